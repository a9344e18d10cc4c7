import type { Socket } from 'node:net'

/**
 * Sends the cancel request of PostgreSQL's protocol, which needs a connection of its own; resolves when the server has closed that,
 * because the signal was sent.
 */
export function sendCancelRequest(socket: Socket, processId: number, secret: number): Promise<void> {
  const packet = Buffer.alloc(16)
  packet.writeInt32BE(16, 0)
  packet.writeInt32BE(80877102, 4)
  packet.writeInt32BE(processId | 0, 8) // drivers read these with a sign or without
  packet.writeInt32BE(secret | 0, 12)
  return new Promise((resolve, reject) => {
    socket.once('error', reject)
    socket.once('close', () => resolve())
    socket.end(packet)
    socket.resume()
  })
}
