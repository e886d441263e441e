// The one interface to schema `api`, and what its two transports share: checking names, and making JSON.
import { createHash } from 'node:crypto'
import type { Functions, Views } from './catalog.ts'
import { invalidInput } from './errors.ts'

/** A column of a row, as itself or cast (`amount::text`), or all of them. */
export type ColumnOf<Row> = (keyof Row & string) | `${keyof Row & string}::${string}` | '*'

/** A row with the columns selected: those cast to text are strings, other casts unknown. */
export type Selected<Row, Column extends string> = {
  [C in Column | (Column extends '*' ? keyof Row & string : never) as C extends `${infer Name}::${string}`
    ? Name
    : Exclude<C, '*'>]: C extends `${infer Name}::${infer Type}`
    ? Type extends 'text'
      ? string | (Name extends keyof Row ? Extract<Row[Name], null> : never)
      : unknown
    : C extends keyof Row
      ? Row[C]
      : never
}

type RowOf<Result> = Result extends (infer Row)[] ? Row : Result
type Untyped =
  'its arguments or columns are not those of the catalog: mend them, or name the type of the answer yourself'
type Answered<Result, Column extends string> = [Column] extends [never]
  ? Result
  : Result extends (infer Row)[]
    ? Selected<Row, Column>[]
    : Selected<Result, Column>
// those that need no argument
type Argless = {
  [F in keyof Functions]: Record<never, never> extends Functions[F]['args'] ? F : never
}[keyof Functions]

export interface CallOptions<Column extends string = string> {
  /** Columns of a function that answers rows or an object: `column`, `column::type` or `*`. Money: `available::text`. */
  select?: readonly Column[]
  /** Over a connection that other calls can't use up, within 5 s: `pgRpc` keeps one; PostgREST has one pool for all. */
  reserved?: boolean
}

export interface RowsQuery<Column extends string = string> {
  /** `column`, `column::type` or `*`; at least one. */
  select: readonly Column[]
  /** Only rows where each column equals its value. */
  where?: Record<string, string>
  /** At most so many; PostgREST's own `db-max-rows` may be lower. Default: all. */
  limit?: number
  /** `column` or `column.desc`, several by comma. */
  order?: string
}

/**
 * Calls functions and reads views, as one database role with one set of claims. Every failure is a `KeyledgerError`.
 * Integers beyond 2^53 and decimals lose digits as JSON numbers: select them `::text`.
 */
export interface Rpc {
  /** Has a connection for calls that are `reserved`: one that isn't answered says that the server is away. */
  readonly reserves?: boolean
  /**
   * Calls `api.<fn>` with arguments by name. A composite or jsonb comes as it is, a set as an array, a scalar as its
   * value, void as null. An argument left out or undefined takes its default; null is SQL's null.
   */
  call<F extends keyof Functions, Column extends ColumnOf<RowOf<Functions[F]['result']>> = never>(
    fn: F,
    args: Functions[F]['args'],
    options?: CallOptions<Column>,
  ): Promise<Answered<Functions[F]['result'], Column>>
  call<F extends Argless>(fn: F): Promise<Functions[F]['result']>
  /** The same, of a type that you name, and with any arguments: for functions of your own. */
  call<T, Fn extends string = string>(
    fn: Fn extends keyof Functions ? Untyped : Fn,
    args?: Record<string, unknown>,
    options?: CallOptions,
  ): Promise<T>
  /** Reads rows of `api.<view>`. */
  rows<V extends keyof Views, Column extends ColumnOf<Views[V]>>(
    view: V,
    query: RowsQuery<Column>,
  ): Promise<Selected<Views[V], Column>[]>
  /** The same, of a type that you name. */
  rows<T, View extends string = string>(
    view: View extends keyof Views ? Untyped : View,
    query: RowsQuery,
  ): Promise<T[]>
  /** Closes the connections it opened itself. */
  close(): Promise<void>
}

/** What a transport implements: it knows no types of its own. */
export interface Transport {
  call<T>(fn: string, args?: Record<string, unknown>, options?: CallOptions): Promise<T>
  rows<T>(view: string, query: RowsQuery): Promise<T[]>
  close(): Promise<void>
}

/** The arguments with the sha-256 of a raw key in its place: the server's log may show a statement, and what it was given. */
export function withoutRawKey(fn: string, args: Record<string, unknown>): Record<string, unknown> {
  const { vk, ...rest } = args
  if (fn !== 'resolve_billing_account' || typeof vk !== 'string') return args
  return { ...rest, key_hash: createHash('sha256').update(toText(vk)).digest('hex') }
}

