// A document, executed: every block of its examples is run in order, and prints the text below it.
import { spawnSync } from 'node:child_process'
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { delimiter, dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import pg from 'pg'
import { suite, type Test } from 'uvu'
import * as assert from 'uvu/assert'
import { createUpstream } from '../../examples/upstream.ts'
import { inPath } from '../../scripts/binaries.ts'
import { freePort, secret, token } from '../../scripts/servers.ts'
import { until } from '../../scripts/supervise.ts'
import { sampleWorld } from '../../scripts/world.ts'
import { type Database, database } from '../support/database.ts'
import { psql, shell } from './runners.ts'

export const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))))

export interface Block {
  line: number
  /** The `##` heading above it. */
  section: string
  language: string
  code: string
  /** The block of `text` right below it. */
  printed: string
}

export interface Document {
  /** Of the document; not run yet. */
  test: Test
  db: Database
  /** The directory its shell and files are in, with our package installed. */
  home: string
  /** PATH with the programs that npm installed. */
  PATH: string
  blocks: Block[]
}

/**
 * Makes a test of each block, in order, on servers of their own, and a test that the files and headings it names are there.
 * `file` is its path in the project. The caller tests the blocks of sections in `except`. A program's first line names its
 * file. With `dev` the reader has pasted the lines of `make dev`; else there are an empty database and JWT_SECRET.
 */
export async function document(
  file: string,
  { except = [] as string[], dev = false } = {},
): Promise<Document> {
  const text = readFileSync(join(root, file), 'utf8')
  const blocks = blocksOf(text)
  const test = suite(file)
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

  const top = mkdtempSync(join(tmpdir(), 'keyledger-readme-'))
  db.onClose(() => rmSync(top, { recursive: true }))
  const home = readersDirectory(top, blocks)
  const PATH = [join(top, 'bin'), join(root, 'node_modules/.bin'), process.env.PATH].join(delimiter)
  const { KEYLEDGER_TEST: _, ...env } = process.env
  const known = dev
    ? await pasted(db, server.url, redis.url, jwtSecret)
    : { JWT_SECRET: jwtSecret, DATABASE_URL: db.loginUrl, REDIS_URL: redis.url }
  const sh = shell(home, { ...env, ...known, PATH })
  db.onClose(sh.close)

  const raw = { getTypeParser: () => (text: string) => text }
  const client = new pg.Client({ connectionString: db.loginUrl, types: raw })
  await client.connect()
  db.onClose(() => client.end())
  const sql = psql(client)

  const [gateway, upstream] = [String(await freePort()), String(await freePort())]
  const addresses = { 'http://127.0.0.1:3000': server.url, 8080: gateway, 8081: upstream }
  const here = (code: string) =>
    Object.entries(addresses).reduce((code, [theirs, ours]) => code.replaceAll(theirs, ours), code)
  const same = (actual: string, { line, printed }: Block) => {
    if (!pattern(here(printed)).test(plain(actual)))
      assert.is(actual, printed, `${file}:${line} prints something else`)
  }
  const write = (code: string) => {
    const [, name] = /^\/\/ (\S+\.(?:[cm]?[jt]s))\n/.exec(code) ?? []
    assert.ok(name, 'the first line names the file')
    writeFileSync(join(home, name), here(code))
  }

  // the shell runs the programs that are written here
  const run: Record<string, (block: Block) => void | Promise<void>> = {
    async sql(block) {
      const output = await sql(block.code)
      // a reader may have switched the counts of rows off
      const counted = /^\(\d+ rows?\)$/m
      same(counted.test(block.printed) ? output : output.replaceAll(new RegExp(counted, 'gm'), ''), block)
    },
    async sh(block) {
      const output = await sh.run(here(block.code))
      // a program in the background prints in its own time
      if (/ &$/m.test(block.code))
        await until(() => pattern(here(block.printed)).test(plain(output())), 'it').catch(() => {})
      same(output(), block)
    },
    js: ({ code }) => write(code),
    ts({ code }) {
      write(code)
      const { status, stdout } = spawnSync(join(root, 'node_modules/.bin/tsc'), {
        cwd: home,
        encoding: 'utf8',
      })
      assert.is(status, 0, stdout)
    },
  }
  for (const block of blocks.filter(({ section }) => !except.includes(section))) {
    const { line, section, language } = block
    test(`${section}, line ${line}: the ${language} does what it says`, () => run[language]!(block))
  }
  test('it names make targets, files and headings that are there', () => namesWhatIsThere(file, text))
  return { test, db, home, PATH, blocks }
}

