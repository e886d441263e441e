// Rights: every api function and view, as every role, against one table of expectations.
import pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Role } from '../support/database.ts'

const test = suite('roles')
const db = await database(test)

// A new function or view fails here until it has a line in this table.
const gateway = 'keyledger_gateway'
const operator = 'keyledger_operator'
const member = 'keyledger_member'

const functions: Record<string, string[]> = {
  account_news: [gateway, operator],
  adjust_balance: [operator],
  assign_price_book: [operator],
  balance_at: [operator],
  cache_changes: [gateway],
  check_budget: [gateway, operator],
  close_period: [operator],
  create_virtual_key: [operator],
  dismiss_parked_usage: [operator],
  drop_usage_partitions: [operator],
  explain_charge: [operator, member],
  extend_holds: [gateway],
  freeze_funds: [operator],
  grant_credit: [operator],
  id_at: [gateway, operator, member],
  import_provider_bill: [operator],
  import_virtual_keys: [operator],
  installation_warnings: [operator],
  maintain: [gateway, operator],
  margins: [operator],
  new_id: [gateway, operator],
  place_holds: [gateway],
  provider_differences: [operator],
  record_openings: [operator],
  record_usage: [gateway],
  refund_charge: [operator],
  release_holds: [gateway],
  remove_budget: [operator],
  replay_parked_usage: [operator],
  resolve_billing_account: [gateway],
  resolve_virtual_key: [gateway],
  resolve_virtual_keys: [gateway],
  reverse_top_up: [operator],
  revoke_virtual_key: [operator],
  rotate_virtual_key: [operator],
  set_budget: [operator],
  set_credit_limit: [operator],
  set_low_balance_threshold: [operator],
  set_rates: [operator],
  set_status: [operator],
  set_time_zone: [operator],
  spend: [operator, member],
  statement: [operator, member],
  top_up: [operator],
  unfreeze_funds: [operator],
  verify_balances: [operator],
  verify_ledger: [operator],
}

const read = 'select'
const views: Record<string, Record<string, string>> = {
  account_balances: { [gateway]: read, [operator]: read, [member]: read },
  accounting_snapshots: { [operator]: read, [member]: read },
  billing_accounts: { [gateway]: read, [operator]: read, [member]: read },
  billing_transactions: { [operator]: read, [member]: read },
  budgets: { [gateway]: read, [operator]: read, [member]: read },
  config_nodes: {
    [gateway]: read,
    [operator]:
      'select, insert (context_meters, endpoint, id, model, name, provider, status), update (context_meters, endpoint, id, model, name, provider, status)',
  },
  holds: { [gateway]: read, [operator]: read, [member]: read },
  minimum_charges: {
    [operator]: 'select, insert (config_node_id, currency, effective_from, minimum, price_book_id)',
  },
  my_prices: { [member]: read },
  parked_usage: { [operator]: read },
  price_book_assignments: { [operator]: read },
  price_book_factors: { [operator]: 'select, insert (effective_from, factor, price_book_id)' },
  price_books: { [operator]: 'select, insert (currency, id, kind, name), update (name)' },
  prices: {
    [gateway]: read,
    [operator]:
      'select, insert (config_node_id, context_over, currency, effective_from, hours, meter, price_book_id, unit_price, unit_size, variant)',
  },
  status_changes: { [operator]: read, [member]: read },
  tenants: {
    [operator]:
      'select, insert (currency, external_id, id, name, status), update (currency, external_id, id, name, status)',
    [member]: read,
  },
  usage_costs: { [operator]: read },
  usage_logs: { [operator]: read, [member]: read },
  user_profiles: {
    [operator]:
      'select, insert (currency, display_name, external_id, id, status, tenant_id, tenant_role), update (currency, display_name, external_id, id, status, tenant_id, tenant_role)',
    [member]: read,
  },
  virtual_key_config_nodes: {
    [gateway]: read,
    [operator]:
      'select, insert (config_node_id, virtual_key_id), update (config_node_id, virtual_key_id), delete',
  },
  virtual_keys: { [operator]: read, [member]: read },
}

// A login that was granted nothing, and the login role before `set role`: neither may do anything.
const stranger = `${db.name}_stranger`
const login = new URL(db.loginUrl).username
await db.sql(`create role ${stranger} login password 'stranger'`)
const strangerUrl = new URL(db.url)
Object.assign(strangerUrl, { username: stranger, password: 'stranger' })
const logins = {
  [stranger]: new pg.Pool({ connectionString: strangerUrl.href }),
  [login]: new pg.Pool({ connectionString: db.loginUrl }),
}
db.onClose(async () => {
  for (const pool of Object.values(logins)) await pool.end()
  await db.sql(`drop role ${stranger}`)
})

