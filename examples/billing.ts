// The billing module of the examples, from the environment, and a server that runs with it.
//   POSTGREST_URL, GATEWAY_TOKEN; with them DATABASE_URL to hear of changes at once, and REDIS_URL to share the cache
import type { Server } from 'node:http'
import { Redis } from 'ioredis'
import { createBillingModule, postgrestRpc } from 'keyledger'

const { POSTGREST_URL = '', GATEWAY_TOKEN = '', DATABASE_URL, REDIS_URL, PORT = '8080' } = process.env
export const rpc = postgrestRpc({ url: POSTGREST_URL, token: GATEWAY_TOKEN })
const redis = REDIS_URL ? new Redis(REDIS_URL) : undefined

// ms of a stop, less than the 30 s until a container is killed: for callers, for work that outlasts
// them, and for the queue; the module ends within 2 s more
const CALLERS = Number(process.env.STOP_WAIT ?? 8_000)
const OUTLASTING = 6_000
const QUEUED = 12_000

const changes = DATABASE_URL ? { listen: DATABASE_URL } : 'poll'

export const billing = createBillingModule({ rpc, redis, changes, stopDeadline: QUEUED })

const ongoing = new Set<Promise<unknown>>()

/** Work that may outlast its caller, and still owes a charge: `run` doesn't end before it. */
export function seenThrough<T>(work: Promise<T>): Promise<T> {
  ongoing.add(work)
  const done = () => ongoing.delete(work)
  work.then(done, done)
  return work
}

/**
 * Listens on PORT (8080) of loopback, until SIGTERM or SIGINT. Then it finishes its open requests,
 * and delivers the queues. Callers have STOP_WAIT ms (8,000) for it; all of it takes 28 s at most.
 */
export async function run(server: Server): Promise<void> {
  await billing.start()
  server.listen(Number(PORT), '127.0.0.1', () => console.log('ready'))
  async function stop() {
    const closed = new Promise((resolve) => server.close(resolve))
    // a caller may have stopped reading
    await within(CALLERS, closed)
    server.closeAllConnections()
    await within(OUTLASTING, outlasting(closed))
    await billing.stop()
    redis?.disconnect()
    await rpc.close()
  }
  async function outlasting(closed: Promise<unknown>) {
    await closed
    await Promise.allSettled(ongoing)
  }
  process.once('SIGTERM', stop).once('SIGINT', stop)
}

async function within(ms: number, work: Promise<unknown>): Promise<void> {
  let timer: NodeJS.Timeout | undefined
  const enough = new Promise((resolve) => {
    timer = setTimeout(resolve, ms)
  })
  await Promise.race([work, enough])
  clearTimeout(timer)
}
