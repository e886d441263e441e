// Steps of the model test: dice that fast-check picks become one operation, with its SQL and the model's answer.
import { fromSteps } from '../../scripts/money.ts'
import type { Role, Row } from './database.ts'
import { newId } from './ids.ts'
import type { Account, World } from './model.ts'
import * as model from './model.ts'
import * as rules from './model-rules.ts'

/** One of 0 … n-1. */
export type Dice = (n: number) => number

/** An operation on the database, and on the model. Answers are short lines. */
export interface Operation {
  name: string
  role: Role
  text: string
  values: unknown[]
  accounts: string[]
  /** Must run alone: other operations read its row before they take any lock. */
  alone?: boolean
  say(rows: Row[]): string[]
  /** Applies it to the model, or throws `Refused`. `said` is the database's answer, with ids that it made. */
  expect(world: World, said: string[]): string[]
}

export interface Setting {
  /** Meter `usd` costs 1 a unit, `third` 1 for 3; no other has a price. */
  nodeId: string
}

export const hour = 3600
export const amounts = (dice: Dice): bigint =>
  [
    () => BigInt(1 + dice(40)) * 10n ** 9n,
    () => BigInt(1 + dice(9)) * 10n ** 10n,
    () => BigInt(1 + dice(99)),
  ][dice(8) > 1 ? 0 : 1 + dice(2)]!()
export const one = <T>(dice: Dice, list: T[]): T | undefined => list[dice(list.length)]
export const reference = (dice: Dice) => (dice(3) ? undefined : `reference ${dice(5)}`)
// amounts around the rest of the account, where rules change
export const nearAll = (dice: Dice, world: World, account: Account): bigint => {
  const all = model.available(account, world.now)
  return all > 0n && dice(2) ? [all, all + 1n, all / 2n + 1n, all / 3n + 1n][dice(4)]! : amounts(dice)
}
// mostly an account that suits the operation, sometimes any other or an unknown one
export const someAccount = (
  dice: Dice,
  world: World,
  has: (account: Account) => boolean = () => true,
): Account => {
  const all = [...world.accounts.values()]
  if (dice(50) === 49) return model.openAccount(newId())
  return (dice(8) ? one(dice, all.filter(has)) : undefined) ?? one(dice, all)!
}
export const hasKind = (kind: string) => (account: Account) =>
  account.entries.some((entry) => entry.kind === kind)

// functions on one account, that answer a row or refuse
export function single(
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
    expect: (world, said) => [expect(world, rules.settle(world, account.id), said)],
  }
}
export const entry = ({ seq, kind }: model.Entry) => `${seq} ${kind}`

const busy = 'busy account_busy'
// functions on many, that answer each element
export function many<Element extends { id: string; account_id: string }>(
  name: string,
  elements: Element[],
  say: (answer: Row) => (string | false | undefined)[],
  expect: (world: World, elements: Element[]) => (string | false | undefined)[][],
): Operation {
  const words = (parts: (string | false | undefined)[]) => parts.filter(Boolean).join(' ')
  return {
    name,
    role: 'keyledger_gateway',
    text: `select api.${name}($1) as answers`,
    values: [JSON.stringify(elements)],
    accounts: [...new Set(elements.map(({ account_id }) => account_id))],
    say: ([row]) => (row!.answers as Row[]).map((answer) => words(say(answer))),
    // an element that was busy was not asked
    expect: (world, said) => {
      const asked = elements.filter((_, i) => said[i] !== busy)
      const answers = expect(world, asked).map(words)
      return elements.map((_, i) => (said[i] === busy ? busy : answers.shift()!))
    },
  }
}
export const locked = (world: World, ids: string[]) => {
  for (const id of new Set(ids)) if (world.accounts.has(id)) rules.settle(world, id)
}
export const availableNow = (world: World, account: Account) => fromSteps(model.available(account, world.now))

/** A maker of operations for each kind. */
export type Kinds = Record<string, (dice: Dice, world: World, setting: Setting) => Operation>
