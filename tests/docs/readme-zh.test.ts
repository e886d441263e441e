// The README in Chinese: it has the blocks and headings of the English one, which another test executes.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { blocksOf, namesWhatIsThere, root } from '../readme/document.ts'

const test = suite('README.zh-CN.md')
const english = readFileSync(join(root, 'README.md'), 'utf8')
const chinese = readFileSync(join(root, 'README.zh-CN.md'), 'utf8')

test('each page links to the other in its first line', () => {
  assert.ok(english.startsWith('[简体中文](README.zh-CN.md)\n'))
  assert.ok(chinese.startsWith('[English](README.md)\n'))
})

test('the blocks are those of README.md, to the byte', () => {
  const of = (text: string) =>
    blocksOf(text).map(({ language, code, printed }) => ({ language, code, printed }))
  assert.equal(of(chinese), of(english))
})

test('the headings have the levels of those of README.md, with as many blocks under each', () => {
  const of = (text: string) => text.match(/^(#+(?= )|```)/gm)
  assert.equal(of(chinese), of(english))
})

test('it names make targets, files and headings that are there', () =>
  namesWhatIsThere('README.zh-CN.md', chinese))

test.run()
