// The example gateway by its other routes: Responses and Messages, whole and as streams, charged
// by the same path.
import { createServer, type ServerResponse } from 'node:http'
import { text as textOf } from 'node:stream/consumers'
import OpenAI from 'openai'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { startExample } from '../../scripts/servers.ts'
import { until } from '../../scripts/supervise.ts'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { holdsTrue } from '../support/ledger.ts'
import { seed, type World } from '../support/seed.ts'

const test = suite('proxy-flavors')
const db = await database(test)
const postgrest = await db.postgrest()

/** How the upstream answers. */
// biome-ignore lint/suspicious/noExplicitAny: a gateway may send anything
type Answering = (res: ServerResponse, asked: any) => unknown

let answering: Answering
// biome-ignore lint/suspicious/noExplicitAny: a gateway may send anything
const calls: { url: string; headers: Record<string, unknown>; body: any; closed: boolean }[] = []
const upstream = createServer(async (req, res) => {
  const call = { url: req.url!, headers: req.headers, body: JSON.parse(await textOf(req)), closed: false }
  calls.push(call)
  res.on('close', () => {
    call.closed = true
  })
  await answering(res, call.body)
})
await new Promise<void>((resolve) => upstream.listen(0, '127.0.0.1', resolve))
db.onClose(() => {
  upstream.closeAllConnections()
  upstream.close()
})
const proxy = await startExample('proxy', {
  POSTGREST_URL: postgrest.url,
  GATEWAY_TOKEN: await postgrest.token({ role: 'keyledger_gateway' }),
  DATABASE_URL: db.loginUrl,
  REDIS_URL: undefined,
  CORS_ORIGIN: undefined,
  UPSTREAM_API_KEY: 'the-credential',
  UPSTREAM_TIMEOUT: '2000',
})
db.onClose(() => proxy.stop())

const [node] = await db.operator(
  `insert into api.config_nodes (name, model, endpoint) values ('node', 'm', $1) returning id`,
  [`http://127.0.0.1:${(upstream.address() as { port: number }).port}/v1`],
)
await db.operator(
  `insert into api.prices (config_node_id, meter, variant, unit_price, unit_size, effective_from)
   select $1, meter, variant, price * case variant when 'priority' then 2 else 1 end, 1000000, '2020-01-01'
   from (values ('input_tokens', 2.5), ('cached_input_tokens', 1.25), ('cache_write_tokens', 3), ('output_tokens', 10))
     as p (meter, price), unnest('{"",priority}'::text[]) variant`,
  [node!.id],
)

interface Caller extends World {
  openai: OpenAI
  /** A POST to `/v1` and this path. */
  post(path: string, body: object, signal?: AbortSignal): Promise<Response>
}

async function caller(funds = '100'): Promise<Caller> {
  const world = await seed(db.operator, { funds })
  await db.operator(
    'insert into api.virtual_key_config_nodes (virtual_key_id, config_node_id) values ($1, $2)',
    [world.keyId, node!.id],
  )
  const headers = { 'x-api-key': world.key, 'content-type': 'application/json' }
  return {
    ...world,
    openai: new OpenAI({ baseURL: `${proxy.url}/v1`, apiKey: world.key, maxRetries: 0 }),
    post: (path, body, signal) =>
      fetch(`${proxy.url}/v1${path}`, { method: 'POST', headers, body: JSON.stringify(body), signal }),
  }
}

/** No hold is left, nothing is parked; the events of the account, with their costs. */
async function events({ accountId }: Caller): Promise<Row[]> {
  await until(
    async () =>
      !(await db.sql(`select from data.hold where account_id = $1 and status = 'open'`, [accountId])).length,
    'holds to end',
  )
  assert.is((await db.sql('select from api.parked_usage where account_id = $1', [accountId])).length, 0)
  return db.sql(
    `select meters, cost::text, coalesce(variant, '') as variant, coalesce(estimated, false) as estimated, request_id
     from api.usage_logs where account_id = $1 order by id`,
    [accountId],
  )
}

const json =
  (body: unknown, status = 200): Answering =>
  (res) =>
    res.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(body))
const sse = (parts: { type: string }[]) =>
  parts.map((part) => `event: ${part.type}\ndata: ${JSON.stringify(part)}\n\n`).join('')
const stream =
  (parts: { type: string }[]): Answering =>
  (res) =>
    res.writeHead(200, { 'content-type': 'text/event-stream' }).end(sse(parts))

test.before.each(() => {
  calls.length = 0
})
test.after.each(() => holdsTrue(db.sql))

