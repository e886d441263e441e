// A login that runs SQL must not make the owner run the login's code.
// Calls every function and trigger it can reach, among its own types, relations, functions, operators
// and casts that bear the catalog's names.
import { createHash, randomUUID } from 'node:crypto'
import pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Role } from '../support/database.ts'
import { payer } from '../support/payer.ts'

const test = suite('pg_temp')
const db = await database(test)
const { operator } = db
const roles: Role[] = ['keyledger_gateway', 'keyledger_operator', 'keyledger_member']

// A login that may become each role, with a schema of its own first in its path. Each poisoned object calls evil.trap().
const login = `${db.name}_login`
await db.sql(`create role ${login} login password 'login'`)
await db.sql(`grant ${roles.join(', ')} to ${login}`)
await db.sql(`alter role ${login} set track_functions = 'all'`)
await db.sql(`create schema evil authorization ${login}`)
await db.sql(`grant usage on schema evil to public`)
await db.sql(`create function evil.trap() returns pg_catalog.bool language plpgsql set search_path = pg_catalog as $$
  begin
    if current_user = 'keyledger_owner' then
      raise notice 'trapped: ran as the owner';
      update data.account_balance set low_balance_threshold = 777;
    end if;
    return true;
  exception when others then
    raise notice 'trapped: ran as the owner, who was stopped by %', sqlerrm;
    return true;
  end $$`)
db.onClose(async () => {
  await db.sql('drop schema evil cascade')
  await db.sql(`revoke ${roles.join(', ')} from ${login}`)
  await db.sql(`drop role ${login}`)
})

const loginUrl = new URL(db.url)
Object.assign(loginUrl, { username: login, password: 'login' })

// Postgres never looks functions and operators up in pg_temp, but does in a path that isn't set.
// Made once, for every name in use.
await db.sql(`do $$
  declare
    f record;
  begin
    set local role ${login};
    for f in
      select p.oid, p.proname, p.proretset, pg_catalog.pg_get_function_identity_arguments(p.oid) as arguments,
        pg_catalog.pg_get_function_result(p.oid) as result
      from pg_catalog.pg_proc p
      where p.pronamespace = 'pg_catalog'::regnamespace and p.prokind = 'f'
        and exists (
          select from pg_catalog.pg_proc o
          where o.pronamespace in (select n.oid from pg_catalog.pg_namespace n where n.nspname in ('api', 'data'))
            and o.prosrc ~ ('\\m' || p.proname || '\\('))
    loop
      begin
        execute format('create function evil.%I(%s) returns %s language plpgsql as %L', f.proname, f.arguments, f.result,
          'begin perform evil.trap(); ' || case when f.proretset then 'return; end' else 'return null; end' end);
      exception when others then null; -- a pseudo-type: no such function can be written
      end;
    end loop;
    for f in
      select o.oprname, o.oprleft::regtype::text as l, o.oprright::regtype::text as r, o.oprresult::regtype::text as result, o.oid
      from pg_catalog.pg_operator o
      where o.oprleft <> 0 and array[o.oprleft, o.oprright]::regtype[] <@ array['uuid', 'text', 'jsonb', 'timestamptz', 'bigint',
        'integer', 'numeric', 'boolean', 'bytea', 'interval', 'name', 'oid', 'xid8', 'pg_snapshot', 'uuid[]', 'double precision']::regtype[]
    loop
      execute format('create function evil.op_%s(a %s, b %s) returns %s language plpgsql as %L', f.oid, f.l, f.r, f.result,
        format('begin perform evil.trap(); return a operator(pg_catalog.%s) b; end', f.oprname));
      execute format('create operator evil.%s (leftarg = %s, rightarg = %s, function = evil.op_%s)', f.oprname, f.l, f.r, f.oid);
    end loop;
  end $$`)

