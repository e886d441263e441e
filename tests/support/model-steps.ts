// The steps of the model test: dice picked by fast-check become one concrete operation, with its SQL and what the model says of it.
import { fromSteps } from '../../scripts/money.ts'
import type { Role, Row } from './database.ts'
import { newId } from './ledger.ts'
import * as model from './model.ts'
import { type Account, type Event, Refused, type World } from './model.ts'
import { idAt } from './payer.ts'

/** One of 0 … n-1. */
export type Dice = (n: number) => number

/** An operation on the database, and on the model. Answers are short lines. */
export interface Operation {
  name: string
  role: Role
  text: string
  values: unknown[]
  accounts: string[]
  /** May not run at the same time as others: what it changes is read before any lock. */
  alone?: boolean
  say(rows: Row[]): string[]
  /** Applies it to the model; `said` is the database's answer, for the ids that it makes. Refused as a whole: throws `Refused`. */
  expect(world: World, said: string[]): string[]
}

export interface Setting {
  /** Meter `usd` costs 1 a unit, `third` 1 for 3; no other has a price. */
  nodeId: string
}

const hour = 3600
const amounts = (dice: Dice): bigint =>
  [
    () => BigInt(1 + dice(40)) * 10n ** 9n,
    () => BigInt(1 + dice(9)) * 10n ** 10n,
    () => BigInt(1 + dice(99)),
  ][dice(8) > 1 ? 0 : 1 + dice(2)]!()
const one = <T>(dice: Dice, list: T[]): T | undefined => list[dice(list.length)]
const reference = (dice: Dice) => (dice(3) ? undefined : `reference ${dice(5)}`)
// around what the account has left, where it matters
const nearAll = (dice: Dice, world: World, account: Account): bigint => {
  const all = model.available(account, world.now)
  return all > 0n && dice(2) ? [all, all + 1n, all / 2n + 1n, all / 3n + 1n][dice(4)]! : amounts(dice)
}
// any account, now and then an unknown one; mostly one that has what the operation is about
const someAccount = (dice: Dice, world: World, has: (account: Account) => boolean = () => true): Account => {
  const all = [...world.accounts.values()]
  if (dice(50) === 49) return model.openAccount(newId())
  return (dice(8) ? one(dice, all.filter(has)) : undefined) ?? one(dice, all)!
}
const hasKind = (kind: string) => (account: Account) => account.entries.some((entry) => entry.kind === kind)

// functions on one account, that answer a row or refuse
function single(
  name: string,
  account: Account,
  args: Row,
  expect: (world: World, account: Account, said: string[]) => string,
  say: (row: Row) => string = ({ seq, kind }) => `${seq} ${kind}`,
): Operation {
  const given = Object.entries({ account_id: account.id, ...args }).filter(([, value]) => value !== undefined)
  return {
    name,
    role: 'keyledger_operator',
    text: `select * from api.${name}(${given.map(([arg], i) => `${arg} => $${i + 1}`).join(', ')})`,
    values: given.map(([, value]) => (typeof value === 'bigint' ? fromSteps(value) : value)),
    accounts: [account.id],
    say: (rows) => rows.map(say),
    expect: (world, said) => [expect(world, model.settle(world, account.id), said)],
  }
}
const entry = ({ seq, kind }: model.Entry) => `${seq} ${kind}`

// functions on many, that answer each element
function many<Element extends { id: string; account_id: string }>(
  name: string,
  elements: Element[],
  say: (answer: Row) => (string | false | undefined)[],
  expect: (world: World) => (string | false | undefined)[][],
): Operation {
  const words = (parts: (string | false | undefined)[]) => parts.filter(Boolean).join(' ')
  return {
    name,
    role: 'keyledger_gateway',
    text: `select api.${name}($1) as answers`,
    values: [JSON.stringify(elements)],
    accounts: [...new Set(elements.map(({ account_id }) => account_id))],
    say: ([row]) => (row!.answers as Row[]).map((answer) => words(say(answer))),
    expect: (world) => expect(world).map(words),
  }
}
const locked = (world: World, ids: string[]) => {
  for (const id of new Set(ids)) if (world.accounts.has(id)) model.settle(world, id)
}
const availableNow = (world: World, account: Account) => fromSteps(model.available(account, world.now))