// --- Responses

const output = [
  {
    type: 'message',
    id: 'm',
    role: 'assistant',
    content: [{ type: 'output_text', text: 'hello', annotations: [] }],
  },
]
const usage = {
  input_tokens: 700,
  input_tokens_details: { cached_tokens: 100 },
  output_tokens: 300,
  output_tokens_details: { reasoning_tokens: 200 },
  total_tokens: 1000,
}
const response = {
  id: 'resp_1',
  object: 'response',
  status: 'completed',
  error: null,
  service_tier: 'default',
  output,
  usage,
}
const RESPONSE = {
  meters: { input_tokens: 600, cached_input_tokens: 100, output_tokens: 300 },
  cost: '0.0046250000',
  variant: '',
  estimated: false,
  request_id: 'resp_1',
}
const begun = [
  { type: 'response.created', response: { ...response, output: [], usage: null } },
  { type: 'response.output_text.delta', delta: 'x'.repeat(400) },
]
const responding = [...begun, { type: 'response.completed', response }]

test("Responses: OpenAI's client, whole and as a stream, is charged by the answer's figures", async () => {
  const who = await caller()
  answering = json(response)
  const answer = await who.openai.responses.create({ model: 'm', input: 'hi', max_output_tokens: 500 })
  assert.is(answer.output_text, 'hello')
  assert.equal(await events(who), [RESPONSE])
  assert.equal([calls[0]!.url, calls[0]!.headers.authorization], ['/v1/responses', 'Bearer the-credential'])
  const [hold] = await db.sql('select meters from api.holds where account_id = $1', [who.accountId])
  assert.is(hold!.meters.output_tokens, 500)

  answering = stream(responding)
  const types: string[] = []
  for await (const event of await who.openai.responses.create({ model: 'm', input: 'hi', stream: true })) {
    types.push(event.type)
    // charged before its last event
    if (event.type === 'response.completed') assert.is((await events(who)).length, 2)
  }
  assert.equal(
    types,
    responding.map(({ type }) => type),
  )
  assert.equal(await events(who), [RESPONSE, RESPONSE])
  // nothing of Chat Completions is asked of it
  assert.equal(calls[1]!.body, { model: 'm', input: 'hi', stream: true })
})

test('Responses: a stream passes on each event by its name', async () => {
  const who = await caller()
  answering = stream(responding)
  const given = await who.post('/responses', { model: 'm', input: 'hi', stream: true })
  assert.is(await given.text(), sse(responding))
})

test('Responses: the tier that was served is charged, and the dearest that may serve is held', async () => {
  const who = await caller()
  answering = json({ ...response, service_tier: 'priority' })
  await who.openai.responses.create({ model: 'm', input: 'hi', service_tier: 'auto' })
  answering = json(response)
  await who.openai.responses.create({ model: 'm', input: 'hi', service_tier: 'priority' })
  await who.openai.responses.create({ model: 'm', input: 'hi', service_tier: 'default' })
  assert.equal(await events(who), [
    { ...RESPONSE, variant: 'priority', cost: '0.0092500000' },
    RESPONSE,
    RESPONSE,
  ])
  const holds = await db.sql(
    'select amount::float8 as amount from api.holds where account_id = $1 order by id',
    [who.accountId],
  )
  const [auto, priority, standard] = holds.map(({ amount }) => amount)
  assert.ok(auto > 1.9 * standard && priority > 1.9 * standard, JSON.stringify(holds))
})

test('Responses: a stream that breaks off is charged by its text, and ends in an error', async () => {
  const who = await caller()
  answering = (res) => {
    res.writeHead(200, { 'content-type': 'text/event-stream' }).write(sse(begun))
    setTimeout(() => res.destroy(), 50)
  }
  const error = await failure(
    (async () => {
      for await (const _ of await who.openai.responses.create({ model: 'm', input: 'hi', stream: true }));
    })(),
  )
  assert.is(error.code, 'upstream_broke_off')
  const [event] = await events(who)
  assert.equal([event!.meters.output_tokens, event!.estimated], [100, true])
})

test('Responses: a caller that cannot pay, or has no such model, is refused as a client of OpenAI expects', async () => {
  const who = await caller('0.0001')
  answering = json(response)
  const refused = await failure(who.openai.responses.create({ model: 'm', input: 'hi' }))
  assert.equal(
    [refused.status, refused.code, refused.type],
    [402, 'insufficient_funds', 'insufficient_quota'],
  )
  const unknown = await failure(who.openai.responses.create({ model: 'other', input: 'hi' }))
  assert.equal([unknown.status, unknown.code], [404, 'model_not_found'])
  assert.is(calls.length, 0)
})