/** Each in its own session: types as domains and relations as views, or types as composites with casts to them. */
const poisons: Record<string, string> = {
  'domains and views': `do $$
    declare
      t record;
    begin
      for t in select typname from pg_catalog.pg_type where typnamespace = 'pg_catalog'::pg_catalog.regnamespace
        and typtype in ('b', 'r', 'e') and typcategory <> 'A' order by typname
      loop
        execute format('create domain pg_temp.%I as pg_catalog.%I check (evil.trap())', t.typname, t.typname);
      end loop;
      for t in select relname from pg_catalog.pg_class where relnamespace = 'pg_catalog'::pg_catalog.regnamespace and relkind in ('r', 'v')
      loop
        begin
          execute format('create temporary view %I as select * from pg_catalog.%I where evil.trap()', t.relname, t.relname);
        exception when invalid_table_definition then null; -- pg_statistic's anyarray
        end;
      end loop;
    end $$`,
  'composites and casts': `do $$
    declare
      t record;
      v_from pg_catalog.text;
    begin
      for t in select typname from pg_catalog.pg_type where typnamespace = 'pg_catalog'::pg_catalog.regnamespace
        and typtype in ('b', 'r', 'e') and typcategory <> 'A' order by typname
      loop
        execute format('create type pg_temp.%I as (v pg_catalog.%I)', t.typname, t.typname);
        foreach v_from in array array['text', 'jsonb', 'uuid', 'timestamptz', 'numeric', 'int8', 'bytea'] loop
          execute format('create function pg_temp.cast_%s(a pg_catalog.%I) returns pg_temp.%I language plpgsql as %L',
            t.typname, v_from, t.typname, 'begin perform evil.trap(); return null; end');
          execute format('create cast (pg_catalog.%I as pg_temp.%I) with function pg_temp.cast_%s(pg_catalog.%I) as implicit',
            v_from, t.typname, t.typname, v_from);
        end loop;
      end loop;
    end $$`,
}

/** A payer of a tenant, with a row of each kind that a call can name. */
async function world() {
  const tenantId = (await operator(`insert into api.tenants (name) values ('t') returning id`))[0]!.id
  const it = await payer(db, { tenantId })
  await operator(`update api.user_profiles set tenant_role = 'admin' where id = $1`, [it.userId])
  await it.topUp('100', { reference: 'paid' })
  const spare = async () =>
    (await operator('select id from api.create_virtual_key($1)', [it.userId]))[0]!.id as string
  const used = it.event('1')
  const { seq } = (await it.record(used))[0]!
  await it.record(it.event('1', { meters: { unknown: '1' } }))
  const [parked] = await operator('select id from api.parked_usage where account_id = $1', [it.accountId])
  const freeze = await it.post('freeze_funds', { amount: '1', reason: 'test' })
  const budget = await it.post('set_budget', {
    scope: 'user',
    scope_id: it.userId,
    amount: '50',
    period: 'day',
  })
  await operator(`select from api.close_period(clock_timestamp(), null, 10000)`)
  const [{ period_start: periodStart }] = (await operator(
    `select period_start::text from api.accounting_snapshots where account_id = $1`,
    [it.accountId],
  )) as [{ period_start: string }]
  const [book] = await operator(`insert into api.price_books (name) values ('${randomUUID()}') returning id`)
  const now = new Date().toISOString()
  // a month that is old enough to be dropped
  await db.sql(
    `update data.accepted_ids set floor = floor - interval '1 month', purged_before = '2000-01-01'`,
  )
  await operator('select api.maintain()')
  return {
    ...it,
    now,
    tenantId,
    seq,
    usageId: used.id,
    parkedId: parked!.id,
    freezeId: freeze.id,
    budgetId: budget.id,
    bookId: book!.id,
    periodStart,
    holdId: await it.hold('1'),
    otherHoldId: await it.hold('1'),
    keyHash: createHash('sha256').update(it.key).digest('hex'),
    revoked: await spare(),
    rotated: await spare(),
    deleted: await spare(),
  }
}
type World = Awaited<ReturnType<typeof world>>
const json = (...elements: unknown[]) => `'${JSON.stringify(elements)}'`

