// Every model of the genai-prices catalog: SQL charges each usage what the catalog's own calculator says.
import { calcPrice, type ModelInfo, type Provider, waitForUpdate } from '@pydantic/genai-prices'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { METERS, type Rate, rateLists } from '../../src/price-list.ts'
import { database } from '../support/database.ts'

const test = suite('catalog')
const db = await database(test)
const providers = (await waitForUpdate())!

// The parts of the catalog that a rate can't hold, each with its reason. A new one fails the test.
const LEFT: Record<string, string> = {
  'groq whisper-large-v3': 'at least 10 seconds are billed: write it to minimum_charges',
  'groq whisper-large-v3-turbo': 'at least 10 seconds are billed: write it to minimum_charges',
}

// The catalog's name of each quantity. A quantity includes the more special ones; a meter doesn't.
const USAGE: Record<string, string> = {
  input_mtok: 'input_tokens',
  cache_read_mtok: 'cache_read_tokens',
  cache_write_mtok: 'cache_write_tokens',
  cache_write_1h_mtok: 'cache_write_1h_tokens',
  input_audio_mtok: 'input_audio_tokens',
  cache_audio_read_mtok: 'cache_audio_read_tokens',
  input_image_mtok: 'input_image_tokens',
  cache_image_read_mtok: 'cache_image_read_tokens',
  input_video_mtok: 'input_video_tokens',
  output_mtok: 'output_tokens',
  output_reasoning_mtok: 'output_reasoning_tokens',
  output_citation_mtok: 'output_citation_tokens',
  output_audio_mtok: 'output_audio_tokens',
  output_image_mtok: 'output_image_tokens',
  output_video_mtok: 'output_video_tokens',
  web_searches_kcount: 'web_searches',
  storage_searches_kcount: 'storage_searches',
  input_text_messages_kcount: 'input_text_messages',
  input_document_kpages: 'input_document_pages',
  input_annotated_document_kpages: 'input_annotated_document_pages',
  audio_hours: 'audio_seconds',
  input_audio_hours: 'input_audio_seconds',
}
const inputs = ['input_', 'cached_input_', 'cache_write_']
const isInput = (meter: string) =>
  meter.endsWith('_tokens') && inputs.some((start) => meter.startsWith(start))
const isOutput = (meter: string) => /^(output_|reasoning_|citation_).*tokens$/.test(meter)
const INCLUDES: Record<string, (meter: string) => boolean> = {
  input_tokens: isInput,
  output_tokens: isOutput,
  cache_read_tokens: (meter) => meter.startsWith('cached_input_'),
  cache_write_tokens: (meter) => meter.startsWith('cache_write_'),
  input_audio_tokens: (meter) => meter.endsWith('input_audio_tokens'),
  input_image_tokens: (meter) => meter.endsWith('input_image_tokens'),
  audio_seconds: (meter) => meter === 'seconds' || meter === 'input_audio_seconds',
  input_document_pages: (meter) => meter === 'pages' || meter === 'annotated_pages',
}

/** A partition, as the catalog's calculator takes it: each quantity with all that it includes. */
function inclusive(keys: string[], meters: Record<string, number>): Record<string, number> {
  return Object.fromEntries(
    keys
      .filter((key) => USAGE[key])
      .map((key) => {
        const [usage, own] = [USAGE[key]!, METERS[key]![0]]
        const includes = INCLUDES[usage] ?? ((meter: string) => meter === own)
        const sum = Object.entries(meters).reduce((sum, [meter, n]) => sum + (includes(meter) ? n : 0), 0)
        return [usage, sum]
      }),
  )
}

interface Model {
  provider: Provider
  model: ModelInfo
  name: string
  lists: { from?: string; rates: Rate[] }[]
}
const models: Model[] = []
const left: Record<string, string> = {}
for (const provider of providers)
  for (const model of provider.models) {
    const name = `${provider.id} ${model.id}`
    const held = rateLists(model, provider.id, model.id)
    if (held.left.length) left[name] = held.left.join('; ')
    models.push({ provider, model, name, lists: held.lists })
  }

const BEGINNING = '2000-01-01T00:00:00Z'
const DAY = '2026-11-30'

/** Moments at both sides of each date, and of each window of hours. */
function momentsOf({ lists }: Model): Date[] {
  const dates = lists.flatMap(({ from }) => (from ? [Date.parse(from) - 1, Date.parse(from)] : []))
  const days = [...new Set([DAY, ...lists.flatMap(({ from }) => (from ? [from.slice(0, 10)] : []))])]
  const minutes = lists
    .flatMap(({ rates }) => rates.flatMap(({ hours }) => [...(hours ?? '').matchAll(/\d+/g)].map(Number)))
    .filter((minute) => minute < 1440)
  const edges = days.flatMap((day) =>
    minutes.flatMap((minute) =>
      [0, 1].map((after) => Date.parse(`${day}T00:00:00Z`) + minute * 60_000 - 1 + after),
    ),
  )
  return [...new Set([Date.parse(`${DAY}T12:34:56Z`), ...dates, ...edges])].map((ms) => new Date(ms))
}

