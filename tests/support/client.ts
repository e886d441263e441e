// The cache and the listener of one client process on real servers, in this process or in one of
// its own.
import { type ChildProcess, fork } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { Redis } from 'ioredis'
import { until } from '../../scripts/supervise.ts'
import { createKeyCache, type Tier } from '../../src/cache.ts'
import { createListener } from '../../src/listener.ts'
import type { Rpc } from '../../src/rpc.ts'
import { pgRpc } from '../../src/rpc-pg.ts'

export interface ClientOptions {
  /** The login role's url. */
  url: string
  redisUrl?: string
  /** Hears of changes by LISTEN, by polling, by following the heartbeat in Redis, or not at all. */
  by: 'listen' | 'poll' | 'follow' | 'nothing'
  /** Where to LISTEN if not at `url`. */
  listenUrl?: string
  maxStaleness?: number
}

/** Called after a read of Postgres, before its answer is used; for clients of this process. */
export type Between = (fn: string, answer: unknown) => Promise<void>

export interface Seen {
  accepted: boolean
  /** Why not. */
  code: string | null
  tier: Tier
}

interface Context {
  code: string | null
  valid_until: string | null
}

export async function startClient(
  { url, redisUrl, by, listenUrl = url, maxStaleness }: ClientOptions,
  between?: Between,
) {
  const rpc = pgRpc({ connectionString: url, role: 'keyledger_gateway' })
  const source: Pick<Rpc, 'call'> = {
    async call<T>(fn: string, args: Record<string, unknown> = {}, options = {}) {
      const answer = await rpc.call<T>(fn, args, options)
      await between?.(fn, answer)
      return answer
    },
  }
  const redis = redisUrl ? new Redis(redisUrl, { retryStrategy: () => 50 }).on('error', () => {}) : undefined
  const cache = createKeyCache<Context>({
    redis,
    maxStaleness,
    load: (key_hash) =>
      source.call<Context>('resolve_virtual_key', { key_hash }).catch((error) => {
        if (error.code === 'virtual_key_unknown') return undefined
        throw error
      }),
  })
  if (redis) await until(() => redis.status === 'ready', 'redis')
  const listener =
    by === 'nothing'
      ? undefined
      : createListener({
          cache,
          rpc: source,
          follow: by === 'follow',
          connectionString: by === 'listen' ? listenUrl : undefined,
        })
  await listener?.start()
  if (by === 'listen') await until(() => listener!.state().listening, 'LISTEN')
  return {
    cache,
    listener: listener!,
    redis: redis!,
    async validate(hash: string): Promise<Seen> {
      const { context, tier } = await cache.get(hash)
      const code = context ? context.code : 'virtual_key_unknown'
      return { accepted: code === null, code, tier }
    },
    async stop() {
      await listener?.stop()
      cache.close()
      redis?.disconnect()
      await rpc.close()
    },
  }
}

export type Client = Awaited<ReturnType<typeof startClient>>

/** A client in a process of its own; ends with this one. */
export async function forkClient(options: ClientOptions) {
  const child: ChildProcess = fork(fileURLToPath(import.meta.url), [JSON.stringify(options)])
  const waiting = new Map<number, { resolve(seen: Seen): void; reject(error: Error): void }>()
  let last = 0
  await new Promise<void>((resolve, reject) => {
    child.once('message', () => resolve()).once('exit', () => reject(new Error('the client did not start')))
  })
  child.on('message', ({ id, seen, error }: { id: number; seen: Seen; error?: string }) => {
    if (error) waiting.get(id)!.reject(new Error(error))
    else waiting.get(id)!.resolve(seen)
    waiting.delete(id)
  })
  return {
    name: `${options.by}${options.redisUrl ? '' : ', without Redis'}`,
    pid: child.pid!,
    validate: (hash: string) =>
      new Promise<Seen>((resolve, reject) => {
        waiting.set(++last, { resolve, reject })
        child.send({ id: last, hash })
      }),
    async stop() {
      const gone = new Promise((resolve) => child.once('exit', resolve))
      child.disconnect()
      await gone
    },
  }
}

export type ForkedClient = Awaited<ReturnType<typeof forkClient>>

if (process.send && process.argv[1] === fileURLToPath(import.meta.url)) {
  const client = await startClient(JSON.parse(process.argv[2]!))
  process.on('message', async ({ id, hash }: { id: number; hash: string }) => {
    const answer = await client.validate(hash).then(
      (seen) => ({ id, seen }),
      (error) => ({ id, error: String(error) }),
    )
    process.send!(answer)
  })
  process.on('disconnect', async () => {
    await client.stop()
    process.exit()
  })
  process.send('ready')
}