// One real call of each function: a function that is not here fails the test.
const calls: Record<string, (w: World) => string> = {
  account_news: () => `cursor => (select api.account_news() -> 'cursor')`,
  adjust_balance: (w) =>
    `account_id => '${w.accountId}', amount => 1, reason => 'test', reference => 'adjusted'`,
  assign_price_book: (w) =>
    `account_id => '${w.accountId}', price_book_id => '${w.bookId}', effective_from => '2020-01-01Z'`,
  balance_at: (w) => `account_id => '${w.accountId}', at => '${w.now}'`,
  cache_changes: () => `cursor => (select api.cache_changes('{}') -> 'cursor')`,
  check_budget: (w) => `user_id => '${w.userId}', amount => 1, virtual_key_id => '${w.keyId}'`,
  close_period: () => `period_end => '${new Date().toISOString()}', "limit" => 10000`,
  create_virtual_key: (w) =>
    `user_id => '${w.userId}', name => 'k', config_node_ids => array['${w.nodeId}']::pg_catalog._uuid`,
  dismiss_parked_usage: (w) => `ids => array['${w.parkedId}']::pg_catalog._uuid, reason => 'test'`,
  drop_usage_partitions: (w) => `older_than => '${w.now}'`,
  explain_charge: (w) => `account_id => '${w.accountId}', usage_id => '${w.usageId}'`,
  extend_holds: (w) => `requests => ${json({ id: w.holdId, account_id: w.accountId, expires_in: 1000 })}`,
  freeze_funds: (w) => `account_id => '${w.accountId}', amount => 1, reason => 'test', reference => 'frozen'`,
  grant_credit: (w) =>
    `account_id => '${w.accountId}', amount => 1, expires_at => '2099-01-01Z', reference => 'granted'`,
  id_at: () => `moment => '2026-11-01Z'`,
  import_provider_bill: (w) =>
    `lines => ${json({ config_node_id: w.nodeId, day: '2026-11-01', meter: 'usd', quantity: '1', amount: '1' })}`,
  import_virtual_keys: (w) =>
    `keys => ${json({ user_id: w.userId, virtual_key: `imported ${randomUUID()}`.replace(' ', '_'), config_node_ids: [w.nodeId], expires_at: '2099-01-01T00:00Z' })}`,
  installation_warnings: () => '',
  maintain: () => '',
  margins: (w) =>
    `by => 'model', since => '${w.now}'::pg_catalog.timestamptz operator(pg_catalog.-) '1 day'::pg_catalog.interval, before => '2099-01-01Z'`,
  new_id: () => '',
  place_holds: (w) =>
    `requests => ${json(w.request('1'), w.request('1', { amount: undefined, config_node_id: w.nodeId, meters: { usd: '1' } }))}`,
  provider_differences: () => `since => '2020-01-01', before => '2099-01-01'`,
  record_openings: (w) => `openings => ${json({ account_id: w.userId, balance: '5', free_credit: '1' })}`,
  record_usage: (w) =>
    `events => ${json(w.event('1', { hold_id: w.holdId, metadata: { a: 'b' }, request_id: 'r' }), w.event('1', { meters: { none: '1' } }))}`,
  refund_charge: (w) => `account_id => '${w.accountId}', usage_id => '${w.usageId}', reference => 'refunded'`,
  release_holds: (w) => `requests => ${json({ id: w.otherHoldId, account_id: w.accountId })}`,
  remove_budget: (w) => `id => '${w.budgetId}'`,
  replay_parked_usage: (w) => `ids => array['${w.parkedId}']::pg_catalog._uuid`,
  resolve_billing_account: (w) => `vk => '${w.key}'`,
  resolve_virtual_key: (w) => `key_hash => '${w.keyHash}'`,
  resolve_virtual_keys: (w) => `key_hashes => array['${w.keyHash}', 'x']::pg_catalog._text`,
  reverse_top_up: (w) =>
    `account_id => '${w.accountId}', top_up_reference => 'paid', amount => 1, reference => 'reversed'`,
  revoke_virtual_key: (w) => `id => '${w.revoked}'`,
  rotate_virtual_key: (w) => `id => '${w.rotated}'`,
  set_budget: (w) =>
    `account_id => '${w.accountId}', scope => 'virtual_key', scope_id => '${w.keyId}', amount => 5, period => 'total'`,
  set_credit_limit: (w) => `account_id => '${w.accountId}', credit_limit => 5`,
  set_low_balance_threshold: (w) => `account_id => '${w.accountId}', amount => 5`,
  set_rates: (w) =>
    `config_node_id => '${w.nodeId}', rates => ${json({ meter: 'tiered', unit_price: '1' }, { meter: 'tiered', unit_price: '2', context_over: 5 })}, price_book_id => '${w.bookId}'`,
  set_status: (w) => `entity => 'user_profile', id => '${w.userId}', status => 'active', reason => 'test'`,
  set_time_zone: (w) => `account_id => '${w.accountId}', time_zone => 'Europe/Berlin'`,
  spend: (w) =>
    `by => 'meter', since => '${w.now}'::pg_catalog.timestamptz operator(pg_catalog.-) '1 day'::pg_catalog.interval, before => '2099-01-01Z', account_id => '${w.accountId}'`,
  statement: (w) => `account_id => '${w.accountId}', period_start => '${w.periodStart}'`,
  top_up: (w) => `account_id => '${w.accountId}', amount => 1, reference => 'topped up'`,
  unfreeze_funds: (w) => `account_id => '${w.accountId}', id => '${w.freezeId}'`,
  verify_balances: () => '',
  verify_ledger: (w) => `account_id => '${w.accountId}'`,
}

