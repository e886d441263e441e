// The billing module: the cache, its listener and the charging lanes put together into what a gateway calls.
import { createHash } from 'node:crypto'
import type { Cluster, Redis } from 'ioredis'
import { createBatcher } from './batch.ts'
import { type Answer, createKeyCache, type KeyCacheOptions, STALE_IF_ERROR_MS, type Tier } from './cache.ts'
import { type Charging, type ChargingOptions, createCharging, type Queues } from './charging.ts'
import { codeOf, isAway, KeyledgerError, keyStatus, mayBeAway } from './errors.ts'
import { createListener } from './listener.ts'
import { createMetrics } from './metrics.ts'
import {
  type Authentication,
  createAuthenticate,
  createMiddleware,
  type Middleware,
  type RequestHeaders,
} from './middleware.ts'
import { createNews, type NewsKind, type NewsListener } from './news.ts'
import { createNodes } from './nodes.ts'
import { refuseReplicas } from './redis.ts'
import { jsonText } from './rpc.ts'
import type { Balance, BudgetAnswer, ConfigNode, KeyContext, UnknownKey, UserContext } from './types.ts'

/** `rpc` reaches Postgres, the primary, as keyledger_gateway: `postgrestRpc(…)` or `pgRpc(…)`. It stays yours to close. */
export interface BillingModuleOptions
  extends ChargingOptions,
    Pick<KeyCacheOptions<KeyContext>, 'maxEntries' | 'maxStaleness' | 'staleIfError' | 'redisSecret'> {
  /**
   * Shared tier of the cache. Stays yours to close. Default: memory alone. From masters only: `scaleReads`, `readOnly` and
   * the like are refused. A client whose Redis has answered nothing for 3 s is made to connect again.
   */
  redis?: Redis | Cluster
  /**
   * Connection string to LISTEN by, of any login, not through a transaction pooler. Default: changes are seen by
   * polling three times a second. `false`: neither; Redis is trusted as long as another process's listener keeps it up.
   */
  listen?: string | false
  /**
   * ms that `stop` takes at most to deliver what is queued. Usage that isn't delivered by then is rejected with `timeout`,
   * so that its caller can log it. Default 20,000: with what else a process does to end, less than Kubernetes' 30 s.
   */
  stopDeadline?: number
}

export interface Health {
  /**
   * `ok`; `degraded`: at work, but something below needs a look (a tier that is not trusted, LISTEN or Redis away, the
   * look-ups, a queue, the news or the upkeep whose last call failed); `down`: not started or stopped, or Postgres can't be read
   * and what is known has grown too old (`staleIfError`) to answer any key by.
   */
  status: 'ok' | 'degraded' | 'down'
  /** What to answer a health check with: 503 if `down`, so that a load balancer sends requests elsewhere; else 200. */
  http_status: 200 | 503
  /** Keys are answered as they were before Postgres went away. */
  stale: boolean
  /** `error`: why keys could not be looked up in Postgres last, within 30 s. */
  cache: {
    memory: boolean
    redis: boolean | null
    entries: number
    answers: Record<Tier, number>
    error: string | null
  }
  /** `listening` is null for a module that doesn't LISTEN; ages are ms since the last complete read was sent. */
  listener: { listening: boolean | null; age: number | null; error: string | null }
  /** Of the news of accounts; nulls while nobody listens to it. */
  news: { age: number | null; error: string | null }
  queues: Queues
  /** The hourly upkeep of the database. */
  maintenance: { at: string | null; error: string | null }
}

