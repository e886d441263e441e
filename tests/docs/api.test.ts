// docs/api.md, executed; and that it leaves out no function and no view.
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

test.run()