async function pasted(db: Database, POSTGREST_URL: string, REDIS_URL: string, secret: string) {
  const upstream = createUpstream()
  await new Promise<void>((resolve) => upstream.listen(0, '127.0.0.1', resolve))
  db.onClose(() => {
    upstream.closeAllConnections()
    upstream.close()
  })
  const { port } = upstream.address() as { port: number }
  const world = await sampleWorld(db.url, `http://127.0.0.1:${port}/v1`)
  return {
    ...{ DATABASE_URL: db.url, POSTGREST_URL, REDIS_URL },
    GATEWAY_TOKEN: await token(secret, { role: 'keyledger_gateway' }),
    OPERATOR_TOKEN: await token(secret, { role: 'keyledger_operator' }),
    MEMBER_TOKEN: await token(secret, { role: 'keyledger_member', user_id: world.USER_ID }),
    ...world,
  }
}

/** The blocks of a file of the project, given by its path. */
export const blocksOfFile = (file: string) => blocksOf(readFileSync(join(root, file), 'utf8'))

export function blocksOf(text: string): Block[] {
  const blocks: Block[] = []
  for (const { index, 1: language, 2: code } of text.matchAll(/^```(\w+)\n(.*?)^```$/gms)) {
    const before = text.slice(0, index)
    const section = /.*^## (.*?)$/ms.exec(before)?.[1] ?? ''
    if (language === 'text' && before.endsWith('```\n')) blocks.at(-1)!.printed = code!
    else
      blocks.push({ line: before.split('\n').length, section, language: language!, code: code!, printed: '' })
  }
  return blocks
}

// `…` stands for text that differs each time; neither spaces nor the length of a rule matter
const plain = (text: string) => text.replace(/\s+/g, '').replace(/-{2,}/g, '--')
const pattern = (printed: string) => {
  const parts = plain(printed).split('…')
  return new RegExp(`^${parts.map((part) => part.replace(/[\\^$.*+?()[\]{}|]/g, '\\$&')).join('[^|",]+')}$`)
}

// `app` in the given directory: our package as npm would install it, if a program uses it, and our own packages above
function readersDirectory(top: string, blocks: Block[]): string {
  const home = join(top, 'app')
  const installed = join(home, 'node_modules/keyledger')
  mkdirSync(installed, { recursive: true })
  mkdirSync(join(top, 'bin'))
  if (!inPath('curl')) symlinkSync(join(root, 'tests/readme/curl.mjs'), join(top, 'bin/curl'))
  symlinkSync(join(root, 'node_modules'), join(top, 'node_modules'))
  const tsconfig = {
    extends: join(root, 'tsconfig.json'),
    compilerOptions: { paths: {}, typeRoots: [join(root, 'node_modules/@types')] },
    include: ['*.mts', '*.ts'],
  }
  writeFileSync(join(home, 'tsconfig.json'), JSON.stringify(tsconfig))
  if (blocks.some(({ language }) => language === 'ts' || language === 'js')) {
    copyFileSync(join(root, 'package.json'), join(installed, 'package.json'))
    const built = ['-p', join(root, 'tsconfig.build.json'), '--outDir', join(installed, 'dist')]
    const { status, stdout } = spawnSync(join(root, 'node_modules/.bin/tsc'), built, { encoding: 'utf8' })
    assert.is(status, 0, stdout)
  }
  return home
}

export function namesWhatIsThere(file: string, text: string) {
  const makefile = readFileSync(join(root, 'Makefile'), 'utf8')
  for (const [, target] of text.matchAll(/(?:^|`)make ([a-z-]+)/gm))
    assert.match(makefile, new RegExp(`^${target}:`, 'm'))
  for (const [, link] of text.matchAll(/\]\(((?!https?:)[^)]+)\)/g)) {
    const [path, heading] = link!.split('#')
    const target = path ? join(root, dirname(file), path) : join(root, file)
    assert.ok(existsSync(target), link)
    if (heading) assert.ok(headingsOf(readFileSync(target, 'utf8')).includes(heading), link)
  }
}

const headingsOf = (text: string) =>
  [...text.matchAll(/^#+ (.*)$/gm)].map(([, heading]) =>
    heading!
      .toLowerCase()
      .replace(/[^\p{L}\p{N} _-]/gu, '')
      .replaceAll(' ', '-'),
  )
