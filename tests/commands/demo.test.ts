// The demo as a command: what it prints, what it proves, and how it refuses a wrong option.
import { spawn } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { cost, fromSteps, toSteps } from '../../scripts/money.ts'
import { prove } from '../../scripts/proof.ts'
import { until } from '../../scripts/supervise.ts'
import { database } from '../support/database.ts'
import { homes } from '../support/leftovers.ts'
import { payer } from '../support/payer.ts'

const test = suite('demo')
const db = await database(test)
const script = join(dirname(dirname(dirname(fileURLToPath(import.meta.url)))), 'scripts/demo.ts')
const dir = mkdtempSync(join(tmpdir(), 'keyledger-demo-test-'))
test.after(() => rmSync(dir, { recursive: true }))

function demo(...args: string[]): Promise<{ code: number | null; out: string[]; err: string[] }> {
  const child = spawn(process.execPath, [...process.execArgv, script, ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  const said = { out: '', err: '' }
  child.stdout.setEncoding('utf8').on('data', (text) => {
    said.out += text
  })
  child.stderr.setEncoding('utf8').on('data', (text) => {
    said.err += text
  })
  const lines = (text: string) => text.trimEnd().split('\n')
  return new Promise((resolve) =>
    child.on('close', (code) => resolve({ code, out: lines(said.out), err: lines(said.err) })),
  )
}

function traceFile(name: string, text: string): string {
  writeFileSync(join(dir, name), text)
  return join(dir, name)
}

// as the Azure traces are: CRLF, seven decimals of a second, no newline at the end
const header = 'TIMESTAMP,ContextTokens,GeneratedTokens'
const rows = Array.from(
  { length: 300 },
  (_, n) => `2023-11-16 18:15:${String(n % 60).padStart(2, '0')}.6805900,${374 + n},${44 + 7 * n}`,
)
const trace = traceFile('trace.csv', [header, ...rows].join('\r\n'))

const keys = [
  ...['requests', 'charged_total', 'expected_total', 'overspent', 'refused', 'duplicates', 'parked'],
  ...['verification_errors', 'seconds', 'requests_per_second', 'validate_p50_ms', 'validate_p99_ms'],
  ...['hold_p50_ms', 'hold_p99_ms', 'record_p50_ms', 'record_p99_ms', 'cache'],
]

for (const transport of ['postgrest', 'pg'])
  test(`charges a trace exactly through ${transport}`, async () => {
    // prices that end between two of the ten decimals, at a half too
    const prices = ['--input-price', '0.00005', '--output-price', '3.0000012345']
    const small = ['--users', '7', '--tenants', '2', '--transport', transport, '--json']
    const { code, out, err } = await demo('--trace', trace, ...prices, ...small)
    assert.is(code, 0, [...out, ...err].join('\n'))
    const figures = JSON.parse(out.at(-1)!)
    assert.equal(Object.keys(figures), keys)
    assert.equal(Object.keys(figures.cache), ['memory', 'redis', 'database'])
    // 0.00005 / 1e6 is half a step a token; 3.0000012345 / 1e6 is 30000.012345 steps
    const steps = rows.map((_, n) => Math.floor((374 + n) * 0.5 + (44 + 7 * n) * 30000.012345 + 0.5))
    assert.is(figures.charged_total, fromSteps(steps.reduce((sum, each) => sum + BigInt(each), 0n)))
    assert.is(figures.expected_total, figures.charged_total)
    assert.is(figures.requests, 300)
    assert.is(figures.overspent, '0.0000000000')
    assert.equal([figures.refused, figures.parked, figures.verification_errors], [0, 0, 0])
    assert.is(figures.cache.memory + figures.cache.redis + figures.cache.database, 300)
    assert.match(out.join('\n'), 'Every cent is proved.')
    const by = transport === 'pg' ? 'pg' : 'PostgREST'
    const [, said] = out.join('\n').match(/trace\.csv, \d+ keys of (.*)/)!
    assert.is(said, `7 users and 2 tenants, 2 gateways, through ${by}`)
  })

test('a run that does not verify says why', async () => {
  const account = await payer(db, { funds: '10' })
  await account.use('1.5', { hold_id: await account.hold('2') })
  await account.use('1')
  const funds = toSteps('10')!
  const replayed = {
    ...{ seconds: 1, overspent: 0n, admitted: 2, refused: 0, repeated: 0, duplicates: 0, parked: 0 },
    ...{ latencies: { validate: [], hold: [], record: [] }, problems: [] },
    expected: new Map([[account.accountId, toSteps('2.5')!]]),
  }
  const problems = async (more = {}, given = funds) =>
    (await prove(db.loginUrl, { ...replayed, ...more }, given)).problems.join('\n')
  assert.is(await problems(), '')
  const off = new Map([[account.accountId, toSteps('2.5000000001')!]])
  assert.match(await problems({ expected: off }), /^charged 2\.5000000000, expected 2\.5000000001\naccount /)
  // as much in all, from another account
  const others = new Map([[randomUUID(), toSteps('2.5')!]])
  assert.match(await problems({ expected: others }), /^account .* was charged 2\.5000000000, expected 0\.0/)
  assert.match(await problems({ admitted: 3 }), '2 events recorded of 3 admitted')
  assert.match(await problems({ repeated: 1 }), '0 duplicates of 1 events sent twice')
  assert.match(await problems({ overspent: 1n }), '0.0000000001 was admitted past')
  assert.match(await problems({}, toSteps('2')!), '0.5000000000 was admitted past')
  assert.match(await problems({ parked: 1 }), 'events are parked')
  assert.is(await problems({ problems: ['what the replay saw'] }), 'what the replay saw')
  const hold = await account.hold('1')
  assert.is(await problems(), '1 holds are still open')
  await account.release(hold)
  await account.use('1', { meters: { unpriced: 1 } })
  assert.is(await problems(), '1 events are parked')
  await db.sql(`delete from data.parked_usage`)
  await db.sql(`update data.account_balance set balance = balance + 1 where account_id = $1`, [
    account.accountId,
  ])
  assert.match(await problems(), `account ${account.accountId}: balance_is_not_the_sum_of_deltas`)
})

test('refuses what an account could not pay, and still proves the rest', async () => {
  const args = ['--trace', trace, '--funds', '0.1', '--users', '5', '--tenants', '2', '--speed', '20']
  const { code, out, err } = await demo(...args, '--transport', 'pg', '--json')
  assert.is(code, 0, [...out, ...err].join('\n'))
  const figures = JSON.parse(out.at(-1)!)
  assert.ok(figures.refused > 0 && figures.refused < 300, `${figures.refused} refused`)
  // of 59 s, at 20 times real time
  assert.ok(figures.seconds > 2.9, `${figures.seconds} s`)
  assert.is(figures.charged_total, figures.expected_total)
  assert.is(figures.overspent, '0.0000000000')
})

test('Ctrl-C leaves nothing', async () => {
  const home = mkdtempSync('/tmp/keyledger-demo-home-')
  chmodSync(home, 0o1777)
  const child = spawn(process.execPath, [...process.execArgv, script], {
    env: { ...process.env, TMPDIR: home },
    stdio: ['ignore', 'ignore', 'pipe'],
  })
  let said = ''
  child.stderr.on('data', (text) => {
    said += text
  })
  await until(() => said.includes('making 500 users') || child.exitCode !== null, 'the servers to be up')
  assert.is(homes(home).length, 3, said)
  child.kill('SIGINT')
  await until(() => child.exitCode !== null || child.signalCode, 'the demo to end')
  assert.equal(homes(home), [])
  rmSync(home, { recursive: true })
})

const wrong: [option: string[], says: RegExp][] = [
  [['--bogus'], /--bogus/],
  [['extra'], /'extra'/],
  [['--speed', '0'], /--speed must be max or a number above 0, not "0"/],
  [['--users', '1.5'], /--users must be a whole number from 1 to /],
  [['--tenants', '-1'], /--tenants must be a whole number from 0 to /],
  [['--input-price', '-1'], /--input-price must be a decimal .* not "-1"/],
  [['--output-price', '1e3'], /--output-price must be a decimal /],
  [['--funds', '0.12345678901'], /--funds must be a decimal .*at most 10 decimals/],
  [['--transport', 'http'], /--transport must be postgrest or pg/],
  [['--input-price', '999999999999'], /lower --input-price/],
  [['--trace', join(dir, 'none.csv')], /--trace: .*none\.csv/],
  [['--trace', traceFile('empty.csv', '')], /empty\.csv line 1: expected TIMESTAMP,/],
  [['--trace', traceFile('header.csv', `${header}\r\n`)], /header\.csv has no requests/],
  [
    ['--trace', traceFile('row.csv', `${header}\n${rows[0]}\n2023-11-16 18:15:46,x,1\n`)],
    /row\.csv line 3: /,
  ],
  [['--trace', traceFile('day.csv', `${header}\n2023-02-31 18:15:99,1,1`)], /day\.csv line 2: /],
]
test('a wrong option gets one line and exit code 2', async () => {
  const said = await Promise.all(wrong.map(([args]) => demo(...args)))
  for (const [n, [args, says]] of wrong.entries()) {
    const { code, out, err } = said[n]!
    assert.is(code, 2, `${args}: ${err}`)
    assert.is(err.length, 1, err.join('\n'))
    assert.match(err[0]!, says)
    assert.equal(out, [''])
  }
})

test('money is read and written to ten decimals, and rounded half up', () => {
  for (const text of ['', '-1', '1.', '.5', '1e3', 'NaN', '1000000000000', '0.00000000001', '1 '])
    assert.is(toSteps(text), undefined, text)
  assert.is(toSteps('999999999999.9999999999'), 10n ** 22n - 1n)
  assert.equal(
    ['2.50', '0', '0.0000000001'].map((text) => fromSteps(toSteps(text)!)),
    ['2.5000000000', '0.0000000000', '0.0000000001'],
  )
  assert.is(fromSteps(-15n), '-0.0000000015')
  assert.equal(
    [499_999, 500_000, 500_001, 1_499_999].map((tokens) => cost({ input: 1n, output: 0n }, tokens, 9)),
    [0n, 1n, 1n, 1n],
  )
})

test.run()
