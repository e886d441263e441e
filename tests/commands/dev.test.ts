// `make dev` as a command: the lines it prints and what they are good for, and that nothing is left of it.
import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { chmodSync, mkdtempSync, rmSync, symlinkSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import OpenAI from 'openai'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { inPath } from '../../scripts/binaries.ts'
import { until } from '../../scripts/supervise.ts'
import { createBillingModule, pgRpc, postgrestRpc } from '../../src/index.ts'
import { once } from '../support/database.ts'
import { homes, pidsIn, runs } from '../support/leftovers.ts'

const test = suite('dev')
const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))))
const servers = [
  'DATABASE_URL',
  'POSTGREST_URL',
  'REDIS_URL',
  'GATEWAY_TOKEN',
  'OPERATOR_TOKEN',
  'MEMBER_TOKEN',
]
const world = ['VIRTUAL_KEY', 'KEY_ID', 'USER_ID', 'TENANT_ID', 'NODE_ID', 'UPSTREAM_URL']

const running: { child: ChildProcess; dir: string; left: () => string[] }[] = []
const leftovers: string[] = []
test.after.each(async () => {
  for (const { child, dir, left } of running.splice(0)) {
    child.kill('SIGKILL')
    await until(() => left().length === 0, `nothing left of ${left()}`)
    leftovers.push(dir)
  }
  for (const dir of leftovers.splice(0)) rmSync(dir, { recursive: true })
})

