// List prices from the catalog: shown first, written on demand, exactly, and only where they differ.
import { spawn } from 'node:child_process'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { calcPrice } from '@pydantic/genai-prices'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row } from '../support/database.ts'
import { event, seed } from '../support/seed.ts'

const test = suite('prices')
const db = await database(test)
const script = join(dirname(dirname(dirname(fileURLToPath(import.meta.url)))), 'src/bin.ts')

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
  const child = spawn(process.execPath, [...process.execArgv, script, 'prices', ...args], {
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
      `select meter, unit_price::text, unit_size, currency from data.price where config_node_id = $1 order by effective_from, meter, price_book_id nulls first`,
      [id],
    )
  ).map((row: Row) => Object.values(row).join(' '))

test('the catalog has the models this file goes by', () => {
  const listed = (model: string) => calcPrice({}, model, { providerId: 'openai' })!.model_price
  assert.equal(listed('gpt-4o'), {
    ...{ input_mtok: 2.5, cache_read_mtok: 1.25, output_mtok: 10 },
    ...{ web_searches_kcount: 10, storage_searches_kcount: 2.5 },
  })
  assert.equal(listed('gpt-4.1-nano'), { input_mtok: 0.1, cache_read_mtok: 0.025, output_mtok: 0.4 })
  assert.equal(listed('gpt-4'), { input_mtok: 30, output_mtok: 60 })
})

