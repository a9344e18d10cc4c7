/** Numbers that follow from a seed. */
export interface Random {
  /** From `least` to `most`, both included. */
  whole(least: number, most: number): number
  pick<Each>(list: readonly Each[]): Each
}

export function randomOf(seed: number): Random {
  let state = seed | 0
  const next = () => {
    state = (state + 0x6d2b79f5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
  const whole = (least: number, most: number) => least + Math.floor(next() * (most - least + 1))
  return { whole, pick: (list) => list[whole(0, list.length - 1)] as (typeof list)[number] }
}
