// The transport over pg: what PostgREST does (role, claims, arguments by name), in one round trip a call.
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
import {
  argumentJson,
  argumentsJson,
  type CallOptions,
  columns,
  count,
  identifier,
  isJsonText,
  ordering,
  type RowsQuery,
  type Rpc,
  toJson,
  toText,
  withoutRawKey,
} from './rpc.ts'

export interface PgRpcOptions {
  /**
   * Yours: to be closed by you, after listening to its `error` events. Give it `connectionTimeoutMillis`: without that, a
   * network that goes silent while connections are made keeps their places taken, for minutes or for ever.
   */
  pool?: pg.Pool
  /**
   * Instead of `pool`: opens one of up to 10 connections, which `close` ends. A transaction pooler will do. Beside either pool
   * one connection more, of the same options, is kept for calls that are `reserved`: the reads of changes. `close` waits 5 s
   * at most for calls that are under way.
   */
  connectionString?: string
  /** The role to be; the login must be a member of it. Default `keyledger_gateway`. */
  role?: string
  /** JWT claims to stand for: `{ user_id }` for a member. Default: none but the role. */
  claims?: Record<string, unknown>
  /** ms to wait for a connection, then for the answer; Postgres ends the statement after as much. Default 10,000. */
  timeout?: number
}

/** A function of schema `api`, as the catalog has it. */
interface Shape {
  params: { name: string; type: string; required: boolean }[]
  set: boolean
  composite: boolean
  nothing: boolean
}

/** Where a call gets its connection, and for how long. */
interface Lane {
  pool: () => pg.Pool
  timeout: number
  preamble: string
}

// gone from the catalog, or changed under us
const stale = ['function_not_found', 'column_not_found', 'internal_error']
const GRACE_MS = 1000
// of a call that is reserved a connection
const RESERVED_MS = 5000
const CLOSE_MS = 5000

