// The README, executed; and that each document under docs/ is executed by a test of its own, `docs/<name>.test.ts`.
import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import * as assert from 'uvu/assert'
import { secret, withDatabase } from '../../scripts/servers.ts'
import { document, root } from '../readme/document.ts'
import { once } from '../support/database.ts'

// the demo is another test's
const { test, db, PATH, blocks } = await document('README.md', { except: ['Try it', 'Install'] })

test('Install: a database is made and reached as it says', async () => {
  const name = `${db.name}_installed`
  const url = withDatabase(db.url, name)
  await once(db.url, `create database ${name}`)
  const [migrate, grant] = blocks.filter(({ section }) => section === 'Install')
  const { status, stderr } = spawnSync('sh', ['-c', migrate!.code], {
    cwd: root,
    env: { ...process.env, PATH, DATABASE_URL: url },
    encoding: 'utf8',
  })
  assert.is(status, 0, stderr)
  const password = secret()
  await once(url, grant!.code.replaceAll('authenticator', name).replace('…', password))
  try {
    for (const role of ['gateway', 'operator', 'member'])
      await once(withDatabase(url, name, { user: name, password }), `set role keyledger_${role}`)
  } finally {
    await once(db.url, `drop database ${name}`)
    await once(db.url, `drop role ${name}`)
  }
})

test('each document has a test that executes it', () => {
  const docs = existsSync(join(root, 'docs')) ? readdirSync(join(root, 'docs')) : []
  const tests = readdirSync(join(root, 'tests/docs'))
  for (const file of docs.filter((file) => file.endsWith('.md')))
    assert.ok(tests.includes(file.replace(/\.md$/, '.test.ts')), file)
})

test.run()
