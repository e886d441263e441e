// The servers that tests, demo and bench start: nothing of them is left after their process, however it ends.
import { type ChildProcess, spawn } from 'node:child_process'
import { chmodSync, existsSync, mkdtempSync, rmSync, statSync } from 'node:fs'
import { connect } from 'node:net'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { startPostgres, startPostgrest, startRedis } from '../../scripts/servers.ts'
import { until } from '../../scripts/supervise.ts'
import { database, once } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { homes, pidsIn, runs } from '../support/leftovers.ts'

const test = suite('tooling')
const db = await database(test)
const servers = join(dirname(dirname(dirname(fileURLToPath(import.meta.url)))), 'scripts/servers.ts')

let parents: { child: ChildProcess; dir: string; pids: number[] }[] = []
test.after.each(async () => {
  for (const { child, ...of } of parents) {
    child.kill('SIGKILL')
    await until(() => left(of).length === 0, `nothing left of ${left(of)}`)
    rmSync(of.dir, { recursive: true })
  }
  parents = []
})

// Runs the script in a process whose servers have a temporary directory of their own.
function parent(script: string) {
  const dir = mkdtempSync('/tmp/keyledger-tooling-')
  chmodSync(dir, 0o1777)
  const child = spawn(process.execPath, [...process.execArgv, '--input-type=module', '--eval', script], {
    env: { ...process.env, TMPDIR: dir },
    stdio: ['ignore', 'pipe', 'ignore'],
  })
  parents.push({ child, dir, pids: [] })
  return { child, dir }
}

// All three servers, up.
async function stack(then: string) {
  const { child, dir } = parent(`
    const { startPostgres, startPostgrest, startRedis } = await import(${JSON.stringify(servers)})
    await Promise.all([startPostgres(), startRedis(), startPostgrest({ databaseUrl: ${JSON.stringify(db.loginUrl)} })])
    console.log('up')
    ${then}`)
  let said = ''
  child.stdout!.on('data', (data) => {
    said += data
  })
  await until(() => said.includes('up') || child.exitCode !== null, 'the servers to be up')
  assert.is(said.trim(), 'up')
  return { child, dir, pids: pidsIn(dir) }
}

const exited = (child: ChildProcess) =>
  until(() => child.exitCode !== null || child.signalCode, 'the process to end')

// Which of the pids still run, and what is left in the directory: a wrapper's last act is to remove its server's.
const left = ({ dir, pids }: { dir: string; pids: number[] }) => [...pids.filter(runs), ...homes(dir)]

const idle = 'setInterval(() => {}, 1000)'
const endings: [name: string, then: string, signal?: NodeJS.Signals][] = [
  ['a normal end', ''],
  ['process.exit', 'process.exit(3)'],
  ['an uncaught error', 'setTimeout(() => { throw new Error() })'],
  ['SIGINT', idle, 'SIGINT'],
  ['SIGTERM', idle, 'SIGTERM'],
]
for (const [name, then, signal] of endings)
  test(`after ${name} of their process, servers and files are gone`, async () => {
    const { child, ...of } = await stack(then)
    if (signal) {
      assert.is(left(of).length, 6) // three processes, three directories
      child.kill(signal)
    }
    await exited(child)
    assert.equal(left(of), [])
  })

test('after kill -9 of their process, servers and files go', async () => {
  const { child, ...of } = await stack(idle)
  assert.is(left(of).length, 6)
  child.kill('SIGKILL')
  await until(() => left(of).length === 0, `nothing left of ${left(of)}`)
})

test('after kill -9 while Postgres is still starting, it goes too', async () => {
  const { child, dir } = parent(`(await import(${JSON.stringify(servers)})).startPostgres()`)
  await until(() => homes(dir).some((home) => existsSync(join(dir, home, 'data'))), 'initdb to be at work')
  const of = { dir, pids: pidsIn(dir) }
  assert.is(left(of).length, 2)
  child.kill('SIGKILL')
  await until(() => left(of).length === 0, `nothing left of ${left(of)}`)
})

test('Postgres keeps what was committed through kill -9 and restart, on the same URL', async () => {
  const server = await startPostgres({ settings: ['log_statement=all'] })
  await once(server.url, 'create table kept as select 42 as answer')
  const { pid } = server
  await server.kill9()
  await server.restart()
  assert.equal(await once(server.url, 'select answer from kept'), [{ answer: 42 }])
  assert.not.equal(server.pid, pid)
  assert.match(server.log(), 'statement: create table kept')
  await server.restart()
  assert.equal(await once(server.url, 'select answer from kept'), [{ answer: 42 }])
  await server.stop()
  assert.is((await failure(once(server.url, 'select'))).code, 'ECONNREFUSED')
})

test('servers listen on 127.0.0.1 only', async () => {
  const [postgres, redis] = await Promise.all([startPostgres(), startRedis()])
  const postgrest = await startPostgrest({ databaseUrl: db.loginUrl })
  // another address of the loopback's: who listens on all addresses is there as well
  const answers = (hostname: string, port: string) =>
    new Promise<boolean>((resolve) => {
      const socket = connect(Number(port), hostname).on('error', () => resolve(false))
      socket.on('connect', () => {
        resolve(true)
        socket.destroy()
      })
    })
  for (const server of [postgres, redis!, postgrest]) {
    const { port } = new URL(server.url)
    assert.equal([await answers('127.0.0.1', port), await answers('127.0.0.2', port)], [true, false])
    await server.stop()
  }
})

test('Postgres asks for a password, and does not run as root', async () => {
  const server = await startPostgres()
  const [row] = await once(
    server.url,
    `select current_setting('data_directory') as data, current_setting('unix_socket_directories') as at`,
  )
  // its user's, or it would not have started
  assert.not.equal(statSync(row!.data).uid, 0)
  assert.is(row!.at, '')
  const wrong = new URL(server.url)
  wrong.password = 'wrong'
  assert.is((await failure(once(wrong.href, 'select'))).code, '28P01')
  await server.stop()
})

test('a server that cannot start says why and leaves nothing', async () => {
  const { message } = await failure(startPostgres({ settings: ['no_such_setting=1'] }))
  assert.match(message, 'unrecognized configuration parameter "no_such_setting"')
})

test('without redis-server in PATH there is no Redis, and no error', async () => {
  const { PATH } = process.env
  process.env.PATH = '/nowhere'
  try {
    assert.is(await startRedis(), undefined)
  } finally {
    process.env.PATH = PATH
  }
})

test.run()
