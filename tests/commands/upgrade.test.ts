// An upgrade, rehearsed: migrations one by one, data in between, and the next release's code applied over a database at work.
import { execFile } from 'node:child_process'
import { cp, mkdtemp, readdir, rename, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { resolveBinary as dbmate } from 'dbmate'
import pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { withDatabase } from '../../scripts/servers.ts'
import { until } from '../../scripts/supervise.ts'
import { database, type Row, type Sql, testServer } from '../support/database.ts'
import { newId } from '../support/ids.ts'
import { holdsTrue } from '../support/ledger.ts'
import { event, hold, seed, type World } from '../support/seed.ts'

const test = suite('upgrade')
const db = await database(test)
const migrations = new URL('../../db/migrations/', import.meta.url).pathname
const files = (await readdir(migrations)).sort()
const isCode = (file: string) => /^\d{8}9/.test(file)

const clients: pg.Client[] = []
async function connected(url: string, role?: string): Promise<Sql> {
  const client = new pg.Client(url)
  await client.connect()
  clients.push(client)
  if (role) await client.query(`set role ${role}`)
  return async (text, values) => (await client.query(text, values)).rows
}
const directory = await mkdtemp(join(tmpdir(), 'keyledger-'))
test.after(async () => {
  for (const client of clients) await client.end()
  await rm(directory, { recursive: true })
})

// Replacing views and triggers may meet a caller half-way, and one of the two is told: both are right when tried again.
async function again<T>(call: () => Promise<T>): Promise<T> {
  for (let tries = 1; ; tries++)
    try {
      return await call()
    } catch (error) {
      if (
        !/deadlock detected|lock timeout/.test(String(error) + (error as { stderr?: string }).stderr) ||
        tries === 10
      )
        throw error
    }
}

async function up(url: string): Promise<string> {
  const flags = [
    '--migrations-dir',
    directory,
    '--migrations-table',
    'keyledger.migrations',
    '--no-dump-schema',
  ]
  const { stdout, stderr } = await promisify(execFile)(dbmate(), ['--url', url, ...flags, 'up'])
  return stdout + stderr
}

// everything of ours that an upgrade could lose or change, as one text per object
const catalog = async (sql: Sql) =>
  (
    await sql(`
    select format('%s %s %s %s', c.oid::regclass, c.relkind, c.relacl, case when c.relkind = 'v' then pg_get_viewdef(c.oid) end) as it
    from pg_class c where c.relnamespace in ('data'::regnamespace, 'api'::regnamespace)
    union all
    select format('%s %s %s', p.oid::regprocedure, pg_get_functiondef(p.oid), p.proacl)
    from pg_proc p where p.pronamespace in ('data'::regnamespace, 'api'::regnamespace)
    union all
    select pg_get_triggerdef(t.oid) from pg_trigger t where not t.tgisinternal
    order by 1`)
  ).map(({ it }) => it as string)

async function tables(sql: Sql): Promise<Row> {
  const rows: Row = {}
  for (const { name } of await sql(`select c.relname as name from pg_class c
    where c.relnamespace = 'data'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition`))
    rows[name] = (
      await sql(`select md5(string_agg(t::text, ',' order by t::text)) as it from data.${name} t`)
    )[0]!.it
  return rows
}

const { adminUrl, template } = testServer()
const name = `${template}_upgraded`
await db.sql(`create database ${name}`)
const url = withDatabase(adminUrl, name)
const login = withDatabase(adminUrl, name, testServer().login)

test('each migration applies by itself, in order, beside data of the host; then it charges', async () => {
  const sql = await connected(url)
  await sql(`create table public.invoice (id int primary key); insert into public.invoice values (1)`)
  for (const [i, file] of files.entries()) {
    await cp(join(migrations, file), join(directory, file))
    const said = await up(url)
    assert.equal(
      [...said.matchAll(/Applied: (\S+)/g)].map(([, name]) => name),
      [file],
    )
    const [{ applied }] = (await sql('select count(*)::int as applied from keyledger.migrations')) as [Row]
    assert.is(applied, i + 1)
  }
  assert.equal(await sql('select * from public.invoice'), [{ id: 1 }])
})

test('a release re-dates the code, and is applied to a database at work: calls go on, nothing is lost or changed', async () => {
  const sql = await connected(url)
  const operator = await connected(login, 'keyledger_operator')
  const worlds: World[] = []
  for (let i = 0; i < 3; i++) worlds.push(await seed(operator, { funds: '1000' }))
  for (const { accountId } of worlds)
    await operator(
      `select api.grant_credit($1, 1, now() + interval '1 hour'), api.freeze_funds($1, 1, 'test'),
      api.set_credit_limit($1, 5)`,
      [accountId],
    )

  // sessions that were there before the upgrade, and go on after it
  let ended = false
  const done: Record<string, number> = {}
  const errors: unknown[] = []
  const work: ((world: World, gateway: Sql, operator: Sql) => Promise<unknown>)[] = [
    async (world, gateway) => {
      const held = hold(world, '0.5')
      await gateway('select api.place_holds($1)', [JSON.stringify([held])])
      const used = { ...event(world, 1000), hold_id: held.id }
      const [{ it }] = (await gateway('select api.record_usage($1) as it', [JSON.stringify([used])])) as [Row]
      assert.is(it[0].status, 'charged')
    },
    (world, gateway) => gateway('select api.record_usage($1)', [JSON.stringify([event(world, 10)])]),
    (world, _, operator) => operator('select seq from api.top_up($1, 1, $2)', [world.accountId, newId()]),
    (world, _, operator) =>
      operator('select * from api.set_credit_limit($1, random()::numeric(3, 2))', [world.accountId]),
    (world, _, operator) => operator(`select * from api.grant_credit($1, 0.1)`, [world.accountId]),
    (world, gateway) => gateway('select * from api.resolve_virtual_key($1)', [world.keyHash]),
    (world, _, operator) =>
      operator('select * from api.billing_accounts where account_id = $1', [world.accountId]),
    (world, _, operator) => operator('select id from api.create_virtual_key($1)', [world.userId]),
    (world, _, operator) =>
      operator(`select api.set_status('config_node', $1, 'active', 'again')`, [world.nodeId]),
    (_, gateway) => gateway('select api.cache_changes()'),
  ]
  const lanes = Array.from({ length: 6 }, async (_, lane) => {
    const gateway = await connected(login, 'keyledger_gateway')
    const own = await connected(login, 'keyledger_operator')
    for (let i = lane; !ended; i++)
      try {
        await again(() => work[i % work.length]!(worlds[i % worlds.length]!, gateway, own))
        done[i % work.length] = (done[i % work.length] ?? 0) + 1
      } catch (error) {
        errors.push(error)
      }
  })
  await until(() => Object.keys(done).length === work.length, 'all to be at work')

  const before = await catalog(sql)
  const code = files.filter(isCode)
  for (const file of code)
    await rename(join(directory, file), join(directory, file.replace(/^\d{8}/, '20270115')))
  const since = Object.values(done).reduce((a, b) => a + b)
  await again(() => up(url))
  const meanwhile = Object.values(done).reduce((a, b) => a + b) - since
  ended = true
  await Promise.all(lanes)

  const applied = await sql(`select from keyledger.migrations where version like '20270115%'`)
  assert.is(applied.length, code.length)
  assert.equal(errors, [])
  assert.ok(meanwhile > 20, `${meanwhile} calls while it was applied`)
  assert.equal(await catalog(sql), before)
  await holdsTrue(sql)
})

test('every code file may be applied again by itself, and changes no row', async () => {
  const sql = await connected(url)
  const before = [await catalog(sql), await tables(sql)]
  for (const file of (await readdir(directory)).filter(isCode)) {
    await sql('delete from keyledger.migrations where version = $1', [file.slice(0, 14)])
    await up(url)
  }
  assert.equal([await catalog(sql), await tables(sql)], before)
  await holdsTrue(sql)
})

test.run()
