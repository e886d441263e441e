// Recording usage through the client and pg, against one transaction a request: an update and an
// insert, in one function. And, for this machine's limit, the same client against a bare ledger: no
// prices, no keys, no hashes, no checks.
import pg from 'pg'
import { createBillingModule, newId, pgRpc } from './library.ts'
import { compare, perSecond, type Stage, type Verdict } from './support.ts'

const inFlight = 64
const seconds = 2
const rounds = 5
// a connection for each request in flight, and pg's default
const poolSizes = [64, 10]

const baselineSql = `
  create schema baseline;
  create table baseline.account (id uuid primary key, balance numeric not null);
  create table baseline.log (
    id uuid primary key, account_id uuid not null, virtual_key_id uuid not null, config_node_id uuid not null,
    meters jsonb not null, cost numeric not null, created_at timestamptz not null default now());
  create function baseline.charge(
    id uuid, account_id uuid, virtual_key_id uuid, config_node_id uuid, meters jsonb, cost numeric)
  returns numeric language plpgsql as $$
  declare
    v_balance numeric;
  begin
    update baseline.account a set balance = a.balance - charge.cost where a.id = charge.account_id
    returning a.balance into v_balance;
    insert into baseline.log (id, account_id, virtual_key_id, config_node_id, meters, cost)
    values (charge.id, charge.account_id, charge.virtual_key_id, charge.config_node_id, charge.meters, charge.cost);
    return v_balance;
  end
  $$;
  insert into baseline.account select account_id, 1000000 from api.billing_accounts;`

const bareSql = `
  create schema bare;
  create table bare.account (id uuid primary key, balance numeric not null, seq bigint not null default 0) with (fillfactor = 50);
  create table bare.entry (
    account_id uuid, seq bigint, amount numeric not null, balance_after numeric not null, usage_count integer not null,
    created_at timestamptz not null default now(), primary key (account_id, seq));
  create table bare.log (
    account_id uuid, id uuid, seq bigint not null, virtual_key_id uuid not null, config_node_id uuid not null,
    meters jsonb not null, cost numeric not null, created_at timestamptz not null default now(), primary key (account_id, id));
  insert into bare.account select account_id, 1000000 from api.billing_accounts;
  create function api.bare_record_usage(events jsonb) returns jsonb
  language plpgsql security definer
  set plan_cache_mode = force_generic_plan set enable_seqscan = off set jit = off
  as $$
  declare
    v_answers jsonb;
  begin
    perform from bare.account a
    where a.id in (select (e ->> 'account_id')::uuid from jsonb_array_elements(events) e) order by a.id for update;
    with event as materialized (
      select *, 0.0013750000 as cost
      from rows from (jsonb_to_recordset(events) as (
        id uuid, account_id uuid, virtual_key_id uuid, config_node_id uuid, meters jsonb)) with ordinality
    ), charged as (
      update bare.account a set balance = a.balance - s.cost, seq = a.seq + 1
      from (select account_id, sum(cost) as cost, count(*) as usage_count from event group by account_id) s
      where a.id = s.account_id
      returning a.*, s.cost, s.usage_count
    ), entered as (
      insert into bare.entry (account_id, seq, amount, balance_after, usage_count)
      select id, seq, cost, balance, usage_count from charged
    ), logged as (
      insert into bare.log (account_id, id, seq, virtual_key_id, config_node_id, meters, cost)
      select e.account_id, e.id, c.seq, e.virtual_key_id, e.config_node_id, e.meters, e.cost
      from event e join charged c on c.id = e.account_id
      on conflict do nothing
    )
    select jsonb_agg(jsonb_build_object(
      'id', e.id, 'status', 'charged', 'cost', e.cost::text, 'available', c.balance::text, 'seq', c.seq) order by e.ordinality)
    into v_answers
    from event e join charged c on c.id = e.account_id;
    return v_answers;
  end
  $$;
  grant execute on function api.bare_record_usage(jsonb) to keyledger_gateway`

/** Both comparisons: one hot account, and a thousand. */
export async function benchRecord({ adminUrl, url }: Stage): Promise<Verdict[]> {
  const admin = new pg.Client(adminUrl)
  await admin.connect()
  const rows = async (text: string, ...values: unknown[]) => (await admin.query(text, values)).rows
  const [{ id: node }] = await rows(`insert into api.config_nodes (name) values ('node') returning id`)
  await rows(
    `insert into api.prices (config_node_id, meter, unit_price, unit_size, effective_from)
     select $1, meter, price, 1000000, now() - interval '1 minute'
     from (values ('input_tokens', 2.5), ('output_tokens', 10)) as p (meter, price)`,
    node,
  )
  const keys: { account_id: string; virtual_key_id: string }[] = await rows(
    `with made as (
       insert into api.user_profiles (id) select gen_random_uuid() from generate_series(1, 1000) returning id
     )
     select id as account_id, (api.create_virtual_key(id, config_node_ids => array[$1::uuid])).id as virtual_key_id from made`,
    node,
  )
  await rows(
    'select api.top_up(id, 1000000) from unnest($1::uuid[]) as id',
    keys.map((key) => key.account_id),
  )
  await rows(baselineSql)
  await rows(bareSql)
  await rows('vacuum analyze')

  const rpc = pgRpc({ connectionString: url })
  const module = createBillingModule({ rpc, changes: { listen: url } })
  await module.start()
  const bare = createBillingModule({
    rpc: {
      ...rpc,
      call: (fn: string, args: object) =>
        rpc.call(fn.replace('record_usage', 'bare_record_usage'), { ...args }),
    } as typeof rpc,
  })
  const pools = new Map(
    poolSizes.map((max) => [max, new pg.Pool({ connectionString: adminUrl, max }).on('error', () => {})]),
  )
  let turn = 0
  const meters = { input_tokens: 374, output_tokens: 44 }
  const charge = (pool: pg.Pool, { account_id, virtual_key_id }: (typeof keys)[number]) =>
    pool.query({
      name: 'charge',
      text: 'select baseline.charge($1, $2, $3, $4, $5, $6)',
      values: [newId(), account_id, virtual_key_id, node, meters, '0.0013750000'],
    })
  const record = async ({ recordUsage }: typeof module, key: (typeof keys)[number]) => {
    const answer = await recordUsage({ ...key, config_node_id: node, meters })
    if (answer.status !== 'charged') throw new Error(`not charged: ${JSON.stringify(answer)}`)
  }

  const verdicts: Verdict[] = []
  for (const { accounts, target } of [
    { accounts: 1, target: 10 },
    { accounts: 1000, target: 2 },
  ]) {
    const next = () => keys[turn++ % accounts]!
    for (const [size, pool] of pools) {
      const sides = (ours: typeof module) =>
        [
          () => perSecond(inFlight, seconds, () => charge(pool, next())),
          () => perSecond(inFlight, seconds, () => record(ours, next())),
        ] as const
      const name = `${accounts} account(s), ${inFlight} in flight, baseline with ${size} connections`
      verdicts.push(await compare(`record usage, ${name}`, target, rounds, ...sides(module)))
      // no target of its own: it shows how high the target can be here
      await compare(`a bare ledger, ${name}`, 0, rounds, ...sides(bare))
    }
  }

  await module.stop()
  await bare.stop()
  await rpc.close()
  for (const pool of pools.values()) await pool.end()
  await admin.end()
  return verdicts
}
