// A database of its own for a test file, copied from the migrated template, with the servers that work on it.
import pg from 'pg'
import type { Test } from 'uvu'
import { type Claims, type Server, startPostgrest, startRedis, withDatabase } from '../../scripts/servers.ts'
import { until } from '../../scripts/supervise.ts'

/** The server that scripts/test.ts prepares, handed to each test file in `KEYLEDGER_TEST`. */
export interface TestServer {
  adminUrl: string
  template: string
  login: { user: string; password: string }
}

// biome-ignore lint/suspicious/noExplicitAny: the shape of a row is the query's business
export type Row = Record<string, any>
/** Runs one statement and gives its rows; `numeric` and `bigint` come as strings. */
export type Sql = (text: string, values?: unknown[]) => Promise<Row[]>
export type Role = 'keyledger_gateway' | 'keyledger_operator' | 'keyledger_member' | 'keyledger_owner'

export interface Database {
  name: string
  /** As the owner of the database, past every grant. */
  url: string
  sql: Sql
  /** As the login role that PostgREST and the client use: it can do nothing before `set role`. */
  loginUrl: string
  /** One statement in its own transaction as PostgREST would run it: role and claims set for that transaction. */
  as(role: Role, claims?: Record<string, unknown>): Sql
  gateway: Sql
  operator: Sql
  member(userId: string): Sql
  /** A connection of its own with the role set, for tests that interleave. The test must `end()` it. */
  session(role?: Role, claims?: Record<string, unknown>): Promise<pg.Client>
  /** Waits until the session waits for a lock; or until `unless`, its statement, has ended. */
  blocked(session: pg.Client, unless?: Promise<unknown>): Promise<void>
  /** PostgREST on this database, started at the first call. */
  postgrest(): Promise<Server & { token(claims: Claims): Promise<string> }>
  /** A Redis of the file's own, started at the first call. */
  redis(): Promise<Server>
  /** Runs at the end of the file, before the check for leaked connections; the last given runs first. */
  onClose(close: () => unknown): void
}

/**
 * Makes the database; it is dropped after the suite, whose file fails if a connection to it was left open.
 * Give it the last suite of the file.
 */
export async function database(suite: Test): Promise<Database> {
  const { adminUrl, template, login } = testServer()
  const name = `${template}_${process.pid}`
  await once(adminUrl, `create database ${name} template ${template}`)
  const url = withDatabase(adminUrl, name)
  const loginUrl = withDatabase(adminUrl, name, login)
  const pools = [pool(url), pool(loginUrl)] as const
  const closes: (() => unknown)[] = []
  const started = new Map<string, Promise<Server>>()

  const lazily = <T extends Server>(what: string, start: () => Promise<T>) => {
    if (!started.has(what)) started.set(what, start())
    return started.get(what) as Promise<T>
  }
  const as = (role: Role, claims: Record<string, unknown> = {}): Sql => {
    // the login role can't become the owner
    const from = role === 'keyledger_owner' ? pools[0] : pools[1]
    return async (text, values) => {
      const client = await from.connect()
      try {
        await client.query('begin')
        await become(client, role, claims, true)
        const { rows } = await client.query(text, values)
        await client.query('commit')
        return rows
      } catch (error) {
        await client.query('rollback').catch(() => {})
        throw error
      } finally {
        client.release()
      }
    }
  }

  suite.after(async () => {
    const faults: unknown[] = []
    const step = async (what: () => unknown) => {
      try {
        await what()
      } catch (error) {
        faults.push(error)
      }
    }
    for (const close of closes.reverse()) await step(close)
    for (const server of started.values()) await step(async () => (await server).stop())
    for (const each of pools) await step(() => endPool(each))
    await step(async () => {
      const leaked = await openConnections(adminUrl, name)
      if (leaked.length) throw new Error(`connections left open: ${JSON.stringify(leaked, null, 2)}`)
    })
    // by force: a connection that was left open would keep this process
    await step(() => once(adminUrl, `drop database ${name} with (force)`))
    // errors thrown here would replace the results
    for (const fault of faults) console.error(fault)
    if (faults.length)
      process.on('exit', () => {
        process.exitCode = 1
      })
  })

  return {
    name,
    url,
    loginUrl,
    sql: async (text, values) => (await pools[0].query(text, values)).rows,
    as,
    gateway: as('keyledger_gateway'),
    operator: as('keyledger_operator'),
    member: (userId) => as('keyledger_member', { user_id: userId }),
    async session(role, claims = {}) {
      const client = new pg.Client(role && role !== 'keyledger_owner' ? loginUrl : url)
      client.on('error', () => {}) // a test that kills it looks for itself
      await client.connect()
      if (role) await become(client, role, claims, false)
      return client
    },
    async blocked(session, unless) {
      const { processID } = session as pg.Client & { processID: number }
      const waiting = `select from pg_stat_activity where pid = ${processID} and wait_event_type = 'Lock'`
      let ended = false
      const end = () => {
        ended = true
      }
      unless?.then(end, end)
      await until(
        async () => ended || (await pools[0].query(waiting)).rowCount,
        `session ${processID} to wait for a lock`,
      )
    },
    postgrest: () => lazily('postgrest', () => startPostgrest({ databaseUrl: loginUrl })),
    redis: () => lazily('redis', redis),
    onClose: (close) => void closes.push(close),
  }
}

/** The server that scripts/test.ts prepared. */
export function testServer(): TestServer {
  const given = process.env.KEYLEDGER_TEST
  if (!given) throw new Error('run test files through `npm test -- <part of the file name>`')
  return JSON.parse(given)
}

/** One statement on a connection of its own. */
export async function once(url: string, text: string): Promise<Row[]> {
  const client = new pg.Client(url)
  await client.connect()
  try {
    return (await client.query(text)).rows
  } finally {
    await client.end()
  }
}

function pool(connectionString: string): pg.Pool {
  return new pg.Pool({ connectionString, max: 20 })
    .on('error', () => {}) // an idle client that a test killed
    .on('connect', (client) => client.on('error', () => {})) // one in use: its query says so
}

// A client may still be on its way back. After 5 s it was never released, and `end` would wait for it.
async function endPool(pool: pg.Pool) {
  const returned = until(() => pool.totalCount === pool.idleCount, 'each client to be released', 5)
  const ended = returned.then(
    () => pool.end(),
    () => {
      void pool.end() // ends the clients that came back
      throw new Error('a client was never released')
    },
  )
  await ended
}

async function become(client: pg.ClientBase, role: Role, claims: Record<string, unknown>, local: boolean) {
  const json = JSON.stringify({ ...claims, role })
  await client.query(`select set_config('role', $1, $3), set_config('request.jwt.claims', $2, $3)`, [
    role,
    json,
    local,
  ])
}

// A closed connection's backend takes a moment to go; after 5 s it was not closed.
async function openConnections(adminUrl: string, name: string): Promise<Row[]> {
  const query = `select application_name, usename, state, query from pg_stat_activity
    where datname = '${name}' and backend_type = 'client backend'`
  let open: Row[] = []
  const closed = async () => {
    open = await once(adminUrl, query)
    return !open.length
  }
  await until(closed, 'each connection to close', 5).catch((error) => {
    if (!open.length) throw error
  })
  return open
}

async function redis(): Promise<Server> {
  const server = await startRedis()
  if (!server) throw new Error('redis-server is not in PATH')
  return server
}
