// The billing module of the examples, from the environment, and a server that runs with it.
//   POSTGREST_URL, GATEWAY_TOKEN; with them DATABASE_URL to hear of changes at once, and REDIS_URL to share the cache
import type { Server } from 'node:http'
import { Redis } from 'ioredis'
import { createBillingModule, postgrestRpc } from 'keyledger'

const { POSTGREST_URL = '', GATEWAY_TOKEN = '', DATABASE_URL, REDIS_URL, PORT = '8080' } = process.env
const rpc = postgrestRpc({ url: POSTGREST_URL, token: GATEWAY_TOKEN })
const redis = REDIS_URL ? new Redis(REDIS_URL) : undefined

export const billing = createBillingModule({ rpc, redis, listen: DATABASE_URL })

const ongoing = new Set<Promise<unknown>>()

/** Work that may outlast its caller, and still owes a charge: `run` doesn't end before it. */
export function seenThrough<T>(work: Promise<T>): Promise<T> {
  ongoing.add(work)
  const done = () => ongoing.delete(work)
  work.then(done, done)
  return work
}

/** Listens on PORT (8080) of loopback, until SIGTERM or SIGINT: then it ends what it has begun, and delivers what is queued. */
export async function run(server: Server): Promise<void> {
  await billing.start()
  server.listen(Number(PORT), '127.0.0.1', () => console.log('ready'))
  const stop = () =>
    server.close(async () => {
      await Promise.allSettled(ongoing)
      await billing.stop()
      redis?.disconnect()
      await rpc.close()
    })
  process.once('SIGTERM', stop).once('SIGINT', stop)
}