// Writes to each view that some role may write, for every trigger behind it; the irreversible write comes last.
const writes: Record<string, (w: World) => string[]> = {
  config_nodes: (w) => [
    `insert into api.config_nodes (id, name, provider, model, endpoint, status)
      values ('${randomUUID()}', '${randomUUID()}', 'p', 'm', 'e', 'disabled')`,
    ...['name', 'provider', 'model', 'endpoint'].map(
      (column) => `update api.config_nodes set ${column} = '${randomUUID()}' where id = '${w.nodeId}'`,
    ),
    `update api.config_nodes set status = 'disabled' where id = '${w.nodeId}'`,
  ],
  minimum_charges: (w) => [
    `insert into api.minimum_charges (price_book_id, minimum, currency, effective_from)
      values ('${w.bookId}', 1, 'USD', '2020-01-01')`,
    `insert into api.minimum_charges (config_node_id, minimum) values ('${w.nodeId}', 1)`,
  ],
  price_book_factors: (w) => [
    `insert into api.price_book_factors (price_book_id, factor, effective_from) values ('${w.bookId}', 1.5, '2020-01-01')`,
  ],
  price_books: (w) => [
    `insert into api.price_books (id, name, currency, kind)
      values ('${randomUUID()}', '${randomUUID()}', 'USD', 'price')`,
    `update api.price_books set name = '${randomUUID()}' where id = '${w.bookId}'`,
  ],
  prices: (w) => [
    `insert into api.prices (config_node_id, meter, unit_price, unit_size, currency, effective_from)
      values ('${w.nodeId}', 'other', 1, 1, 'USD', '2020-01-01')`,
    `insert into api.prices (config_node_id, price_book_id, meter, variant, context_over, hours, unit_price)
      values ('${w.nodeId}', '${w.bookId}', 'windowed', 'flex', 0, null, 1),
        ('${w.nodeId}', '${w.bookId}', 'windowed', 'flex', 0, '{[0,10)}', 1)`,
  ],
  tenants: (w) => [
    `insert into api.tenants (id, name, external_id, currency, status)
      values ('${randomUUID()}', 'n', '${randomUUID()}', 'USD', 'suspended')`,
    `update api.tenants set name = 'x', external_id = '${randomUUID()}' where id = '${w.tenantId}'`,
    `update api.tenants set status = 'suspended' where id = '${w.tenantId}'`,
  ],
  user_profiles: (w) => [
    `insert into api.user_profiles (id, tenant_id, tenant_role, external_id, display_name, currency, status)
      values ('${randomUUID()}', '${w.tenantId}', 'admin', '${randomUUID()}', 'd', 'USD', 'suspended')`,
    `update api.user_profiles set external_id = '${randomUUID()}', display_name = 'x' where id = '${w.userId}'`,
    `update api.user_profiles set tenant_role = 'member' where id = '${w.userId}'`,
    `update api.user_profiles set tenant_id = null where id = '${w.userId}'`,
    `update api.user_profiles set status = 'suspended' where id = '${w.userId}'`,
  ],
  virtual_key_config_nodes: (w) => [
    `insert into api.virtual_key_config_nodes (virtual_key_id, config_node_id) values ('${w.deleted}', '${w.nodeId}')`,
    `update api.virtual_key_config_nodes set config_node_id = '${w.nodeId}' where virtual_key_id = '${w.deleted}'`,
    `delete from api.virtual_key_config_nodes where virtual_key_id = '${w.deleted}'`,
  ],
}
// Writes that a trigger refuses.
const refusals: Record<string, (w: World) => string> = {
  'PT422 invalid_currency': () => `insert into api.tenants (name, currency) values ('n', 'usd')`,
  'PT422 value_required': () => `insert into api.config_nodes (name, status) values ('n', null)`,
  'PT409 id_is_fixed': (w) => `update api.config_nodes set id = '${randomUUID()}' where id = '${w.nodeId}'`,
}

