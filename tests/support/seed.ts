// A small world for a test: a payer with money, its user, a key, and a priced node mounted on it.
import { createHash, randomUUID } from 'node:crypto'
import type { Sql } from './database.ts'

export interface World {
  /** Null for a user who pays alone. */
  tenantId: string | null
  userId: string
  /** The payer's: the tenant's id, or the user's. */
  accountId: string
  nodeId: string
  keyId: string
  /** The raw key. */
  key: string
  /** Its sha-256, 64 lower hex digits. */
  keyHash: string
}

/**
 * Makes the world as the operator. `funds` are paid in (default '100'); `alone` makes a user without a tenant. Prices per
 * million tokens: `input_tokens` 2.50, `output_tokens` 10.00, in USD, at any time since 2020.
 */
export async function seed(operator: Sql, { funds = '100', alone = false } = {}): Promise<World> {
  const id = async (text: string, values: unknown[]) => (await operator(text, values))[0]!.id as string
  const tenantId = alone
    ? null
    : await id('insert into api.tenants (name) values ($1) returning id', ['tenant'])
  const userId = await id('insert into api.user_profiles (tenant_id) values ($1) returning id', [tenantId])
  const accountId = tenantId ?? userId
  const nodeId = await id('insert into api.config_nodes (name) values ($1) returning id', [
    `node ${randomUUID()}`,
  ])
  await operator(
    `insert into api.prices (config_node_id, meter, unit_price, unit_size, effective_from)
     values ($1, 'input_tokens', 2.50, 1000000, '2020-01-01'), ($1, 'output_tokens', 10.00, 1000000, '2020-01-01')`,
    [nodeId],
  )
  const made = await operator(
    'select id, virtual_key from api.create_virtual_key($1, config_node_ids => $2)',
    [userId, [nodeId]],
  )
  const { id: keyId, virtual_key: key } = made[0]!
  if (Number(funds)) await operator('select seq from api.top_up($1, $2)', [accountId, funds])
  return {
    tenantId,
    userId,
    accountId,
    nodeId,
    keyId,
    key,
    keyHash: createHash('sha256').update(key).digest('hex'),
  }
}