const roles = [gateway, operator, member, stranger, login]
const as = (role: string) => (sql: string) =>
  logins[role] ? logins[role].query(sql) : db.as(role as Role)(sql)

// 42501, another code, or 'done'
const attempt = (role: string, sql: string): Promise<string> =>
  as(role)(sql).then(
    () => 'done',
    (error) => error.code,
  )

const apiFunctions = () =>
  db.sql(`select p.oid, p.proname as name,
      (select coalesce(string_agg(format('null::%s', format_type(t, null)), ', ' order by n), '')
        from unnest(p.proargtypes) with ordinality as a (t, n)) as nulls
    from pg_proc p where p.pronamespace = 'api'::regnamespace order by 2`)

const apiViews = () =>
  db.sql(`select c.oid, c.relname as name, array(
      select a.attname::text from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 order by 1) as columns
    from pg_class c where c.relnamespace = 'api'::regnamespace and c.relkind <> 'c' order by 2`)

const expected = (view: string, role: string) => views[view]![role] ?? ''
const columnsOf = (right: string, rights: string) =>
  (new RegExp(`${right} \\(([^)]*)\\)`).exec(rights)?.[1] ?? '').split(', ')

test('every role may call exactly the functions of the table', async () => {
  const found = await apiFunctions()
  assert.equal(
    found.map(({ name }) => name),
    Object.keys(functions),
    'add the roles that may call it to the table above',
  )
  for (const { oid, name, nulls } of found)
    for (const role of roles) {
      const may = functions[name]!.includes(role)
      const [granted] = await db.sql(`select has_function_privilege($1, $2::oid, 'execute') as it`, [
        role,
        oid,
      ])
      assert.is(granted!.it, may, `${role} may execute ${name}`)
      const code = await attempt(role, `select api.${name}(${nulls})`)
      assert.is(code !== '42501', may, `${role} calls ${name}: ${code}`)
    }
})

test('every role may use each view exactly as the table says', async () => {
  const found = await apiViews()
  assert.equal(
    found.map(({ name }) => name),
    Object.keys(views),
    'add the rights of each role to the table above',
  )
  for (const { oid, name } of found)
    for (const role of roles) {
      const [granted] = await db.sql(
        `select coalesce(string_agg(r.name || c.columns, ', ' order by r.n), '') as rights
        from unnest(array['select', 'insert', 'update', 'delete', 'truncate', 'references', 'trigger'])
          with ordinality as r (name, n)
        cross join lateral (
          select case
            when has_table_privilege($1, $2::oid, r.name) then ''
            when r.name in ('select', 'insert', 'update', 'references') then (
              select format(' (%s)', string_agg(a.attname, ', ' order by a.attname))
              from pg_attribute a
              where a.attrelid = $2::oid and a.attnum > 0 and has_column_privilege($1, $2::oid, a.attnum, r.name)
              having count(*) > 0)
          end as columns
        ) c where c.columns is not null`,
        [role, oid],
      )
      assert.is(granted!.rights, expected(name, role), `${role} on ${name}`)
    }
})

test('each right that a role lacks on a view is refused when tried', async () => {
  for (const { name, columns } of await apiViews())
    for (const role of roles) {
      const rights = expected(name, role)
      const may = (right: string, sql: string) =>
        attempt(role, sql).then((code) => {
          // nobody can write a view of several tables (55000), a computed (0A000) or a generated column (428C9)
          const outcome = ['42501', '55000', '0A000', '428C9'].includes(code) ? 'refused' : code
          assert.is(outcome, right ? 'done' : 'refused', `${role}: ${sql}: ${code}`)
        })
      const has = (right: string) => (rights.split(/[, ]+/).includes(right) ? right : '')
      await may(has('select'), `select * from api.${name} limit 0`)
      await may(has('delete'), `delete from api.${name} where false`)
      for (const column of columns as string[]) {
        const [inserts, updates] = ['insert', 'update'].map((right) =>
          columnsOf(right, rights).includes(column) ? right : '',
        )
        const source = `select ${column} from api.${name} where false`
        await may(
          inserts!,
          `insert into api.${name} (${column}) ${has('select') ? source : 'select null where false'}`,
        )
        await may(updates!, `update api.${name} set ${column} = null where false`)
      }
    }
})

