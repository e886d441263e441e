// docs/design.md: it has nothing to run, and the files of SQL that it names are there.
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { blocksOf, namesWhatIsThere, root } from '../readme/document.ts'

const test = suite('docs/design.md')
const page = readFileSync(join(root, 'docs/design.md'), 'utf8')

test('it has no block that should be run', () => assert.equal(blocksOf(page), []))

const migrations = join(root, 'db/migrations')
const code = readdirSync(migrations)
  .filter((file) => /^\d{8}9/.test(file))
  .map((file) => ({
    noun: file.slice(15, -4),
    isEngine: /^\d{8}9000/.test(file),
    text: readFileSync(join(migrations, file), 'utf8').replace(/--.*|comment on [\s\S]*?';\n/g, ''),
  }))

test('it lists each file of the engine, in their order', () => {
  const files = page.slice(page.indexOf('\n## Files\n'))
  const rows = [...files.matchAll(/^\| (`\w+`(?:, `\w+`)*) \|/gm)].flatMap(([, nouns]) =>
    nouns!.replaceAll('`', '').split(', '),
  )
  assert.equal(
    rows,
    code.filter((file) => file.isEngine).map((file) => file.noun),
  )
})

test('an engine file refers to earlier files only', () => {
  const home = new Map(
    code.flatMap(({ text }, place) =>
      [...text.matchAll(/create or replace (?:function|view) ((?:data|api)\.\w+)/g)].map(
        ([, name]) => [name!, place] as const,
      ),
    ),
  )
  assert.ok(home.size > 200)
  const upwards = code.flatMap(({ noun, isEngine, text }, place) =>
    isEngine
      ? [...text.matchAll(/\b(?:data|api)\.\w+/g)]
          .filter(([name]) => home.get(name)! > place)
          .map(([name]) => `${noun} names ${name}`)
      : [],
  )
  assert.equal(upwards, [])
})

test('it names make targets, files and headings that are there', () =>
  namesWhatIsThere('docs/design.md', page))

test.run()
