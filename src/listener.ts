// The listener: reads what has changed, evicts it from both tiers, and keeps or ends their trust.
import { randomUUID } from 'node:crypto'
import { type KeyCache, withinTime } from './cache.ts'
import { setServerTime } from './ids.ts'
import type { Cursor, RedisTier } from './redis.ts'
import type { Rpc } from './rpc.ts'
import { BEAT_MS } from './trust.ts'
import { createLoop, createSubscription, READ_MS } from './wake.ts'

type Reader = Pick<Rpc, 'call'>

export interface ListenerOptions {
  cache: KeyCache<unknown>
  /** Reads the changes, of the primary. */
  rpc: Reader
  /**
   * Reads none: this process follows the heartbeat that others keep in Redis, trusts the Redis tier by it as long as it is
   * of the database that `rpc` reaches, and has no memory tier.
   */
  follow?: boolean
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
  /** Which could not be read last. */
  away: { postgres: boolean; redis: boolean }
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
  now: number
}

// So often that what has committed is seen within a second, and that a proof which waits for two beats is younger.
const POLL_MS = 300
const LOOK_MS = 100
/** ms for which a follower trusts a proof: who keeps the heartbeat may have died since. */
export const FOLLOWER_MS = 1000
// how often a follower asks which database is its own, and for how long an answer serves while it can't
const IDENTIFY_MS = 1000
const IDENTITY_MS = 5000

export function createListener({
  cache,
  rpc,
  follow,
  connectionString,
  channels,
}: ListenerOptions): Listener {
  const { redis } = cache
  if (follow && !redis) throw new TypeError('createListener: `follow` needs a cache with `redis`')
  if (follow) redis!.trust.shorten(FOLLOWER_MS)
  let cursor: Cursor | undefined
  let provenAt: number | undefined
  let readError: Error | undefined
  let looks: { beat: number; generation: string; sentAt: number }[] = []
  let identity: { cluster: string; askedAt: number } | undefined
  let asking: Promise<void> | undefined
  let askedAt = -Infinity
  const away = { postgres: false, redis: false }

  async function changesSince(since: Cursor | undefined): Promise<Changes> {
    const sentAt = performance.now()
    // over a connection of its own: calls that wait for each other must not keep a change waiting; a follower reads none
    const reading = rpc.call<Changes>('cache_changes', { cursor: since ?? null }, { reserved: !follow })
    const changes = await withinTime(reading, READ_MS)
    setServerTime(changes.now, sentAt, performance.now())
    return changes
  }

  // Redis's own cursor is read first: its next value must come from a read sent after this one was written.
  async function read() {
    const sentAt = performance.now()
    const found = await redis?.covered().catch(() => undefined)
    const base = found?.coverage
    const shares = found && (!cursor || same(cursor, base?.cursor))
    const [theirs, mine] = await Promise.all([
      found && changesSince(base?.cursor),
      shares ? undefined : changesSince(cursor),
    ])
    const own = (mine ?? theirs)!
    const keys = [...new Set([...own.keys, ...(theirs?.keys ?? [])])]
    const generation = theirs?.reset || !base ? randomUUID() : base.generation

    // Memory before Redis, which may take its time. Memory is not filled again from there with what is about to go: not
    // from a generation that is over, nor with these keys until they are gone.
    if (theirs) redis!.turn(generation)
    const advanced = theirs && advance(found!, { cursor: theirs.cursor, generation }, keys)
    cache.forget(keys, advanced)
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
    away.postgres = false

    const now = await advanced
    // written by us, or by another listener onto the same generation; a third one's generation has to be read first
    if (now?.generation === generation) redis!.prove(sentAt, generation)
    else if (advanced && now !== null) loop.wake()
  }

  // begins when memory has forgotten; null if it failed, which has ended trust in the tier
  async function advance(...args: Parameters<RedisTier<unknown>['advance']>) {
    await undefined
    return redis!.advance(...args).catch(() => null)
  }

  // Beat n + 1 comes from a read that was sent after beat n was written. So when two more beats have been written
  // since a look of ours, all that was committed before that look is evicted, whatever anybody's clock says.
  async function look() {
    const sentAt = performance.now()
    refreshIdentity()
    const { coverage } = await redis!.covered().catch((error) => {
      away.redis = true
      throw error
    })
    away.redis = false
    const last = looks.at(-1)
    if (!coverage || (last && (last.generation !== coverage.generation || last.beat > coverage.beat)))
      forgetLooks()
    if (!coverage) throw new Error('no listener keeps vk:cursor in Redis')
    await identify(coverage.cursor.cluster)
    looks = [...looks.filter((look) => look.beat < coverage.beat), { ...coverage, sentAt }]
    const proof = looks.findLast((look) => look.beat <= coverage.beat - 2)
    if (!proof) return
    redis!.prove(proof.sentAt, proof.generation)
    provenAt = proof.sentAt
    readError = undefined
    looks = looks.slice(looks.indexOf(proof))
  }

  function forgetLooks() {
    redis!.trust.end()
    looks = []
  }

  // The heartbeat must be of our own database: after a failover, or by mistake, a listener of another may keep it.
  async function identify(cluster: string) {
    const isOurs = () => identity?.cluster === cluster && performance.now() - identity.askedAt < IDENTITY_MS
    if (!isOurs()) await asking
    if (isOurs()) return
    forgetLooks()
    throw new Error('vk:cursor in Redis is kept by a listener of another database')
  }

  function refreshIdentity() {
    if (performance.now() - askedAt < IDENTIFY_MS) return
    askedAt = performance.now()
    asking ??= askIdentity().finally(() => {
      asking = undefined
    })
  }

  async function askIdentity() {
    const sentAt = performance.now()
    const changes = await changesSince(undefined).catch(() => undefined)
    away.postgres = !changes
    if (changes) identity = { cluster: changes.cursor.cluster, askedAt: sentAt }
  }

  function endTrust() {
    cache.trust.end()
    redis?.trust.end()
  }

  function beat() {
    cache.trust.beat()
    redis?.trust.beat()
  }

  const loop = createLoop(
    () => {
      beat()
      return (follow ? look() : read()).catch((reason) => {
        readError = reason
        if (!follow) away.postgres = true
        endTrust()
      })
    },
    follow ? LOOK_MS : POLL_MS,
  )
  let beating: NodeJS.Timeout | undefined
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
      beating = setInterval(beat, BEAT_MS).unref()
      subscription?.start()
      await loop.wake()
    },
    async stop() {
      await Promise.all([loop.stop(), subscription?.stop()])
      clearInterval(beating)
      endTrust()
    },
    state() {
      const { listening = false, error } = subscription?.state() ?? {}
      return {
        listening,
        age: provenAt === undefined ? null : performance.now() - provenAt,
        error: readError ?? error,
        away: { ...away },
      }
    },
  }
}

const same = (a: Cursor, b: Cursor | undefined) => a.cluster === b?.cluster && a.snapshot === b.snapshot