// What was installed is tested: npm stays out of it.
// Starts it from the given program and waits until it is ready; its servers have a temporary directory of their own.
async function dev(argv = ['make', '--old-file=install', 'dev'], env: Record<string, string> = {}) {
  const dir = mkdtempSync('/tmp/keyledger-dev-test-')
  chmodSync(dir, 0o1777)
  const [program, ...args] = argv
  // started by a person, not by the make that runs the tests
  const { KEYLEDGER_TEST: _, MAKEFLAGS: __, MAKELEVEL: ___, ...inherited } = process.env
  const child: ChildProcess = spawn(program!, args, {
    cwd: root,
    detached: true,
    env: { ...inherited, TMPDIR: dir, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  let [out, err] = ['', '']
  child.stdout!.setEncoding('utf8').on('data', (text) => {
    out += text
  })
  child.stderr!.setEncoding('utf8').on('data', (text) => {
    err += text
  })
  let known: number[] = []
  // what still runs, and what is left of its files
  const left = () => [...new Set([...known, ...pidsIn(dir)])].filter(runs).map(String).concat(homes(dir))
  running.push({ child, dir, left })
  await until(() => out.endsWith('ready\n') || child.exitCode !== null, 'ready', 60)
  known = pidsIn(dir)
  assert.match(out, /ready\n$/, err)
  return {
    child,
    left,
    err: () => err,
    out: () => out,
    pids: () => known,
    values: evaluated(out.replace(/ready\n$/, '')),
  }
}

// as a program sees them that is started by the shell they were pasted into, after `set -a`
function evaluated(lines: string): Record<string, string> {
  const script = `set -eua; ${lines}\n'${process.execPath}' -p 'JSON.stringify(process.env)'`
  return JSON.parse(execFileSync('sh', ['-c', script], { encoding: 'utf8', env: {} }))
}

const exited = (child: ChildProcess) => until(() => child.exitCode !== null || child.signalCode, 'its end')

test('prints the promised lines, each good for what it says; ends by Ctrl-C', async () => {
  const { child, values, out, left, pids } = await dev()
  assert.equal(out().match(/^\w+/gm), [...servers, ...world, 'ready'])
  const { POSTGREST_URL, GATEWAY_TOKEN, OPERATOR_TOKEN, MEMBER_TOKEN, USER_ID, TENANT_ID } = values
  const get = async (path: string, token = '') => {
    const response = await fetch(`${POSTGREST_URL}/${path}`, {
      headers: { authorization: `Bearer ${token}` },
    })
    return response.ok ? response.json() : response.status
  }
  const balance = `account_balances?user_id=eq.${USER_ID}&select=account_id,balance::text`
  const acme = [{ account_id: TENANT_ID, balance: '25.0000000000' }]
  for (const token of [GATEWAY_TOKEN, OPERATOR_TOKEN, MEMBER_TOKEN])
    assert.equal(await get(balance, token), acme)
  // the member is an admin of its tenant, and no more
  assert.equal((await get('user_profiles?select=display_name&order=display_name', MEMBER_TOKEN)) as unknown, [
    { display_name: 'Ann' },
    { display_name: 'Ben' },
  ])
  assert.is(await get('tenants', GATEWAY_TOKEN), 403)
  assert.is(await get('tenants'), 401)

  const { DATABASE_URL, REDIS_URL, VIRTUAL_KEY, KEY_ID, NODE_ID } = values
  assert.equal(await once(DATABASE_URL!, 'select * from api.verify_balances()'), [])
  assert.match(REDIS_URL!, /^redis:\/\/:\w+@127\.0\.0\.1:\d+$/)
  for (const rpc of [
    pgRpc({ connectionString: DATABASE_URL! }),
    postgrestRpc({ url: POSTGREST_URL!, token: GATEWAY_TOKEN! }),
  ]) {
    const billing = createBillingModule({ rpc })
    const context = await billing.validate(VIRTUAL_KEY!)
    assert.equal(
      [context.virtual_key_id, context.account_id, context.config_node_ids],
      [KEY_ID, TENANT_ID, [NODE_ID]],
    )
    const meters = { input_tokens: 1000, cached_input_tokens: 1000, output_tokens: 1000 }
    const charged = await billing.recordUsage({ ...context, config_node_id: NODE_ID!, meters })
    assert.equal([charged.status, charged.cost], ['charged', '0.0137500000'])
    await billing.stop()
    await rpc.close()
  }

  // a terminal sends it to all in the foreground
  process.kill(-child.pid!, 'SIGINT')
  await exited(child)
  assert.equal(pids().length, 3)
  assert.equal(left(), [])
})

test('says so where redis-server is not installed', async () => {
  const bin = mkdtempSync('/tmp/keyledger-dev-bin-')
  chmodSync(bin, 0o755)
  for (const name of ['sh', 'id', 'test', 'sleep', 'mv', 'rm', 'chown'])
    symlinkSync(inPath(name)!, join(bin, name))
  leftovers.push(bin)
  const { values, err } = await dev([process.execPath, '--import', 'tsx', 'scripts/dev.ts'], { PATH: bin })
  assert.is(values.REDIS_URL, undefined)
  assert.match(err(), /no REDIS_URL: redis-server is not installed/)
})

test('with --proxy, the openai client works with what it prints', async () => {
  const { values, out, child, left } = await dev(['make', '--old-file=install', 'dev', 'ARGS=--proxy'])
  assert.equal(out().match(/^\w+/gm), [...servers, 'PROXY_URL', ...world, 'ready'])
  const { PROXY_URL, VIRTUAL_KEY, TENANT_ID, DATABASE_URL } = values
  const openai = new OpenAI({ baseURL: `${PROXY_URL}/v1`, apiKey: VIRTUAL_KEY })
  const messages = [{ role: 'user' as const, content: 'Good morning!' }]
  const { choices } = await openai.chat.completions.create({ model: 'demo', messages })
  assert.is(choices[0]!.message.content, 'You said: Good morning!')
  const [account] = await once(
    DATABASE_URL!,
    `select balance::text from api.billing_accounts where account_id = '${TENANT_ID}'`,
  )
  assert.equal(account, { balance: '24.9999550000' }) // 2 in, 4 out
  process.kill(-child.pid!, 'SIGINT')
  await exited(child)
  assert.equal(left(), [])
})

for (const signal of ['SIGTERM', 'SIGKILL'] as const)
  test(`nothing is left after ${signal} of make alone`, async () => {
    const { child, left } = await dev()
    assert.ok(left().length >= 6)
    child.kill(signal)
    await until(() => left().length === 0, 'nothing left')
    await exited(child)
  })

test('a wrong option gets one line and exit code 2', async () => {
  const child = spawn(process.execPath, ['--import', 'tsx', 'scripts/dev.ts', '--bogus'], { cwd: root })
  const err: string[] = []
  child.stderr.setEncoding('utf8').on('data', (text) => err.push(text))
  await exited(child)
  assert.is(child.exitCode, 2)
  assert.match(err.join(''), /^dev: .*'--bogus'.*\n$/)
})

test.run()
