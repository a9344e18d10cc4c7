/** Keeps the CPU busy for `delay` ms. */
export function spin(delay: number): void {
  const end = performance.now() + delay
  while (performance.now() < end);
}
