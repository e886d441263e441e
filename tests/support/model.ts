// The model: a world of accounts in memory, exact to the last decimal, and its figures as texts.
import { fromSteps, toSteps } from '../../scripts/money.ts'
import { budgetNow } from './model-rules.ts'

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
  status: 'open' | 'parked' | 'captured' | 'released' | 'expired'
  end: number
  /** A repeated request is the same if this is equal; null for a freeze. */
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
  /** A repeated reference is the same if this is equal, with kind and amount. */
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
  /** The hour it counts at: of its id or its hold's, whichever is later. */
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
  parked: Parked[]
}
export interface Parked {
  event: Event
  code: string
  /** The hold that stays set aside. */
  holdId?: string | undefined
  resolution?: 'charged' | 'dismissed'
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

/** The moment of a UUIDv7, in ms. */
export const msOf = (id: string) => Number.parseInt(id.replace('-', '').slice(0, 12), 16)

export const steps = (text: string | undefined): bigint => toSteps(text!)!

/** The cost of meters at 1 per `usd` and 1 per 3 of `third`: one rounding, half up. */
export function costOf({ usd = '0', third = '0' }: Record<string, string>): bigint {
  const sixths = 6n * steps(usd) + 2n * steps(third)
  return (sixths + 3n) / 6n
}

export const sum = (amounts: Iterable<bigint>) => {
  let total = 0n
  for (const amount of amounts) total += amount
  return total
}
export const min = (...all: bigint[]) => all.reduce((a, b) => (b < a ? b : a))
export const max = (a: bigint, b: bigint) => (a > b ? a : b)
export const amountOf = (entry: Entry) => entry.balance + entry.free - entry.outstanding

export const freeCredit = (account: Account, now = -1) =>
  sum(account.grants.filter(({ end }) => end > now).map(({ remaining }) => remaining))
export const open = (account: Account, now: number) =>
  [...account.holds.values()].filter(
    ({ status, end }) => status === 'parked' || (status === 'open' && end > now),
  )
/** Shrinks the money set aside for parked events by the credit that expired under it. */
export const parkedUnspent = (account: Account) =>
  sum(
    [...account.holds.values()]
      .filter(({ status }) => status === 'parked')
      .map(({ amount, captured }) => amount - captured),
  )
export const frozen = (account: Account, now: number) =>
  sum(open(account, now).map(({ amount, captured }) => amount - captured))
/** The money at a moment: grants and holds that ended by then are gone; later spending is unknown. */
const availableAt = (account: Account, moment: number) =>
  account.balance +
  account.limit -
  account.outstanding +
  freeCredit(account, moment) -
  frozen(account, moment)
const shrunk = (account: Account, now: number) => {
  const due = sum(
    account.grants.filter(({ end }) => end > -1 && end <= now).map(({ remaining }) => remaining),
  )
  const lacks = -availableAt(account, now)
  return due > 0n && lacks > 0n ? min(lacks, due, parkedUnspent(account)) : 0n
}
export const available = (account: Account, now: number) => availableAt(account, now) + shrunk(account, now)

/**
 * The money left after a moment when grants expire, if all holds that end by then are captured.
 * Lasting credit with priority over those grants is spent first; `lasting` is the part they don't reach.
 */
export function past(account: Account, moment: number): { left: bigint; lasting: bigint } {
  const live = account.grants.filter(({ remaining }) => remaining > 0n)
  const last = Math.max(...live.filter(({ end }) => end <= moment).map(({ priority }) => priority))
  const before = live.filter(({ end, priority }) => end > moment && priority < last)
  const ending = open(account, -1).filter(({ status, end }) => status === 'open' && end <= moment)
  const [spent, lasting] = [
    sum(ending.map(({ amount, captured }) => amount - captured)),
    sum(before.map(({ remaining }) => remaining)),
  ]
  return { left: availableAt(account, moment) - min(spent, lasting), lasting: max(lasting - spent, 0n) }
}

/** The money for a hold from `since` until `end`: the least of its life, and for the holds that outlive it. */
export function backing(account: Account, since: number, end: number): bigint {
  const moments = account.grants
    .filter(({ remaining, end }) => remaining > 0n && end < Infinity)
    .map((grant) => ({ moment: grant.end, ...past(account, grant.end) }))
  const limits = moments.filter(({ moment, left, lasting }) => moment < end || lasting > max(left, 0n))
  return min(availableAt(account, since), ...limits.map(({ left }) => left))
}

export function holdNow(hold: Hold, now: number): string {
  return hold.status === 'open' && hold.end <= now ? 'expired' : hold.status
}

/** Moves time on by whole hours, and keeps the figures at the start of each. */
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

/** An account as the test reads it from the database. */
export function shown(world: World, account: Account) {
  const { now } = world
  const money = [
    account.balance,
    freeCredit(account, now),
    account.limit,
    frozen(account, now) - shrunk(account, now),
    account.outstanding,
  ]
  return {
    figures: [...money, available(account, now)].map(fromSteps),
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
