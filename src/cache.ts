// The two-tier cache: finds the context of a key's hash in memory, else Redis, else Postgres.
//
// It answers by itself only while it is complete: every committed change must have evicted its
// keys.
//
// Trust (trust.ts): a listener reads the changes and evicts their keys, three times a second. Each
// read proves a tier complete up to the moment it was sent. A tier is live while its last proof is
// younger than `maxStaleness`. A lost connection or a failed read ends trust until the next proof.
//
// Flight: callers that miss the same key share one flight to Redis and Postgres. An eviction
// removes the flight from the map. It still answers its callers: they asked before. It stores
// nothing.
//
// Lease: Redis has many writers. A reader that misses there puts a random token under the key, and
// reads Postgres. It stores its entry only over that token. An eviction deletes the token, so an
// overtaken reader stores nothing. A second reader sees the lease, and stores nothing either.
//
// Generation: each entry in Redis names the generation it was read in. If nobody knows which
// changes Redis missed (a first start, a failover), the listener begins a new one: older entries
// are dead.
import { LRUCache } from 'lru-cache'
import { serverNowAtLatest } from './clock.ts'
import { noAnswer } from './errors.ts'
import { createRedisTier, type RedisTier } from './redis.ts'
import type { RedisClient } from './redis-client.ts'
import { withinTime } from './time-limits.ts'
import { createTrust, type Trust } from './trust.ts'

export interface KeyCacheOptions<Context> {
  /**
   * Reads the context of the key with this sha-256 (hex) from Postgres, the primary; undefined if
   * there is no such key.
   */
  load: (hash: string) => Promise<Context | undefined>
  /**
   * Shared tier, read from masters only; may be absent or down. Commands get 200 ms, whatever the
   * client's own limits.
   */
  redis?: RedisClient | undefined
  /**
   * Signs each value in Redis, by HMAC-SHA-256: a stranger who may write to Redis still can't make
   * a key valid. At least 16 characters, and the same for all processes of one Redis. Several, for
   * rotation: the first signs, all verify. Default: unsigned.
   */
  redisSecret?: string | readonly string[] | undefined
  /**
   * Known keys kept in memory; the least recently used go first. Unknown keys are kept apart, a
   * tenth as many. Default 100,000.
   */
  maxEntries?: number | undefined
  /**
   * ms a tier answers by itself after the last complete read of the changes was sent. Default
   * 5,000; keep it above 1,000.
   */
  maxStaleness?: number | undefined
  /**
   * ms a known key is still answered, as `stale`, once nothing is trusted and Postgres can't be
   * read. Default 300,000.
   */
  staleIfError?: number | undefined
  /**
   * False for a process that reads no changes: nobody evicts from its memory, so it keeps none.
   * Default true.
   */
  remembers?: boolean
  /**
   * Does this error of `load` say that Postgres is away, after `waited` ms in which no read of the
   * changes was answered? A busy pool is no reason for a stale answer. Default: every error does.
   */
  isAway?: (error: unknown, waited: number) => boolean
}

/**
 * The source of an answer. A `stale` answer may be out of date; it is given because Postgres could
 * not be read.
 */
export type Tier = 'memory' | 'redis' | 'database' | 'stale'

/** `context` is frozen and shared between callers; undefined: there is no such key. */
export interface Answer<Context> {
  context?: Context
  tier: Tier
}

export interface KeyCache<Context> {
  /**
   * Rejects with the error of `load` if nothing better is known; a failure is never an unknown key.
   */
  get(hash: string): Promise<Answer<Context>>
  /**
   * Drops these keys (`vk:<hash>`) from memory, and the flights that might bring them back. Redis
   * may still have them until `gone` is settled, and isn't asked for them until then.
   */
  forget(keys: string[], gone?: Promise<unknown>): void
  forgetAll(): void
  /** The trust of the memory tier. */
  trust: Trust
  redis?: RedisTier<Context>
  /** Answers given so far by tier, and the entries in memory. */
  stats(): Record<Tier, number> & { entries: number }
  /** Leaves the Redis client to its owner. */
  close(): void
}

interface Entry<Context> {
  context?: Context
  /**
   * After it, by either clock, the entry is not even stale: the monotonic one stands still with a
   * suspended machine.
   */
  until: number
  untilWall: number
  /** Monotonic clock. */
  storedAt: number
}

interface Flight<Context> {
  answer: Promise<Answer<Context>>
  startedAt: number
  callers: number
}

const KNOWN_MS = 24 * 3600 * 1000
const UNKNOWN_MS = 60 * 1000
export const STALE_IF_ERROR_MS = 300_000
const JOINABLE_MS = 1000

