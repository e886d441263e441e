// What a DBA may find: a database with objects of its own, a clash of names, no superuser, an older or newer Postgres.
import { readdirSync, readFileSync } from 'node:fs'
import pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { installPostgres } from '../../scripts/binaries.ts'
import { migrate, prepareRoles, secret, startPostgres, withDatabase } from '../../scripts/servers.ts'
import { database, type Row, type Sql, testServer } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { holdsTrue } from '../support/ledger.ts'
import { event, hold, seed } from '../support/seed.ts'

const test = suite('migrations')
const db = await database(test)
const migrations = new URL('../../db/migrations/', import.meta.url)
const files = readdirSync(migrations).sort()
const up = (file: string) => readFileSync(new URL(file, migrations), 'utf8').split('-- migrate:down')[0]!

let closes: (() => unknown)[] = []
test.after.each(async () => {
  for (const close of closes.reverse()) await close()
  closes = []
})

async function connected(url: string): Promise<Sql> {
  const client = new pg.Client(url)
  await client.connect()
  closes.push(() => client.end())
  return async (text, values) => (await client.query(text, values)).rows
}

// An empty database on the tests' server; scripts/test.ts drops it.
let made = 0
async function empty(): Promise<{ url: string; sql: Sql }> {
  const { adminUrl, template } = testServer()
  const name = `${template}_m${++made}`
  await db.sql(`create database ${name}`)
  const url = withDatabase(adminUrl, name)
  return { url, sql: await connected(url) }
}

const asRole =
  (sql: Sql, role: string): Sql =>
  async (text, values) => {
    await sql(`set role ${role}`)
    try {
      return await sql(text, values)
    } finally {
      await sql('reset role')
    }
  }

// One charge through the whole of it, and the proof.
async function charges(sql: Sql) {
  const world = await seed(asRole(sql, 'keyledger_operator'))
  const gateway = asRole(sql, 'keyledger_gateway')
  const call = async (fn: string, element: Row): Promise<Row> => {
    const [row] = await gateway(`select api.${fn}($1) as answers`, [JSON.stringify([element])])
    return row!.answers[0]
  }
  const held = hold(world, '1')
  assert.is((await call('place_holds', held)).status, 'held')
  const charged = await call('record_usage', { ...event(world, 1_000_000), hold_id: held.id })
  assert.equal([charged.status, Number(charged.cost), Number(charged.available)], ['charged', 2.5, 97.5])
  const [resolved] = await gateway('select * from api.resolve_virtual_key($1)', [world.keyHash])
  assert.is(resolved!.account_id, world.accountId)
  const [changes] = await gateway('select api.cache_changes() as c')
  assert.is(changes!.c.reset, true)
  await gateway('select api.maintain()')
  await holdsTrue(sql)
}

// Everything of ours in the catalog, as one text per object.
const catalog = async (sql: Sql) =>
  (
    await sql(`
    select format('%s %s %s %s', n.nspname, c.relname, c.relkind, c.relacl) as object
    from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname in ('data', 'api')
    union all
    select format('%s %s %s %s', p.pronamespace::regnamespace, p.oid::regprocedure, md5(pg_get_functiondef(p.oid)), p.proacl)
    from pg_proc p where p.pronamespace::regnamespace::text in ('data', 'api')
    union all
    select pg_get_triggerdef(t.oid) from pg_trigger t where not t.tgisinternal
    union all
    select format('%s %s', c.conrelid::regclass, pg_get_constraintdef(c.oid)) from pg_constraint c
    where c.connamespace::regnamespace::text in ('data', 'api')
    union all
    select format('%s %s %s', a.defaclrole::regrole, a.defaclobjtype, a.defaclacl) from pg_default_acl a
    order by 1`)
  ).map(({ object }) => object as string)

