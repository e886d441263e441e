// A TCP proxy in front of a server: to cut connections, refuse new ones, or let them hang half-open.
import { createServer, connect as dial, type Socket } from 'node:net'

export interface TcpProxy {
  /** The server's url with the proxy's port. */
  url: string
  /** `pass` (at first); `refuse` closes each new connection at once; `hang` reads and passes nothing on. */
  mode: 'pass' | 'refuse' | 'hang'
  /** Connections refused so far. */
  refused: number
  /** Sockets that are open. */
  readonly open: number
  /** Cuts all open connections. */
  cut(): void
  close(): Promise<void>
}

export async function startProxy(serverUrl: string): Promise<TcpProxy> {
  const target = new URL(serverUrl)
  const sockets = new Set<Socket>()
  const add = (socket: Socket) => {
    sockets.add(socket)
    return socket.on('error', () => {}).on('close', () => sockets.delete(socket))
  }
  const server = createServer((near) => {
    add(near)
    if (proxy.mode === 'refuse') {
      proxy.refused++
      near.destroy()
      return
    }
    const far = add(dial(Number(target.port), target.hostname))
    const forward = (from: Socket, to: Socket) =>
      from.on('data', (bytes) => proxy.mode === 'pass' && to.write(bytes)).on('close', () => to.destroy())
    forward(near, far)
    forward(far, near)
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const url = new URL(serverUrl)
  url.port = String((server.address() as { port: number }).port)

  const proxy: TcpProxy = {
    url: url.href,
    mode: 'pass',
    refused: 0,
    get open() {
      return sockets.size
    },
    cut() {
      for (const socket of sockets) socket.destroy()
    },
    close() {
      proxy.cut()
      return new Promise((resolve) => server.close(() => resolve()))
    },
  }
  return proxy
}
