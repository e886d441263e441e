// A small world for a test: a payer with money, its user, a key, and a priced node mounted on it.
import { createHash, randomUUID } from 'node:crypto'
import type { Sql } from './database.ts'
import { newId } from './ids.ts'

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

/** Each meter's unit price and unit size. */
type Prices = Record<string, [price: string, size: number]>

const tokenPrices: Prices = { input_tokens: ['2.50', 1_000_000], output_tokens: ['10.00', 1_000_000] }

export interface Seeding {
  /** Paid in, in USD. */
  funds?: string
  /** Makes no tenant: the user is of `tenantId`, or pays alone. */
  alone?: boolean
  tenantId?: string | null
  /** In USD, at any time since 2020; by default a million input tokens cost 2.50, output tokens 10.00. */
  prices?: Prices
}

/** Makes the world as the operator. */
export async function seed(
  operator: Sql,
  { funds = '100', tenantId: given = null, alone = given !== null, prices = tokenPrices }: Seeding = {},
): Promise<World> {
  const id = async (text: string, values: unknown[]) => (await operator(text, values))[0]!.id as string
  const tenantId = alone
    ? given
    : await id('insert into api.tenants (name) values ($1) returning id', ['tenant'])
  const userId = await id('insert into api.user_profiles (tenant_id) values ($1) returning id', [tenantId])
  const accountId = tenantId ?? userId
  const nodeId = await id('insert into api.config_nodes (name) values ($1) returning id', [
    `node ${randomUUID()}`,
  ])
  const priced = Object.entries(prices)
  await operator(
    `insert into api.prices (config_node_id, meter, unit_price, unit_size, effective_from)
     select $1, p.meter, p.price, p.size, '2020-01-01'
     from unnest($2::text[], $3::numeric[], $4::integer[]) as p (meter, price, size)`,
    [
      nodeId,
      priced.map(([meter]) => meter),
      priced.map(([, [price]]) => price),
      priced.map(([, [, size]]) => size),
    ],
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

/** A request to hold an amount for the world's key. */
export const hold = ({ accountId, keyId }: World, amount: string, id = newId()) => ({
  id,
  account_id: accountId,
  virtual_key_id: keyId,
  amount,
})

/** An event without a hold; a million tokens cost 2.50. */
export const event = ({ accountId, keyId, nodeId }: World, tokens: number, id = newId()) => ({
  id,
  account_id: accountId,
  virtual_key_id: keyId,
  config_node_id: nodeId,
  meters: { input_tokens: tokens },
})