// PostgREST reads these in a query string as its own
const reserved = ['select', 'order', 'limit', 'offset', 'and', 'or', 'not', 'columns', 'on_conflict']

/** A lower-case identifier that means the same in SQL and in a URL. 400 `invalid_input` else. */
export function identifier(name: string): string {
  if (/^[a-z_][a-z0-9_]*$/.test(name) && !reserved.includes(name)) return name
  throw invalidInput(
    `${JSON.stringify(name)} is no name of schema api`,
    'use lower-case letters, digits and _',
  )
}

/** Reads `select`: `column`, `column::type` or `*`. */
export function columns(select: readonly string[]): { name: string; type?: string }[] {
  if (!select.length) throw invalidInput('`select` is empty', 'name the columns')
  return select.map((item) => {
    if (item === '*') return { name: item }
    const [name, type, more] = item.split('::')
    if (more !== undefined) throw invalidInput(`\`select\` has ${JSON.stringify(item)}`, 'write column::type')
    return type === undefined
      ? { name: identifier(name!) }
      : { name: identifier(name!), type: identifier(type) }
  })
}

/** Reads `order`. */
export function ordering(order: string): { name: string; desc: boolean }[] {
  return order.split(',').map((item) => {
    const [name, direction, more] = item.split('.')
    if (more !== undefined || !['asc', 'desc', undefined].includes(direction)) {
      throw invalidInput(`\`order\` has ${JSON.stringify(item)}`, 'write column or column.desc')
    }
    return { name: identifier(name!), desc: direction === 'desc' }
  })
}

/** Checks `limit`: a whole number from 0 on. */
export function count(limit: number): number {
  if (Number.isSafeInteger(limit) && limit >= 0) return limit
  throw invalidInput(`\`limit\` is ${limit}`, 'give a whole number, 0 or more')
}

const unstorable = () =>
  invalidInput(
    'a text has a NUL character or half of a surrogate pair',
    'remove it: Postgres can store neither',
  )

// JSON.stringify escapes in this way only what can't be stored, and a few other control characters
const UNSTORABLE = /(?<!\\)((?:\\\\)*)\\u(?:0000|d[89a-f]..)/g

/** The value as JSON that jsonb can hold. 400 `invalid_input`: BigInt, a cycle, no value, NUL, half a surrogate pair. */
export function toJson(value: unknown): string {
  const json = stringify(value)
  if (json.includes('\\u') && json.search(UNSTORABLE) >= 0) throw unstorable()
  return json
}

/** The same, with U+FFFD for each character that can't be stored: for what must not be lost by it. */
export function toStorableJson(value: unknown): string {
  const json = stringify(value)
  return json.includes('\\u') ? json.replace(UNSTORABLE, '$1\\ufffd') : json
}

function stringify(value: unknown): string {
  let json: string | undefined
  try {
    json = JSON.stringify(value)
  } catch (cause) {
    throw invalidInput('an argument is no JSON', 'pass no BigInt (write it as a string) and no cycles', cause)
  }
  if (json === undefined)
    throw invalidInput('an argument is no JSON', 'pass an object, not a function or undefined')
  return json
}

const TEXT = Symbol('JSON text')

/** JSON text as an argument: it goes as it is, without being made into a value and into text again. */
export interface JsonText {
  [TEXT]: string
  toJSON(): unknown
}

/** `json` must be what `toJson` gave, or put together of it. */
export const jsonText = (json: string): JsonText => ({ [TEXT]: json, toJSON: () => JSON.parse(json) })

export const isJsonText = (value: unknown): value is JsonText =>
  typeof value === 'object' && value !== null && TEXT in value

/** The JSON of one argument. */
export const argumentJson = (value: unknown): string => (isJsonText(value) ? value[TEXT] : toJson(value))

/** The JSON of all arguments, without the undefined ones. */
export function argumentsJson(args: Record<string, unknown>): string {
  const given = Object.entries(args).filter(([, value]) => value !== undefined)
  return `{${given.map(([name, value]) => `${toJson(name)}:${argumentJson(value)}`).join(',')}}`
}

/** The same check for a text on its own. */
export function toText(value: string): string {
  if (typeof value !== 'string') throw invalidInput(`a text is ${typeof value}`, 'give a string')
  if (value.includes('\0') || /\p{Cs}/u.test(value)) throw unstorable()
  return value
}
