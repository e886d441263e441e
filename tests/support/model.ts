// What the money rules come to, written a second time and plainly: one world of accounts in memory, exact to the last decimal.
import { fromSteps, toSteps } from '../../scripts/money.ts'

/** Money is in steps of 1e-10, moments in hours since the world began; Infinity: never. */
export interface Grant {
  seq: number
  remaining: bigint
  priority: number
  end: number
}
export interface Hold {
  id: string
  amount: bigint
  captured: bigint
  status: 'open' | 'captured' | 'released' | 'expired'
  end: number
  /** What makes a repeated request the same; null for a freeze. */
  content: string | null
  keyId?: string
  reference?: string | undefined
}
export interface Budget {
  id: string
  accountId: string
  scope: 'virtual_key' | 'user' | 'tenant'
  scopeId: string
  period: 'day' | 'total'
  amount: bigint
}
export interface Entry {
  seq: number
  kind: string
  balance: bigint
  free: bigint
  outstanding: bigint
  limit: bigint
  reference?: string | undefined
  /** What makes a repeated reference the same, beside kind and amount. */
  content: string
  refundOf?: number
  refundOfUsage?: string | undefined
  draws: { seq: number; amount: bigint; returned: bigint }[]
}
export interface Usage {
  content: string
  cost: bigint
  seq: number
  keyId: string
  /** The hour of its id. */
  hour: number
}
export interface Account {
  id: string
  balance: bigint
  limit: bigint
  outstanding: bigint
  grants: Grant[]
  holds: Map<string, Hold>
  entries: Entry[]
  usage: Map<string, Usage>
  /** Statements: the hour they end, and the last entry in each. */
  sealed: { end: number; first: number; last: number }[]
}
export interface Figures {
  balance: bigint
  free: bigint
  outstanding: bigint
  seq: number
}
export interface User {
  id: string
  keyId: string
  tenantId: string | null
  suspended: boolean
}
export interface World {
  /** A full hour, in ms. */
  began: number
  now: number
  budgets: Budget[]
  /** The figures as each hour began, where statements are cut. */
  hour: Map<number, Map<string, Figures>>
  accounts: Map<string, Account>
  users: Map<string, User>
  /** Events that could not be charged, and why, until they were. */
  parked: { event: Event; code: string; resolved: boolean }[]
}
export interface Event {
  id: string
  account_id: string
  virtual_key_id: string
  config_node_id: string
  meters: Record<string, string>
  hold_id?: string
  final?: boolean
}

/** An operation that is refused as a whole: nothing has changed. */
export class Refused extends Error {}

export const openAccount = (id: string): Account => ({
  id,
  balance: 0n,
  limit: 0n,
  outstanding: 0n,
  grants: [],
  holds: new Map(),
  entries: [],
  usage: new Map(),
  sealed: [],
})

export const steps = (text: string | undefined): bigint => toSteps(text!)!

/** What meters cost at 1 for `usd` and 1 for 3 of `third`: one rounding, half up. */
export function costOf({ usd = '0', third = '0' }: Record<string, string>): bigint {
  const sixths = 6n * steps(usd) + 2n * steps(third)
  return (sixths + 3n) / 6n
}

const sum = (amounts: Iterable<bigint>) => {
  let total = 0n
  for (const amount of amounts) total += amount
  return total
}
export const min = (...all: bigint[]) => all.reduce((a, b) => (b < a ? b : a))
const max = (a: bigint, b: bigint) => (a > b ? a : b)
export const amountOf = (entry: Entry) => entry.balance + entry.free - entry.outstanding

export const freeCredit = (account: Account, now = -1) =>
  sum(account.grants.filter(({ end }) => end > now).map(({ remaining }) => remaining))
const open = (account: Account, now: number) =>
  [...account.holds.values()].filter(({ status, end }) => status === 'open' && end > now)
export const frozen = (account: Account, now: number) =>
  sum(open(account, now).map(({ amount, captured }) => amount - captured))
