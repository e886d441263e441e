// The two-tier cache: the hash of a virtual key to what it resolves to, from memory, else Redis, else Postgres.
import type { Cluster, Redis } from 'ioredis'
import { LRUCache } from 'lru-cache'
import { KeyledgerError } from './errors.ts'
import { serverNow } from './ids.ts'
import { createRedisTier, type RedisTier } from './redis.ts'
import { createTrust, type Trust } from './trust.ts'

export interface KeyCacheOptions<Context> {
  /** Reads Postgres, the primary: what the key with this sha-256 (hex) resolves to; undefined if it is known to be unknown. */
  load: (hash: string) => Promise<Context | undefined>
  /** Shared tier, read from masters only; may be absent or down. Commands get 200 ms, whatever the client's own limits. */
  redis?: Redis | Cluster
  /**
   * Signs what is stored in Redis, by HMAC-SHA-256: who may write there, and doesn't know it, can't make a key valid. At least
   * 16 characters, and the same for all processes of one Redis. Several, for rotation: the first signs, all verify. Default: unsigned.
   */
  redisSecret?: string | readonly string[]
  /** Known keys kept in memory, the least recently used go first; unknown ones are kept apart, a tenth of it. Default 100,000. */
  maxEntries?: number
  /** ms a tier answers by itself after the last complete read of the changes was sent. Default 5,000; keep it above 1,000. */
  maxStaleness?: number
  /** ms a known key is still answered, as `stale`, once nothing is trusted and Postgres can't be read. Default 300,000. */
  staleIfError?: number
  /** False for a process that reads no changes: nothing is evicted from its memory, so it keeps none. Default true. */
  remembers?: boolean
  /**
   * Does this error of `load` say that Postgres is away, after `waited` ms in which no read of the changes was answered? A
   * busy pool is no reason for a stale answer. Default: any does.
   */
  isAway?: (error: unknown, waited: number) => boolean
}

/** From where an answer came; `stale` is one that may be out of date, given because Postgres could not be read. */
export type Tier = 'memory' | 'redis' | 'database' | 'stale'

/** `context` is frozen and shared between callers; undefined: there is no such key. */
export interface Answer<Context> {
  context?: Context
  tier: Tier
}

export interface KeyCache<Context> {
  /** Rejects with what `load` threw if nothing better is known; a failure is never an unknown key. */
  get(hash: string): Promise<Answer<Context>>
  /**
   * Drops these keys (`vk:<hash>`) from memory, and the flights that might bring them back. Until `gone` is settled Redis may
   * still have them, and isn't asked for them.
   */
  forget(keys: string[], gone?: Promise<unknown>): void
  forgetAll(): void
  /** Of the memory tier. */
  trust: Trust
  redis?: RedisTier<Context>
  /** Answers given so far by tier, and the entries in memory. */
  stats(): Record<Tier, number> & { entries: number }
  /** Leaves the Redis client to its owner. */
  close(): void
}

interface Entry<Context> {
  context?: Context
  /** After it, by either clock, the entry is not even stale: the monotonic one stands still with a suspended machine. */
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

/**
 * Nothing in it is trusted until a listener proves it. Then an entry is right because every change deletes it, and
 * because a reader stores only what no change has overtaken: in Redis by a lease, in memory by its flight.
 */
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
  // of which Redis is being rid
  const leaving = new Set<Set<string>>()
  const given = { memory: 0, redis: 0, database: 0, stale: 0 }

  // ms from now, by the server's clock; it may be a year that JavaScript can't read, 10000 and later
  function lifetime(context: Context | undefined): number {
    if (!context) return UNKNOWN_MS
    if (!context.valid_until) return KNOWN_MS
    const left = Date.parse(context.valid_until) - serverNow()
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

  // only while this flight is the key's: an eviction has taken the place of one it overtook
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
    if (!shared?.trust.holds()) return fromPostgres(key, hash, flight)
    // as if it were gone: who can take the lease of nothing comes after the delete
    if (isLeaving(key)) return fromPostgres(key, hash, flight, null)
    return shared.get(key).then(
      (raw) => {
        // asked after the answer: ioredis may have sent the command again, to a Redis that came back older
        const entry = shared.trust.holds() ? shared.open(key, raw) : undefined
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
        context = await withinTime(reading, maxStaleness)
      } catch (error) {
        // Postgres is there if it has answered a read of the changes meanwhile
        const away = trust.provenAt() < askedAt && isAway(error, performance.now() - askedAt)
        const stale = away ? await lastKnown(key) : undefined
        if (stale) return land(key, flight, 'stale', stale)
        // failed, and says why; or slow, and nothing better is known
        context = await reading
      }
      // a duration counts from when it was asked for: no clock but Postgres's has a say
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

  // known to be right within staleIfError: by the proof that passed over it, or because it was read then
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
      const trusted = trust.holds()
      const entry = trusted ? remembered(key) : undefined
      if (entry) {
        given.memory++
        return Promise.resolve({ context: entry.context, tier: 'memory' })
      }
      let flight = flights.get(key)
      // without trust nobody ends a flight that a change has overtaken
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

/** Rejects with 504 `timeout` if there is no answer within `ms`; the work itself goes on, unseen. */
export function withinTime<T>(work: Promise<T>, ms: number): Promise<T> {
  return new Promise((resolve, reject) => {
    const late = () =>
      new KeyledgerError('timeout', 504, { detail: `no answer from Postgres within ${ms} ms` })
    const timer = setTimeout(() => reject(late()), ms)
    work.then(resolve, reject).finally(() => clearTimeout(timer))
  })
}