for (const shared of [false, true])
  test(`beside objects of the host in schemas of these names${shared ? ', open to public' : ''}: all keep what is theirs`, async () => {
    const { url, sql } = await empty()
    const host = `${testServer().template}_host${made}`
    await sql(`
      create role ${host};
      create schema data authorization ${host};
      create schema api authorization ${host};
      set role ${host};
      create table data.invoice (id int primary key, note text);
      insert into data.invoice values (1, 'theirs');
      create view api.invoices as select * from data.invoice;
      create function api.ping() returns int language sql as 'select 1';
      ${shared ? 'grant usage on schema data, api to public;' : ''}
      reset role;
      create table schema_migrations (version varchar(128) primary key);
      insert into schema_migrations values ('20200101000001');
      grant ${host} to current_user`)
    closes.push(() => sql(`drop owned by ${host} cascade; drop role ${host}`).catch(() => {}))
    const theirs = `
      select c.relname as name, c.relowner::regrole::text as owner from pg_class c
      where c.oid in ('data.invoice'::regclass, 'api.invoices'::regclass)
      union all select proname, proowner::regrole::text from pg_proc where oid = 'api.ping'::regproc
      union all select nspname, nspowner::regrole::text from pg_namespace where nspname in ('data', 'api')
      order by 1`
    const before = await sql(theirs)
    await migrate(url)
    await charges(sql)
    assert.equal(await sql(theirs), before)
    assert.ok(before.every(({ owner }) => owner === host))
    assert.equal(await sql('select * from data.invoice'), [{ id: 1, note: 'theirs' }])
    assert.equal(await sql('select * from schema_migrations'), [{ version: '20200101000001' }])
    const [{ applied }] = (await sql('select count(*)::int as applied from keyledger.migrations')) as [Row]
    assert.is(applied, files.length)
  })

const clashes: [object: string, statement: string][] = [
  ['data.tenant', 'create table data.tenant (id int)'],
  ['data.account_now', 'create view data.account_now as select 1 as one'],
  ['data.post', `create function data.post(x int) returns int language sql as 'select 1'`],
  ['data.hold', `create type data.hold as enum ('a')`],
  ['data.money', `create type data.money as (amount numeric)`],
  ['data.amount', 'create domain data.amount as numeric'],
  ['data.price', 'create sequence data.price'],
  ['data.usage_log_2031_01', 'create table data.usage_log_2031_01 (id int)'],
  ['data.hold_open', 'create table data.t (id int); create index hold_open on data.t (id)'],
  ['api.holds', 'create table api.holds (id int)'],
  ['api.top_up', `create procedure api.top_up() language sql as 'select 1'`],
]
for (const [object, statement] of clashes)
  test(`a host's own ${object} is a clash: refused in plain words, nothing made`, async () => {
    const { url, sql } = await empty()
    await sql(`create schema data; create schema api; ${statement}`)
    const before = await catalog(sql)
    const { message } = await failure(migrate(url))
    assert.match(message, `keyledger can't be installed here: this database already has ${object}`)
    assert.equal(await catalog(sql), before)
    const left = await sql(`
      select n.nspname || '.' || c.relname as name from pg_class c join pg_namespace n on n.oid = c.relnamespace
      where n.nspname not in ('pg_catalog', 'information_schema', 'pg_toast', 'data', 'api') and c.relkind = 'r'
        and n.nspname !~ '^pg_'`)
    assert.equal(left, [{ name: 'keyledger.migrations' }]) // dbmate's own
    assert.equal(await sql('select * from keyledger.migrations'), [])
  })

test('the names whose clash is refused are exactly those that are made', async () => {
  const text = up(files[0]!)
  const [inData, inApi] = [...text.matchAll(/any \(array\[([^\]]+)\]/g)].map(([, list]) =>
    [...list!.matchAll(/'(\w+)'/g)].map(([, name]) => name!),
  ) as [string[], string[]]
  const { url, sql } = await empty()
  await migrate(url)
  // what Postgres names by itself gives way to names already taken
  const named = await sql(`
    select distinct n.nspname as schema, o.name
    from (
      select c.relnamespace as namespace, c.relname as name from pg_class c
      where c.relkind not in ('S', 'c') and (c.relkind not in ('i', 'I') or c.relname !~ '_(pkey|key|idx)$')
        and c.relname !~ '^usage_log_'
      union
      select p.pronamespace, p.proname from pg_proc p
      union
      select t.typnamespace, t.typname from pg_type t where t.typtype in ('d', 'e', 'r', 'c') and t.typrelid = 0
      union
      select c.relnamespace, c.relname from pg_class c where c.relkind = 'c'
    ) o
    join pg_namespace n on n.oid = o.namespace
    where n.nspname in ('data', 'api')
    order by 1, 2`)
  const of = (schema: string) => named.filter((row) => row.schema === schema).map(({ name }) => name)
  assert.equal(inData.toSorted(), of('data'))
  assert.equal(inApi.toSorted(), of('api'))
})