export const kinds: Record<string, (dice: Dice, world: World, setting: Setting) => Operation> = {
  record_openings(dice, world) {
    const account = someAccount(dice, world)
    const [balance, free_credit, credit_limit] = [
      (dice(2) ? 1n : -1n) * amounts(dice),
      dice(2) ? amounts(dice) : 0n,
      dice(2) ? amounts(dice) : 0n,
    ]
    const content = [balance, free_credit, credit_limit].map(fromSteps)
    const given = { id: account.id, account_id: account.id, balance: content[0], free_credit: content[1] }
    return {
      ...many(
        'record_openings',
        [{ ...given, credit_limit: content[2] }],
        ({ status, code, available }) => [status, code, status !== 'refused' && available],
        (world) => {
          locked(world, [account.id])
          const now = world.accounts.get(account.id)
          if (!now) return [['refused', 'account_not_found']]
          const [first] = now.entries
          if (!first) {
            model.post(now, 'opening', { balance, limit: credit_limit, content: content.join() })
            if (free_credit) grant(now, free_credit, 100, Infinity)
          } else if (first.kind !== 'opening') return [['refused', 'account_in_use']]
          else if (first.content !== content.join()) return [['refused', 'opening_mismatch']]
          return [[first ? 'duplicate' : 'opened', availableNow(world, now)]]
        },
      ),
      role: 'keyledger_operator',
    }
  },

  top_up(dice, world) {
    const [amount, ref] = [amounts(dice) * 4n, reference(dice)]
    return single('top_up', someAccount(dice, world), { amount, reference: ref }, (_, account) =>
      entry(
        model.firstTry(account, 'top_up', ref, '', amount) ??
          model.post(account, 'top_up', { balance: amount, reference: ref }),
      ),
    )
  },

  reverse_top_up(dice, world) {
    const account = someAccount(dice, world, hasKind('top_up'))
    const topUps = account.entries.filter(({ kind }) => kind === 'top_up')
    const chosen = dice(8) ? one(dice, topUps) : one(dice, account.entries)
    const byReference = chosen?.reference && dice(2) ? chosen.reference : undefined
    const seq = byReference ? undefined : (chosen?.seq ?? 99)
    const amount = dice(3) ? amounts(dice) / 3n + 1n : null
    const ref = reference(dice)
    const args = { seq, top_up_reference: byReference, amount: amount ?? undefined, reference: ref }
    return single('reverse_top_up', account, args, (_, account) => {
      const topUp = account.entries.find(
        (entry) =>
          entry.kind === 'top_up' && (byReference ? entry.reference === byReference : entry.seq === seq),
      )
      if (!topUp) throw new Refused('top_up_not_found')
      const first = model.firstTry(
        account,
        'top_up_reversal',
        ref,
        `${topUp.seq}`,
        amount === null ? null : -amount,
      )
      if (first) return entry(first)
      const reversals = account.entries.filter(
        ({ kind, refundOf }) => kind === 'top_up_reversal' && refundOf === topUp.seq,
      )
      const left = reversals.reduce(
        (left, reversal) => left + model.amountOf(reversal),
        model.amountOf(topUp),
      )
      if (left <= 0n || (amount ?? left) > left) throw new Refused('reversal_exceeds_top_up')
      return entry(
        model.post(account, 'top_up_reversal', {
          balance: -(amount ?? left),
          reference: ref,
          content: `${topUp.seq}`,
          refundOf: topUp.seq,
        }),
      )
    })
  },

  adjust_balance(dice, world) {
    const account = someAccount(dice, world)
    const [amount, ref] = [(dice(2) ? 1n : -1n) * amounts(dice), reference(dice)]
    const version = dice(4) ? undefined : account.entries.length - dice(2)
    const args = { amount, reason: 'model', reference: ref, expected_version: version }
    return single('adjust_balance', account, args, (_, account) => {
      const first = model.firstTry(account, 'adjustment', ref, '', amount)
      if (first) return entry(first)
      if (version !== undefined && version !== account.entries.length) throw new Refused('version_conflict')
      return entry(model.post(account, 'adjustment', { balance: amount, reference: ref }))
    })
  },

  grant_credit(dice, world) {
    const [amount, ref, priority] = [amounts(dice), reference(dice), 1 + dice(3)]
    const end = dice(4) ? world.now + [0, 1, 2, 4, 8, 16, 32, -1][dice(8)]! + 0.25 : Infinity
    const expires_at = end === Infinity ? undefined : new Date(world.began + end * hour * 1000)
    const args = { amount, priority, expires_at, reference: ref }
    const operation = single('grant_credit', someAccount(dice, world), args, (_, account) => {
      const content = `${priority} ${end}`
      return entry(
        model.firstTry(account, 'credit_grant', ref, content, amount) ??
          grant(account, amount, priority, end, { reference: ref, content }),
      )
    })
    const { expect } = operation
    operation.expect = (world, said) => {
      const used = world.accounts
        .get(operation.accounts[0]!)
        ?.entries.some(({ reference }) => ref !== undefined && reference === ref)
      if (end <= world.now && !used) throw new Refused('invalid_expires_at')
      return expect(world, said)
    }
    return operation
  },

  set_credit_limit(dice, world) {
    const limit = dice(3) ? amounts(dice) : 0n
    return single(
      'set_credit_limit',
      someAccount(dice, world),
      { credit_limit: limit },
      (world, account) => {
        if (account.limit !== limit) model.post(account, 'limit_change', { limit })
        return availableNow(world, account)
      },
      ({ available }) => available,
    )
  },

  refund_charge(dice, world) {
    const account = someAccount(dice, world, hasKind('usage'))
    const usage = dice(2) ? (one(dice, [...account.usage.keys()]) ?? newId()) : undefined
    const charges = account.entries.filter(({ kind }) => kind === 'usage' || dice(12) === 0)
    const seq = usage ? (dice(8) ? undefined : 1 + dice(9)) : (one(dice, charges)?.seq ?? 99)
    const amount = dice(3) ? amounts(dice) / 4n + 1n : null
    const ref = reference(dice)
    const args = { seq, usage_id: usage, amount: amount ?? undefined, reference: ref }
    return single('refund_charge', account, args, (world, account) =>
      entry(model.refund(world, account, { seq, usage, amount, reference: ref })),
    )
  },

  freeze_funds(dice, world) {
    const frozen = someAccount(dice, world)
    const [amount, ref] = [nearAll(dice, world, frozen), reference(dice)]
    const shown = ({ id, status, amount }: Row) => `${id} ${status} ${amount}`
    return single(
      'freeze_funds',
      frozen,
      { amount, reason: 'model', reference: ref },
      (world, account, [said]) => {
        let hold = [...account.holds.values()].find((hold) => ref !== undefined && hold.reference === ref)
        if (hold && hold.amount !== amount) throw new Refused('reference_mismatch')
        if (!hold) {
          if (amount > model.backing(account, world.now, Infinity)) throw new Refused('insufficient_funds')
          const id = said!.split(' ')[0]!
          hold = { id, amount, captured: 0n, status: 'open', end: Infinity, content: null, reference: ref }
          account.holds.set(id, hold)
        }
        return shown({ ...hold, amount: fromSteps(hold.amount) })
      },
      shown,
    )
  },

  unfreeze_funds(dice, world) {
    const account = someAccount(dice, world, ({ holds }) =>
      [...holds.values()].some(({ end }) => end === Infinity),
    )
    const freezes = [...account.holds.values()].filter(({ end }) => end === Infinity || dice(12) === 0)
    const id = one(dice, freezes)?.id ?? newId()
    return single(
      'unfreeze_funds',
      account,
      { id },
      (_, account) => {
        const hold = account.holds.get(id)
        if (hold?.end !== Infinity) throw new Refused('freeze_not_found')
        hold.status = 'released'
        return `${id} released`
      },
      ({ id, status }) => `${id} ${status}`,
    )
  },

  place_holds(dice, world, { nodeId }) {
    const all = one(dice, [...world.users.values()])!
    const requests = Array.from({ length: 1 + dice(3) }, () => {
      const user = dice(2) ? all : one(dice, [...world.users.values()])!
      const account = dice(9)
        ? world.accounts.get(user.tenantId ?? user.id)!
        : one(dice, [...world.accounts.values()])!
      const known = dice(6) ? undefined : one(dice, [...account.holds.keys()])
      const [amount, priced] = [nearAll(dice, world, account), dice(3) === 0]
      return {
        id: known ?? newId(),
        account_id: account.id,
        virtual_key_id: user.keyId,
        expires_in: ([0, 1, 2, 5, 20][dice(5)]! + 0.5) * hour,
        ...(priced
          ? { config_node_id: nodeId, meters: { usd: fromSteps(amount) } }
          : { amount: fromSteps(amount) }),
      }
    })
    return many(
      'place_holds',
      requests,
      ({ status, code, hold_status, mismatch, available }) => [
        status,
        code,
        hold_status,
        mismatch && 'mismatch',
        status === 'held' && available,
      ],
      (world) => {
        const codes = requests.map(({ account_id, virtual_key_id }) => {
          const user = model.userOf(world, virtual_key_id)
          if (user.suspended) return 'user_suspended'
          return (user.tenantId ?? user.id) === account_id ? undefined : 'invalid_account'
        })
        locked(
          world,
          requests.filter((_, i) => !codes[i]).map(({ account_id }) => account_id),
        )
        return requests.map(({ id, account_id, virtual_key_id, ...request }, i) => {
          const account = world.accounts.get(account_id)!
          const content = JSON.stringify([virtual_key_id, { ...request, expires_in: null }])
          const first = account.holds.get(id)
          if (first)
            return ['duplicate', model.holdNow(first, world.now), first.content !== content && 'mismatch']
          if (codes[i]) return ['refused', codes[i]]
          const amount = model.steps('amount' in request ? request.amount : request.meters.usd)
          const end = world.now + request.expires_in / hour
          if (amount > model.backing(account, world.now, end)) return ['refused', 'insufficient_funds']
          const { id: userId } = model.userOf(world, virtual_key_id)
          const over = model.overBudget(world, account_id, virtual_key_id, userId, amount)
          if (over) return ['refused', over]
          const keyId = virtual_key_id
          account.holds.set(id, { id, amount, captured: 0n, status: 'open', end, content, keyId })
          return ['held', availableNow(world, account)]
        })
      },
    )
  },

  release_holds: (dice, world) => endOrExtend(dice, world, 'release_holds'),
  extend_holds: (dice, world) => endOrExtend(dice, world, 'extend_holds'),

  record_usage(dice, world, { nodeId }) {
    const events = Array.from({ length: 1 + dice(3) }, (): Event => {
      const account = dice(40) ? one(dice, [...world.accounts.values()])! : model.openAccount(newId())
      const known = dice(8) ? undefined : one(dice, [...account.usage.keys()])
      const of = dice(7) ? account : one(dice, [...world.accounts.values()])!
      const holds = [...of.holds.values()].filter(
        ({ status, end }) => (status === 'open' && end < Infinity) || !dice(6),
      )
      const hold_id = dice(4) ? one(dice, holds)?.id : undefined
      const meters = dice(15)
        ? { usd: fromSteps(dice(9) ? amounts(dice) : 0n), ...(dice(3) ? {} : { third: `${1 + dice(20)}` }) }
        : { unpriced: '1' }
      return {
        // now, or late
        id:
          known ?? idAt(new Date(world.began + (world.now - (dice(6) ? 0 : dice(30))) * hour * 1000 + 1000)),
        account_id: account.id,
        virtual_key_id: one(dice, [...world.users.values()])!.keyId,
        config_node_id: nodeId,
        meters: meters as Record<string, string>,
        ...(hold_id ? { hold_id } : {}),
        ...(dice(3) ? {} : { final: false }),
      }
    })
    if (events.length > 1 && dice(6) === 0)
      events[1] = { ...events[0]!, ...(dice(2) ? {} : { final: false }) }
    return many('record_usage', events, sayCharge, (world) => record(world, events))
  },

  replay_rejected_usage(dice, world) {
    const parked = one(dice, world.parked)
    return {
      name: 'replay_rejected_usage',
      role: 'keyledger_operator',
      text: `select api.replay_rejected_usage(array(
        select id from api.rejected_usage where usage_id = $1 and event = $2::jsonb)) as answers`,
      values: [parked?.event.id ?? newId(), JSON.stringify(parked?.event ?? null)],
      accounts: parked ? [parked.event.account_id] : [],
      alone: true,
      say: ([row]) => (row!.answers as Row[]).map((answer) => sayCharge(answer).filter(Boolean).join(' ')),
      expect(world) {
        const again = world.parked.find(
          ({ event }) => event.id === parked?.event.id && same(event, parked.event),
        )
        if (!again || again.resolved) return []
        const { hold_id: _, ...event } = again.event
        const [answer] = record(world, [again.code === 'invalid_hold' ? event : again.event])
        if (answer![0] === 'parked') again.code = answer![1] as string
        else again.resolved = true
        return [answer!.filter(Boolean).join(' ')]
      },
    }
  },

  check_budget(dice, world) {
    const { id } = one(dice, [...world.users.values()])!
    const amount = amounts(dice)
    return {
      name: 'check_budget',
      role: 'keyledger_gateway',
      text: 'select * from api.check_budget($1, $2)',
      values: [id, fromSteps(amount)],
      accounts: [],
      say: ([row]) => [`${row!.code} ${row!.available}`],
      expect(world) {
        const user = world.users.get(id)!
        const account = world.accounts.get(user.tenantId ?? id)!
        const left = model.available(account, world.now)
        const over = model.overBudget(world, account.id, null, id, amount)
        const code = user.suspended ? 'user_suspended' : amount > left ? 'insufficient_funds' : (over ?? null)
        return [`${code} ${fromSteps(left)}`]
      },
    }
  },

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
        return `${budget.id} ${fromSteps(model.budgetNow(world, budget).left)}`
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
        model.settle(world, world.budgets[at]!.accountId)
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

function grant(account: Account, amount: bigint, priority: number, end: number, about = {}): model.Entry {
  return model.post(account, 'credit_grant', {
    ...about,
    change: (seq) => account.grants.push({ seq, remaining: amount, priority, end }),
  })
}

function endOrExtend(dice: Dice, world: World, name: 'release_holds' | 'extend_holds'): Operation {
  const requests = Array.from({ length: 1 + dice(3) }, () => {
    const isOpen = ({ status, end }: model.Hold) => status === 'open' && (end < Infinity || dice(6) === 0)
    const account = someAccount(dice, world, ({ holds }) => [...holds.values()].some(isOpen))
    const holds = [...account.holds.values()].filter((hold) => isOpen(hold) || dice(6) === 0)
    const id = one(dice, holds)?.id ?? newId()
    return { id, account_id: account.id, expires_in: ([0, 1, 5, 20][dice(4)]! + 0.5) * hour }
  })
  return many(
    name,
    requests,
    ({ status, code, available }) => [status, code, !code && available],
    (world) => {
      locked(
        world,
        requests.map(({ account_id }) => account_id),
      )
      return requests.map(({ id, account_id, expires_in }) => {
        const account = world.accounts.get(account_id)
        if (!account) return ['closed', 'account_not_found']
        const hold = account.holds.get(id)
        if (!hold) return ['closed', 'hold_not_found']
        if (hold.status !== 'open') return ['closed', `hold_${hold.status}`]
        if (hold.end === Infinity) return ['refused', 'hold_frozen']
        if (name === 'release_holds') {
          hold.status = 'released'
          return ['released', availableNow(world, account)]
        }
        const end = Math.max(hold.end, world.now + expires_in / hour)
        const others = { ...account, holds: new Map(account.holds) }
        others.holds.delete(id)
        const unspent = hold.amount - hold.captured
        const moments = account.grants.filter(
          (grant) => grant.remaining > 0n && grant.end >= hold.end && grant.end < end,
        )
        if (moments.some((grant) => unspent > model.available(others, grant.end)))
          return ['refused', 'insufficient_funds']
        hold.end = end
        return ['extended', availableNow(world, account)]
      })
    },
  )
}

const sayCharge = ({ status, code, cost, seq, mismatch, available }: Row) => [
  status,
  code,
  cost,
  seq && `${seq}`,
  mismatch && 'mismatch',
  available,
]
const same = (a: object, b: object) => JSON.stringify(a) === JSON.stringify(b)

function record(world: World, events: Event[]): (string | false | undefined)[][] {
  const codes = events.map(({ account_id, hold_id, meters }) => {
    const account = world.accounts.get(account_id)
    if (!account) return 'account_not_found'
    if (hold_id && (account.holds.get(hold_id)?.end ?? Infinity) === Infinity) return 'invalid_hold'
    return 'unpriced' in meters ? 'price_not_found' : undefined
  })
  const chargeable = events.filter((_, i) => !codes[i])
  locked(
    world,
    chargeable.map(({ account_id }) => account_id),
  )
  const charged = new Set<Event>()
  for (const id of new Set(chargeable.map(({ account_id }) => account_id))) {
    const account = world.accounts.get(id)!
    const fresh: Event[] = []
    for (const event of chargeable.filter(({ account_id }) => account_id === id)) {
      if (account.usage.has(event.id)) continue
      const cost = model.costOf(event.meters)
      account.usage.set(event.id, {
        content: contentOf(event),
        cost,
        seq: account.entries.length + 1,
        keyId: event.virtual_key_id,
        hour: Math.floor(
          (Number.parseInt(event.id.replace('-', '').slice(0, 12), 16) - world.began) / 3_600_000,
        ),
      })
      fresh.push(event)
      charged.add(event)
    }
    if (!fresh.length) continue
    const cost = (some: Event[]) => some.reduce((sum, { id }) => sum + account.usage.get(id)!.cost, 0n)
    for (const holdId of new Set(fresh.map(({ hold_id }) => hold_id))) {
      const hold = account.holds.get(holdId ?? '')
      if (hold?.status !== 'open') continue
      const drawing = fresh.filter(({ hold_id }) => hold_id === holdId)
      hold.captured += model.min(cost(drawing), hold.amount - hold.captured)
      if (drawing.some(({ final }) => final !== false)) hold.status = 'captured'
    }
    model.post(account, 'usage', { outstanding: cost(fresh) })
  }
  return events.map((event, i) => {
    if (codes[i]) {
      if (!world.parked.some((parked) => same(parked.event, event)))
        world.parked.push({ event, code: codes[i], resolved: false })
      return ['parked', codes[i]]
    }
    const account = world.accounts.get(event.account_id)!
    const { content, cost, seq } = account.usage.get(event.id)!
    const mismatch = !charged.has(event) && content !== contentOf(event) && 'mismatch'
    return [
      charged.has(event) ? 'charged' : 'duplicate',
      fromSteps(cost),
      `${seq}`,
      mismatch,
      availableNow(world, account),
    ]
  })
}

const contentOf = ({ virtual_key_id, config_node_id, meters, hold_id, final = true }: Event) =>
  JSON.stringify([virtual_key_id, config_node_id, meters, hold_id, final])