// --- Messages

const messageUsage = { input_tokens: 100, cache_read_input_tokens: 1000, cache_creation_input_tokens: 500 }
const message = {
  id: 'msg_1',
  type: 'message',
  role: 'assistant',
  content: [{ type: 'text', text: 'hello' }],
  usage: { ...messageUsage, output_tokens: 90, service_tier: 'standard' },
}
const MESSAGE = {
  meters: { input_tokens: 100, cached_input_tokens: 1000, cache_write_tokens: 500, output_tokens: 90 },
  cost: '0.0039000000',
  variant: '',
  estimated: false,
  request_id: 'msg_1',
}
const start = {
  type: 'message_start',
  message: { ...message, content: [], usage: { ...messageUsage, output_tokens: 1 } },
}
const delta = { type: 'content_block_delta', index: 0, delta: { type: 'text_delta', text: 'x'.repeat(800) } }
const telling = [
  start,
  { type: 'content_block_start', index: 0, content_block: { type: 'text', text: '' } },
  { type: 'ping' },
  delta,
  { type: 'content_block_stop', index: 0 },
  { type: 'message_delta', delta: { stop_reason: 'end_turn' }, usage: { output_tokens: 90 } },
  { type: 'message_stop' },
]
const asking = { model: 'm', max_tokens: 200, messages: [{ role: 'user', content: 'hi' }] }

test('Messages: an answer and a stream come as the upstream gave them, and are charged by its figures', async () => {
  const who = await caller()
  answering = json(message)
  const whole = await who.post('/messages', asking)
  assert.equal([whole.status, whole.headers.get('x-usage-cost')], [200, MESSAGE.cost])
  assert.equal(await whole.json(), message)
  const { url, headers, body } = calls[0]!
  assert.equal(
    [url, headers['x-api-key'], headers.authorization],
    ['/v1/messages', 'the-credential', undefined],
  )
  assert.equal([headers['anthropic-version'], body], ['2023-06-01', asking])

  answering = stream(telling)
  const streamed = await who.post('/messages', { ...asking, stream: true })
  assert.is(await streamed.text(), sse(telling))
  assert.equal(await events(who), [MESSAGE, MESSAGE])
})

test('Messages: a caller that leaves pays for the text passed on, not for the first count', async () => {
  const who = await caller()
  answering = (res) => res.writeHead(200, { 'content-type': 'text/event-stream' }).write(sse([start, delta]))
  const leaving = new AbortController()
  const given = await who.post('/messages', { ...asking, stream: true }, leaving.signal)
  const reader = given.body!.getReader()
  let text = ''
  while (!text.includes('content_block_delta')) text += Buffer.from((await reader.read()).value!).toString()
  leaving.abort()
  await until(() => calls[0]!.closed, 'the upstream to be told')
  const [event] = await events(who)
  assert.equal(event!.meters, { ...MESSAGE.meters, output_tokens: 200 })
  assert.is(event!.estimated, true)
})

test('Messages: a stream that breaks off ends in an error of its shape', async () => {
  const who = await caller()
  answering = (res) => {
    res.writeHead(200, { 'content-type': 'text/event-stream' }).write(sse([start]))
    setTimeout(() => res.destroy(), 50)
  }
  const text = await (await who.post('/messages', { ...asking, stream: true })).text()
  const [name, data] = text.trim().split('\n').slice(-2)
  assert.is(name, 'event: error')
  const { type, error } = JSON.parse(data!.slice('data: '.length))
  assert.equal([type, error.type, error.code], ['error', 'api_error', 'upstream_broke_off'])
  assert.is((await events(who)).length, 1)
})

