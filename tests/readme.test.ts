// The README, executed: every block of its examples is run in order, and prints what stands below it.
import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { delimiter, dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { inPath } from '../scripts/binaries.ts'
import { secret, token, withDatabase } from '../scripts/servers.ts'
import { until } from '../scripts/supervise.ts'
import { psql, shell } from './readme/runners.ts'
import { database, once } from './support/database.ts'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const readme = readFileSync(join(root, 'README.md'), 'utf8')

interface Block {
  line: number
  section: string
  language: string
  code: string
  /** The block of `text` right below it. */
  printed: string
}

const blocks: Block[] = []
for (const { index, 1: language, 2: code } of readme.matchAll(/^```(\w+)\n(.*?)^```$/gms)) {
  const before = readme.slice(0, index)
  const section = /.*^## (.*?)$/ms.exec(before)![1]!
  const above = blocks.at(-1)
  if (language === 'text' && before.endsWith('```\n')) above!.printed = code!
  else
    blocks.push({ line: before.split('\n').length, section, language: language!, code: code!, printed: '' })
}
const inSection = (section: string) => blocks.filter((block) => block.section === section)

// `…` stands for what is another each time; neither spaces nor the length of a rule matter
const plain = (text: string) => text.replace(/\s+/g, '').replace(/-{2,}/g, '--')
const pattern = (printed: string) => {
  const parts = plain(printed).split('…')
  return new RegExp(`^${parts.map((part) => part.replace(/[\\^$.*+?()[\]{}|]/g, '\\$&')).join('[^|",]+')}$`)
}
function same(actual: string, { line, printed }: Block) {
  if (!pattern(printed).test(plain(actual)))
    assert.is(actual, printed, `README.md:${line} prints something else`)
}

const test = suite('readme')
const db = await database(test)
const server = await db.postgrest()
const redis = await db.redis()

// a reader knows PostgREST's secret; ours is told another one
const jwtSecret = secret()
const login = new URL(db.loginUrl).username
await db.sql(`alter role ${login} in database ${db.name} set pgrst.jwt_secret = '${jwtSecret}'`)
await db.sql(`notify pgrst, 'reload config'`)
const authorization = `Bearer ${await token(jwtSecret, { role: 'keyledger_gateway' })}`
await until(async () => (await fetch(server.url, { headers: { authorization } })).ok, 'the other secret')

// the reader's directory, with our package in it
const home = mkdtempSync(join(tmpdir(), 'keyledger-readme-'))
db.onClose(() => rmSync(home, { recursive: true }))
symlinkSync(join(root, 'node_modules'), join(home, 'node_modules'))
const paths = { keyledger: [join(root, 'src/index.ts')] }
const tsconfig = { extends: join(root, 'tsconfig.json'), compilerOptions: { paths }, include: ['*.mts'] }
writeFileSync(join(home, 'tsconfig.json'), JSON.stringify(tsconfig))
mkdirSync(join(home, 'bin'))
if (!inPath('curl')) symlinkSync(join(root, 'tests/readme/curl.mjs'), join(home, 'bin/curl'))

const PATH = [join(home, 'bin'), join(root, 'node_modules/.bin'), process.env.PATH].join(delimiter)
const { KEYLEDGER_TEST: _, ...env } = process.env
const sh = shell(home, {
  ...env,
  PATH,
  JWT_SECRET: jwtSecret,
  DATABASE_URL: db.loginUrl,
  REDIS_URL: redis.url,
})
db.onClose(sh.close)

const raw = { getTypeParser: () => (text: string) => text }
const client = new pg.Client({ connectionString: db.loginUrl, types: raw })
await client.connect()
db.onClose(() => client.end())
const sql = psql(client)

const [gatewayPort, upstreamPort] = [await freePort(), await freePort()]
const here = (code: string) =>
  code
    .replaceAll('http://127.0.0.1:3000', server.url)
    .replaceAll('8080', gatewayPort)
    .replaceAll('8081', upstreamPort)

const run: Record<string, (block: Block) => void | Promise<void>> = {
  async sql(block) {
    same(await sql(block.code), block)
  },
  async sh(block) {
    const output = await sh.run(here(block.code))
    // what runs in the background prints in its own time
    if (/ &$/m.test(block.code))
      await until(() => pattern(block.printed).test(plain(output())), 'it').catch(() => {})
    same(output(), block)
  },
  // a file, named in its first line; it is run by the shell
  ts({ code }) {
    writeFileSync(join(home, /^\/\/ (\S+\.mts)\n/.exec(code)![1]!), here(code))
    const { status, stdout } = spawnSync(join(root, 'node_modules/.bin/tsc'), { cwd: home, encoding: 'utf8' })
    assert.is(status, 0, stdout)
  },
}

// the demo is another test's; of Install, below
for (const block of blocks.filter(({ section }) => !['Try it', 'Install'].includes(section))) {
  const { line, section, language } = block
  test(`${section}, line ${line}: the ${language} does what it says`, () => run[language]!(block))
}

test('Install: a database is made and reached as it says', async () => {
  const name = `${db.name}_installed`
  const url = withDatabase(db.url, name)
  await once(db.url, `create database ${name}`)
  const [migrate, grant] = inSection('Install')
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

test('what it names is there: make targets, files, headings', () => {
  const makefile = readFileSync(join(root, 'Makefile'), 'utf8')
  for (const [, target] of readme.matchAll(/(?:^|`)make ([a-z-]+)/gm))
    assert.match(makefile, new RegExp(`^${target}:`, 'm'))
  const headings = [...readme.matchAll(/^#+ (.*)$/gm)].map(([, heading]) =>
    heading!.toLowerCase().replaceAll(' ', '-'),
  )
  for (const [, link] of readme.matchAll(/\]\(((?!https?:)[^)]+)\)/g))
    assert.ok(link!.startsWith('#') ? headings.includes(link!.slice(1)) : existsSync(join(root, link!)), link)
})

test.run()

function freePort(): Promise<string> {
  return new Promise((resolve, reject) => {
    const probe = createServer().on('error', reject)
    probe.listen(0, '127.0.0.1', () => {
      const { port } = probe.address() as { port: number }
      probe.close(() => resolve(String(port)))
    })
  })
}
