// The transport over pg: like PostgREST it sets the role and the claims, and passes arguments by
// name; one round trip a call.
import pg from 'pg'
import {
  fromNetwork,
  fromServer,
  functionNotFound,
  KeyledgerError,
  neverSent,
  poolBusy,
  type ServerError,
} from './errors.ts'
import { toJson } from './json.ts'
import { calling, literal, lookup, reading, type Shape, selectList } from './pg-query.ts'
import { identifier } from './query.ts'
import { type CallOptions, type RowsQuery, type Rpc, withoutRawKey } from './rpc.ts'
import { withinTime } from './time-limits.ts'

export interface PgRpcOptions {
  /**
   * It is yours: listen to its `error` events, and close it afterwards. Give it
   * `connectionTimeoutMillis`: without that, a network that goes silent while connections are made
   * keeps their places taken, for minutes or for ever.
   */
  pool?: pg.Pool | undefined
  /**
   * Instead of `pool`: opens a pool of up to 10 connections, which `close` ends. A transaction
   * pooler will do. Beside either pool, one more connection of the same options is kept for
   * `reserved` calls: the reads of changes. `close` waits 5 s at most for calls that are under way.
   */
  connectionString?: string | undefined
  /** The role to be; the login must be a member of it. Default `keyledger_gateway`. */
  role?: string | undefined
  /** JWT claims to stand for: `{ user_id }` for a member. Default: none but the role. */
  claims?: Record<string, unknown> | undefined
  /**
   * ms to wait for a connection, then for the answer; Postgres ends the statement after as much.
   * Default 10,000.
   */
  timeout?: number | undefined
}

/** Where a call gets its connection, and how long it may take. */
interface Lane {
  pool: () => pg.Pool
  timeout: number
  preamble: string
}

// errors that a function gives which is gone from the catalog, or has changed since we looked
const stale = ['function_not_found', 'column_not_found', 'internal_error']
const GRACE_MS = 1000
// the limit of a reserved call
const RESERVED_MS = 5000
const CLOSE_MS = 5000

/**
 * An `Rpc` over connections of its own to Postgres. Role, claims and time limit are set for one
 * call. Each call is one transaction, so the next user of the connection finds it as it was. Throws
 * TypeError without `pool` or `connectionString`.
 */
