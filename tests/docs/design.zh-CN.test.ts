// docs/design.zh-CN.md: it has nothing to run, and names files and headings that are there.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { blocksOf, namesWhatIsThere, root } from '../readme/document.ts'

const test = suite('docs/design.zh-CN.md')
const page = readFileSync(join(root, 'docs/design.zh-CN.md'), 'utf8')

test('it has no block that should be run', () => assert.equal(blocksOf(page), []))

test('it names make targets, files and headings that are there', () =>
  namesWhatIsThere('docs/design.zh-CN.md', page))

test.run()
