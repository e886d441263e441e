// The listener: reads what has changed, evicts it from both tiers, and keeps or ends their trust.
import { randomUUID } from 'node:crypto'
import { type KeyCache, withinTime } from './cache.ts'
import type { Cursor } from './redis.ts'
import type { Rpc } from './rpc.ts'
import { createLoop, createSubscription, READ_MS } from './wake.ts'

type Reader = Pick<Rpc, 'call'>

export interface ListenerOptions {
  cache: KeyCache<unknown>
  /**
   * Reads the changes, of the primary. Absent: this process follows the heartbeat that others keep in Redis, trusts
   * the Redis tier by it, and has no memory tier.
   */
  rpc?: Reader
  /** Where to LISTEN, any login of the database, not through a transaction pooler. Absent: changes are seen by polling alone. */
  connectionString?: string
  /** Other channels to LISTEN on, over the same connection, and what to call then. */
  channels?: Record<string, () => unknown>
}

export interface ListenerState {
  /** A LISTEN connection is up. */
  listening: boolean
  /** ms since the last complete read was sent; null before the first. */
  age: number | null
  /** Why the last read failed, else why LISTEN is not up. */
  error?: Error
}

export interface Listener {
  /** Resolves after the first read, also if that failed: it goes on trying until `stop`. */
  start(): Promise<void>
  stop(): Promise<void>
  state(): ListenerState
}

interface Changes {
  cursor: Cursor
  keys: string[]
  reset: boolean
}

export function createListener({ cache, rpc, connectionString, channels }: ListenerOptions): Listener {
  const { redis } = cache
  if (!rpc && !redis) throw new TypeError('createListener: without `rpc` the cache needs `redis` to follow')
  let cursor: Cursor | undefined
  let provenAt: number | undefined
  let readError: Error | undefined
  let looks: { beat: number; generation: string; sentAt: number }[] = []

  const changesSince = (since: Cursor | undefined, { call }: Reader) =>
    withinTime(call<Changes>('cache_changes', { cursor: since ?? null }), READ_MS)

  // Redis's own cursor is read first: its next value must come from a read sent after this one was written.
  async function read(source: Reader) {
    const sentAt = performance.now()
    const found = await redis?.covered().catch(() => undefined)
    const base = found?.coverage
    const shares = found && (!cursor || same(cursor, base?.cursor))
    const [theirs, mine] = await Promise.all([
      found && changesSince(base?.cursor, source),
      shares ? undefined : changesSince(cursor, source),
    ])
    const own = (mine ?? theirs)!
    const keys = [...new Set([...own.keys, ...(theirs?.keys ?? [])])]

    // Redis before memory, or memory could be filled again from what is about to go; memory even if Redis failed,
    // since that ended trust in the Redis tier
    const deleted =
      found &&
      (await redis!.del(keys).then(
        () => true,
        () => false,
      ))
    cache.forget(keys)
    if (own.reset || !cursor) {
      cache.forgetAll()
      // not past what Redis has been rid of
      cursor = (theirs ?? own).cursor
    } else {
      cursor = own.cursor
    }
    cache.trust.prove(sentAt)
    provenAt = sentAt
    readError = undefined

    if (!found || !theirs || !deleted) return
    const generation = theirs.reset || !base ? randomUUID() : base.generation
    const now = await redis!
      .advance(found, { cursor: theirs.cursor, generation }, keys.length)
      .catch(() => null)
    // written by us, or by another listener onto the same generation; a third one's generation has to be read first
    if (now?.generation === generation) redis!.prove(sentAt, generation)
    else if (now !== null) loop.wake()
  }

  // Beat n + 1 comes from a read that was sent after beat n was written. So when two more beats have been written
  // since a look of ours, all that was committed before that look is evicted, whatever anybody's clock says.
  async function follow() {
    const sentAt = performance.now()
    const { coverage } = await redis!.covered()
    const last = looks.at(-1)
    if (!coverage || (last && (last.generation !== coverage.generation || last.beat > coverage.beat))) {
      redis!.trust.end()
      looks = []
    }
    if (!coverage) throw new Error('no listener keeps vk:cursor in Redis')
    looks = [...looks.filter((look) => look.beat < coverage.beat), { ...coverage, sentAt }]
    const proof = looks.findLast((look) => look.beat <= coverage.beat - 2)
    if (!proof) return
    redis!.prove(proof.sentAt, proof.generation)
    provenAt = proof.sentAt
    readError = undefined
    looks = looks.slice(looks.indexOf(proof))
  }

  function endTrust() {
    cache.trust.end()
    redis?.trust.end()
  }

  const loop = createLoop(() =>
    (rpc ? read(rpc) : follow()).catch((reason) => {
      readError = reason
      endTrust()
    }),
  )
  const subscription =
    connectionString === undefined
      ? undefined
      : createSubscription({
          connectionString,
          channels: { ...channels, keyledger_cache: loop.wake },
          lost() {
            endTrust()
            loop.wake()
          },
        })

  return {
    async start() {
      subscription?.start()
      await loop.wake()
    },
    async stop() {
      await Promise.all([loop.stop(), subscription?.stop()])
      endTrust()
    },
    state() {
      const { listening = false, error } = subscription?.state() ?? {}
      return {
        listening,
        age: provenAt === undefined ? null : performance.now() - provenAt,
        error: readError ?? error,
      }
    },
  }
}

const same = (a: Cursor, b: Cursor | undefined) => a.cluster === b?.cluster && a.snapshot === b.snapshot
