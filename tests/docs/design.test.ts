// docs/design.md: it has nothing to run, and the files of SQL that it names are there.
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { blocksOf, namesWhatIsThere, root } from '../readme/document.ts'

const test = suite('docs/design.md')
const page = readFileSync(join(root, 'docs/design.md'), 'utf8')

test('it has no block that should be run', () => assert.equal(blocksOf(page), []))

test('each file of code that it lists is there', () => {
  const listed = [...page.matchAll(/^\| `(\w+)` \|/gm)].map(([, noun]) => noun!)
  const figures = page.slice(page.indexOf('\n## Accounts\n'), page.indexOf('\n## Holds and events\n'))
  const files = readdirSync(join(root, 'db/migrations'))
  const engine = listed.filter((noun) => !figures.includes(`| \`${noun}\` |`))
  assert.ok(engine.length > 5)
  for (const noun of engine)
    assert.ok(
      files.some((file) => new RegExp(`9\\d{5}_${noun}\\.sql$`).test(file)),
      noun,
    )
})

test('it names make targets, files and headings that are there', () =>
  namesWhatIsThere('docs/design.md', page))

test.run()
