// The rules of money, written a second time and plainly.
import type { Account, Budget, Entry, Grant, Hold, User, World } from './model.ts'
import { amountOf, available, freeCredit, holdNow, max, min, open, Refused, sum } from './model.ts'

/** Settles an account: ends what the clock has ended. Every operation does so first. */
export function settle(world: World, id: string): Account {
  const account = world.accounts.get(id)
  if (!account) throw new Refused('account_not_found')
  for (const hold of account.holds.values()) hold.status = holdNow(hold, world.now) as Hold['status']
  const due = account.grants.filter(({ end, remaining }) => end <= world.now && remaining > 0n)
  if (due.length) {
    const expired = sum(due.map(({ remaining }) => remaining))
    post(account, 'credit_expiry', {
      change: () => {
        for (const grant of due) grant.remaining = 0n
      },
    })
    let missing = min(-available(account, world.now), expired)
    const parked = [...account.holds.values()].filter(({ status }) => status === 'parked')
    for (const hold of parked.sort((a, b) => (a.id < b.id ? 1 : -1))) {
      const part = max(min(hold.amount - hold.captured, missing), 0n)
      hold.amount -= part
      missing -= part
    }
  }
  return account
}

/** Ends a parked hold with the last parked event that names it; in time, and if none was final, it goes on. */
export function endParked(world: World, account: Account, holdId: string | undefined): void {
  const hold = account.holds.get(holdId ?? '')
  if (hold?.status !== 'parked' || waits(world, account, hold)) return
  const its = world.parked.filter(
    (parked) => parked.holdId === hold.id && parked.event.account_id === account.id,
  )
  const goesOn = hold.end > world.now && its.every(({ event }) => event.final === false)
  hold.status = goesOn ? 'open' : 'released'
}
export const waits = (world: World, account: Account, { id }: Hold) =>
  world.parked.some(
    ({ event, holdId, resolution }) => !resolution && holdId === id && event.account_id === account.id,
  )

const inOrder = (a: Grant, b: Grant) =>
  a.priority - b.priority || (a.end === b.end ? 0 : a.end - b.end) || a.seq - b.seq

interface Posting extends Partial<Omit<Entry, 'seq' | 'kind' | 'free' | 'draws'>> {
  /** Changes the grants before debt is paid. */
  change?: (seq: number) => void
}

/** One entry: money comes or goes, then free credit, and balance down to the limit, pay debt. */
export function post(account: Account, kind: string, posting: Posting): Entry {
  const { balance = 0n, outstanding = 0n, limit = account.limit, change, content = '', ...about } = posting
  const before = { ...account, free: freeCredit(account) }
  const seq = account.entries.length + 1
  change?.(seq)
  account.limit = limit
  account.balance += balance
  account.outstanding += outstanding
  if (account.balance < -limit) {
    account.outstanding += -limit - account.balance
    account.balance = -limit
  }
  const draws: Entry['draws'] = []
  for (const grant of [...account.grants].sort(inOrder)) {
    const amount = min(grant.remaining, account.outstanding)
    if (amount === 0n) continue
    grant.remaining -= amount
    account.outstanding -= amount
    draws.push({ seq: grant.seq, amount, returned: 0n })
  }
  const paid = min(account.outstanding, account.balance + limit)
  account.balance -= paid
  account.outstanding -= paid
  const entry: Entry = {
    seq,
    kind,
    balance: account.balance - before.balance,
    free: freeCredit(account) - before.free,
    outstanding: account.outstanding - before.outstanding,
    limit,
    content,
    draws,
    ...about,
  }
  account.entries.push(entry)
  return entry
}

/** The entry that used a reference; refuses another kind or content. With `amount` null any amount matches. */
export function firstTry(
  account: Account,
  kind: string,
  reference: string | undefined,
  content: string,
  amount: bigint | null,
): Entry | undefined {
  const first = reference && account.entries.find((entry) => entry.reference === reference)
  if (!first) return
  if (first.kind !== kind || first.content !== content || (amount !== null && amountOf(first) !== amount))
    throw new Refused('reference_mismatch')
  return first
}

