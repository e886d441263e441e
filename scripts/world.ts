// A small world to try things in: Acme pays for Ann and Ben, Bob pays alone, and one node serves
// model demo.
import pg from 'pg'

/**
 * Makes tenants, users, keys, a node and its prices, as an operator would. `databaseUrl` is of a
 * login that may become keyledger_operator; `endpoint` is the node's address. Gives the lines that
 * `make dev` prints.
 */
export async function sampleWorld(databaseUrl: string, endpoint: string) {
  const client = new pg.Client(databaseUrl)
  await client.connect()
  const one = async (text: string, ...values: unknown[]) => (await client.query(text, values)).rows[0]
  const user = async (display_name: string, tenant_id: string | null, tenant_role = 'member') => {
    const { id } = await one(
      `insert into api.user_profiles (display_name, tenant_id, tenant_role) values ($1, $2, $3) returning id`,
      ...[display_name, tenant_id, tenant_role],
    )
    const nodes = [node.id]
    const key = await one(
      `select id, virtual_key from api.create_virtual_key($1, $2, config_node_ids => $3)`,
      ...[id, `${display_name}'s key`, nodes],
    )
    return { id, key }
  }
  await client.query('set role keyledger_operator')
  const node = await one(
    `insert into api.config_nodes (name, provider, model, endpoint) values ('demo', 'local', 'demo', $1) returning id`,
    endpoint,
  )
  // in force since before the first event, whose time has only milliseconds
  await client.query(
    `insert into api.prices (config_node_id, meter, unit_price, unit_size, effective_from)
     select $1, meter, unit_price, 1000000, now() - interval '1 minute'
     from (values ('input_tokens', 2.50), ('cached_input_tokens', 1.25), ('output_tokens', 10)) as p (meter, unit_price)`,
    [node.id],
  )
  const acme = await one(`insert into api.tenants (name) values ('Acme') returning id`)
  const ann = await user('Ann', acme.id, 'admin')
  await user('Ben', acme.id)
  const bob = await user('Bob', null)
  await one(`select from api.top_up($1, 25, reference => 'invoice-1')`, acme.id)
  await one(`select from api.top_up($1, 5, reference => 'card-1')`, bob.id)
  await client.end()
  return {
    VIRTUAL_KEY: ann.key.virtual_key as string,
    KEY_ID: ann.key.id as string,
    USER_ID: ann.id as string,
    TENANT_ID: acme.id as string,
    NODE_ID: node.id as string,
    UPSTREAM_URL: endpoint,
  }
}