/** All methods reject with `KeyledgerError`; 503 `unavailable` and 504 `timeout` are possible everywhere. */
export interface BillingModule extends Charging {
  /**
   * Who makes the request, and who pays. 401 `virtual_key_unknown`, `virtual_key_disabled`, `virtual_key_expired`;
   * 403 `user_suspended`, `tenant_suspended`. Any failure to find out is 503 `unavailable`, never a refusal.
   */
  validate(virtualKey: string): Promise<UserContext>
  /**
   * `validate` for a request: the key is the first found of `x-virtualkey`, a bearer token, `x-api-key` and `api-key`. A
   * refusal is the whole answer, 401, 403 or 503, in the shape of OpenAI's errors. Never rejects. It sees no method: answer
   * a browser's OPTIONS before you ask.
   */
  authenticate(headers: RequestHeaders): Promise<Authentication>
  /** `authenticate`, Connect-style: sets `req.userContext`, or answers by itself; OPTIONS without a key is 204. */
  middleware(): Middleware
  /**
   * The active nodes mounted on the key, by name: what a gateway calls. Not a read each time: a change of a node is seen
   * within 5 s, a new mount as soon as `validate` sees it.
   */
  nodes(context: Pick<UserContext, 'config_node_ids'>): Promise<ConfigNode[]>
  /** Who pays for the user, and what they have. 404 `user_not_found`. */
  getBalance(userId: string): Promise<Balance>
  /** Advice; a hold is the guarantee. 422 `invalid_amount`, 404 `user_not_found`. */
  checkBudget(context: Pick<UserContext, 'user_id' | 'virtual_key_id'>, amount: string): Promise<BudgetAnswer>
  /**
   * Calls `listener` with each event of a kind from now on: `low_balance`, `exhausted`, `back_in_funds`, `budget_exhausted`,
   * and `reset` when some may have been missed. Gives the function that ends it. Listeners are called in order, an account's events in
   * the order of its entries, and not waited for; one that throws is a process warning. A lost connection is caught up
   * with. Each process that listens is told: keep the `id` of what you have done, and drop it when it comes again.
   * Begins with `start`; while nobody listens, nothing is read. 400 `invalid_input` for an unknown kind.
   */
  on<Kind extends NewsKind>(kind: Kind, listener: NewsListener<Kind>): () => void
  /** JSON-ready, without secrets. */
  health(): Health
  /** Begins to follow changes, and to maintain the database hourly (in 10 s again, if that fails). Until then each key is read from Postgres. */
  start(): Promise<void>
  /**
   * Delivers what is queued, and ends the listener; for good. What isn't delivered at its own deadline, or after `stopDeadline`,
   * is rejected. What you passed in stays open.
   */
  stop(): Promise<void>
}

// of the listener and the news, each of which may be in a read
const STOP_READING_MS = 2000
const HOUR_MS = 3600 * 1000
const MAINTAIN_AGAIN_MS = 10_000
// longer than any key
const MAX_KEY = 4096
// a look-up that failed is not worth waiting for: what is known may do
const LOOK_UP_MS = 100
const MAX_LOOK_UPS = 10_000
// three reads of the changes would have been answered in it
const SILENT_MS = 1000
const BALANCE = [
  ...['user_id', 'tenant_id', 'account_id', 'owner', 'currency', 'balance::text', 'free_credit::text'],
  ...['credit_limit::text', 'frozen_balance::text', 'outstanding_amount::text', 'overdue_amount::text'],
  ...['available::text', 'balance_version'],
]
const BUDGET = ['allowed', 'code', 'available::text', 'remaining::text', 'account_id', 'currency']

