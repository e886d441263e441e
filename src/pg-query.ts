// The SQL that the pg transport sends: a call of a function, a read of a view, a look into the
// catalog.
import pg from 'pg'
import { KeyledgerError } from './errors.ts'
import { argumentJson, argumentsJson, isJsonText, toText } from './json.ts'
import { columns, count, identifier, ordering } from './query.ts'
import type { RowsQuery } from './rpc.ts'

/** A function of schema `api`, as the catalog has it. */
export interface Shape {
  params: { name: string; type: string; required: boolean }[]
  set: boolean
  composite: boolean
  nothing: boolean
}

/**
 * Calls a function. One query, one value `json`: Postgres makes the JSON, as it does for PostgREST.
 */
export function calling(fn: string, shape: Shape, args: Record<string, unknown>, select?: string) {
  // these names come from the catalog, so they may be reserved: `limit` is one
  const used = shape.params.filter(({ name }) => args[name] !== undefined)
  // JSON is parsed here and now; any other type is read from JSON as PostgREST reads it
  const read = used.filter(({ name, type }) => !(type === 'jsonb' && isJsonText(args[name])))
  const passed = used.map((param) => {
    const value = read.includes(param)
      ? `a.${pg.escapeIdentifier(param.name)}`
      : jsonLiteral(argumentJson(args[param.name]))
    return `${pg.escapeIdentifier(param.name)} => ${value}`
  })
  const record = argumentsJson(Object.fromEntries(read.map(({ name }) => [name, args[name]])))
  const columns = read.map(({ name, type }) => `${pg.escapeIdentifier(name)} ${type}`)
  const from = `${read.length ? `json_to_record(${jsonLiteral(record)}) as a(${columns.join(', ')}), lateral ` : ''}api.${quoted(fn)}(${passed.join(', ')}) as c`
  if (shape.nothing) return `select null::text as json from ${from}`
  if (shape.composite) {
    const all = shape.set ? `coalesce(json_agg(r), '[]')` : 'row_to_json(r)'
    return `select ${all}::text as json from (select ${select ?? 'c.*'} from ${from}) r`
  }
  if (select)
    throw new KeyledgerError('column_not_found', 400, {
      detail: `api.${fn} has no columns`,
      hint: 'leave `select` out',
    })
  return `select ${shape.set ? `coalesce(json_agg(c.value), '[]')` : 'to_json(c.value)'}::text as json from ${from}(value)`
}

/** Reads the shapes of every function with this name. */
export const lookup = (fn: string) => `
  select coalesce(json_agg(json_build_object(
    'set', p.proretset,
    'composite', t.typtype = 'c' or t.typname = 'record',
    'nothing', t.typname = 'void',
    'params', (
      select coalesce(json_agg(json_build_object(
        'name', i.name,
        'type', format_type(i.type, null),
        'required', i.position <= p.pronargs - p.pronargdefaults
      )), '[]')
      from (
        select u.name, u.type, row_number() over (order by u.n) as position
        from unnest(p.proargnames, coalesce(p.proallargtypes, p.proargtypes::oid[]), p.proargmodes)
          with ordinality as u (name, type, mode, n)
        where coalesce(u.mode, 'i') in ('i', 'b')
      ) i
    )
  )), '[]')::text as json
  from pg_proc p
  join pg_type t on t.oid = p.prorettype
  where p.pronamespace = 'api'::regnamespace and p.prokind = 'f' and p.proname = ${literal(fn)}`

/** Reads rows of a view, as one value `json`. */
export function reading(view: string, { select, where = {}, limit, order }: RowsQuery): string {
  const conditions = Object.entries(where).map(([name, value]) => `${quoted(name)} = ${literal(value)}`)
  const keys = (order === undefined ? [] : ordering(order)).map(
    ({ name, desc }) => quoted(name) + (desc ? ' desc' : ''),
  )
  const query = [
    `select ${columnList(select, '')} from api.${quoted(view)}`,
    ...(conditions.length ? [`where ${conditions.join(' and ')}`] : []),
    ...(keys.length ? [`order by ${keys.join(', ')}`] : []),
    ...(limit === undefined ? [] : [`limit ${count(limit)}`]),
  ]
  return `select coalesce(json_agg(r), '[]')::text as json from (${query.join(' ')}) r`
}

/** The columns that a call selects, for `calling`. */
export const selectList = (select: readonly string[]) => columnList(select, 'c.')

function columnList(select: readonly string[], of: string) {
  return columns(select)
    .map(({ name, type }) => {
      if (name === '*') return `${of}*`
      return type ? `cast(${of}${quoted(name)} as ${type}) as ${quoted(name)}` : of + quoted(name)
    })
    .join(', ')
}

const quoted = (name: string) => pg.escapeIdentifier(identifier(name))

export const literal = (value: string) => pg.escapeLiteral(toText(value))

// most of our JSON has nothing to escape, and escapeLiteral goes letter by letter: 4 ms for 500
// events
const jsonLiteral = (json: string) => (/['\\]/.test(json) ? pg.escapeLiteral(json) : `'${json}'`)