export function pgRpc(options: PgRpcOptions): Rpc {
  const { connectionString, role = 'keyledger_gateway', claims, timeout = 10_000 } = options
  if (!options.pool && !connectionString) throw new TypeError('pgRpc: give `pool` or `connectionString`')
  const pool =
    options.pool ?? new pg.Pool({ connectionString, keepAlive: true, connectionTimeoutMillis: timeout })
  // an idle connection that breaks is replaced by the next call
  if (!options.pool) pool.on('error', () => {})
  const busy = new Set<pg.PoolClient>()
  const shapes = new Map<string, Promise<Shape[]>>()

  const preambleOf = (statementTimeout: number) => {
    const settings = {
      role,
      'request.jwt.claims': toJson({ role, ...claims }),
      statement_timeout: String(statementTimeout),
    }
    const set = Object.entries(settings).map(
      ([name, value]) => `set_config(${literal(name)}, ${literal(value)}, true)`,
    )
    return `select ${set.join(', ')}; `
  }
  const shared: Lane = { pool: () => pool, timeout, preamble: preambleOf(timeout) }
  // One connection beside the pool, with the pool's options, for calls that must not wait for the
  // pool; opened at the first.
  let own: pg.Pool | undefined
  const reservedTimeout = Math.min(timeout, RESERVED_MS)
  const reserved: Lane = {
    pool: () => {
      // a spread leaves the password out: it is no enumerable property
      const { options } = pool
      const limits = { min: 0, max: 1, connectionTimeoutMillis: reservedTimeout, allowExitOnIdle: true }
      own ??= new pg.Pool({ ...options, password: options.password, ...limits }).on('error', () => {})
      return own
    },
    timeout: reservedTimeout,
    preamble: preambleOf(reservedTimeout),
  }

  async function connect(lane: Lane): Promise<pg.PoolClient> {
    const { timeout } = lane
    const pool = lane.pool()
    // if the pool is not full, a connection is opened for us, and may hang as the server does
    const full = pool.idleCount === 0 && pool.totalCount >= pool.options.max
    const connecting = pool.connect()
    try {
      return await withinTime(connecting, timeout, full ? poolFull : noConnection)
    } catch (error) {
      connecting.then(
        (late) => late.release(),
        () => {},
      )
      throw neverSent(isTaken(error) ? poolFull(timeout) : toError(error))
    }
  }

  // Several statements in one simple query are one transaction: it ends with the answer, good or
  // bad.
  async function run<T>(statement: string, lane = shared): Promise<T> {
    const { timeout, preamble } = lane
    const client = await connect(lane)
    const ignore = () => {}
    client.on('error', ignore) // the query rejects as well
    busy.add(client)
    let broken = false
    try {
      const answers = await withinTime(client.query(preamble + statement), timeout + GRACE_MS, noAnswer)
      const json = (answers as unknown as pg.QueryResult[]).at(-1)?.rows[0].json
      return JSON.parse(json ?? 'null')
    } catch (error) {
      broken = !(isServerError(error) && error.severity === 'ERROR')
      throw toError(error)
    } finally {
      busy.delete(client)
      client.release(broken)
      client.removeListener('error', ignore)
    }
  }

  // asked once per function, and again when the arguments don't fit the shapes of the last answer
  async function shapeOf(fn: string, names: string[], lane: Lane): Promise<Shape> {
    const fitting = (candidates: Shape[]) =>
      candidates.find(
        ({ params }) =>
          names.every((name) => params.some((param) => param.name === name)) &&
          params.every((param) => !param.required || names.includes(param.name)),
      )
    const known = shapes.get(fn)
    const shape = known && fitting(await known)
    if (shape) return shape
    const asked = run<Shape[]>(lookup(fn), lane)
    shapes.set(fn, asked)
    asked.catch(() => shapes.delete(fn))
    const found = await asked.catch((error) => {
      throw neverSent(error)
    })
    const fresh = fitting(found)
    if (fresh) return fresh
    throw functionNotFound(fn, names)
  }

  return {
    reserves: true,

    async call<T>(fn: string, given: Record<string, unknown> = {}, options: CallOptions = {}) {
      const { select } = options
      const args = withoutRawKey(fn, given)
      const lane = options.reserved ? reserved : shared
      const names = Object.keys(args).filter((name) => args[name] !== undefined)
      const list = select && selectList(select)
      const shape = await shapeOf(identifier(fn), names, lane)
      try {
        return await run<T>(calling(fn, shape, args, list), lane)
      } catch (error) {
        if (error instanceof KeyledgerError && stale.includes(error.code)) shapes.delete(fn)
        throw error
      }
    },

    async rows<T>(view: string, query: RowsQuery) {
      return run<T[]>(reading(view, query))
    },

    async close() {
      const ours = [own, options.pool ? undefined : pool].filter((each) => each && !each.ending)
      // a call that hangs keeps no process from ending
      const limit = setTimeout(() => {
        for (const client of busy) (client as unknown as pg.Client).end().catch(() => {})
      }, CLOSE_MS)
      await Promise.all(ours.map((each) => each!.end()))
      clearTimeout(limit)
    },
  }
}

const isServerError = (error: unknown): error is ServerError & { severity: string } =>
  error instanceof Error && 'severity' in error

const toError = (error: unknown) =>
  isServerError(error) ? fromServer(error) : fromNetwork(error, 'Postgres')

// the pool's own words, when it gives up before we do
const isTaken = (error: unknown) =>
  error instanceof Error && error.message === 'timeout exceeded when trying to connect'

const noConnection = (ms: number) =>
  new KeyledgerError('unavailable', 503, {
    detail: `no free connection within ${ms} ms`,
    hint: 'allow the pool more connections (`max`), or give pgRpc a longer `timeout`',
  })

const poolFull = (ms: number) => poolBusy(noConnection(ms))

const noAnswer = (ms: number) =>
  new KeyledgerError('timeout', 504, {
    detail: `no answer from Postgres within ${ms} ms`,
    hint: 'give pgRpc a longer `timeout`, or make Postgres answer faster',
  })
