// The README, executed; and each document under docs/ is executed by a test of its own, `docs/<name>.test.ts`.
import { spawnSync } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import * as assert from 'uvu/assert'
import type { Run } from '../../scripts/report.ts'
import { table } from '../../scripts/report.ts'
import { withDatabase } from '../../scripts/servers.ts'
import { blocksOfFile, document, root } from '../readme/document.ts'
import { once } from '../support/database.ts'

// the demo has a test of its own
const { test, db, PATH, blocks } = await document('README.md', { except: ['Try it', 'Install'], dev: true })

test('Try it: the demo prints the lines that it shows', () => {
  const figures = { overspent: '0.0000000000', chargedTotal: '1.0000000000', expectedTotal: '1.0000000000' }
  const run: Run = {
    ...{ requests: 5000, title: 'keyledger: a generated trace', hasRedis: true },
    replayed: {
      ...{ seconds: 7.9, overspent: 0n, admitted: 0, refused: 0, repeated: 53, duplicates: 53, parked: 0 },
      ...{ latencies: { validate: [1], hold: [1], record: [1] }, problems: [], expected: new Map() },
    },
    proof: { ...figures, parked: 0, verificationErrors: 0, problems: [] },
    cache: { memory: 0, redis: 0, database: 0 },
  }
  const words = (text: string) => text.replace(/[\d.,]+/g, '0').replace(/ +/g, ' ')
  const printed = words(table(run)).split('\n')
  const shown = blocks.find(({ section }) => section === 'Try it')!.printed
  const [, ...lines] = words(shown).trimEnd().split('\n')
  for (const line of lines.filter((line) => line.trim() !== '…')) assert.ok(printed.includes(line), line)
})

test('Install: the command makes a database', async () => {
  const name = `${db.name}_installed`
  const url = withDatabase(db.url, name)
  await once(db.url, `create database ${name}`)
  const [migrate] = blocks.filter(({ section }) => section === 'Install')
  try {
    const env = { ...process.env, PATH, DATABASE_URL: url }
    const { status, stderr } = spawnSync('sh', ['-c', migrate!.code], { cwd: root, env, encoding: 'utf8' })
    assert.is(status, 0, stderr)
    assert.equal(await once(url, 'select * from api.verify_balances()'), [])
  } finally {
    await once(db.url, `drop database ${name}`)
  }
})

test('Install: one command for everybody', () => {
  const pages = ['README.md', ...readdirSync(join(root, 'docs')).map((file) => `docs/${file}`)]
  const commands = pages
    .filter((page) => page.endsWith('.md'))
    .flatMap((page) => blocksOfFile(page))
    .filter(({ code }) => code.includes('dbmate --url'))
  assert.is(new Set(commands.map(({ code }) => code)).size, 1)
})

test('it has at most 200 lines', () => {
  for (const page of ['README.md', 'README.zh-CN.md'])
    assert.ok(readFileSync(join(root, page), 'utf8').trimEnd().split('\n').length <= 200, page)
})

test('each document has a test that executes it', () => {
  const tests = readdirSync(join(root, 'tests/docs'))
  for (const file of readdirSync(join(root, 'docs')).filter((file) => file.endsWith('.md')))
    assert.ok(tests.includes(file.replace(/\.md$/, '.test.ts')), file)
})

test.run()
