// docs/adopt.md, executed: paths that need a server of their own kind are tried here, the others block by block.
import { spawnSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import pg from 'pg'
import * as assert from 'uvu/assert'
import { missing } from '../../scripts/redis.ts'
import {
  prepareRoles,
  type Server,
  secret,
  startPostgres,
  startPostgrest,
  withDatabase,
} from '../../scripts/servers.ts'
import { until } from '../../scripts/supervise.ts'
import { createBillingModule, pgRpc, postgrestRpc, type Rpc } from '../../src/index.ts'
import { document, root } from '../readme/document.ts'
import { once } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { startPgBouncer } from '../support/pgbouncer.ts'
import { seed } from '../support/seed.ts'

const except = ['Beside your own schemas', 'Without a superuser', 'Supabase', 'PgBouncer']
const { test, db, PATH, blocks } = await document('docs/adopt.md', { except, dev: true })
const documented = readFileSync(join(root, 'docs/adopt.md'), 'utf8')
const codeOf = (section: string, language: string) =>
  blocks.filter((block) => block.section === section && block.language === language).map(({ code }) => code)

const [install] = codeOf('Beside your own schemas', 'sh')
const dbmate = (url: string) =>
  spawnSync('sh', ['-c', install!], {
    cwd: root,
    env: { ...process.env, PATH, DATABASE_URL: url },
    encoding: 'utf8',
  })

let closes: (() => unknown)[] = []
test.after.each(async () => {
  for (const close of closes.reverse()) await close()
  closes = []
})

async function connected(url: string) {
  const client = new pg.Client(url)
  await client.connect()
  closes.push(() => client.end())
  return async (text: string, values?: unknown[]) => (await client.query(text, values)).rows
}

test('Beside your own schemas: refused as it says, then installed by its command', async () => {
  const name = `${db.name}_beside`
  const url = withDatabase(db.url, name)
  await once(db.url, `create database ${name}`)
  closes.push(() => once(db.url, `drop database ${name} with (force)`))
  const sql = await connected(url)
  await sql(`
    create table schema_migrations (version varchar primary key);
    create schema data; create schema api; create table data.tenant (id int); create table api.holds (id int);
    create table data.theirs (id int)`)
  const refused = dbmate(url)
  assert.is(refused.status, 2)
  assert.match(refused.stderr, codeOf('Beside your own schemas', 'text')[0]!.trim())
  await sql('drop table data.tenant, api.holds')
  const { status, stderr } = dbmate(url)
  assert.is(status, 0, stderr)
  assert.equal(await sql('select * from schema_migrations'), [])
  await sql('select * from data.theirs; select * from api.tenants')
})

// A database of a managed server: its administrator made the role `dba` as the document says.
async function managed() {
  const server = await startPostgres()
  closes.push(() => server.stop())
  const admin = await connected(server.url)
  const password = secret()
  await admin('create database app')
  const [give, letIn, share] = codeOf('Without a superuser', 'sql')
  await admin(give!.replace('…', password))
  const dba = withDatabase(server.url, 'app', { user: 'dba', password })
  const { status, stderr } = dbmate(dba)
  assert.is(status, 0, stderr)
  return { server, admin, dba, letIn: letIn!, share: share!, password }
}

test('Without a superuser: two rights are enough, and the next database asks for one', async () => {
  const { server, admin, dba, share, password } = await managed()
  const sql = await connected(dba)
  const [{ owners, versions }] = (await sql(`
    select (select json_agg(distinct relowner::regrole::text) from pg_class
        where relnamespace in ('data'::regnamespace, 'api'::regnamespace)) as owners,
      (select count(*)::int from keyledger.migrations) as versions`)) as [
    { owners: string; versions: number },
  ]
  assert.equal(owners, ['keyledger_owner'])
  assert.ok(versions > 10)

  await admin(`create role dba2 login createrole password '${password}'`)
  await admin('create database app2')
  await admin('grant create on database app2 to dba2')
  const dba2 = withDatabase(server.url, 'app2', { user: 'dba2', password })
  const again = dbmate(dba2)
  if (again.status !== 0) {
    assert.match(again.stderr, share.trim().replace(';', ''))
    await sql(share)
    assert.is(dbmate(dba2).status, 0)
  }
})

test('Without a superuser: a schema of somebody else is not touched before its owner lets us in', async () => {
  const { server, admin, letIn, password } = await managed()
  await admin('create database app3')
  await admin('create role theirs; grant create on database app3 to dba')
  const inside = await connected(withDatabase(server.url, 'app3'))
  await inside('create schema api authorization theirs')
  const dba = withDatabase(server.url, 'app3', { user: 'dba', password })
  const refused = dbmate(dba)
  assert.is(refused.status, 2)
  assert.match(refused.stderr, letIn.trim().replace(';', ''))
  assert.equal(await inside(`select from pg_namespace where nspname = 'data'`), [])
  await inside(`set role theirs; ${letIn}; reset role`)
  const { status, stderr } = dbmate(dba)
  assert.is(status, 0, stderr)
  const [{ owner }] = (await inside(
    `select nspowner::regrole::text as owner from pg_namespace where nspname = 'api'`,
  )) as [{ owner: string }]
  assert.is(owner, 'theirs')
})

test('Without a superuser: schemas that are keyledger_owner’s already want no further right', async () => {
  const server = await startPostgres()
  closes.push(() => server.stop())
  const [admin, password] = [await connected(server.url), secret()]
  await admin('create database app')
  await admin(codeOf('Without a superuser', 'sql')[0]!.replace('…', password))
  const dba = withDatabase(server.url, 'app', { user: 'dba', password })
  await (await connected(dba))('create role keyledger_owner nologin')
  await (await connected(withDatabase(server.url, 'app')))('create schema data authorization keyledger_owner')
  const { status, stderr } = dbmate(dba)
  assert.is(status, 0, stderr)
})

test('Supabase: a signed-in user is a member, anon is nobody, gateway and operator have their tokens', async () => {
  const { server, admin, dba } = await managed()
  const password = secret()
  // as Supabase makes them
  await admin(`
    create role anon nologin noinherit;
    create role authenticated nologin noinherit;
    create role service_role nologin noinherit bypassrls;
    create role authenticator login noinherit password '${password}';
    grant anon, authenticated, service_role to authenticator;
    grant authenticator to dba with admin option;
    grant set on parameter pgrst.db_schemas to dba`)
  const inside = await connected(withDatabase(server.url, 'app'))
  await inside(`
    create schema auth; create schema graphql_public;
    create table auth.users (id uuid primary key, email text);
    grant usage on schema auth to dba;
    grant trigger on auth.users to dba;
    create table public.todo (id int);
    grant select on public.todo to anon, authenticated`)

  const sql = await connected(dba)
  const [expose, inherit, copy, tokens, signUp] = codeOf('Supabase', 'sql')
  for (const code of [expose, tokens, signUp]) await sql(code!)
  const postgrest = await startPostgrest({
    databaseUrl: withDatabase(server.url, 'app', { user: 'authenticator', password }),
    settings: { PGRST_DB_SCHEMAS: 'public' },
  })
  closes.push(() => postgrest.stop())
  const as = async (claims: { role: string; sub?: string }): Promise<Rpc> =>
    postgrestRpc({ url: postgrest.url, token: await postgrest.token(claims) })

  const [ann, bob] = ['6ec0bd7f-11c0-43da-975e-2a8ad9ebae0b', 'd0714948-6fbf-4c22-9b4c-2b3a4b7c8d9e']
  await inside(`insert into auth.users values ('${ann}', 'ann@example.com'), ('${bob}', 'bob@example.com')`)
  const operator = await as({ role: 'keyledger_operator' })
  const users = await operator.rows<{ id: string; external_id: string }>('user_profiles', {
    select: ['id', 'external_id'],
    order: 'display_name',
  })
  assert.equal(
    users.map(({ external_id }) => external_id),
    [ann, bob],
  )
  await operator.call('top_up', { account_id: users[0]!.id, amount: '5' })
  const { virtual_key } = await operator.call<{ virtual_key: string }>('create_virtual_key', {
    user_id: users[0]!.id,
  })
  const gateway = await as({ role: 'keyledger_gateway' })
  const { user_id } = await gateway.call<{ user_id: string }>('resolve_billing_account', { vk: virtual_key })
  assert.is(user_id, users[0]!.id)

  const balances = (rpc: Rpc) =>
    rpc.rows('account_balances', { select: ['external_id', 'available::text'] }) as Promise<unknown>
  const mine = await as({ role: 'authenticated', sub: ann })
  assert.is((await failure(balances(mine))).code, 'permission_denied')
  const { version } = (await sql(`select current_setting('server_version_num')::int / 10000 as version`))[0]
  const ways: [give: string, take: string][] = [
    [copy!, `set role keyledger_owner; drop owned by authenticated`],
  ]
  if (version >= 16) ways.unshift([inherit!, 'revoke keyledger_member from authenticated'])
  for (const [give, take] of ways) {
    await sql(give)
    assert.equal(await balances(mine), [{ external_id: ann, available: '5.0000000000' }])
    assert.equal(await balances(await as({ role: 'authenticated', sub: bob })), [
      { external_id: bob, available: '0.0000000000' },
    ])
    assert.equal(await balances(await as({ role: 'authenticated', sub: secret() })), [])
    assert.is(
      (await failure(mine.call('top_up', { account_id: users[0]!.id, amount: '5' }))).code,
      'permission_denied',
    )
    for (const role of ['anon', 'service_role'])
      assert.is((await failure(balances(await as({ role, sub: ann })))).code, 'permission_denied', role)
    if (give === inherit) await sql(take)
  }
  // their own schema stays the first
  const theirs = await fetch(`${postgrest.url}/todo`, {
    headers: { authorization: `Bearer ${await postgrest.token({ role: 'anon' })}` },
  })
  assert.equal(await theirs.json(), [])
})

const why = missing('pgbouncer')
const bouncing = why === undefined ? test : test.skip
bouncing(
  'PgBouncer: in transaction mode each call is its own role and claims, over two connections',
  async () => {
    // a login of its own: that of the document has another secret
    const login = await prepareRoles(db.url, `${db.name}_pooled`)
    closes.push(() => db.sql(`drop role ${login.user}`))
    const bouncer = (await startPgBouncer({ databaseUrl: login.url, connections: 2 })) as Server
    closes.push(() => bouncer.stop())
    const settings = { PGRST_DB_PREPARED_STATEMENTS: 'false', PGRST_DB_CHANNEL_ENABLED: 'false' }
    for (const [name, value] of Object.entries(settings)) assert.match(documented, `${name}=${value}`)
    const postgrest = await startPostgrest({ databaseUrl: bouncer.url, settings })
    closes.push(() => postgrest.stop())

    const worlds = [
      await seed(db.operator, { alone: true }),
      await seed(db.operator, { alone: true }),
    ] as const
    const readers: [userId: string, rpc: Rpc][] = []
    for (const { userId: user_id } of worlds) {
      const role = 'keyledger_member'
      const direct = pgRpc({ connectionString: bouncer.url, role, claims: { user_id } })
      closes.push(() => direct.close())
      const token = await postgrest.token({ role, user_id })
      readers.push([user_id, direct], [user_id, postgrestRpc({ url: postgrest.url, token })])
    }
    const reads = Array.from({ length: 400 }, async (_, n) => {
      const [user_id, rpc] = readers[n % readers.length]!
      assert.equal(await rpc.rows('user_profiles', { select: ['id'] }), [{ id: user_id }])
    })
    await Promise.all(reads)

    // the whole path, with a direct connection to listen on
    const rpc = pgRpc({ connectionString: bouncer.url })
    const billing = createBillingModule({ rpc, changes: { listen: db.loginUrl } })
    await billing.start()
    try {
      await until(() => billing.health().listener.listening, 'LISTEN')
      const context = await billing.validate(worlds[0].key)
      const meters = { input_tokens: 1_000_000 }
      const used = { config_node_id: worlds[0].nodeId, meters }
      const held = await billing.hold(context, used)
      const charged = await billing.recordUsage({ ...context, ...used, hold_id: held.id })
      assert.equal([charged.status, Number(charged.cost)], ['charged', 2.5])
    } finally {
      await billing.stop()
      await rpc.close()
    }
    // and nobody else's session finds any of it: several at once, so that each of the connections answers
    const left = Array.from({ length: 6 }, () =>
      once(
        bouncer.url,
        `select current_setting('role') as role, current_setting('request.jwt.claims', true) as claims,
        current_setting('statement_timeout') as timeout, pg_sleep(0.1)::text as slept`,
      ),
    )
    for (const [row] of await Promise.all(left))
      assert.equal([row!.role, row!.claims || null, row!.timeout], ['none', null, '0'])
    const [{ connections }] = (await db.sql(
      `select count(*)::int as connections from pg_stat_activity where usename = '${login.user}'`,
    )) as [{ connections: number }]
    assert.ok(connections === 1 || connections === 2, `${connections} connections carried all of it`)
  },
)

test.run()
