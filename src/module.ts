// The billing module: puts the cache, its listener and the charging queues together into the
// methods a gateway calls.
import { createHash } from 'node:crypto'
import { createBatcher } from './batch.ts'
import { type Answer, createKeyCache, type KeyCacheOptions, STALE_IF_ERROR_MS } from './cache.ts'
import { type Charging, type ChargingOptions, createCharging } from './charging.ts'
import { codeOf, isAway, KeyledgerError, keyStatus, mayBeAway } from './errors.ts'
import { type Health, type HealthParts, healthOf } from './health.ts'
import { jsonText } from './json.ts'
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
import { type RedisClient, refuseReplicas } from './redis-client.ts'
import { endsWithin } from './time-limits.ts'
import type { Balance, BudgetAnswer, ConfigNode, KeyContext, UnknownKey, UserContext } from './types.ts'

/**
 * How the module sees changes of keys, users and tenants.
 *
 * - `poll`: it asks Postgres three times a second.
 * - `{ listen }`: it also LISTENs, by this connection string: any login, no transaction pooler.
 * - `follow`: it does neither, and keeps nothing in memory. It trusts Redis as long as another
 *   process's listener keeps Redis up to date.
 */
export type Changes = 'poll' | { listen: string | undefined } | 'follow'

/**
 * `rpc` reaches Postgres, the primary, as keyledger_gateway: `postgrestRpc(…)` or `pgRpc(…)`. It
 * stays yours to close.
 */
export interface BillingModuleOptions
  extends ChargingOptions,
    Pick<KeyCacheOptions<KeyContext>, 'maxEntries' | 'maxStaleness' | 'staleIfError' | 'redisSecret'> {
  /**
   * Shared tier of the cache: a client of ioredis 5 or 6, `Redis` or `Cluster`. It stays yours to
   * close. Default: memory alone. Reads go to masters only: `scaleReads`, `readOnly` and the like
   * are refused. A client whose Redis has answered nothing for 3 s is made to connect again.
   */
  redis?: RedisClient | undefined
  /** How the module sees changes. Default `poll`. */
  changes?: Changes | undefined
  /**
   * ms that `stop` takes at most to deliver the queues. Usage that isn't delivered by then is
   * rejected with `timeout`, so that its caller can log it. Default 20,000: that leaves a process
   * some of Kubernetes' 30 s for its other work.
   */
  stopDeadline?: number | undefined
}

/**
 * All methods reject with `KeyledgerError`; 503 `unavailable` and 504 `timeout` are possible
 * everywhere.
 */
export interface BillingModule extends Charging {
  /**
   * Finds the maker of the request, and its payer. 401 `virtual_key_unknown`,
   * `virtual_key_disabled`, `virtual_key_expired`; 403 `user_suspended`, `tenant_suspended`. A key
   * that could not be checked is 503 `unavailable`, never a refusal.
   */
  validate(virtualKey: string): Promise<UserContext>
  /**
   * `validate` for a request. The key is the first found of `x-virtualkey`, a bearer token,
   * `x-api-key` and `api-key`. A refusal is the whole answer, 401, 403 or 503, in the shape of
   * OpenAI's errors. Never rejects. It doesn't see the request's method: answer a browser's OPTIONS
   * before you ask.
   */
  authenticate(headers: RequestHeaders): Promise<Authentication>
  /**
   * `authenticate` as Connect-style middleware: sets `req.userContext`, or answers by itself.
   * OPTIONS without a key is 204.
   */
  middleware(): Middleware
  /**
   * Gives the active nodes mounted on the key, by name. It doesn't read each time: a change of a
   * node is seen within 5 s, a new mount as soon as `validate` sees it.
   */
  nodes(context: Pick<UserContext, 'config_node_ids'>): Promise<ConfigNode[]>
  /** Gives the payer of the user, and the payer's funds. 404 `user_not_found`. */
  getBalance(userId: string): Promise<Balance>
  /**
   * Says whether the payer could pay. It is advice; a hold is the guarantee. 422 `invalid_amount`,
   * 404 `user_not_found`.
   */
  checkBudget(context: Pick<UserContext, 'user_id' | 'virtual_key_id'>, amount: string): Promise<BudgetAnswer>
  /**
   * Calls `listener` with each event of a kind from now on: `low_balance`, `exhausted`,
   * `back_in_funds`, `budget_exhausted`, and `reset` when some may have been missed. Gives the
   * function that ends it. Listeners are called in order, with an account's events in the order of
   * its entries. Nobody waits for a listener; a throw in it is a process warning. A lost connection
   * is caught up with. Each process that listens is told: keep the `id` of an event you have
   * handled, and drop the event when it comes again. Begins with `start`; while nobody listens,
   * nothing is read. 400 `invalid_input` for an unknown kind.
   */
  on<Kind extends NewsKind>(kind: Kind, listener: NewsListener<Kind>): () => void
  /** JSON-ready, without secrets. */
  health(): Health
  /**
   * Begins to follow changes, and to maintain the database hourly (10 s after a failure). Until
   * then each key is read from Postgres.
   */
  start(): Promise<void>
  /**
   * Delivers the queues, and ends the listener, for good. An element that isn't delivered by its
   * own deadline, or by `stopDeadline`, is rejected. The `rpc` and `redis` that you passed in stay
   * open.
   */
  stop(): Promise<void>
}

