// docs/operate.md, executed; logins and removal on a server of their own, where a role without superuser installed it.
import { spawnSync } from 'node:child_process'
import pg from 'pg'
import * as assert from 'uvu/assert'
import { type Server, secret, startPostgres, withDatabase } from '../../scripts/servers.ts'
import { blocksOfFile, document, root } from '../readme/document.ts'

const except = ['Logins', 'PostgREST', 'Removal']
const { test, PATH, blocks } = await document('docs/operate.md', { except })
const codeOf = (section: string) =>
  blocks.filter((block) => block.section === section).map(({ code }) => code)
const install = blocksOfFile('README.md').find(({ section }) => section === 'Install')!.code

let server: Server | undefined
test.after.each(async () => {
  await server?.stop()
  server = undefined
})

async function run<Row extends pg.QueryResultRow>(url: string, text: string) {
  const client = new pg.Client(url)
  await client.connect()
  try {
    return (await client.query<Row>(text)).rows
  } finally {
    await client.end()
  }
}

/** A database `keyledger`, where `dba` may make roles and schemas, and has installed it. */
async function installed() {
  server = await startPostgres()
  const password = secret()
  await run(server.url, 'create database keyledger')
  await run(server.url, `create role dba login createrole password '${password}'`)
  await run(server.url, 'grant create on database keyledger to dba')
  const dba = withDatabase(server.url, 'keyledger', { user: 'dba', password })
  const env = { ...process.env, PATH, DATABASE_URL: dba }
  const { status, stderr } = spawnSync('sh', ['-c', install], { cwd: root, env, encoding: 'utf8' })
  assert.is(status, 0, stderr)
  return { admin: server.url, dba }
}

test('Logins: the login may become each role, and then no other login may connect', async () => {
  const { admin, dba } = await installed()
  const keyledger = withDatabase(admin, 'keyledger')
  const isOpen = async () => {
    const rows = await run<{ code: string }>(keyledger, 'select code from api.installation_warnings()')
    return rows.some(({ code }) => code === 'every_login_may_connect')
  }
  const [make, connect] = codeOf('Logins')
  const password = secret()
  await run(dba, make!.replace('…', password))
  const login = withDatabase(admin, 'keyledger', { user: 'authenticator', password })
  for (const role of ['gateway', 'operator', 'member']) await run(login, `set role keyledger_${role}`)
  assert.ok(await isOpen())
  await run(admin, connect!)
  await run(login, 'select 1')
  assert.not(await isOpen())
})

test('Removal: the role that installed it takes all of it out', async () => {
  const { admin, dba } = await installed()
  await run(dba, codeOf('Removal')[0]!)
  assert.equal(await run(admin, `select rolname from pg_roles where rolname like 'keyledger%'`), [])
  const left = `select nspname from pg_namespace where nspname in ('data', 'api', 'keyledger')`
  assert.equal(await run(withDatabase(admin, 'keyledger'), left), [])
})

test('Removal: out of a schema that was there before, by its last sentence', async () => {
  server = await startPostgres()
  const url = withDatabase(server.url, 'keyledger')
  await run(server.url, 'create database keyledger')
  await run(url, 'create schema api; create table api.theirs (id int)')
  const env = { ...process.env, PATH, DATABASE_URL: url }
  const { status, stderr } = spawnSync('sh', ['-c', install], { cwd: root, env, encoding: 'utf8' })
  assert.is(status, 0, stderr)
  await run(url, 'drop owned by keyledger_owner cascade')
  await run(url, 'table api.theirs')
  const left = `select relname from pg_class where relnamespace in (select oid from pg_namespace where nspname in ('data', 'api'))`
  assert.equal(await run(url, left), [{ relname: 'theirs' }])
})

test.run()