/**
 * An `Rpc` over a connection of its own to Postgres. Role, claims and time limit hold for one call: each is one
 * transaction, and the next user of the connection finds it as it was. Throws TypeError without `pool` or `connectionString`.
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
  // One connection beside the pool, as the pool makes them, for what must not wait for the pool's; opened when first asked for.
  let own: pg.Pool | undefined
  const reservedTimeout = Math.min(timeout, RESERVED_MS)
  const reserved: Lane = {
    pool: () => {
      // its password is no enumerable property
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
    // else a connection is opened for us, and may hang as the server does
    const full = pool.idleCount === 0 && pool.totalCount >= pool.options.max
    const connecting = pool.connect()
    try {
      return await within(timeout, connecting, full ? poolFull : noConnection)
    } catch (error) {
      connecting.then(
        (late) => late.release(),
        () => {},
      )
      throw neverSent(isTaken(error) ? poolFull(timeout) : toError(error))
    }
  }

  // Several statements in one simple query are one transaction: it ends with the answer, whatever that is.
  async function run<T>(statement: string, lane = shared): Promise<T> {
    const { timeout, preamble } = lane
    const client = await connect(lane)
    const ignore = () => {}
    client.on('error', ignore) // the query rejects as well
    busy.add(client)
    let broken = false
    try {
      const answers = await within(timeout + GRACE_MS, client.query(preamble + statement), noAnswer)
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

  // asked once per function, and again when the arguments don't fit what was answered then
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
      const list = select && columnList(select, 'c.')
      const shape = await shapeOf(identifier(fn), names, lane)
      try {
        return await run<T>(calling(fn, shape, args, list), lane)
      } catch (error) {
        if (error instanceof KeyledgerError && stale.includes(error.code)) shapes.delete(fn)
        throw error
      }
    },

    async rows<T>(view: string, { select, where = {}, limit, order }: RowsQuery) {
      const conditions = Object.entries(where).map(([name, value]) => `${quoted(name)} = ${literal(value)}`)
      const keys = order === undefined ? [] : ordering(order)
      return run<T[]>(
        `select coalesce(json_agg(r), '[]')::text as json from (select ${columnList(select, '')} from api.${quoted(view)}${
          conditions.length ? ` where ${conditions.join(' and ')}` : ''
        }${keys.length ? ` order by ${keys.map(({ name, desc }) => quoted(name) + (desc ? ' desc' : '')).join(', ')}` : ''}${
          limit === undefined ? '' : ` limit ${count(limit)}`
        }) r`,
      )
    },

    async close() {
      const ours = [own, options.pool ? undefined : pool].filter((each) => each && !each.ending)
      // what hangs keeps no process from ending
      const limit = setTimeout(() => {
        for (const client of busy) (client as unknown as pg.Client).end().catch(() => {})
      }, CLOSE_MS)
      await Promise.all(ours.map((each) => each!.end()))
      clearTimeout(limit)
    },
  }
}

// One query, one value `json`: Postgres makes the JSON, as it does for PostgREST.
function calling(fn: string, shape: Shape, args: Record<string, unknown>, select?: string) {
  // their names are the catalog's: `limit` is one
  const used = shape.params.filter(({ name }) => args[name] !== undefined)
  // JSON is parsed here and now; any other type is read from JSON as PostgREST reads it
  const read = used.filter(({ name, type }) => !(type === 'jsonb' && isJsonText(args[name])))
  const passed = used.map((param) => {
    const value = read.includes(param)
      ? `a.${pg.escapeIdentifier(param.name)}`
      : jsonLiteral(argumentJson(args[param.name]))
    return `${pg.escapeIdentifier(param.name)} => ${value}`
  })
  const record = argumentsJson(Object.fromEntries(read.map(({ name }) => [name, args[name]])))
  const columns = read.map(({ name, type }) => `${pg.escapeIdentifier(name)} ${type}`)
  const from = `${read.length ? `json_to_record(${jsonLiteral(record)}) as a(${columns.join(', ')}), lateral ` : ''}api.${quoted(fn)}(${passed.join(', ')}) as c`
  if (shape.nothing) return `select null::text as json from ${from}`
  if (shape.composite) {
    const all = shape.set ? `coalesce(json_agg(r), '[]')` : 'row_to_json(r)'
    return `select ${all}::text as json from (select ${select ?? 'c.*'} from ${from}) r`
  }
  if (select)
    throw new KeyledgerError('column_not_found', 400, {
      detail: `api.${fn} has no columns`,
      hint: 'leave `select` out',
    })
  return `select ${shape.set ? `coalesce(json_agg(c.value), '[]')` : 'to_json(c.value)'}::text as json from ${from}(value)`
}

const lookup = (fn: string) => `
  select coalesce(json_agg(json_build_object(
    'set', p.proretset,
    'composite', t.typtype = 'c' or t.typname = 'record',
    'nothing', t.typname = 'void',
    'params', (
      select coalesce(json_agg(json_build_object(
        'name', i.name,
        'type', format_type(i.type, null),
        'required', i.position <= p.pronargs - p.pronargdefaults
      )), '[]')
      from (
        select u.name, u.type, row_number() over (order by u.n) as position
        from unnest(p.proargnames, coalesce(p.proallargtypes, p.proargtypes::oid[]), p.proargmodes)
          with ordinality as u (name, type, mode, n)
        where coalesce(u.mode, 'i') in ('i', 'b')
      ) i
    )
  )), '[]')::text as json
  from pg_proc p
  join pg_type t on t.oid = p.prorettype
  where p.pronamespace = 'api'::regnamespace and p.prokind = 'f' and p.proname = ${literal(fn)}`

function columnList(select: readonly string[], of: string) {
  return columns(select)
    .map(({ name, type }) => {
      if (name === '*') return `${of}*`
      return type ? `cast(${of}${quoted(name)} as ${type}) as ${quoted(name)}` : of + quoted(name)
    })
    .join(', ')
}

const quoted = (name: string) => pg.escapeIdentifier(identifier(name))

const literal = (value: string) => pg.escapeLiteral(toText(value))

// most JSON of ours has nothing to escape, and escapeLiteral goes letter by letter: 4 ms for 500 events
const jsonLiteral = (json: string) => (/['\\]/.test(json) ? pg.escapeLiteral(json) : `'${json}'`)

const isServerError = (error: unknown): error is ServerError & { severity: string } =>
  error instanceof Error && 'severity' in error

const toError = (error: unknown) =>
  isServerError(error) ? fromServer(error) : fromNetwork(error, 'Postgres')

// as the pool says it, when it gives up before we do
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
    detail: `no answer of Postgres within ${ms} ms`,
    hint: 'see `timeout` of pgRpc',
  })

// The work goes on, unseen.
function within<T>(ms: number, work: Promise<T>, late: (ms: number) => Error): Promise<T> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(late(ms)), ms)
    work.then(resolve, reject).finally(() => clearTimeout(timer))
  })
}