/** Throws TypeError for `listen: false` without `redis`, a Redis client that reads from replicas, a short `redisSecret`. */
export function createBillingModule(options: BillingModuleOptions): BillingModule {
  const { rpc, redis, redisSecret, listen, maxEntries, maxStaleness } = options
  const { staleIfError = STALE_IF_ERROR_MS, stopDeadline = 20_000 } = options
  if (listen === false && !redis) throw new TypeError('createBillingModule: `listen: false` needs `redis`')
  if (redis) refuseReplicas(redis)
  const follows = listen === false
  // the reads of changes have a connection of their own: while none is answered, it is not the pool that is busy
  const hangs = (error: unknown, waited: number) =>
    rpc.reserves === true && !follows && waited >= SILENT_MS && mayBeAway(error)
  const cache = createKeyCache<KeyContext>({
    load: resolve,
    ...{ redis, redisSecret, maxEntries, maxStaleness, staleIfError },
    remembers: !follows,
    isAway: (error, waited) => isAway(error) || hangs(error, waited),
  })
  const news = createNews(rpc)
  const followed = follows ? { follow: true } : { connectionString: listen }
  const listener = createListener({ cache, rpc, ...followed, channels: { keyledger_account: news.wake } })
  // Made-up keys cost few calls, and leave connections to the charges: their queue is short, and its lanes are two.
  const lookUps = createBatcher<string, KeyContext | UnknownKey>({
    send: (hashes) =>
      rpc.call('resolve_virtual_keys', { key_hashes: jsonText(`[${hashes.join(',')}]`) as never }),
    account: (hash) => hash,
    deadline: LOOK_UP_MS,
    lanes: 2,
    maxQueue: MAX_LOOK_UPS,
  })
  const metrics = createMetrics()
  const { stats, stop: drain, ...charging } = createCharging(options, metrics)
  let unwatch = () => {}
  const maintenance: Health['maintenance'] = { at: null, error: null }
  let timer: NodeJS.Timeout | undefined
  let servedStale = false
  let state: 'new' | 'started' | 'stopped' = 'new'

  async function resolve(hash: string): Promise<KeyContext | undefined> {
    const answer = await lookUps.add(hash)
    return answer.virtual_key_id === null ? undefined : answer
  }

  async function lookUp(virtualKey: string): Promise<Partial<Answer<KeyContext>> & { code: string | null }> {
    if (typeof virtualKey !== 'string' || virtualKey === '' || virtualKey.length > MAX_KEY) {
      return { code: 'virtual_key_unknown' }
    }
    try {
      const { context, tier } = await cache.get(createHash('sha256').update(virtualKey).digest('hex'))
      if (tier !== 'memory') servedStale = tier === 'stale'
      return { context, tier, code: context ? context.code : 'virtual_key_unknown' }
    } catch (cause) {
      const detail = 'the key could not be checked'
      throw new KeyledgerError('unavailable', 503, { detail, hint: 'try again', cause })
    }
  }

  const identify = metrics.lookUps(lookUp)

  async function validate(virtualKey: string): Promise<UserContext> {
    const { context, code } = await identify(virtualKey)
    if (code !== null) throw refused(code)
    const { virtual_key_id, user_id, tenant_id, account_id, currency, name, key_prefix } = context!
    const config_node_ids = [...context!.config_node_ids]
    return { virtual_key_id, user_id, tenant_id, account_id, currency, name, key_prefix, config_node_ids }
  }

  async function maintain() {
    try {
      await rpc.call('maintain')
      maintenance.at = new Date().toISOString()
      maintenance.error = null
    } catch (error) {
      maintenance.error = codeOf(error)
    }
    if (state === 'started')
      timer = setTimeout(maintain, maintenance.error ? MAINTAIN_AGAIN_MS : HOUR_MS).unref()
  }

  function health(): Health {
    const { entries, ...answers } = cache.stats()
    const memory = cache.trust.holds()
    const redis = cache.redis?.trust.holds() ?? null
    const { age, error, away, ...heard } = listener.state()
    const listening = listen ? heard.listening : null
    const told = news.state()
    const queues = stats()
    const lookUp = lookUps.stats().error
    const trusted = memory || redis === true
    // a follower has no memory: what it knows is in Redis
    const known = age !== null && age <= staleIfError && !(follows && away.redis)
    const answering = trusted || !away.postgres || known
    const failing = [
      error,
      lookUp,
      told.error,
      maintenance.error,
      ...Object.values(queues).map((queue) => queue.error),
    ]
    const well = trusted && redis !== false && failing.every((reason) => !reason)
    const status = state !== 'started' || !answering ? 'down' : well ? 'ok' : 'degraded'
    return {
      status,
      http_status: status === 'down' ? 503 : 200,
      stale: servedStale && !trusted,
      cache: { memory, redis, entries, answers, error: lookUp },
      listener: { listening, age, error: error ? codeOf(error) : null },
      news: { age: told.age, error: told.error ? codeOf(told.error) : null },
      queues,
      maintenance: { ...maintenance },
    }
  }

  return {
    ...metrics.operations(charging),
    validate,
    authenticate: createAuthenticate(validate),
    middleware: () => createMiddleware(validate),
    nodes: createNodes(rpc),

    async getBalance(user_id) {
      const [balance] = await rpc.rows<Balance>('account_balances', { select: BALANCE, where: { user_id } })
      if (balance) return balance
      throw new KeyledgerError('user_not_found', 404, {
        detail: `user ${user_id}`,
        hint: 'create the user first',
      })
    },

    checkBudget: ({ user_id, virtual_key_id }, amount) =>
      rpc.call<BudgetAnswer>('check_budget', { user_id, virtual_key_id, amount }, { select: BUDGET }),

    on: news.on,

    health,

    async start() {
      if (state === 'stopped') throw new KeyledgerError('stopped', 503, { hint: 'create another module' })
      if (state === 'started') return
      state = 'started'
      maintain()
      unwatch = metrics.watch(health)
      await Promise.all([listener.start(), news.start()])
    },

    async stop() {
      state = 'stopped'
      clearTimeout(timer)
      await drain(stopDeadline)
      unwatch()
      let limit: NodeJS.Timeout | undefined
      const enough = new Promise((resolve) => {
        limit = setTimeout(resolve, STOP_READING_MS)
      })
      await Promise.race([Promise.all([listener.stop(), news.stop()]), enough])
      clearTimeout(limit)
      cache.close()
    },
  }
}

const refused = (code: string) =>
  new KeyledgerError(code, keyStatus(code), { detail: 'this virtual key may not be used' })
