// The population behind the traffic: tenants, users, keys, nodes and prices, made through schema
// `api` like an operator's.
import { randomUUID } from 'node:crypto'
import pg from 'pg'
import { type Random, weighted } from './trace.ts'

export interface PopulationOptions {
  /** The URL of a login that may become keyledger_operator. */
  databaseUrl: string
  random: Random
  users: number
  tenants: number
  /** Decimal strings, per million tokens. */
  inputPrice: string
  outputPrice: string
  /** Decimal string, paid into each account that pays; '0' for none. */
  funds: string
  /** Called with the keys made so far, and how many there will be. */
  progress?: (done: number, total: number) => void
}

export interface Key {
  virtualKey: string
  /** Nodes mounted on it. */
  nodes: string[]
  /** Its share of the traffic. */
  weight: number
}

export interface Population {
  keys: Key[]
  /** Draws a key by its share of the traffic. */
  pick(): Key
}

const nodeCount = 3
const seedingBatch = 500

/**
 * A tenth of the users pay for themselves and make a tenth of the traffic. Of the rest, tenant n
 * has a share of 1/n, and so has the nth user within a tenant: a few make most of the traffic. A
 * fifth of the users has a second key.
 */
export async function populate(options: PopulationOptions): Promise<Population> {
  const { random, inputPrice, outputPrice, funds, progress = () => {} } = options
  const tenants = Array.from({ length: options.tenants }, (_, n) => ({
    id: randomUUID(),
    name: `tenant ${n + 1}`,
    weight: 1 / (n + 1),
    users: 0,
  }))
  const pickTenant = weighted(tenants.map(({ weight }) => weight))
  const loners = tenants.length ? Math.ceil(options.users / 10) : options.users
  const users = Array.from({ length: options.users }, (_, n) => {
    const tenant = n < loners ? undefined : (tenants[n - loners] ?? tenants[pickTenant(random)])
    const weight = tenant ? tenant.weight / ++tenant.users : 0
    return { id: randomUUID(), tenant_id: tenant?.id ?? null, display_name: `user ${n + 1}`, weight }
  })
  const others = users.reduce((sum, { weight }) => sum + weight, 0)
  for (const user of users.slice(0, loners)) user.weight = (others || 9) / 9 / loners

  const nodes = Array.from({ length: nodeCount }, (_, n) => ({ id: randomUUID(), name: `node ${n + 1}` }))
  const keys = users.flatMap(({ id, weight }) => {
    const count = random() < 0.2 ? 2 : 1
    return Array.from({ length: count }, () => {
      const first = Math.floor(random() * nodeCount)
      const mounted = 1 + Math.floor(random() * nodeCount)
      const config_node_ids = Array.from({ length: mounted }, (_, n) => nodes[(first + n) % nodeCount]!.id)
      return { user_id: id, config_node_ids, weight: weight / count }
    })
  })

  const client = new pg.Client(options.databaseUrl)
  await client.connect()
  const rows = async (text: string, ...values: unknown[]) => (await client.query(text, values)).rows
  const made: string[] = []
  try {
    await rows('set role keyledger_operator')
    await rows(
      'insert into api.tenants (id, name) select id, name from json_to_recordset($1) as t (id uuid, name text)',
      JSON.stringify(tenants),
    )
    await rows(
      `insert into api.user_profiles (id, tenant_id, display_name) select id, tenant_id, display_name
       from json_to_recordset($1) as u (id uuid, tenant_id uuid, display_name text)`,
      JSON.stringify(users),
    )
    await rows(
      `insert into api.config_nodes (id, name) select id, name from json_to_recordset($1) as n (id uuid, name text)`,
      JSON.stringify(nodes),
    )
    // in force since before the first event, whose time has only milliseconds
    await rows(
      `insert into api.prices (config_node_id, meter, unit_price, unit_size, effective_from)
       select id, meter, price, 1000000, now() - interval '1 minute'
       from unnest($1::uuid[]) as id,
         (values ('input_tokens', $2::numeric), ('output_tokens', $3::numeric)) as p (meter, price)`,
      nodes.map(({ id }) => id),
      inputPrice,
      outputPrice,
    )
    if (Number(funds) > 0) {
      await rows(
        `select from unnest($1::uuid[]) as id cross join lateral api.top_up(id, $2, reference => 'demo')`,
        [...tenants, ...users.slice(0, loners)].map(({ id }) => id),
        funds,
      )
    }
    while (made.length < keys.length) {
      const created = await rows(
        `select k.virtual_key from rows from (json_to_recordset($1) as (user_id uuid, config_node_ids uuid[]))
           with ordinality as w (user_id, config_node_ids, position)
         cross join lateral api.create_virtual_key(w.user_id, config_node_ids => w.config_node_ids) k
         order by w.position`,
        JSON.stringify(keys.slice(made.length, made.length + seedingBatch)),
      )
      for (const { virtual_key } of created) made.push(virtual_key)
      progress(made.length, keys.length)
    }
  } finally {
    await client.end()
  }

  const population = keys.map(({ config_node_ids, weight }, n) => ({
    virtualKey: made[n]!,
    nodes: config_node_ids,
    weight,
  }))
  const pickKey = weighted(population.map(({ weight }) => weight))
  return { keys: population, pick: () => population[pickKey(random)]! }
}