/** At a moment: what has ended by then is gone, and what is spent by then nobody knows. */
const availableAt = (account: Account, moment: number) =>
  account.balance +
  account.limit -
  account.outstanding +
  freeCredit(account, moment) -
  frozen(account, moment)
export const available = availableAt

/** What a hold until `end` can stand on, from `since`: the least that is there at any moment of its life. */
export function backing(account: Account, since: number, end: number): bigint {
  const moments = account.grants.filter(
    (grant) => grant.end >= since && grant.end < end && grant.remaining > 0n,
  )
  return min(availableAt(account, since), ...moments.map((grant) => availableAt(account, grant.end)))
}

/** What a budget has been used for, and holds are to use it for, in the window that is now. */
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

/** The code of the first budget of an account, narrow ones first, that an amount for a key (or for a user, null) goes over. */
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

export function holdNow(hold: Hold, now: number): string {
  return hold.status === 'open' && hold.end <= now ? 'expired' : hold.status
}

/** Time moves on, by whole hours; the figures as each began are kept. */
export function pass(world: World, hours: number): void {
  for (let i = 0; i < hours; i++) {
    world.now++
    world.hour.set(world.now, figuresOf(world))
  }
}
export const figuresOf = (world: World) =>
  new Map(
    [...world.accounts].map(([id, account]): [string, Figures] => {
      const { balance, outstanding, entries } = account
      return [id, { balance, free: freeCredit(account, world.now), outstanding, seq: entries.length }]
    }),
  )

/** What every operation does first with the accounts it touches: what the clock has ended, ends. */
export function settle(world: World, id: string): Account {
  const account = world.accounts.get(id)
  if (!account) throw new Refused('account_not_found')
  for (const hold of account.holds.values()) hold.status = holdNow(hold, world.now) as Hold['status']
  const due = account.grants.filter(({ end, remaining }) => end <= world.now && remaining > 0n)
  for (const grant of due.sort((a, b) => a.end - b.end || a.seq - b.seq))
    post(account, 'credit_expiry', {
      change: () => {
        grant.remaining = 0n
      },
    })
  return account
}

const inOrder = (a: Grant, b: Grant) =>
  a.priority - b.priority || (a.end === b.end ? 0 : a.end - b.end) || a.seq - b.seq

interface Posting extends Partial<Omit<Entry, 'seq' | 'kind' | 'free' | 'draws'>> {
  /** What happens to the grants before debt is paid. */
  change?: (seq: number) => void
}

/** One entry: money comes or goes, and then debt is paid by free credit, and by balance down to the limit. */
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

/** The entry a reference was used for; refused if for anything else. `amount` null: whatever it was. */
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

/** A charge given back: debt first, then what was money, then what was free credit, to grants that still live. */
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

/** An account as the test reads it from the database. */
export function shown(world: World, account: Account) {
  const { now } = world
  const money = [
    account.balance,
    freeCredit(account, now),
    account.limit,
    frozen(account, now),
    account.outstanding,
  ]
  return {
    figures: [...money, availableAt(account, now)].map(fromSteps),
    grants: account.grants
      .filter(({ remaining, end }) => remaining > 0n && end > now)
      .map(({ seq, remaining }) => `${seq}: ${fromSteps(remaining)}`),
    holds: [...account.holds.values()]
      .map((hold) => `${hold.id} ${holdNow(hold, now)} ${fromSteps(hold.captured)}/${fromSteps(hold.amount)}`)
      .sort(),
    entries: account.entries.map(
      ({ seq, kind, balance, free, outstanding, limit }) =>
        `${seq} ${kind} ${[balance, free, outstanding, limit].map(fromSteps).join(' ')}`,
    ),
    budgets: world.budgets
      .filter(({ accountId }) => accountId === account.id)
      .map((budget) => {
        const { spent, held } = budgetNow(world, budget)
        return `${budget.id} ${budget.period} ${[budget.amount, spent, held].map(fromSteps).join(' ')}`
      })
      .sort(),
    usage: [...account.usage].map(([id, { cost, seq }]) => `${id} ${fromSteps(cost)} ${seq}`).sort(),
  }
}