/** A session of the login in that role; a member is the user. `trapped` means that code ran as the owner. */
async function session(role: Role, userId: string, poison: string) {
  const client = new pg.Client(loginUrl.href)
  const trapped: string[] = []
  client.on('notice', ({ message }) => {
    if (message?.startsWith('trapped')) trapped.push(message)
  })
  await client.connect()
  await client.query(`select set_config('role', $1, false), set_config('request.jwt.claims', $2, false)`, [
    role,
    JSON.stringify({ user_id: userId }),
  ])
  try {
    await client.query(poison)
    await client.query('set search_path = evil, pg_temp, pg_catalog')
  } catch (error) {
    await client.end()
    throw error
  }
  return { client, trapped }
}

const granted = async (role: Role): Promise<string[]> =>
  (
    await db.sql(
      `select p.proname::text as name from pg_proc p
      where p.pronamespace = 'api'::regnamespace and has_function_privilege($1, p.oid, 'execute') order by 1`,
      [role],
    )
  ).map(({ name }) => name)
const writable = async (role: Role): Promise<string[]> =>
  (
    await db.sql(
      `select c.relname::text as name from pg_class c
      where c.relnamespace = 'api'::regnamespace and c.relkind = 'v'
        and (has_any_column_privilege($1, c.oid, 'insert, update') or has_table_privilege($1, c.oid, 'delete, truncate'))
      order by 1`,
      [role],
    )
  ).map(({ name }) => name)
const readable = async (role: Role): Promise<string[]> =>
  (
    await db.sql(
      `select c.relname::text as name from pg_class c
      where c.relnamespace = 'api'::regnamespace and c.relkind = 'v' and has_table_privilege($1, c.oid, 'select') order by 1`,
      [role],
    )
  ).map(({ name }) => name)

test('the trap springs where a path is empty, unset, or starts with pg_temp', async () => {
  const { userId } = await world()
  for (const [path, springs] of [
    [`set search_path = ''`, true],
    ['', true],
    ['set search_path = pg_temp, pg_catalog', true],
    ['set search_path = pg_catalog, pg_temp', false],
  ] as const)
    for (const [name, poison] of Object.entries(poisons)) {
      await db.sql(`create or replace function evil.bait() returns void language plpgsql security definer ${path} as $$
        begin
          perform ('${randomUUID()}'::pg_catalog.text)::uuid;
        exception when others then null;
        end $$`)
      await db.sql('alter function evil.bait() owner to keyledger_owner')
      const { client, trapped } = await session('keyledger_member', userId, poison)
      await client.query('select evil.bait()').finally(() => client.end())
      assert.is(trapped.length > 0, springs, `${name}: ${path || 'no path'}: ${trapped}`)
    }
  await db.sql('update data.account_balance set low_balance_threshold = null')
})