/** Usages of a list at both sides of each tier: all meters, with a context of that many tokens. */
function usagesOf(rates: Rate[], seed: number): Record<string, number>[] {
  const meters = [...new Set(rates.map(({ meter }) => meter))]
  const overs = [...new Set(rates.map(({ context_over }) => context_over))]
  const contexts = [1 + (seed % 900), ...overs.filter(Boolean).flatMap((over) => [over, over + 1])]
  return contexts.map((context, i) => {
    const its = meters.filter(isInput)
    const usage: Record<string, number> = {}
    let rest = context
    for (const [n, meter] of its.entries()) {
      const part = n === its.length - 1 ? rest : Math.floor(rest / (2 + ((seed + n + i) % 5)))
      usage[meter] = part
      rest -= part
    }
    for (const [n, meter] of meters.filter((meter) => !isInput(meter)).entries())
      usage[meter] = meter === 'requests' ? 1 : 1 + ((seed * 31 + n * 17 + i) % 5000)
    return usage
  })
}

test('the catalog is the one this file goes by, and names each part that no rate holds', () => {
  assert.ok(models.length > 1500, `${models.length} models`)
  assert.equal(left, LEFT)
  assert.ok(
    models.some(({ lists }) => lists.length > 1),
    'dates',
  )
  assert.ok(
    models.some(({ lists }) => lists.some(({ rates }) => rates.some(({ hours }) => hours))),
    'hours',
  )
  assert.ok(
    models.some(({ lists }) => lists.some(({ rates }) => rates.some((rate) => rate.context_over))),
    'tiers',
  )
})

test('SQL charges each usage of each model what the catalog charges, at both sides of all that matters', async () => {
  const nodes = await db.operator(
    'insert into api.config_nodes (name) select n from unnest($1::text[]) n returning id, name',
    [models.map(({ name }) => name)],
  )
  const idOf = new Map(nodes.map(({ id, name }) => [name, id]))
  await db.operator(
    `select count(*) from jsonb_to_recordset($1) as l (node uuid, rates jsonb, since timestamptz)
    cross join lateral api.set_rates(l.node, l.rates, effective_from => l.since)`,
    [
      JSON.stringify(
        models.flatMap(({ name, lists }) =>
          lists
            .filter(({ rates }) => rates.length)
            .map(({ from, rates }) => ({ node: idOf.get(name), rates, since: from ?? BEGINNING })),
        ),
      ),
    ],
  )

  const cases: { name: string; node: string; meters: Record<string, number>; at: string; price: number }[] =
    []
  const refused: string[] = []
  for (const [n, it] of models.entries()) {
    const alone = { ...it.provider, models: [{ ...it.model, match: { equals: it.model.id } }] }
    for (const timestamp of momentsOf(it)) {
      const inForce = it.lists.findLast(({ from }) => !from || Date.parse(from) <= timestamp.getTime())!
      const entry = calcPrice({}, it.model.id, { provider: alone, timestamp })!.model_price
      const keys = Object.keys(entry)
      for (const meters of usagesOf(inForce.rates, n)) {
        const usage = inclusive(keys, meters)
        // the calculator bills 10 seconds at least, which a rate can't hold
        if (LEFT[it.name] && meters.seconds! < 10) continue
        try {
          const { total_price: price } = calcPrice(usage, it.model.id, { provider: alone, timestamp })!
          cases.push({ name: it.name, node: idOf.get(it.name)!, meters, at: timestamp.toISOString(), price })
        } catch (error) {
          refused.push(`${it.name}: ${(error as Error).message}`)
        }
      }
    }
  }
  assert.equal(refused, [])
  assert.ok(cases.length > 1800, `${cases.length} usages`)

  const charged = await db.sql(
    `select p.cost::text, p.code
    from data.terms_in_use u
    cross join rows from (jsonb_to_recordset($1) as (node uuid, meters jsonb, at timestamptz))
      with ordinality as c (node, meters, at, n)
    cross join lateral data.price_meters(c.node, c.meters, 'USD', c.at, '', null, u) p
    order by c.n`,
    [JSON.stringify(cases.map(({ node, meters, at }) => ({ node, meters, at })))],
  )
  assert.is(charged.length, cases.length)
  for (const [i, { name, meters, at, price }] of cases.entries()) {
    const { cost, code } = charged[i]!
    const what = `${name} at ${at}: ${JSON.stringify(meters)}: ${cost ?? code}, the catalog says ${price}`
    assert.ok(cost !== null && Math.abs(Number(cost) - price) <= 1e-9 * price + 1.1e-10, what)
  }
})

test.run()
