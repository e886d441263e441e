// The types of schema api, from the catalog of a migrated database: `npm run types` writes
// src/catalog.ts.
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import pg from 'pg'
import { migrate, startPostgres, withDatabase } from './servers.ts'

/** Where the types are kept. */
export const catalogFile = fileURLToPath(new URL('../src/catalog.ts', import.meta.url))

// JSON has no shape in the catalog; src/types.ts has them, by function (for its answer) or
// `function.argument`
const shapes: Record<string, string> = {
  account_news: 'AccountNews',
  extend_holds: '(ExtendAnswer | BusyAnswer)[]',
  'extend_holds.requests': 'ExtendRequest[]',
  import_virtual_keys: 'KeyImportAnswer[]',
  'import_virtual_keys.keys': 'KeyImport[]',
  place_holds: 'HoldAnswer[]',
  'place_holds.requests': 'PlaceHoldRequest[]',
  record_openings: 'OpeningAnswer[]',
  'record_openings.openings': 'Opening[]',
  record_usage: '(UsageAnswer | BusyAnswer)[]',
  'record_usage.events': 'RecordedEvent[]',
  release_holds: '(ReleaseAnswer | BusyAnswer)[]',
  'release_holds.requests': 'ReleaseRequest[]',
  resolve_virtual_keys: '(KeyContext | UnknownKey)[]',
  replay_parked_usage: '(UsageAnswer & { parked_id: string })[]',
}

// arguments without a default that SQL takes a null for: the catalog can't say so
const takesNull = ['set_low_balance_threshold.amount']

// the types in JSON; JSON without a shape of ours is unknown
const scalars: Record<string, string> = {
  boolean: 'boolean',
  bytea: 'string',
  bigint: 'number',
  integer: 'number',
  date: 'string',
  int4multirange: 'string',
  interval: 'string',
  json: 'unknown',
  jsonb: 'unknown',
  numeric: 'number',
  text: 'string',
  'timestamp with time zone': 'string',
  uuid: 'string',
  void: 'null',
}

interface Column {
  name: string
  /** With domains resolved. */
  type: string
}

interface Fn {
  name: string
  summary: string
  args: (Column & { optional: boolean })[]
  outs: Column[]
  /** What it returns; a view's name without schema for its row. */
  type: string
  view: string | null
  /** The columns of the row it returns, of a view or of another type. */
  composite: Column[] | null
  set: boolean
}

interface View {
  name: string
  summary: string
  columns: Column[]
}

// a domain is its base type, in an array too
const typeName = (oid: string) => `(
  select case when t.typtype = 'd' then format_type(t.typbasetype, null) else format_type(t.oid, null) end
  from pg_type t where t.oid = ${oid})`

const functionsQuery = `
  select json_agg(json_build_object(
    'name', p.proname,
    'summary', split_part(obj_description(p.oid, 'pg_proc'), E'\\n', 1),
    'args', (
      select coalesce(json_agg(json_build_object('name', a.name, 'type', ${typeName('a.type')},
        'optional', a.position > p.pronargs - p.pronargdefaults) order by a.n), '[]')
      from (
        select u.*, row_number() over (order by u.n) as position
        from unnest(p.proargnames, coalesce(p.proallargtypes, p.proargtypes::oid[]), p.proargmodes)
          with ordinality as u (name, type, mode, n)
        where coalesce(u.mode, 'i') in ('i', 'b')
      ) a),
    'outs', (
      select coalesce(json_agg(json_build_object('name', u.name, 'type', ${typeName('u.type')}) order by u.n), '[]')
      from unnest(p.proargnames, p.proallargtypes, p.proargmodes) with ordinality as u (name, type, mode, n)
      where u.mode in ('o', 'b', 't')),
    'type', ${typeName('p.prorettype')},
    'view', (select c.relname from pg_class c join pg_type t on t.typrelid = c.oid where t.oid = p.prorettype and c.relkind = 'v'),
    'composite', (
      select json_agg(json_build_object('name', a.attname, 'type', ${typeName('a.atttypid')}) order by a.attnum)
      from pg_attribute a join pg_type t on t.typrelid = a.attrelid
      where t.oid = p.prorettype and a.attnum > 0 and not a.attisdropped),
    'set', p.proretset) order by p.proname) as it
  from pg_proc p
  where p.pronamespace = 'api'::regnamespace and p.prokind = 'f'`