test('every code file may be applied again, over data, and changes nothing', async () => {
  const { url, sql } = await empty()
  await migrate(url)
  await charges(sql)
  const before = await catalog(sql)
  const code = files.filter((file) => /^\d{8}9/.test(file))
  assert.ok(code.length >= 10)
  for (const file of code) {
    await sql('begin')
    await sql(up(file))
    await sql('commit')
  }
  assert.equal(await catalog(sql), before)
  // all of them, as a release that re-dates them does
  await sql('delete from keyledger.migrations where version = any ($1)', [
    code.map((file) => file.slice(0, 14)),
  ])
  await migrate(url)
  assert.equal(await catalog(sql), before)
  await charges(sql)
})

test('history files are not code: a second time they refuse', async () => {
  const { url, sql } = await empty()
  await migrate(url)
  for (const file of files.filter((file) => /^\d{8}0/.test(file)).slice(1)) {
    await sql('begin')
    assert.match((await failure(sql(up(file)))).message, 'already exists')
    await sql('rollback')
  }
})

for (const version of ['15', '16', '17', '18']) {
  // what can't be had offline is counted as skipped
  let run: typeof test | typeof test.skip = test
  try {
    installPostgres(version)
  } catch (error) {
    if (!/E(NOTFOUND|AI_AGAIN|TIMEDOUT|CONNREFUSED|CONNRESET|NOTCACHED)|network/i.test(String(error)))
      throw error
    run = test.skip
  }
  run(
    `PostgreSQL ${version}: installs without a superuser, beside another database of the cluster, and charges`,
    async () => {
      const server = await startPostgres({ version })
      closes.push(() => server.stop())
      const admin = await connected(server.url)
      assert.match((await admin('show server_version'))[0]!.server_version, new RegExp(`^${version}\\.`))
      const password = secret()
      for (const n of [1, 2]) {
        await admin(`create role dba${n} login createrole password '${password}'`)
        await admin(`create database app${n}`)
        await admin(`grant create on database app${n} to dba${n}`)
      }
      const dba = (n: number) => withDatabase(server.url, `app${n}`, { user: `dba${n}`, password })
      // public isn't theirs to make dbmate's table in
      const migrateBy = (n: number) => migrate(dba(n), 'keyledger.migrations')

      await migrateBy(1)
      const first = await connected(withDatabase(server.url, 'app1'))
      await charges(first)
      const owners = await first(`
      select distinct relowner::regrole::text as owner from pg_class where relnamespace in ('data'::regnamespace, 'api'::regnamespace)
      union select proowner::regrole::text from pg_proc where pronamespace in ('data'::regnamespace, 'api'::regnamespace)`)
      assert.equal(owners, [{ owner: 'keyledger_owner' }])

      // the roles are there from the first database, and belong to whoever made them
      if (version === '15') {
        await migrateBy(2) // there, CREATEROLE may grant any role that is no superuser
      } else {
        const { message } = await failure(migrateBy(2))
        assert.match(
          message,
          `keyledger can't be installed by dba2 yet: as the role that made keyledger_owner, grant keyledger_owner to dba2`,
        )
        const made = await connected(withDatabase(server.url, 'app2'))
        assert.equal(await made(`select from pg_namespace where nspname in ('data', 'api')`), [])
        await (await connected(dba(1)))('grant keyledger_owner to dba2') // as the refusal says
        await migrateBy(2)
      }
      await charges(await connected(withDatabase(server.url, 'app2')))

      // the login of PostgREST is the DBA's to make, too
      const login = await prepareRoles(dba(1))
      const rows = await (await connected(login.url))(`select set_config('role', 'keyledger_gateway', false)`)
      assert.is(rows.length, 1)
    },
  )
}

test.run()