/** Nothing in it is trusted until a listener proves it: see the head of this file. */
export function createKeyCache<Context extends { valid_until: string | null; valid_for_ms?: number | null }>({
  load,
  redis,
  redisSecret = [],
  maxEntries = 100_000,
  maxStaleness = 5000,
  staleIfError = STALE_IF_ERROR_MS,
  remembers = true,
  isAway = () => true,
}: KeyCacheOptions<Context>): KeyCache<Context> {
  const trust = createTrust(maxStaleness)
  const secrets = typeof redisSecret === 'string' ? [redisSecret] : redisSecret
  const shared = redis && createRedisTier<Context>(redis, { maxStaleness, secrets })
  const known = new LRUCache<string, Entry<Context>>({ max: maxEntries })
  // apart, so that a flood of made-up keys can't drive out real ones
  const unknown = new LRUCache<string, Entry<Context>>({ max: Math.ceil(maxEntries / 10) })
  const flights = new Map<string, Flight<Context>>()
  // keys that Redis is about to lose
  const leaving = new Set<Set<string>>()
  const given = { memory: 0, redis: 0, database: 0, stale: 0 }

  // ms from now that are surely left by the server's clock; JavaScript can't read the year 10000 and later
  function lifetime(context: Context | undefined): number {
    if (!context) return UNKNOWN_MS
    if (!context.valid_until) return KNOWN_MS
    const left = Date.parse(context.valid_until) - serverNowAtLatest()
    return Number.isNaN(left) ? KNOWN_MS : Math.min(KNOWN_MS, left)
  }

  function remembered(key: string): Entry<Context> | undefined {
    const entry = known.get(key) ?? unknown.get(key)
    return entry && performance.now() < entry.until && Date.now() < entry.untilWall ? entry : undefined
  }

  const isLeaving = (key: string) => {
    for (const keys of leaving) if (keys.has(key)) return true
    return false
  }

  function forget(key: string) {
    known.delete(key)
    unknown.delete(key)
    flights.delete(key)
  }

  // only while this flight is the key's: an eviction removes each flight that it overtakes
  function remember(key: string, flight: Flight<Context>, context: Context | undefined, left: number) {
    if (!remembers || flights.get(key) !== flight) return
    if (context) unknown.delete(key)
    else known.delete(key)
    const storedAt = performance.now()
    const entry = { context, until: storedAt + left, untilWall: Date.now() + left, storedAt }
    ;(context ? known : unknown).set(key, entry)
  }

  function land(key: string, flight: Flight<Context>, tier: Tier, context?: Context): Answer<Context> {
    if (flights.get(key) === flight) flights.delete(key)
    given[tier] += flight.callers
    return { context, tier }
  }

  // then() rather than await: a hit in Redis passes through here as often as not
  function resolve(key: string, hash: string, flight: Flight<Context>): Promise<Answer<Context>> {
    if (!shared?.trust.live()) return fromPostgres(key, hash, flight)
    // as if the entry were gone: a lease that replaces nothing can only be taken after the delete
    if (isLeaving(key)) return fromPostgres(key, hash, flight, null)
    return shared.get(key).then(
      (raw) => {
        // asked after the answer: ioredis may have sent the command again, to a Redis that came
        // back older
        const entry = shared.trust.live() ? shared.open(key, raw) : undefined
        const left = entry ? lifetime(entry.context) : 0
        if (!entry || left <= 0) return fromPostgres(key, hash, flight, raw)
        remember(key, flight, freeze(entry.context), left)
        return land(key, flight, 'redis', entry.context)
      },
      () => fromPostgres(key, hash, flight),
    )
  }

  async function fromPostgres(key: string, hash: string, flight: Flight<Context>, raw?: string | null) {
    try {
      // undefined: the tier is away, or another reader has the lease
      const lease = raw === undefined ? undefined : await shared!.lease(key, raw).catch(() => undefined)
      const askedAt = performance.now()
      const reading = load(hash)
      let context: Context | undefined
      try {
        context = await withinTime(reading, maxStaleness, noAnswer)
      } catch (error) {
        // Postgres is not away if it has answered a read of the changes meanwhile
        const away = trust.provenAt() < askedAt && isAway(error, performance.now() - askedAt)
        const stale = away ? await lastKnown(key) : undefined
        if (stale) return land(key, flight, 'stale', stale)
        // it failed, and says why; or it is slow, and we know nothing better
        context = await reading
      }
      // a duration counts from the moment of the question: then only Postgres's clock matters
      const duration = context?.valid_for_ms
      const left =
        typeof duration === 'number'
          ? Math.min(KNOWN_MS, duration - (performance.now() - askedAt))
          : lifetime(context)
      remember(key, flight, freeze(context), left)
      const ttl = Math.floor(left)
      if (lease && ttl > 0) shared!.store(lease, context, ttl).catch(() => {})
      return land(key, flight, 'database', context)
    } catch (error) {
      if (flights.get(key) === flight) flights.delete(key)
      throw error
    }
  }

  // right within the last `staleIfError` ms: a proof passed over it then, or it was read then
  async function lastKnown(key: string): Promise<Context | undefined> {
    const since = performance.now() - staleIfError
    const entry = remembered(key)
    if (entry && Math.max(entry.storedAt, trust.provenAt()) >= since) return entry.context
    if (!shared || shared.trust.provenAt() < since || isLeaving(key)) return undefined
    const raw = await shared.get(key).catch(() => null)
    const found = shared.open(key, raw)
    return found && lifetime(found.context) > 0 ? freeze(found.context) : undefined
  }

  return {
    get(hash) {
      const key = `vk:${hash}`
      const trusted = trust.live()
      const entry = trusted ? remembered(key) : undefined
      if (entry) {
        given.memory++
        return Promise.resolve({ context: entry.context, tier: 'memory' })
      }
      let flight = flights.get(key)
      // without trust, nobody removes a flight that a change has overtaken
      if (!flight || (!trusted && performance.now() - flight.startedAt >= JOINABLE_MS)) {
        flight = { startedAt: performance.now(), callers: 0 } as Flight<Context>
        flights.set(key, flight)
        flight.answer = resolve(key, hash, flight)
      }
      flight.callers++
      return flight.answer
    },

    forget(keys, gone) {
      keys.forEach(forget)
      if (!gone || keys.length === 0) return
      const these = new Set(keys)
      leaving.add(these)
      const done = () => leaving.delete(these)
      gone.then(done, done)
    },

    forgetAll() {
      known.clear()
      unknown.clear()
      flights.clear()
    },

    trust,
    redis: shared,
    stats: () => ({ ...given, entries: known.size + unknown.size }),
    close: () => shared?.close(),
  }
}

function freeze<T extends object | undefined>(context: T): T {
  for (const value of Object.values(context ?? {})) if (Array.isArray(value)) Object.freeze(value)
  return Object.freeze(context)
}