const viewsQuery = `
  select json_agg(json_build_object(
    'name', c.relname,
    'summary', split_part(obj_description(c.oid, 'pg_class'), E'\\n', 1),
    'columns', (
      select json_agg(json_build_object('name', a.attname, 'type', ${typeName('a.atttypid')}) order by a.attnum)
      from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped)
    ) order by c.relname) as it
  from pg_class c
  where c.relnamespace = 'api'::regnamespace and c.relkind = 'v'`

/** The text of src/catalog.ts for the database. */
export async function catalogTypes(url: string): Promise<string> {
  const client = new pg.Client(url)
  await client.connect()
  try {
    const functions: Fn[] = (await client.query(functionsQuery)).rows[0].it
    const views: View[] = (await client.query(viewsQuery)).rows[0].it
    return text(functions, views)
  } finally {
    await client.end()
  }
}

function text(functions: Fn[], views: View[]): string {
  const known = functions.flatMap(({ name: fn, args }) => [fn, ...args.map(({ name }) => `${fn}.${name}`)])
  const stray = [...takesNull, ...Object.keys(shapes)].find((name) => !known.includes(name))
  if (stray) throw new Error(`scripts/types.ts names ${stray}, and the catalog has no such thing`)
  const named = [
    ...new Set(Object.values(shapes).flatMap((shape) => shape.match(/\b[A-Z]\w+/g) ?? [])),
  ].sort()
  return `// Made by \`npm run types\` from the database's catalog: the arguments and answers of the functions of schema api, the rows of its views.
import type {
${named.map((name) => `  ${name},`).join('\n')}
} from './types.ts'

/**
 * The rows in JSON. The catalog doesn't say which columns are never null. A \`number\` may be a
 * decimal, which loses digits: select it \`::text\`. Amounts among the arguments are decimal
 * strings.
 */
export interface Views {
${views.map((view) => `${doc(view)}  ${view.name}: ${object(view.columns.map(nullable), '  ')}`).join('\n')}
}

/**
 * Arguments by name; an argument with a default is optional. \`result\` is the answer when no
 * columns are selected.
 */
export interface Functions {
${functions
  .map((fn) => `${doc(fn)}  ${fn.name}: {\n    args: ${args(fn)}\n    result: ${result(fn)}\n  }`)
  .join('\n')}
}
`
}

const doc = ({ summary }: { summary: string }) => `  /** ${summary} */\n`

function ts(type: string, where: string): string {
  if (type.endsWith('[]')) return `${ts(type.slice(0, -2), where)}[]`
  const known = scalars[type]
  if (!known) throw new Error(`${where}: scripts/types.ts has no type for ${type}`)
  return known
}

const nullable = ({ name, type }: Column) => {
  const of = ts(type, name)
  return `${name}: ${of === 'unknown' ? of : `${of} | null`}`
}

const object = (members: string[], indent: string) =>
  members.length
    ? `{\n${members.map((member) => `${indent}  ${member}\n`).join('')}${indent}}`
    : 'Record<string, never>'

function args({ name: fn, args }: Fn): string {
  const members = args.map(({ name, type, optional }) => {
    const shape = shapes[`${fn}.${name}`] ?? (type === 'numeric' ? 'string' : ts(type, `${fn}.${name}`))
    const isNullable = optional || takesNull.includes(`${fn}.${name}`)
    const of = isNullable && shape !== 'unknown' ? `${shape} | null` : shape
    return `${name}${optional ? '?' : ''}: ${of}`
  })
  return object(members, '    ')
}

function result({ name, outs, type, view, composite, set }: Fn): string {
  const columns = outs.length > 1 || type === 'record' ? outs : composite
  const one =
    (view && `Views['${view}']`) ?? (columns ? object(columns.map(nullable), '    ') : ts(type, name))
  return shapes[name] ?? (set ? `${one}[]` : one)
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const server = await startPostgres()
  const url = withDatabase(server.url, 'keyledger')
  await migrate(url)
  writeFileSync(catalogFile, await catalogTypes(url))
  await server.stop()
  console.log(`wrote ${join('src', 'catalog.ts')}`)
}
