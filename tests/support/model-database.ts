// The database's side of the model test: makes a world, and reads its state in the terms of the model.
import type pg from 'pg'
import type { Database, Row } from './database.ts'
import { figuresOf, openAccount, type User, type World } from './model.ts'

/** A new world on the database at a full hour: a tenant with a member, and a user who pays alone. */
export async function begin(db: Database, nodeId: string): Promise<World> {
  // at a full hour, so that no test step meets the turn of a day
  const [{ began }] = (await db.sql(
    `update clock.ahead set seconds = extract(epoch from date_trunc('hour', now() + interval '1 hour') - now())
    returning date_trunc('hour', now() + interval '1 hour') as began`,
  )) as [Row]
  const [{ ids }] = (await db.operator(
    `with tenant as (insert into api.tenants (name) values ('model') returning id),
      alone as (insert into api.user_profiles (display_name) values ('model') returning id)
    select array(select id from tenant) || array(select id from alone) as ids`,
  )) as [Row]
  const [tenantId, ...alone] = ids as string[]
  const members = await db.operator(
    'insert into api.user_profiles (tenant_id) values ($1) returning id, tenant_id',
    [tenantId],
  )
  const keys = await db.operator(
    `select u.id, k.id as key_id from unnest($1::uuid[]) as u (id)
    cross join lateral api.create_virtual_key(u.id, config_node_ids => array[$2::uuid]) k`,
    [[...alone, ...members.map(({ id }) => id)], nodeId],
  )
  const users = keys.map(({ id, key_id }): [string, User] => [
    id,
    {
      id,
      keyId: key_id,
      tenantId: members.find((member) => member.id === id)?.tenant_id ?? null,
      suspended: false,
    },
  ])
  const accounts = new Map(
    [...ids, ...members.map(({ id }) => id)].map((id) => [id as string, openAccount(id)]),
  )
  const world: World = {
    began: began.getTime(),
    now: 0,
    hour: new Map(),
    accounts,
    users: new Map(users),
    budgets: [],
    parked: [],
  }
  world.hour.set(0, figuresOf(world))
  return world
}

// a session that plans once: planning these views takes longer than reading them
let session: Promise<pg.Client> | undefined
async function reader(db: Database): Promise<pg.Client> {
  session ??= (async () => {
    const client = await db.session()
    db.onClose(() => client.end())
    await client.query('set plan_cache_mode = force_generic_plan')
    return client
  })()
  return session
}

/** The state of the database, in the terms of the model. */
export async function read(
  db: Database,
  accounts: string[],
  touched: string[],
): Promise<[Map<string, unknown>, Row[]]> {
  const client = await reader(db)
  const sql = async (name: string, text: string, values: unknown[]): Promise<Row[]> =>
    (await client.query({ name, text, values })).rows
  const rows = await sql(
    'figures',
    `select a.account_id,
      array[a.balance, a.free_credit, a.credit_limit, a.frozen_balance, a.outstanding_amount, a.available]::text[] as figures,
      array(select g.seq || ': ' || g.remaining from data.credit_grant g where g.account_id = a.account_id and g.remaining > 0
        and (g.expires_at is null or g.expires_at > clock.clock_timestamp()) order by g.seq) as grants,
      array(select h.id || ' ' || h.status || ' ' || h.captured || '/' || h.amount from api.holds h
        where h.account_id = a.account_id order by 1) as holds,
      array(select concat_ws(' ', t.seq, t.kind, t.balance_delta, t.free_credit_delta, t.outstanding_delta, t.credit_limit_after)
        from data.billing_transaction t where t.account_id = a.account_id order by t.seq) as entries,
      array(select concat_ws(' ', b.id, b.period, b.amount, b.spent, b.held) from api.budgets b
        where b.account_id = a.account_id order by 1) as budgets,
      array(select l.id || ' ' || l.cost || ' ' || l.transaction_seq from data.usage_log l
        where l.account_id = a.account_id order by 1) as usage
    from api.billing_accounts a where a.account_id = any ($1)`,
    [accounts],
  )
  const problems = await sql(
    'problems',
    'select v.* from unnest($1::uuid[]) as a (id) cross join lateral api.verify_balances(a.id) v',
    [touched],
  )
  return [new Map(rows.map(({ account_id, ...has }) => [account_id, has])), problems]
}
