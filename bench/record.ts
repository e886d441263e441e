// Recording usage through the client and pg, against one transaction a request: an update and an insert, in one function.
import pg from 'pg'
import { createBillingModule, newId, pgRpc } from './library.ts'
import { compare, perSecond, type Stage, type Verdict } from './support.ts'

const inFlight = 64
const seconds = 2
const rounds = 5
// pg's default, and a connection for each request in flight; the baseline is given the better one
const poolSizes = [10, 64]

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
  await rows('vacuum analyze')

  const rpc = pgRpc({ connectionString: url })
  const module = createBillingModule({ rpc, listen: url })
  await module.start()
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
  const record = async (key: (typeof keys)[number]) => {
    const answer = await module.recordUsage({ ...key, config_node_id: node, meters })
    if (answer.status !== 'charged') throw new Error(`not charged: ${JSON.stringify(answer)}`)
  }

  const verdicts: Verdict[] = []
  for (const { accounts, target } of [
    { accounts: 1, target: 10 },
    { accounts: 1000, target: 2 },
  ]) {
    const next = () => keys[turn++ % accounts]!
    const tried = new Map<number, number>()
    for (const [size, pool] of pools) {
      await perSecond(inFlight, seconds / 2, () => charge(pool, next()))
      tried.set(size, await perSecond(inFlight, seconds, () => charge(pool, next())))
    }
    const [best] = [...tried].sort((a, b) => b[1] - a[1])[0]!
    const sizes = [...tried].map(([size, rate]) => `${size} connections ${Math.round(rate)}/s`).join(', ')
    console.log(`baseline over ${accounts} account(s): ${sizes}; compared with ${best}`)
    verdicts.push(
      await compare(
        `record usage, ${inFlight} in flight, ${accounts} account(s)`,
        target,
        rounds,
        () => perSecond(inFlight, seconds, () => charge(pools.get(best)!, next())),
        () => perSecond(inFlight, seconds, () => record(next())),
      ),
    )
  }

  await module.stop()
  await rpc.close()
  for (const pool of pools.values()) await pool.end()
  await admin.end()
  return verdicts
}
