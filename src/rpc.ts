// The one interface to schema `api`, which its two transports implement.
import { createHash } from 'node:crypto'
import type { Functions, Views } from './catalog.ts'
import { toText } from './json.ts'

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