// the limit for the listener and the news to stop: each may be in a read
const STOP_READING_MS = 2000
const HOUR_MS = 3600 * 1000
const MAINTAIN_AGAIN_MS = 10_000
// no key is longer
const MAX_KEY = 4096
// a look-up that fails is not worth a longer wait: the last known answer may do
const LOOK_UP_MS = 100
const MAX_LOOK_UPS = 10_000
// a Postgres that is there would have answered three reads of the changes in it
const SILENT_MS = 1000
const BALANCE = [
  ...['user_id', 'tenant_id', 'account_id', 'owner', 'currency', 'balance::text', 'free_credit::text'],
  ...['credit_limit::text', 'frozen_balance::text', 'outstanding_amount::text', 'overdue_amount::text'],
  ...['available::text', 'balance_version'],
]
const BUDGET = ['allowed', 'code', 'available::text', 'remaining::text', 'account_id', 'currency']

/**
 * Throws TypeError for `changes: 'follow'` without `redis`, for `changes` without a connection
 * string to listen by, for a Redis client that reads from replicas, and for a short `redisSecret`.
 */
export function createBillingModule(options: BillingModuleOptions): BillingModule {
  const { rpc, redis, redisSecret, maxEntries, maxStaleness, changes = 'poll' } = options
  const { staleIfError = STALE_IF_ERROR_MS, stopDeadline = 20_000 } = options
  const { mode, connectionString } = readChanges(changes)
  const follows = mode === 'follow'
  if (follows && !redis) throw new TypeError("createBillingModule: `changes: 'follow'` needs `redis`")
  if (redis) refuseReplicas(redis)
  // the reads of changes have a connection of their own: while none is answered, a busy pool can't
  // be the reason
  const hangs = (error: unknown, waited: number) =>
    rpc.reserves === true && !follows && waited >= SILENT_MS && mayBeAway(error)
  const cache = createKeyCache<KeyContext>({
    load: resolve,
    ...{ redis, redisSecret, maxEntries, maxStaleness, staleIfError },
    remembers: !follows,
    isAway: (error, waited) => isAway(error) || hangs(error, waited),
  })
  const news = createNews(rpc)
  const channels = { keyledger_account: news.wake }
  const listener = createListener({ cache, rpc, follow: follows, connectionString, channels })
  // Made-up keys must cost few calls, and leave connections to the charges: their queue is short,
  // and it has two lanes.
  const lookUps = createBatcher<string, KeyContext | UnknownKey>({
    send: (hashes) =>
      rpc.call('resolve_virtual_keys', { key_hashes: jsonText(`[${hashes.join(',')}]`) as never }),
    account: (hash) => hash,
    deadline: LOOK_UP_MS,
    lanes: 2,
    maxQueue: MAX_LOOK_UPS,
  })
  const metrics = createMetrics()
  const { stats, stop: drain, ...charging } = createCharging(options, metrics.batches)
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

  const health = () =>
    healthOf({
      ...{ cache, listener: listener.state(), news: news.state(), queues: stats(), maintenance },
      ...{ lookUpError: lookUps.stats().error, isStarted: state === 'started' },
      ...{ mode, servedStale, staleIfError },
    })

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
      await endsWithin(Promise.all([listener.stop(), news.stop()]), STOP_READING_MS)
      cache.close()
    },
  }
}

function readChanges(changes: Changes): { mode: HealthParts['mode']; connectionString?: string } {
  if (changes === 'poll' || changes === 'follow') return { mode: changes }
  if (typeof changes?.listen === 'string' && changes.listen !== '')
    return { mode: 'listen', connectionString: changes.listen }
  throw new TypeError("createBillingModule: `changes` is 'poll', 'follow' or { listen: a connection string }")
}

const refused = (code: string) =>
  new KeyledgerError(code, keyStatus(code), { detail: 'this virtual key may not be used' })
