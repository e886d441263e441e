// The one interface to schema `api`, which its two transports implement.
import { createHash } from 'node:crypto'
import type { Functions, Views } from './catalog.ts'
import { toText } from './json.ts'

/** A column of a row, as itself or cast (`amount::text`), or all columns (`*`). */
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
type Misfit =
  'its arguments or columns are not those of the catalog: mend them, or name the type of the answer yourself'
type Unknown = 'the catalog has no such name: mend it, or name the type of the answer yourself'
// A name that the catalog has is typed above. Any other name, written out, needs the type of its
// answer: else a misspelt one would compile.
type NameFor<T, Name extends string, Known> = Name extends Known
  ? Misfit
  : [T] extends [never]
    ? string extends Name
      ? Name
      : Unknown
    : Name
type Named<T> = [T] extends [never] ? unknown : T
type Answered<Result, Column extends string> = [Column] extends [never]
  ? Result
  : Result extends (infer Row)[]
    ? Selected<Row, Column>[]
    : Selected<Result, Column>
// the functions that need no argument
type Argless = {
  [F in keyof Functions]: Record<never, never> extends Functions[F]['args'] ? F : never
}[keyof Functions]

export interface CallOptions<Column extends string = string> {
  /**
   * Columns of a function that answers rows or an object: `column`, `column::type` or `*`. Money:
   * `available::text`.
   */
  select?: readonly Column[]
  /**
   * Uses a connection that other calls can't take, and at most 5 s. `pgRpc` keeps one; PostgREST
   * has one pool for all calls.
   */
  reserved?: boolean
}

export interface RowsQuery<Column extends string = string> {
  /** `column`, `column::type` or `*`; at least one. */
  select: readonly Column[]
  /** Only rows where each column equals its value. */
  where?: Record<string, string>
  /** So many rows at most; PostgREST's own `db-max-rows` may be lower. Default: all. */
  limit?: number
  /** `column` or `column.desc`, or several, separated by commas. */
  order?: string
}

/**
 * Calls functions and reads views, as one database role with one set of claims. Every failure is a
 * `KeyledgerError`. Integers beyond 2^53 and decimals lose digits as JSON numbers: select them
 * `::text`.
 */
export interface Rpc {
  /** Has a connection for `reserved` calls: if such a call isn't answered, the server is away. */
  readonly reserves?: boolean
  /**
   * Calls `api.<fn>` with arguments by name. Answers a composite or jsonb as it is, a set as an
   * array, a scalar as its value, void as null. An argument left out or undefined takes its
   * default; null is SQL's null.
   */
  call<F extends keyof Functions, Column extends ColumnOf<RowOf<Functions[F]['result']>> = never>(
    fn: F,
    args: Functions[F]['args'],
    options?: CallOptions<Column>,
  ): Promise<Answered<Functions[F]['result'], Column>>
  call<F extends Argless>(fn: F): Promise<Functions[F]['result']>
  /**
   * The same for your own functions: name the type of the answer, `call<T>(…)`, and pass any
   * arguments.
   */
  call<T = never, Fn extends string = string>(
    fn: NameFor<T, Fn, keyof Functions>,
    args?: Record<string, unknown>,
    options?: CallOptions,
  ): Promise<Named<T>>
  /** Reads rows of `api.<view>`. */
  rows<V extends keyof Views, Column extends ColumnOf<Views[V]>>(
    view: V,
    query: RowsQuery<Column>,
  ): Promise<Selected<Views[V], Column>[]>
  /** The same for your own views: name the type of a row, `rows<T>(…)`. */
  rows<T = never, View extends string = string>(
    view: NameFor<T, View, keyof Views>,
    query: RowsQuery,
  ): Promise<Named<T>[]>
  /** Closes the connections it opened itself. */
  close(): Promise<void>
}

/** The interface of a transport: like `Rpc`, without the catalog's types. */
export interface Transport {
  call<T>(fn: string, args?: Record<string, unknown>, options?: CallOptions): Promise<T>
  rows<T>(view: string, query: RowsQuery): Promise<T[]>
  close(): Promise<void>
}

/**
 * The arguments, with the sha-256 of a raw key in its place: the server's log may show a statement
 * and its arguments.
 */
export function withoutRawKey(fn: string, args: Record<string, unknown>): Record<string, unknown> {
  const { vk, ...rest } = args
  if (fn !== 'resolve_billing_account' || typeof vk !== 'string') return args
  return { ...rest, key_hash: createHash('sha256').update(toText(vk)).digest('hex') }
}