test('only the owner may use schema data and its objects', async () => {
  const granted = await db.sql(`
    with object as (
      select 'schema ' || n.nspname as name, coalesce(n.nspacl, acldefault('n'::"char", n.nspowner)) as acl, n.nspowner as owner
      from pg_namespace n where n.nspname = 'data'
      union all
      select 'relation ' || c.relname, coalesce(c.relacl, acldefault((case c.relkind when 'S' then 's' else 'r' end)::"char", c.relowner)), c.relowner
      from pg_class c where c.relnamespace = 'data'::regnamespace
      union all
      select 'column ' || c.relname || '.' || a.attname, a.attacl, c.relowner
      from pg_class c join pg_attribute a on a.attrelid = c.oid where c.relnamespace = 'data'::regnamespace
      union all
      select 'function ' || p.oid::regprocedure, coalesce(p.proacl, acldefault('f'::"char", p.proowner)), p.proowner
      from pg_proc p where p.pronamespace = 'data'::regnamespace
      union all
      -- a table's row type has no rights of its own
      select 'type ' || t.typname, coalesce(t.typacl, acldefault('T'::"char", t.typowner)), t.typowner
      from pg_type t where t.typnamespace = 'data'::regnamespace and t.typrelid = 0 and t.typelem = 0
    )
    select o.name, o.owner::regrole::text as owner, g.grantee::regrole::text, g.privilege_type
    from object o left join lateral aclexplode(o.acl) g on g.grantee <> o.owner
    where g.grantee is not null or o.owner <> 'keyledger_owner'::regrole`)
  assert.equal(granted, [])
  for (const role of roles)
    for (const sql of [
      'select from data.tenant',
      `select from data.usage_log_${new Date().toISOString().slice(0, 7).replace('-', '_')}`,
      'select from data.key_context',
      'select data.actor()',
      'update data.account_balance set balance = 1',
      'create table data.mine ()',
      'create table api.mine ()',
    ])
      assert.is(await attempt(role, sql), '42501', `${role}: ${sql}`)
})

test('the roles hold no more than their grants', async () => {
  const found = await db.sql(
    `
    select rolname, rolsuper or rolcreaterole or rolcreatedb or rolcanlogin or rolreplication or rolbypassrls as more,
      array(select m.roleid::regrole::text from pg_auth_members m where m.member = r.oid) as member_of
    from pg_roles r where starts_with(rolname, 'keyledger_') and rolname <> all ($1) order by 1`,
    [[stranger, login]],
  )
  assert.equal(
    found.filter(({ rolname }) => !rolname.startsWith('keyledger_test_')),
    [gateway, member, operator, 'keyledger_owner'].map((rolname) => ({
      rolname,
      more: false,
      member_of: [],
    })),
  )
})

test('every table has row-level security without a policy, and every object has its owner and a comment', async () => {
  // a partition made later is as closed as the first ones
  await db.sql(`update data.accepted_ids set floor = floor - interval '1 month'`)
  const [maintained] = await db.operator(`select api.maintain() -> 'usage_partitions_made' as made`)
  const made: string[] = maintained!.made
  assert.is(made.length, 1)
  const relations = await db.sql(`
    select c.oid::regclass::text as name, c.relkind, c.relispartition, c.relrowsecurity, c.relowner::regrole::text as owner,
      c.reloptions, obj_description(c.oid, 'pg_class') as comment,
      exists (select from pg_policy p where p.polrelid = c.oid) as has_policy,
      has_table_privilege('keyledger_member', c.oid, 'select') as for_members
    from pg_class c where c.relnamespace in ('data'::regnamespace, 'api'::regnamespace) and c.relkind not in ('i', 'I', 'S', 'c')`)
  assert.ok(relations.some(({ name }) => name === `data.${made[0]}`))
  for (const { name, relkind, ...is } of relations) {
    assert.is(is.owner, 'keyledger_owner', name)
    if (!is.relispartition) assert.ok(is.comment, `${name} has a comment`)
    if (relkind !== 'v') assert.equal([is.relrowsecurity, is.has_policy], [true, false], name)
    // a reader's own function must not see rows before the filter has
    if (is.for_members) assert.equal(is.reloptions, ['security_barrier=true'], name)
  }
})

test('every api function is the owner’s, a commented security definer, with pg_temp last in its search path', async () => {
  for (const { name, comment, ...is } of await db.sql(`
    select p.oid::regprocedure::text as name, p.proowner::regrole::text as owner, p.prosecdef as definer,
      array(select s from unnest(p.proconfig) s where s like 'search_path=%') as path, obj_description(p.oid, 'pg_proc') as comment
    from pg_proc p where p.pronamespace = 'api'::regnamespace`)) {
    assert.equal(
      is,
      { owner: 'keyledger_owner', definer: true, path: ['search_path=pg_catalog, pg_temp'] },
      name,
    )
    assert.ok(comment, `${name} has a comment`)
  }
  const open = await db.sql(`select p.oid::regprocedure::text as name from pg_proc p
    where p.pronamespace = 'data'::regnamespace and p.prosecdef and not coalesce(p.proconfig @> array['search_path=pg_catalog, pg_temp'], false)`)
  assert.equal(open, [], 'only a security definer sets its search path')
})

test.run()
