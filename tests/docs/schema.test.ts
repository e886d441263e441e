// docs/schema.md against the catalog: each table with its columns, and each foreign key, is drawn as it is.
import { readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database } from '../support/database.ts'

const page = readFileSync(join(dirname(fileURLToPath(import.meta.url)), '../../docs/schema.md'), 'utf8')
const drawn = [...page.matchAll(/^```mermaid\n(.*?)^```$/gms)].map(([, diagram]) => diagram!)

const test = suite('schema')
const db = await database(test)

test('every table of data is drawn once, with its columns in order, their types and keys', async () => {
  const tables = await db.sql(`
    select c.relname as name, array_agg(concat_ws(' ', t.name, a.attname, k.keys) order by a.attnum) as columns
    from pg_class c
    join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
    cross join lateral (
      select case when y.typelem <> 0 and y.typcategory = 'A' then e.typname || '[]' else y.typname end as name
      from pg_type y left join pg_type e on e.oid = y.typelem where y.oid = a.atttypid
    ) t
    left join lateral (
      select string_agg(i.key, ', ' order by i.key) as keys
      from (
        select distinct case i.contype when 'p' then 'PK' when 'f' then 'FK' else 'UK' end as key
        from pg_constraint i
        where i.conrelid = c.oid and a.attnum = any (i.conkey)
          and (i.contype in ('p', 'f') or i.contype = 'u' and cardinality(i.conkey) = 1)
      ) i
    ) k on true
    where c.relnamespace = 'data'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition
    group by 1 order by 1`)
  const found = Object.fromEntries(
    drawn.flatMap((diagram) =>
      [...diagram.matchAll(/^ {2}(\w+) \{\n(.*?)^ {2}\}$/gms)].map(([, name, columns]) => [
        name,
        columns!
          .trim()
          .split(/\n\s+/)
          .map((column) => column.replace(/ ".*"$/, '')),
      ]),
    ),
  )
  assert.equal(found, Object.fromEntries(tables.map(({ name, columns }) => [name, columns])))
})

test('every foreign key is drawn, and no other solid line', async () => {
  const keys = await db.sql(`
    select distinct format('%s %s', f.relname, c.relname) as key
    from pg_constraint k
    join pg_class c on c.oid = k.conrelid
    join pg_class f on f.oid = k.confrelid
    where k.contype = 'f' and c.relnamespace = 'data'::regnamespace and not c.relispartition
    order by 1`)
  const solid = drawn.flatMap((diagram) =>
    [...diagram.matchAll(/^ {2}(\w+) \S+--\S+ (\w+) : /gm)].map(([, to, from]) => `${to} ${from}`),
  )
  assert.equal(
    solid.sort(),
    keys.map(({ key }) => key),
  )
})

test.run()
