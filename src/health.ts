// Health: one report of the module from the state of its parts, and the status that a health check
// answers.
import type { KeyCache, Tier } from './cache.ts'
import type { Queues } from './charging.ts'
import { codeOf } from './errors.ts'
import type { ListenerState } from './listener.ts'
import type { NewsState } from './news.ts'

export interface Health {
  /**
   * `ok`. `degraded`: at work, but a part needs a look: a tier is not trusted, or LISTEN or Redis
   * is away. Or the last call of the look-ups, a queue, the news or the upkeep failed. `down`: not
   * started, or stopped; or Postgres can't be read, and every known key is too old (`staleIfError`)
   * to be answered.
   */
  status: 'ok' | 'degraded' | 'down'
  /**
   * The status for a health check: 503 if `down`, so that a load balancer sends requests elsewhere;
   * else 200.
   */
  http_status: 200 | 503
  /** Keys are answered as they were before Postgres went away. */
  stale: boolean
  /** `error`: why the last look-up of keys in Postgres failed, if that was within 30 s. */
  cache: {
    memory: boolean
    redis: boolean | null
    entries: number
    answers: Record<Tier, number>
    error: string | null
  }
  /**
   * `listening` is null for a module that doesn't LISTEN. An `age` is the ms since the last
   * complete read was sent.
   */
  listener: { listening: boolean | null; age: number | null; error: string | null }
  /** The news of accounts; nulls while nobody listens to it. */
  news: { age: number | null; error: string | null }
  queues: Queues
  /** The hourly upkeep of the database. */
  maintenance: { at: string | null; error: string | null }
}

export interface HealthParts {
  cache: KeyCache<unknown>
  listener: ListenerState
  news: NewsState
  queues: Queues
  maintenance: Health['maintenance']
  /** Why keys could not be looked up in Postgres last. */
  lookUpError: string | null
  isStarted: boolean
  /** How the module sees changes. */
  mode: 'poll' | 'listen' | 'follow'
  /** The last answer that was not from memory was stale. */
  servedStale: boolean
  staleIfError: number
}

export function healthOf(parts: HealthParts): Health {
  const { cache, listener, news, queues, maintenance, lookUpError, isStarted, mode, servedStale } = parts
  const { entries, ...answers } = cache.stats()
  const memory = cache.trust.live()
  const redis = cache.redis?.trust.live() ?? null
  const trusted = memory || redis === true
  const reasons = [listener.error, lookUpError, news.error, maintenance.error]
  const failing = [...reasons, ...Object.values(queues).map(({ error }) => error)]
  const well = trusted && redis !== false && failing.every((reason) => !reason)
  const status = !isStarted || !(trusted || knowsEnough(parts)) ? 'down' : well ? 'ok' : 'degraded'
  return {
    status,
    http_status: status === 'down' ? 503 : 200,
    stale: servedStale && !trusted,
    cache: { memory, redis, entries, answers, error: lookUpError },
    listener: {
      listening: mode === 'listen' ? listener.listening : null,
      age: listener.age,
      error: listener.error ? codeOf(listener.error) : null,
    },
    news: { age: news.age, error: news.error ? codeOf(news.error) : null },
    queues,
    maintenance: { ...maintenance },
  }
}

// Postgres answers, or the last complete read is young enough to answer by; a follower keeps its
// entries in Redis alone
function knowsEnough({ listener: { age, away }, mode, staleIfError }: HealthParts): boolean {
  const isYoung = age !== null && age <= staleIfError
  return !away.postgres || (isYoung && !(mode === 'follow' && away.redis))
}