/** Gives a charge back: debt first, then paid money, then free credit, to grants that still live. */
export function refund(
  world: World,
  account: Account,
  wanted: {
    seq?: number | undefined
    usage?: string | undefined
    amount: bigint | null
    reference?: string | undefined
  },
): Entry {
  const { usage: usageId, reference } = wanted
  const usage = usageId === undefined ? undefined : account.usage.get(usageId)
  if (usageId !== undefined && (!usage || (wanted.seq !== undefined && usage.seq !== wanted.seq)))
    throw new Refused('charge_not_found')
  const charge = account.entries[(wanted.seq ?? usage?.seq ?? 0) - 1]
  if (charge?.kind !== 'usage') throw new Refused('charge_not_found')
  const content = `${charge.seq} ${usageId}`
  const first = firstTry(account, 'refund', reference, content, wanted.amount)
  if (first) return first

  const refunds = account.entries.filter(({ kind, refundOf }) => kind === 'refund' && refundOf === charge.seq)
  const charged = -amountOf(charge)
  const refunded = sum(refunds.map(amountOf))
  let left = charged - refunded
  if (usage)
    left = min(
      left,
      usage.cost - sum(refunds.filter(({ refundOfUsage }) => refundOfUsage === usageId).map(amountOf)),
    )
  const amount = wanted.amount ?? left
  if (amount > left || left <= 0n) throw new Refused('refund_exceeds_charge')

  const debt = min(amount, account.outstanding)
  const money = charged + charge.free
  const fromFree = min(max(refunded + amount - money, 0n) - max(refunded - money, 0n), amount - debt)
  let returned = 0n
  const back: [Grant, bigint][] = []
  const drawn = charge.draws.map((draw) => ({
    draw,
    grant: account.grants.find(({ seq }) => seq === draw.seq)!,
  }))
  for (const { draw, grant } of drawn.sort((a, b) => -inOrder(a.grant, b.grant))) {
    if (grant.end <= world.now) continue
    const some = min(fromFree - returned, draw.amount - draw.returned)
    draw.returned += some
    returned += some
    back.push([grant, some])
  }
  return post(account, 'refund', {
    reference,
    content,
    refundOf: charge.seq,
    refundOfUsage: usageId,
    outstanding: -debt,
    balance: amount - debt - returned,
    change: () => {
      for (const [grant, some] of back) grant.remaining += some
    },
  })
}

/** The use of a budget and the holds on it, in the current window. */
export function budgetNow(world: World, { accountId, scope, scopeId, period, amount }: Budget) {
  const account = world.accounts.get(accountId)!
  const windowOf = (hour: number) =>
    period === 'total' ? 0 : Math.floor((world.began / 3_600_000 + hour) / 24)
  const isIts = (keyId: string | undefined) =>
    keyId !== undefined &&
    (scope === 'tenant' || scopeId === (scope === 'virtual_key' ? keyId : userOf(world, keyId).id))
  const used = [...account.usage.values()].filter(
    ({ keyId, hour }) => isIts(keyId) && windowOf(hour) === windowOf(world.now),
  )
  const spent = sum(used.map(({ cost }) => cost))
  const held = sum(
    open(account, world.now)
      .filter(({ keyId }) => isIts(keyId))
      .map(({ amount, captured }) => amount - captured),
  )
  return { spent, held, left: amount - spent - held }
}
export const userOf = (world: World, keyId: string): User =>
  [...world.users.values()].find((user) => user.keyId === keyId)!

/** The code of the first budget, narrow ones first, that an amount for a key (null: for a user) exceeds. */
export function overBudget(
  world: World,
  accountId: string,
  keyId: string | null,
  userId: string,
  amount: bigint,
): string | undefined {
  const scopes = ['virtual_key', 'user', 'tenant']
  const over = world.budgets.filter(
    (budget) =>
      budget.accountId === accountId &&
      (budget.scope === 'tenant' || budget.scopeId === (budget.scope === 'user' ? userId : keyId)) &&
      amount > budgetNow(world, budget).left,
  )
  const [first] = over.sort((a, b) => scopes.indexOf(a.scope) - scopes.indexOf(b.scope))
  return first && `${first.scope === 'virtual_key' ? 'key' : first.scope}_budget_exceeded`
}
