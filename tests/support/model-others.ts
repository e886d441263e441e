// Steps of the model test: budgets, statements, time, people.
import { fromSteps } from '../../scripts/money.ts'
import { newId } from './ids.ts'
import * as model from './model.ts'
import { Refused } from './model.ts'
import * as rules from './model-rules.ts'
import { amounts, hour, type Kinds, one, single, someAccount } from './model-steps.ts'

export const others: Kinds = {
  set_budget(dice, world) {
    const user = one(dice, [...world.users.values()])!
    const account = dice(8)
      ? world.accounts.get(dice(3) ? (user.tenantId ?? user.id) : user.id)!
      : someAccount(dice, world)
    const scope = one(dice, ['virtual_key', 'user', 'tenant'] as const)!
    const tenants = [...world.accounts.keys()].filter((id) => !world.users.has(id))
    const scopeId = scope === 'tenant' ? one(dice, tenants)! : scope === 'user' ? user.id : user.keyId
    const [period, amount] = [one(dice, ['day', 'total'] as const)!, amounts(dice) * BigInt(1 + dice(4))]
    return single(
      'set_budget',
      account,
      { scope, scope_id: scopeId, amount, period },
      (world, account, [said]) => {
        const { id: userId, tenantId } = world.users.get(user.id)!
        const payers = scope === 'tenant' ? [scopeId] : [tenantId ?? userId, userId]
        if (!payers.includes(account.id)) throw new Refused('invalid_account')
        let budget = world.budgets.find(
          (budget) =>
            budget.accountId === account.id &&
            budget.scopeId === scopeId &&
            budget.scope === scope &&
            budget.period === period,
        )
        if (budget) budget.amount = amount
        else {
          const id = said!.split(' ')[0]!
          budget = { id, accountId: account.id, scope, scopeId, period, amount }
          world.budgets.push(budget)
        }
        return `${budget.id} ${fromSteps(rules.budgetNow(world, budget).left)}`
      },
      ({ id, remaining }) => `${id} ${remaining}`,
    )
  },

  remove_budget(dice, world) {
    const id = one(dice, world.budgets)?.id ?? newId()
    return {
      name: 'remove_budget',
      role: 'keyledger_operator',
      text: 'select * from api.remove_budget($1)',
      values: [id],
      accounts: [],
      say: (rows) => rows.map(({ id }) => id),
      expect(world) {
        const at = world.budgets.findIndex((budget) => budget.id === id)
        if (at < 0) throw new Refused('budget_not_found')
        rules.settle(world, world.budgets[at]!.accountId)
        world.budgets.splice(at, 1)
        return [id]
      },
    }
  },

  close_period(dice, world) {
    const account = one(dice, [...world.accounts.values()])!
    const end = Math.max(world.now - (dice(4) ? 0 : 1), 0)
    const before = (BigInt(`0x${account.id.replaceAll('-', '')}`) - 1n).toString(16).padStart(32, '0')
    return {
      name: 'close_period',
      role: 'keyledger_operator',
      text: `select s.*, b.balance as at_balance, b.free_credit as at_free_credit from api.close_period($1, $2, 1) s
        cross join lateral api.balance_at(s.account_id, s.period_end) b`,
      values: [new Date(world.began + end * hour * 1000), before],
      accounts: [account.id],
      say: (rows) =>
        rows.map((row) =>
          [
            row.first_seq,
            row.last_seq,
            row.balance_closing,
            row.free_credit_closing,
            row.outstanding_closing,
            row.at_balance,
            row.at_free_credit,
          ].join(' '),
        ),
      expect(world) {
        const now = world.accounts.get(account.id)!
        const last = now.sealed.at(-1)
        let sealed = now.sealed.find((statement) => statement.end === end)
        if (!sealed) {
          if (last && last.end > end) throw new Refused('period_is_sealed')
          const { seq } = world.hour.get(end)!.get(account.id)!
          sealed = { end, first: (last?.last ?? 0) + 1, last: seq }
          now.sealed.push(sealed)
        }
        const { balance, free, outstanding } = world.hour.get(end)!.get(account.id)!
        const money = [balance, free, outstanding, balance, free].map(fromSteps)
        return [[sealed.first, sealed.last, ...money].join(' ')]
      },
    }
  },

  pass(dice) {
    const hours = 1 + dice(3)
    return {
      name: 'pass',
      role: 'keyledger_owner',
      text: 'update clock.ahead set seconds = seconds + $1',
      values: [hours * hour],
      accounts: [],
      alone: true,
      say: () => [],
      expect(world) {
        model.pass(world, hours)
        return []
      },
    }
  },

  move(dice, world) {
    const { id } = one(dice, [...world.users.values()])!
    const tenants = [...world.accounts.keys()].filter((id) => !world.users.has(id))
    const tenantId = one(dice, [null, ...tenants])!
    return {
      name: 'move',
      role: 'keyledger_operator',
      text: 'update api.user_profiles set tenant_id = $2 where id = $1',
      values: [id, tenantId],
      accounts: [],
      alone: true,
      say: () => [],
      expect(world) {
        world.users.get(id)!.tenantId = tenantId
        return []
      },
    }
  },

  suspend(dice, world) {
    const { id } = one(dice, [...world.users.values()])!
    const suspended = dice(5) === 0
    return {
      name: 'suspend',
      role: 'keyledger_operator',
      text: `select api.set_status('user_profile', $1, $2)`,
      values: [id, suspended ? 'suspended' : 'active'],
      accounts: [],
      alone: true,
      say: () => [],
      expect(world) {
        world.users.get(id)!.suspended = suspended
        return []
      },
    }
  },
}
