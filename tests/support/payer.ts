// A payer, with the calls that a test of money makes on the account. Amounts are short decimals.
import type { Database, Row } from './database.ts'
import { newId } from './ids.ts'
import { seed } from './seed.ts'

export type Payer = Awaited<ReturnType<typeof payer>>

/** Opens the account, with a key and a node mounted on it, where one unit of meter `usd` costs 1. */
export async function payer(
  db: Database,
  { funds = '0', limit = '0', tenantId = null as string | null } = {},
) {
  const { operator, gateway } = db
  const one = async (rows: Promise<Row[]>): Promise<Row> => (await rows)[0]!
  const world = await seed(operator, { funds: '0', alone: true, tenantId, prices: { usd: ['1', 1] } })
  const { userId, accountId, nodeId, keyId, key } = world
  const batch = async (fn: string, elements: Row[]): Promise<Row[]> =>
    (await one(gateway(`select api.${fn}($1::jsonb) as answers`, [JSON.stringify(elements)]))).answers

  const account = {
    userId,
    accountId,
    nodeId,
    keyId,
    key,

    topUp: (amount: string, args = {}) => account.post('top_up', { amount, ...args }),
    adjust: (amount: string, args = {}) =>
      account.post('adjust_balance', { amount, reason: 'test', ...args }),
    grant: (amount: string, args = {}) => account.post('grant_credit', { amount, ...args }),
    limit: (credit_limit: string) => account.post('set_credit_limit', { credit_limit }),
    /** Calls a function with the account's id and named arguments. */
    post: (fn: string, args: Row): Promise<Row> => {
      const names = ['account_id', ...Object.keys(args)]
      const passed = names.map((name, i) => `${name} => $${i + 1}`).join(', ')
      return one(operator(`select * from api.${fn}(${passed})`, [accountId, ...Object.values(args)]))
    },

    event: (usd: string, more: Row = {}): Row => ({
      id: newId(),
      account_id: accountId,
      virtual_key_id: keyId,
      config_node_id: nodeId,
      meters: { usd },
      ...more,
    }),
    request: (amount: string, more: Row = {}): Row => ({
      id: newId(),
      account_id: accountId,
      virtual_key_id: keyId,
      amount,
      ...more,
    }),
    record: (...events: Row[]) => batch('record_usage', events),
    place: (...requests: Row[]) => batch('place_holds', requests),
    release: (...ids: string[]) =>
      batch(
        'release_holds',
        ids.map((id) => ({ id, account_id: accountId })),
      ),
    extend: (id: string, expires_in?: unknown) =>
      batch('extend_holds', [{ id, account_id: accountId, expires_in }]),
    use: async (usd: string, more: Row = {}): Promise<Row> =>
      (await account.record(account.event(usd, more)))[0]!,
    /** Places a hold that must succeed; gives its id. */
    hold: async (amount: string, more: Row = {}): Promise<string> => {
      const [answer] = await account.place(account.request(amount, more))
      if (answer!.status !== 'held') throw new Error(JSON.stringify(answer))
      return answer!.id
    },

    /** The figures that are not zero, as the view shows them. */
    figures: async (): Promise<Row> => {
      const names = [
        'balance',
        'free_credit',
        'credit_limit',
        'frozen_balance',
        'outstanding_amount',
        'available',
      ]
      const list = names.map((name) => `trim_scale(${name})::text as ${name}`).join(', ')
      const row = await one(
        operator(`select ${list} from api.billing_accounts where account_id = $1`, [accountId]),
      )
      return Object.fromEntries(Object.entries(row).filter(([, value]) => value !== '0'))
    },
    /** The entries after `seq`, as `kind amount: bucket delta, …`. */
    entries: async (after = 0): Promise<string[]> => {
      const deltas = ['balance', 'free_credit', 'outstanding']
        .map((name) => `case when ${name}_delta <> 0 then '${name} ' || trim_scale(${name}_delta) end`)
        .join(', ')
      const rows = await operator(
        `select format('%s %s: %s', kind, trim_scale(amount), concat_ws(', ', ${deltas})) as entry
        from api.billing_transactions where account_id = $1 and seq > $2 order by seq`,
        [accountId, after],
      )
      return rows.map(({ entry }) => entry)
    },
    version: async (): Promise<string> =>
      (
        await one(
          operator('select balance_version from api.billing_accounts where account_id = $1', [accountId]),
        )
      ).balance_version,
    /** A hold as `status captured/amount`. */
    holdNow: async (id: string): Promise<string> =>
      (
        await one(
          operator(
            `select format('%s %s/%s', status, trim_scale(captured), trim_scale(amount)) as now
            from api.holds where account_id = $1 and id = $2`,
            [accountId, id],
          ),
        )
      ).now,
  }
  if (Number(limit)) await account.limit(limit)
  if (Number(funds)) await account.topUp(funds)
  return account
}