for (const role of roles)
  for (const [name, poison] of Object.entries(poisons))
    test(`${role} among ${name}: no function or trigger runs its code as the owner`, async () => {
      const w = await world()
      const { client, trapped } = await session(role, w.userId, poison)
      const failed: string[] = []
      const attempt = async (sql: string) => {
        await client.query(sql).catch((error) => failed.push(`${sql}: ${error.message}`))
        assert.equal(trapped, [], sql)
      }
      try {
        for (const view of await readable(role)) await attempt(`select * from api.${view} limit 5`)
        const names = await granted(role)
        // calls that end a row which others need come last
        const last = ['drop_usage_partitions', 'replay_parked_usage']
        names.sort((a, b) => last.indexOf(a) - last.indexOf(b))
        for (const name of names) {
          assert.ok(calls[name], `write a real call of ${name} into the table above`)
          await attempt(`select * from api.${name}(${calls[name]!(w)})`)
        }
        for (const view of await writable(role)) {
          assert.ok(writes[view], `write what can be done to ${view} into the table above`)
          for (const sql of writes[view]!(w)) await attempt(sql)
        }
        for (const [code, sql] of Object.entries(refusals)) {
          if (!(await writable(role)).length) break
          const refused = await client.query(sql(w)).catch((error) => `${error.code} ${error.message}`)
          assert.equal([refused, trapped], [code, []])
        }
        await client.query('select pg_catalog.pg_stat_force_next_flush()')
      } finally {
        await client.end()
      }
      assert.equal(failed, [], 'every call was a real one')
      assert.equal(await db.sql('select from data.account_balance where low_balance_threshold = 777'), [])
    })

test('the calls fired each trigger, and so each trigger function', async () => {
  const unfired = await db.sql(`
    select distinct p.oid::regprocedure::text as name
    from pg_trigger t
    join pg_class c on c.oid = t.tgrelid
    join pg_proc p on p.oid = t.tgfoid
    where not t.tgisinternal and c.relnamespace = 'data'::regnamespace
      and not exists (select from pg_stat_user_functions f where f.funcid = p.oid and f.calls > 0)
    order by 1`)
  assert.equal(
    unfired.map(({ name }) => name),
    [
      // the statistics don't count a call that raises: the refusals fired these
      'data.check_written()',
      // only deleting keys or changing history fires these, and no role may do either
      'data.forbid_change()',
      'data.forbid_truncate()',
      'data.keep_account()',
      // as check_written
      'data.keep_node_identity()',
      'data.virtual_key_deleted()',
    ],
  )
})

test('only these functions and triggers reach a function of schema data', async () => {
  for (const role of [...roles, login])
    assert.equal(
      await db.sql(
        `select p.oid::regprocedure::text as name from pg_proc p
        where p.pronamespace = 'data'::regnamespace and has_function_privilege($1, p.oid, 'execute')
        union all
        select n.nspname from pg_namespace n where n.nspname = 'data' and has_schema_privilege($1, n.oid, 'usage, create')`,
        [role],
      ),
      [],
      role,
    )
  // a view calls catalog functions with its reader's rights and path; no role could call data's functions
  assert.equal(
    await db.sql(`
      select distinct r.ev_class::regclass::text as view, d.refobjid::regprocedure::text as calls
      from pg_rewrite r
      join pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = r.oid and d.refclassid = 'pg_proc'::regclass
      where r.ev_class in (select c.oid from pg_class c where c.relnamespace in ('api'::regnamespace, 'data'::regnamespace))`),
    [],
  )
})

test.run()
