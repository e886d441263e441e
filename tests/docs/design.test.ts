// docs/design.md: it has nothing to run, and the files of SQL that it names are there, in its order.
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { blocksOf, namesWhatIsThere, root } from '../readme/document.ts'

const test = suite('docs/design.md')
const page = readFileSync(join(root, 'docs/design.md'), 'utf8')

test('it has no block that should be run', () => assert.equal(blocksOf(page), []))

test('the engine is the first files of code, by name and in order', () => {
  const told = page.slice(page.indexOf('\n## Files\n'), page.indexOf('**doors**'))
  const engine = [...told.matchAll(/^\| `(\w+)` \|/gm)].map(([, noun]) => noun)
  const code = readdirSync(join(root, 'db/migrations'))
    .map((file) => /9000\d\d_(\w+)\.sql$/.exec(file)?.[1])
    .filter((noun) => noun !== undefined)
  assert.equal(engine, code.slice(0, engine.length))
})

test('it names make targets, files and headings that are there', () =>
  namesWhatIsThere('docs/design.md', page))

test.run()
