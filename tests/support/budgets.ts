// Budgets in tests: a tenant with two members, and functions that set and show a budget.
import { randomUUID } from 'node:crypto'
import type { Database, Row } from './database.ts'
import { type Payer, payer } from './payer.ts'

export type Scope = 'virtual_key' | 'user' | 'tenant'

export function budgeting(db: Database) {
  const { operator } = db
  const scopeId = (account: Payer, scope: Scope) =>
    ({ virtual_key: account.keyId, user: account.userId, tenant: account.accountId })[scope]

  /** Sets it as the operator; `id` is the payer's own key, user or tenant by default. */
  const setBudget = async (
    account: Payer,
    scope: Scope,
    amount: string,
    { period = 'month', id = scopeId(account, scope) } = {},
  ): Promise<Row> => account.post('set_budget', { scope, scope_id: id, amount, period })

  /** A budget as `spent + held of amount, remaining`. */
  const shown = async (id: string): Promise<string> =>
    (
      await operator(
        `select format('%s + %s of %s, %s', trim_scale(spent), trim_scale(held), trim_scale(amount), trim_scale(remaining)) as it
        from api.budgets where id = $1`,
        [id],
      )
    )[0]!.it

  /** A tenant with money and two members, of whom the first has two keys. */
  async function team() {
    const [tenant] = await operator('insert into api.tenants (name) values ($1) returning id', [randomUUID()])
    const first = await payer(db, { tenantId: tenant!.id, funds: '1000' })
    const second = await payer(db, { tenantId: tenant!.id })
    const [key] = await operator('select id from api.create_virtual_key($1, config_node_ids => $2)', [
      first.userId,
      [first.nodeId],
    ])
    return { first, second, otherKey: key!.id as string }
  }

  return { setBudget, shown, team }
}