for (const by of Object.keys(ways)) {
  test(`shows what would change, writes it when told to, and then finds nothing to write, by ${by}`, async () => {
    const provider = await node('openai', 'gpt-4o')
    const nano = await node('openai', 'gpt-4.1-nano')
    const other = await node('anthropic', 'gpt-4o')

    const shown = await prices(by, '--provider', 'openai')
    assert.is(shown.code, 0, shown.err)
    assert.match(shown.out, new RegExp(`^${provider.name} +gpt-4o +cached_input_tokens +- +1.25 +new$`, 'm'))
    assert.match(shown.out, /8 prices to write, .*Nothing was written: repeat it with --write/)
    assert.equal([await written(provider), await written(nano)], [[], []])

    const wrote = await prices(by, '--provider', 'openai', '--write')
    assert.is(wrote.code, 0, wrote.err)
    assert.match(wrote.out, /^8 prices written/m)
    assert.equal(await written(provider), [
      'cached_input_tokens 1.25 1000000 USD',
      'input_tokens 2.5 1000000 USD',
      'output_tokens 10 1000000 USD',
      'storage_searches 2.5 1000 USD',
      'web_searches 10 1000 USD',
    ])
    assert.equal(await written(nano), [
      'cached_input_tokens 0.025 1000000 USD',
      'input_tokens 0.1 1000000 USD',
      'output_tokens 0.4 1000000 USD',
    ])
    assert.equal(await written(other), [])

    const again = await prices(by, '--provider', 'openai', '--write')
    assert.is(again.code, 0, again.err)
    assert.match(again.out, 'Nothing to write.')
    assert.match(again.out, new RegExp(`^${provider.name} +gpt-4o +input_tokens +2.5 +2.5 +in force$`, 'm'))
    assert.is((await written(provider)).length, 5)
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
        ($1, 'cached_input_tokens', 1.25, 1000000, 'EUR', '2024-01-01'), ($1, 'ours', 1, 1, 'USD', '2024-01-01')`,
      [it.id],
    )
    const of = (...args: string[]) => prices(by, '--provider', 'openai', '--node', it.name, ...args)
    const earlier = await of('--from', '2024-06-01')
    assert.match(earlier.out, /^3 prices to write, .* from 2024-06-01T00:00:00.000Z/m)
    const { out, err } = await of('--write', '--from', '2026-01-01T02:00:00+02:00')
    assert.match(out, /ours +as it is +- +not in the catalog$/m)
    assert.match(out, /output_tokens +15 +10 +changes$/m, err)
    assert.match(out, /input_tokens +0.0025 per 1000 +2.5 +in force$/m)
    assert.equal((await written(it)).slice(5), [
      'cached_input_tokens 1.25 1000000 USD',
      'output_tokens 10 1000000 USD',
      'storage_searches 2.5 1000 USD',
      'web_searches 10 1000 USD',
    ])
    const rows = await db.sql(
      `select count(*)::int as prices, effective_from from data.price where config_node_id = $1 group by 2 order by 2 desc limit 1`,
      [it.id],
    )
    assert.equal(rows, [{ prices: 4, effective_from: new Date('2026-01-01T00:00:00Z') }])

    // prices are never changed: not even by a list that disagrees about the same moment
    await db.operator(`update api.config_nodes set model = 'gpt-4' where id = $1`, [it.id])
    const clash = await of('--write', '--from', '2026-01-01')
    assert.is(clash.code, 1)
    assert.match(clash.err, 'has another output_tokens price from that very moment')
    assert.is((await written(it)).length, 9)
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
  const unknown = await node('openai', 'mine-4o')
  const without = await node('openai', null)
  const { code, out, err } = await prices('pg', '--provider', 'openai', '--write')
  assert.is(code, 0, err)
  assert.match(out, `the catalog has no price of openai's mine-4o`)
  assert.match(out, 'it has no model')
  assert.equal(await written(old), ['input_tokens 30 1000000 USD', 'output_tokens 60 1000000 USD'])
  assert.equal([await written(unknown), await written(without)], [[], []])
  const named = await prices('pg', '--provider', 'openai', '--node', unknown.name)
  assert.is(named.code, 1)
  assert.match(named.err, /no price of openai's mine-4o$/m)
  await db.operator(`update api.config_nodes set provider = 'done' where provider = 'openai'`)
})

test('what it was not given, or does not know, it says', async () => {
  const it = await node('anthropic', 'claude-x')
  const cases: [args: string[], code: number, said: RegExp][] = [
    [[], 2, /^prices: --provider is missing/],
    [['--provider', 'openai', '--from', '2026-02-30'], 2, /--from must be a date/],
    [['--provider', 'openai', '--from', '2026-02-01T00:00:00'], 2, /--from must be a date/],
    [['--provider', 'openai', '--wirte'], 2, /--wirte/],
    [['--provider', 'openai', '--factor', '2'], 2, /--factor needs a --book/],
    [['--provider', 'openai', '--book', 'b', '--factor', '2'], 2, /--factor is the whole book's/],
    [['--book', 'b', '--factor', '1001'], 2, /--factor must be a number/],
    [['--book', 'b', '--factor', '-1'], 2, /--factor/],
    [['--book', 'b', '--factor', '1.1234567'], 2, /--factor must be a number/],
    [['--provider', 'openai', '--model', 'gpt-4o'], 2, /--model needs a --node/],
    [['--provider', 'openai', '--book', 'nowhere'], 1, /^prices: there is no price book nowhere/],
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

test('history: from an early date each change of the catalog is a list of its own', async () => {
  const it = await node('openai', 'o3')
  const { code, out, err } = await prices(
    'pg',
    '--provider',
    'openai',
    '--node',
    it.name,
    '--from',
    '2025-01-01',
    '--write',
  )
  assert.is(code, 0, err)
  const lists = await db.operator(
    `select effective_from, trim_scale(unit_price)::text as price from api.prices
    where config_node_id = $1 and meter = 'input_tokens' order by 1`,
    [it.id],
  )
  assert.equal(lists, [
    { effective_from: new Date('2025-01-01T00:00:00Z'), price: '10' },
    { effective_from: new Date('2025-06-10T00:00:00Z'), price: '2' },
  ])
  assert.match(out, /input_tokens +10 +2 +changes from 2025-06-10$/m)
  const again = await prices(
    'pg',
    '--provider',
    'openai',
    '--node',
    it.name,
    '--from',
    '2025-01-01',
    '--write',
  )
  assert.match(again.out, 'Nothing to write.', again.err)
  await db.operator(`update api.config_nodes set provider = 'done' where id = $1`, [it.id])
})

test('hours and tiers become rates, under another name of the model, and in a book', async () => {
  const it = await node('deepseek', 'ours')
  await db.operator(`insert into api.price_books (name, kind) values ('our costs', 'cost')`)
  const of = (...args: string[]) =>
    prices(
      'pg',
      '--provider',
      'deepseek',
      '--node',
      it.name,
      '--model',
      'deepseek-chat',
      '--book',
      'our costs',
      ...args,
    )
  const { code, out, err } = await of('--from', '2025-03-01', '--write')
  assert.is(code, 0, err)
  assert.match(out, /in 00:30-16:30 UTC/)
  const [{ windows, own }] = (await db.operator(
    `select count(*) filter (where hours is not null)::int as windows, bool_and(price_book_id is not null) as own
    from api.prices where config_node_id = $1`,
    [it.id],
  )) as [Row]
  assert.ok(windows > 0)
  assert.is(own, true)
  assert.match((await of('--from', '2025-03-01')).out, 'Nothing to write.')
})

for (const by of Object.keys(ways))
  test(`a book's factor is shown, written, and then left alone, by ${by}`, async () => {
    const name = `resellers by ${by}`
    await db.operator('insert into api.price_books (name) values ($1)', [name])
    const of = (...args: string[]) => prices(by, '--book', name, '--factor', '1.2', ...args)
    assert.match((await of()).out, /factor - -> 1.2, from now\n\nNothing was written/)
    assert.match((await of('--write')).out, 'The factor is written.')
    assert.match((await of('--write')).out, /factor 1.2 -> 1.2, from now\n\nNothing to write/)
  })

test.run()
