// The listener: reads the changes, evicts their keys from both tiers, and keeps or ends the trust
// in the tiers.
import { randomUUID } from 'node:crypto'
import type { KeyCache } from './cache.ts'
import { setServerTime } from './clock.ts'
import { noAnswer } from './errors.ts'
import type { Cursor, RedisTier } from './redis.ts'
import type { Rpc } from './rpc.ts'
import { withinTime } from './time-limits.ts'
import { BEAT_MS } from './trust.ts'
import { createLoop, createSubscription, READ_MS } from './wake.ts'

type Reader = Pick<Rpc, 'call'>

export interface ListenerOptions {
  cache: KeyCache<unknown>
  /** Reads the changes, from the primary. */
  rpc: Reader
  /**
   * Reads no changes. This process follows the heartbeat that other listeners keep in Redis, and
   * trusts the Redis tier by it. The heartbeat must be of the database that `rpc` reaches. It has
   * no memory tier.
   */
  follow?: boolean
  /**
   * Where to LISTEN: any login of the database, not through a transaction pooler. Absent: polling
   * alone sees the changes.
   */
  connectionString?: string
  /** Other channels to LISTEN on over the same connection, and the function to call then. */
  channels?: Record<string, () => unknown>
}

export interface ListenerState {
  /** A LISTEN connection is up. */
  listening: boolean
  /** ms since the last complete read was sent; null before the first. */
  age: number | null
  /** Why the last read failed; else why LISTEN is not up. */
  error?: Error
  /** Which of the two could not be read last. */
  away: { postgres: boolean; redis: boolean }
}

export interface Listener {
  /**
   * Resolves after the first read, even if that failed: the listener goes on trying until `stop`.
   */
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

// So often that a committed change is seen within a second, and that a proof which waits for two
// beats is younger.
const POLL_MS = 300
const LOOK_MS = 100
/**
 * ms for which a follower trusts a proof: the listener that keeps the heartbeat may have died
 * since.
 */
export const FOLLOWER_MS = 1000
// how often a follower asks which database is its own, and how long an answer serves while it can't
// ask
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
    // over a reserved connection: calls that wait for each other must not delay a change; a
    // follower reads no changes
    const reading = rpc.call<Changes>('cache_changes', { cursor: since ?? null }, { reserved: !follow })
    const changes = await withinTime(reading, READ_MS, noAnswer)
    setServerTime(changes.now, sentAt, performance.now())
    return changes
  }

  // Redis's own cursor is read first: its next value must come from a read sent after this one was
  // written.
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

    // Memory goes before Redis, which may take its time. Meanwhile Redis must not fill memory again
    // with an entry that is about to go: no entry of a generation that is over, and none of these
    // keys until they are gone.
    if (theirs) redis!.turn(generation)
    const advanced = theirs && advance(found!, { cursor: theirs.cursor, generation }, keys)
    cache.forget(keys, advanced)
    if (own.reset || !cursor) {
      cache.forgetAll()
      // not past the changes that Redis has been told of
      cursor = (theirs ?? own).cursor
    } else {
      cursor = own.cursor
    }
    cache.trust.prove(sentAt)
    provenAt = sentAt
    readError = undefined
    away.postgres = false

    const now = await advanced
    // we wrote it, or another listener of the same generation did; another generation has to be
    // read first
    if (now?.generation === generation) redis!.prove(sentAt, generation)
    else if (advanced && now !== null) loop.wake()
  }

  // begins when memory has forgotten the keys; null if it failed: the failure has ended trust in
  // the tier
  async function advance(...args: Parameters<RedisTier<unknown>['advance']>) {
    await undefined
    return redis!.advance(...args).catch(() => null)
  }

  // Beat n + 1 comes from a read that was sent after beat n was written. Say that two more beats
  // have been written since a look of ours: then every change committed before that look is
  // evicted. No clock of any host has a say in this.
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

  // The heartbeat must be of our own database: after a failover, or by mistake, another database's
  // listener may keep it.
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