test("Messages: refusals are in Anthropic's shape, ours and the upstream's", async () => {
  const who = await caller()
  const refused = async (given: Promise<Response>) => {
    const answer = await given
    const { type, error } = (await answer.json()) as { type: string; error: { type: string; code?: string } }
    return [answer.status, type, error.type, error.code]
  }
  answering = json({ type: 'error', error: { type: 'invalid_request_error', message: 'no' } }, 400)
  assert.equal(await refused(who.post('/messages', asking)), [
    400,
    'error',
    'invalid_request_error',
    undefined,
  ])
  answering = json({ type: 'error', error: { type: 'authentication_error', message: 'our key' } }, 401)
  assert.equal(await refused(who.post('/messages', asking)), [502, 'error', 'api_error', 'upstream_failed'])
  // an error as the first event of a stream is the whole answer
  answering = stream([
    { type: 'error', error: { type: 'overloaded_error', message: 'busy' } } as { type: string },
  ])
  assert.equal(await refused(who.post('/messages', { ...asking, stream: true })), [
    529,
    'error',
    'overloaded_error',
    undefined,
  ])
  assert.equal(await refused(who.post('/messages', { ...asking, model: 'other' })), [
    404,
    'error',
    'not_found_error',
    'model_not_found',
  ])
  const poor = await caller('0.0001')
  assert.equal(await refused(poor.post('/messages', asking)), [
    402,
    'error',
    'billing_error',
    'insufficient_funds',
  ])
  const nobody = fetch(`${proxy.url}/v1/messages`, {
    method: 'POST',
    headers: { 'x-api-key': 'vk_made_up' },
    body: '{}',
  })
  assert.equal(await refused(nobody), [401, 'error', 'authentication_error', 'virtual_key_unknown'])
  assert.equal(await refused(fetch(`${proxy.url}/v1/messages`, { headers: { 'x-api-key': who.key } })), [
    404,
    'error',
    'not_found_error',
    'not_found',
  ])
  assert.equal(await events(who), [])
})

// --- the end of a stream (F9)

test('F9: usage in a last event without its blank line is charged, and reaches the caller', async () => {
  const said = { choices: [{ index: 0, delta: { content: 'hi' } }] }
  const usage = { prompt_tokens: 3000, completion_tokens: 2000, total_tokens: 5000 }
  for (const end of ['\n', '']) {
    const who = await caller()
    const last = `data: ${JSON.stringify({ choices: [], usage })}`
    answering = (res) =>
      res
        .writeHead(200, { 'content-type': 'text/event-stream' })
        .end(`data: ${JSON.stringify(said)}\n\n${last}${end}`)
    const body = { model: 'm', messages: [], stream: true, stream_options: { include_usage: true } }
    assert.match(await (await who.post('/chat/completions', body)).text(), '"completion_tokens":2000')
    const [event] = await events(who)
    assert.equal([event!.cost, event!.estimated], ['0.0275000000', false])
  }
})

// --- pictures (F2, F6), and the provider's own cost

const picture = (url: string) => ({
  model: 'm',
  max_tokens: 100,
  messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url } }] }],
})
const chatted = (more: object) =>
  json({
    id: 'chatcmpl-1',
    choices: [{ index: 0, message: { role: 'assistant', content: 'hi' } }],
    usage: { prompt_tokens: 30_000, completion_tokens: 20, total_tokens: 30_020, ...more },
  })

test('F6: a picture by its address is held by its possible cost, an inline one not by its bytes', async () => {
  const poor = await caller('0.02')
  answering = chatted({})
  assert.is((await poor.post('/chat/completions', picture('https://example.com/a.png'))).status, 402)
  assert.is(calls.length, 0)
  const who = await caller('1')
  const inline = `data:image/png;base64,${'A'.repeat(400_000)}`
  assert.is((await who.post('/chat/completions', picture(inline))).status, 200)
})

test('F2: who leaves during a question with a picture pays for a picture, not for its base64', async () => {
  const who = await caller()
  answering = (res) =>
    res
      .writeHead(200, { 'content-type': 'text/event-stream' })
      .write(`data: ${JSON.stringify({ choices: [{ index: 0, delta: { content: 'hi' } }] })}\n\n`)
  const leaving = new AbortController()
  const body = { ...picture(`data:image/png;base64,${'A'.repeat(1_000_000)}`), stream: true }
  const given = await who.post('/chat/completions', body, leaving.signal)
  await given.body!.getReader().read()
  leaving.abort()
  const [event] = await events(who)
  assert.ok(event!.meters.input_tokens > 1_100 && event!.meters.input_tokens < 1_200, JSON.stringify(event))
})

test("the provider's own cost goes with the event, and costs the caller nothing", async () => {
  const who = await caller()
  answering = chatted({ cost: 0.0123 })
  const given = await who.post('/chat/completions', { model: 'm', messages: [] })
  assert.is(given.headers.get('x-usage-cost'), '0.0752000000')
  await given.text()
  await events(who)
  const [cost] = await db.operator(
    'select cost::float8 as cost, currency, is_upstream from api.usage_costs where account_id = $1',
    [who.accountId],
  )
  assert.equal(cost, { cost: 0.0123, currency: 'USD', is_upstream: true })
})

test.run()
