// Steps of the model test: money in and back, limits, grants.
import { fromSteps } from '../../scripts/money.ts'
import { newId } from './ids.ts'
import * as model from './model.ts'
import { type Account, Refused } from './model.ts'
import * as rules from './model-rules.ts'
import {
  amounts,
  availableNow,
  entry,
  hasKind,
  hour,
  type Kinds,
  locked,
  many,
  one,
  reference,
  single,
  someAccount,
} from './model-steps.ts'

export const money: Kinds = {
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
            rules.post(now, 'opening', { balance, limit: credit_limit, content: content.join() })
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
        rules.firstTry(account, 'top_up', ref, '', amount) ??
          rules.post(account, 'top_up', { balance: amount, reference: ref }),
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
      const first = rules.firstTry(
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
        rules.post(account, 'top_up_reversal', {
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
      const first = rules.firstTry(account, 'adjustment', ref, '', amount)
      if (first) return entry(first)
      if (version !== undefined && version !== account.entries.length) throw new Refused('version_conflict')
      return entry(rules.post(account, 'adjustment', { balance: amount, reference: ref }))
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
        rules.firstTry(account, 'credit_grant', ref, content, amount) ??
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
        if (account.limit !== limit) rules.post(account, 'limit_change', { limit })
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
      entry(rules.refund(world, account, { seq, usage, amount, reference: ref })),
    )
  },
}

function grant(account: Account, amount: bigint, priority: number, end: number, about = {}): model.Entry {
  return rules.post(account, 'credit_grant', {
    ...about,
    change: (seq) => account.grants.push({ seq, remaining: amount, priority, end }),
  })
}
