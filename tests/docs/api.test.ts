// docs/api.md, executed; it leaves out no function, no view and no argument.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import * as assert from 'uvu/assert'
import { document, root } from '../readme/document.ts'

const { test, db } = await document('docs/api.md', { dev: true })
const page = readFileSync(join(root, 'docs/api.md'), 'utf8')

test('each function and view has a heading, and no other has one', async () => {
  const found = await db.sql(`
    select proname::text as name from pg_proc where pronamespace = 'api'::regnamespace
    union
    select relname::text from pg_class where relnamespace = 'api'::regnamespace and relkind = 'v'
    order by 1`)
  const headings = [...page.matchAll(/^### ([a-z_]+)$/gm)].map(([, name]) => name!)
  assert.equal(
    headings.sort(),
    found.map(({ name }) => name),
  )
})

test('each function has its arguments in a table: name, type, default', async () => {
  const found = await db.sql(`
    select p.proname::text as name, coalesce(json_agg(json_build_array(
        p.proargnames[a.n],
        replace(format_type(a.type, null), 'timestamp with time zone', 'timestamptz'),
        case when a.n <= p.pronargs - p.pronargdefaults then 'required'
          else regexp_replace(pg_get_function_arg_default(p.oid, a.n::int), '^''(.*)''::.*|::.*', '\\1') end
      ) order by a.n) filter (where a.n is not null), '[]') as args
    from pg_proc p
    left join lateral unnest(p.proargtypes) with ordinality as a (type, n) on true
    where p.pronamespace = 'api'::regnamespace
    group by 1 order by 1`)
  const told = (name: string) => {
    const [, part = ''] = page.split(`\n### ${name}\n`)
    const [, table = ''] = /\n\| argument \|.*\n\|---.*\n((?:\|.*\n)+)/.exec(part.split('\n### ')[0]!) ?? []
    return [...table.matchAll(/^\| `(\w+)` \| (.*?) \| (.*?) \|/gm)].map((row) => row.slice(1, 4))
  }
  for (const { name, args } of found)
    assert.equal(
      told(name),
      args.map(([argument, type, byDefault]: string[]) => [
        argument,
        type,
        byDefault?.replace(/^NULL$/, 'null') || 'null',
      ]),
      name,
    )
})

test.run()
