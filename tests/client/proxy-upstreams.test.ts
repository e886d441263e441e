// The example gateway before real-life upstreams: the caller gets its answer, and is charged once.
import { createServer, type ServerResponse } from 'node:http'
import { text as textOf } from 'node:stream/consumers'
import OpenAI, { AzureOpenAI } from 'openai'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { type Part, serverSentEvents } from '../../examples/events.ts'
import { answering as answerOf } from '../../examples/http.ts'
import { startExample } from '../../scripts/servers.ts'
import { until } from '../../scripts/supervise.ts'
import { KeyledgerError } from '../../src/errors.ts'
import { createMeters } from '../../src/meters.ts'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { holdsTrue, units } from '../support/ledger.ts'
import { runs } from '../support/leftovers.ts'
import { seed, type World } from '../support/seed.ts'

const test = suite('proxy-upstreams')
const db = await database(test)
const postgrest = await db.postgrest()

/** How a node answers: the response to write, and the request it was sent. */
// biome-ignore lint/suspicious/noExplicitAny: a gateway may send anything
type Answering = (res: ServerResponse, asked: any) => unknown

interface Call {
  node: number
  // biome-ignore lint/suspicious/noExplicitAny: a gateway may send anything
  body: any
  closed: boolean
}
const answering: Answering[] = []
const calls: Call[] = []
const upstream = createServer(async (req, res) => {
  const node = Number(req.url!.split('/')[1])
  const call: Call = { node, body: JSON.parse(await textOf(req)), closed: false }
  calls.push(call)
  res
    .on('error', () => {})
    .on('close', () => {
      call.closed = true
    })
  await answering[node]!(res, call.body)
})
await new Promise<void>((resolve) => upstream.listen(0, '127.0.0.1', resolve))
db.onClose(() => {
  upstream.closeAllConnections()
  upstream.close()
})
const upstreamUrl = `http://127.0.0.1:${(upstream.address() as { port: number }).port}`

// ms of silence that the gateway stands
const PATIENCE = 2_000
const start = async (more: Record<string, string> = {}) =>
  startExample('proxy', {
    POSTGREST_URL: postgrest.url,
    GATEWAY_TOKEN: await postgrest.token({ role: 'keyledger_gateway' }),
    DATABASE_URL: db.loginUrl,
    REDIS_URL: undefined,
    CORS_ORIGIN: undefined,
    UPSTREAM_TIMEOUT: String(PATIENCE),
    ...more,
  })
const proxy = await start()
db.onClose(() => proxy.stop())

interface Caller extends World {
  /** Each node's place among the upstream's. */
  nodes: number[]
  openai: OpenAI
  /** The answer to a chat request, as it is. */
  post(body: object, signal?: AbortSignal): Promise<Response>
}

/** Somebody with a key for model `m`, and the nodes that serve it, tried in this order. */
async function caller(url: string, ...nodes: Answering[]): Promise<Caller> {
  const world = await seed(db.operator)
  const places: number[] = []
  for (const node of nodes) {
    const place = answering.push(node) - 1
    places.push(place)
    const [made] = await db.operator(
      `insert into api.config_nodes (name, model, endpoint) values ($1, 'm', $2) returning id`,
      [`node ${String(place).padStart(4, '0')}`, `${upstreamUrl}/${place}/v1`],
    )
    await db.operator(
      `insert into api.prices (config_node_id, meter, unit_price, unit_size, effective_from)
       select $1, meter, price, 1000000, '2020-01-01' from
         (values ('input_tokens', 2.5), ('cached_input_tokens', 1.25), ('output_tokens', 10)) as p (meter, price)`,
      [made!.id],
    )
    await db.operator(
      'insert into api.virtual_key_config_nodes (virtual_key_id, config_node_id) values ($1, $2)',
      [world.keyId, made!.id],
    )
  }
  const headers = { authorization: `Bearer ${world.key}`, 'content-type': 'application/json' }
  return {
    ...world,
    nodes: places,
    openai: new OpenAI({ baseURL: `${url}/v1`, apiKey: world.key, maxRetries: 0 }),
    post: (body, signal) =>
      fetch(`${url}/v1/chat/completions`, { method: 'POST', headers, body: JSON.stringify(body), signal }),
  }
}

const open = async ({ accountId }: Caller) =>
  (await db.sql(`select from data.hold where account_id = $1 and status = 'open'`, [accountId])).length

/** No hold is left, nothing is parked, and the account paid for these tokens and no others. */
async function charged(who: Caller, expected: [input: number, output: number][]): Promise<Row[]> {
  await until(async () => !(await open(who)), 'holds to end')
  const events = await db.sql(
    'select id, meters, cost::text, request_id, metadata from api.usage_logs where account_id = $1 order by id',
    [who.accountId],
  )
  assert.equal(
    events.map(({ meters }) => [meters.input_tokens, meters.output_tokens]),
    expected,
  )
  const parked = await db.sql('select from api.parked_usage where account_id = $1', [who.accountId])
  assert.is(parked.length, 0)
  const sum = expected.reduce(
    (sum, [input, output]) => sum + 25000n * BigInt(input) + 100000n * BigInt(output),
    0n,
  )
  const [account] = await db.sql(
    'select balance::text, frozen_balance::text from api.billing_accounts where account_id = $1',
    [who.accountId],
  )
  assert.equal([units(account!.balance), account!.frozen_balance], [units('100') - sum, '0.0000000000'])
  return events
}

const messages = [{ role: 'user' as const, content: 'one two three four' }]
const asked = { model: 'm', messages }
const streaming = { ...asked, stream: true as const }
const sizeOf = (body: object) => Buffer.byteLength(JSON.stringify(body))
const promptOf = (body: object) => Math.ceil(sizeOf(body) / 4)

const usage = { prompt_tokens: 1000, completion_tokens: 200, total_tokens: 1200 }
const PAID: [number, number] = [1000, 200]
const whole = (message: object = { role: 'assistant', content: 'hi' }, more: object = {}) => ({
  id: 'chatcmpl-1',
  choices: [{ index: 0, message, finish_reason: 'stop' }],
  usage,
  ...more,
})
const chunk = (delta: object = { content: 'hi' }, more: object = {}) => ({
  id: 'chatcmpl-1',
  choices: [{ index: 0, delta, finish_reason: null }],
  ...more,
})
const event = (data: object | string) => `data: ${typeof data === 'string' ? data : JSON.stringify(data)}\n\n`
const GOOD = [chunk(), { id: 'chatcmpl-1', choices: [], usage }, '[DONE]'].map(event).join('')

const json =
  (body: unknown, status = 200): Answering =>
  (res) =>
    res.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(body))
const stream =
  (text = GOOD, type = 'text/event-stream'): Answering =>
  (res) =>
    res.writeHead(200, type ? { 'content-type': type } : {}).end(text)
/** Whole or as a stream, as it is asked. */
const good: Answering = (res, asked) => (asked.stream ? stream() : json(whole()))(res, asked)

async function said(answer: AsyncIterable<OpenAI.ChatCompletionChunk>): Promise<string> {
  let text = ''
  for await (const { choices } of answer) text += choices[0]?.delta?.content ?? ''
  return text
}

const partsOf = async (packets: (string | Uint8Array)[], most?: number) => {
  const parts: Part[] = []
  const body = (async function* () {
    for (const packet of packets) yield Buffer.from(packet)
  })()
  for await (const part of serverSentEvents(body, most)) parts.push(part)
  return parts
}
const cut = (text: string, size: number) => {
  const bytes = Buffer.from(text)
  return Array.from({ length: Math.ceil(bytes.length / size) }, (_, n) =>
    bytes.subarray(n * size, (n + 1) * size),
  )
}

test.before.each(() => {
  calls.length = 0
})
test.after.each(() => holdsTrue(db.sql))

// --- large events

test('events without content, in any packets, of any line ends, are read; keep-alives between them are passed on', async () => {
  const text =
    ': comment\n\ndata: {"a":\r\ndata:"ü"}\r\n\r\nevent: x\n: within\ndata:b\n\n\nid: 1\n\rdata: c\r\rdata: cut'
  for (const size of [1, 2, 3, 7, 1000]) {
    const parts = await partsOf(cut(text, size))
    assert.equal(
      parts.flatMap(({ data }) => data ?? []),
      ['{"a":\n"ü"}', 'b', 'c'],
      `${size}`,
    )
    const passed = parts.map(({ data, text }) => (data === undefined ? text : '[event]\n')).join('')
    assert.is(passed, ': comment\n\n[event]\n: within\n[event]\n\n\n[event]\n', `${size}`)
  }
})

test('an event takes work in proportion to its size', async () => {
  const cpu = async (megabytes: number) => {
    const packets = cut(event(JSON.stringify({ image: 'x'.repeat(megabytes * 1_000_000) })), 16_384)
    const times: number[] = []
    for (let run = 0; run < 3; run++) {
      const before = process.cpuUsage()
      assert.is((await partsOf(packets)).length, 1)
      const { user, system } = process.cpuUsage(before)
      times.push(user + system)
    }
    return Math.min(...times)
  }
  await cpu(1)
  const [small, large] = [await cpu(1), await cpu(16)]
  // 16 if it is linear; more than 200 if each packet looks at all before it
  assert.ok(large / small < 80, `16 MB took ${large / small} times the work of 1 MB`)
})

test('an event of 16 MB in small packets reaches the caller, and its stream is charged by its figures', async () => {
  const picture = 'x'.repeat(16_000_000)
  const large = event(chunk({ content: 'hi', images: [{ image_url: { url: picture } }] }))
  const who = await caller(proxy.url, async (res) => {
    res.writeHead(200, { 'content-type': 'text/event-stream' })
    for (const packet of cut(large + GOOD, 16_384)) {
      if (!res.write(packet)) await new Promise((resolve) => res.once('drain', resolve))
    }
    res.end()
  })
  const text = await (await who.post(streaming)).text()
  assert.ok(text.startsWith(large) && text.endsWith(event('[DONE]')))
  await charged(who, [PAID])
})

test('an event past the bound is passed on in pieces and not read; the next one is', async () => {
  const large = `data: ${'y'.repeat(1_000)}\ndata: ${'z'.repeat(1_500)}\n\n`
  for (const size of [1, 100, 10_000]) {
    const parts = await partsOf(cut(`${event('a')}${large}: alive\n\n${event('b')}`, size), 2_000)
    assert.equal(
      parts.flatMap(({ data }) => data ?? []),
      ['a', 'b'],
    )
    const raw = parts.filter(({ tooLarge }) => tooLarge).map(({ text }) => text)
    assert.is(raw.join(''), large, `${size}`)
    assert.ok(Math.max(...raw.map((text) => text!.length)) <= Math.max(2_100, size))
  }
  // a comment without an end is none to keep either
  const parts = await partsOf(cut(`:${'c'.repeat(5_000)}\n\n${event('b')}`, 100), 2_000)
  assert.equal(parts.at(-1), { data: 'b' })
})

test('a stream with such an event says so in its charge', async () => {
  const large = event('w'.repeat(33_000_000))
  const who = await caller(proxy.url, stream(event(chunk()) + large + GOOD))
  const text = await (await who.post(streaming)).text()
  assert.is(text.length, (event(chunk()) + large + event(chunk()) + event('[DONE]')).length)
  const [paid] = await charged(who, [PAID])
  assert.equal(paid!.metadata, { model: 'm', estimated: false, unread: 'event_too_large' })
})

// --- upstreams that refuse `stream_options`

const refusingOptions: [name: string, status: number, body: object][] = [
  [
    'by its place',
    422,
    {
      detail: [
        { type: 'extra_forbidden', loc: ['body', 'stream_options'], msg: 'Extra inputs are not permitted' },
      ],
    },
  ],
  ['in words', 400, { error: { message: 'json: unknown field "stream_options"', code: 'bad_request' } }],
  ['by what is in it', 400, { error: { message: 'include_usage is not supported' } }],
]
for (const [name, status, refusal] of refusingOptions)
  test(`an upstream that refuses stream_options ${name} is asked without, from then on at once`, async () => {
    const last = [chunk(), chunk({ content: '!' }, { usage }), '[DONE]'].map(event).join('')
    const who = await caller(proxy.url, (res, asked) =>
      (asked.stream_options ? json(refusal, status) : stream(last))(res, asked),
    )
    const bodies = () => calls.splice(0).map(({ body }) => body)
    assert.is(await said(await who.openai.chat.completions.create(streaming)), 'hi!')
    assert.equal(bodies(), [{ ...streaming, stream_options: { include_usage: true } }, streaming])
    for (const stream_options of [undefined, { include_usage: true }]) {
      // as it comes without us: we hide nothing that the upstream says unasked
      const answer = await who.post({ ...streaming, stream_options })
      assert.is(await answer.text(), last)
      assert.equal(bodies(), [streaming])
    }
    await charged(who, [PAID, PAID, PAID])
  })

test('any other refusal is passed on, and teaches nothing', async () => {
  let refused = 0
  const other = { error: { message: 'too many messages', type: 'invalid_request_error', code: 'too_many' } }
  const echo = { error: { message: 'no such role: stream_options', code: 'bad_role' } }
  const own = { error: { message: 'stream_options.pace: unknown', code: 'bad_options' } }
  const who = await caller(proxy.url, (res, asked) => {
    const { role } = asked.messages[0]
    const bad =
      role === 'many'
        ? other
        : role === 'stream_options'
          ? echo
          : asked.stream_options?.pace
            ? own
            : undefined
    if (bad) refused++
    return (bad ? json(bad, 400) : stream())(res, asked)
  })
  const ask = async (body: object) =>
    ((await (await who.post(body)).json()) as { error: { code: string } }).error.code
  assert.equal(await ask({ ...streaming, messages: [{ role: 'many' }] }), 'too_many')
  assert.is(refused, 1)
  assert.equal(await ask({ ...streaming, messages: [{ role: 'stream_options' }] }), 'bad_role')
  assert.equal(await ask({ ...streaming, stream_options: { pace: 1 } }), 'bad_options')
  calls.length = 0
  // the usage is still asked for, so that nobody makes his neighbours' bills an estimate
  await said(await who.openai.chat.completions.create(streaming))
  assert.equal(
    calls.map(({ body }) => body.stream_options),
    [{ include_usage: true }],
  )
  await charged(who, [PAID])
})

// --- keep-alives

const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms))

/** Says `what` again and again, for longer than the gateway stands silence. */
async function keepAlive(res: ServerResponse, what: string) {
  const end = Date.now() + 1.5 * PATIENCE
  while (Date.now() < end) {
    res.write(what)
    await pause(PATIENCE / 20)
  }
}

test('keep-alives of a stream reach the caller, before its first event and later, and count as life', async () => {
  const who = await caller(proxy.url, async (res) => {
    res.writeHead(200, { 'content-type': 'text/event-stream' })
    await keepAlive(res, ': working\n\n')
    res.write(event(chunk()))
    await keepAlive(res, '\n')
    res.end(GOOD)
  })
  const text = await (await who.post(streaming)).text()
  const [before, after] = text.split(event(chunk())) as [string, string]
  assert.match(before, /^(: working\n\n){10,}$/)
  assert.match(after, /^\n{10,}$/)
  assert.ok(text.endsWith(event('[DONE]')))
  await charged(who, [PAID])
})

test("an answer that OpenAI's client reads through its keep-alives, whole or as a stream", async () => {
  const who = await caller(proxy.url, async (res, asked) => {
    res.writeHead(200, { 'content-type': asked.stream ? 'text/event-stream' : 'application/json' })
    await keepAlive(res, asked.stream ? ': OPENROUTER PROCESSING\n\n' : ' \n')
    res.end(asked.stream ? GOOD : JSON.stringify(whole()))
  })
  const { chat } = who.openai
  const [streamed, answer] = await Promise.all([
    chat.completions.create(streaming).then(said),
    chat.completions.create(asked),
  ])
  assert.equal([streamed, answer.choices[0]!.message.content], ['hi', 'hi'])
  await charged(who, [PAID, PAID])
})

test("after keep-alives, an error is another node's turn; once they are passed on, it is the caller's to see", async () => {
  const error = event({ error: { message: 'the model has crashed', code: 'crashed' } })
  const early = await caller(proxy.url, stream(`: working\n\n${error}`), good)
  assert.is(await said(await early.openai.chat.completions.create(streaming)), 'hi')
  await charged(early, [PAID])

  const late = await caller(
    proxy.url,
    async (res) => {
      res.writeHead(200, { 'content-type': 'text/event-stream' })
      await keepAlive(res, ': working\n\n')
      res.end(error)
    },
    good,
  )
  const thrown = await failure(late.openai.chat.completions.create(streaming).then(said))
  assert.equal([thrown.code, thrown.error.message], ['crashed', 'the model has crashed'])
  await charged(late, [])
})

// --- a 200 that is no answer

const nothings: [
  name: string,
  body: unknown,
  status: number,
  code: string | number | undefined,
  message: RegExp,
][] = [
  ['an error that names its status', { error: { code: 429, message: 'slow down' } }, 429, 429, /slow down/],
  [
    'an error that names none',
    { error: { code: 'crashed', message: 'it broke' } },
    502,
    'crashed',
    /it broke/,
  ],
  ['an error beside choices', { error: { message: 'it broke' }, choices: null }, 502, undefined, /it broke/],
  [
    'an error about our credentials',
    { error: { code: 401, message: 'secret' } },
    502,
    'upstream_failed',
    /failed/,
  ],
  ['an error that is a text', { error: 'no model is loaded' }, 502, 'upstream_failed', /no model is loaded/],
  [
    'an error of another shape',
    { object: 'error', message: 'odd', code: 400 },
    400,
    'upstream_failed',
    /odd/,
  ],
  ['choices that are null', { id: 'x', choices: null }, 502, 'upstream_failed', /no answer/],
  [
    'no choices and zeros',
    { choices: [], usage: { prompt_tokens: 0, completion_tokens: 0 } },
    502,
    'upstream_failed',
    /no answer/,
  ],
  ['an empty object', {}, 502, 'upstream_failed', /no answer/],
]
for (const [name, body, status, code, message] of nothings)
  test(`200 with ${name}: another node answers, or ${status} says why`, async () => {
    for (const form of ['whole', 'bare', 'event'] as const) {
      // a stream is none when its first event is an error, and may turn out to be bare JSON
      if (form === 'event' && !(body as { error?: object }).error) continue
      const answer =
        form === 'whole' ? json(body) : stream(form === 'bare' ? JSON.stringify(body) : event(body as object))
      const ask = form === 'whole' ? asked : streaming
      const chained = await caller(proxy.url, answer, good)
      assert.ok(await chained.openai.chat.completions.create(ask), form)
      await charged(chained, [PAID])

      const alone = await caller(proxy.url, answer)
      const thrown = await failure(alone.openai.chat.completions.create(ask))
      assert.equal([thrown.status, thrown.code], [status, code], form)
      assert.match(thrown.message, message)
      assert.not.match(thrown.message, 'secret')
      await charged(alone, [])
    }
  })

const JSON_TYPE = { 'content-type': 'application/json' }
const unusable: [name: string, answer: Answering][] = [
  ['a status that HTTP has not', (res) => res.writeHead(600, JSON_TYPE).end('{"error":{"message":"x"}}')],
  [
    'a stream of such a status',
    (res) => res.writeHead(999, { 'content-type': 'text/event-stream' }).end(event(whole())),
  ],
  ...['{"toString":1,"valueOf":1}', `${'['.repeat(20_000)}${']'.repeat(20_000)}`].flatMap((code) =>
    ['code', 'type', 'status'].map((field): [string, Answering] => [
      `an error with ${field} ${code.slice(0, 9)}`,
      (res) => res.writeHead(200, JSON_TYPE).end(`{"error":{"${field}":${code},"message":"x"}}`),
    ]),
  ),
]
for (const [name, answer] of unusable)
  test(`${name} is no answer: another node's turn`, async () => {
    const chained = await caller(proxy.url, answer, good)
    assert.ok(await chained.openai.chat.completions.create(asked))
    await charged(chained, [PAID])
    const alone = await caller(proxy.url, answer)
    assert.is((await failure(alone.openai.chat.completions.create(asked))).status, 502)
    await charged(alone, [])
  })

const COUNTED = event({ id: 'chatcmpl-1', choices: [], usage })
const lastEvents: [name: string, last: string][] = [
  ['its last event has one newline', COUNTED.slice(0, -1)],
  ['its last event has no newline', COUNTED.trimEnd()],
  ['[DONE] has one newline', `${COUNTED}data: [DONE]\n`],
  ['[DONE] has no newline', `${COUNTED}data: [DONE]`],
]
for (const [name, last] of lastEvents)
  test(`a stream that ends well is relayed and charged to its end, though ${name}`, async () => {
    const who = await caller(proxy.url, stream(event(chunk()) + last))
    const text = await (await who.post({ ...streaming, stream_options: { include_usage: true } })).text()
    assert.match(text, 'prompt_tokens')
    assert.is(text.includes('data: [DONE]\n\n'), last.includes('[DONE]'))
    const [paid] = await charged(who, [PAID])
    assert.is(paid!.metadata.estimated, false)
  })

test('the first part of an event that was cut off is none', async () => {
  const who = await caller(proxy.url, stream(COUNTED.slice(0, 30)), good)
  await (await who.post(streaming)).text()
  await charged(who, [PAID])
})

test("the gateway's own trouble is a 503 to callers, without its hints; theirs is theirs", async () => {
  const errors: [error: KeyledgerError, status: number, code: string][] = [
    [new KeyledgerError('invalid_token', 401, { hint: 'secret' }), 503, 'unavailable'],
    [new KeyledgerError('permission_denied', 403, { detail: 'secret' }), 503, 'unavailable'],
    [new KeyledgerError('function_not_found', 404, { detail: 'secret' }), 503, 'unavailable'],
    [new KeyledgerError('invalid_input', 400, { detail: 'secret' }), 503, 'unavailable'],
    [new KeyledgerError('invalid_response', 502, { hint: 'secret' }), 503, 'unavailable'],
    [new KeyledgerError('unavailable', 503, { detail: 'secret' }), 503, 'unavailable'],
    [new KeyledgerError('timeout', 504, { hint: 'secret' }), 503, 'unavailable'],
    [new KeyledgerError('insufficient_funds', 402, { hint: 'secret' }), 402, 'insufficient_funds'],
    [new KeyledgerError('virtual_key_disabled', 403), 403, 'virtual_key_disabled'],
    [new KeyledgerError('node_not_mounted', 403), 403, 'node_not_mounted'],
    [new KeyledgerError('payload_too_large', 413), 413, 'payload_too_large'],
    [new KeyledgerError('invalid_meters', 422), 422, 'invalid_meters'],
    [new KeyledgerError('price_not_found', 422, { hint: 'secret' }), 500, 'price_not_found'],
  ]
  const print = console.error
  console.error = () => {}
  for (const [error, status, code] of errors) {
    const response = await answerOf(() => Promise.reject(error))
    const body = await response.text()
    assert.equal([response.status, JSON.parse(body).error.code], [status, code], error.code)
    assert.not.match(body, 'secret')
  }
  console.error = print
})

test('a gateway that is told to stop waits for a caller that reads no more, but not for ever', async () => {
  const other = await start({ STOP_WAIT: '500' })
  let full = false
  const who = await caller(other.url, async (res) => {
    res.writeHead(200, { 'content-type': 'text/event-stream' })
    const chunk = event({ choices: [{ index: 0, delta: { content: 'x'.repeat(100_000) } }] })
    while (!res.destroyed) {
      if (!res.write(chunk)) {
        const drained = new Promise((resolve) => res.once('drain', resolve).once('close', resolve))
        full = await Promise.race([drained.then(() => false), pause(300).then(() => true)])
        await drained
      }
    }
  })
  const answer = await who.post(streaming)
  assert.is(answer.status, 200)
  await until(() => full, 'nobody to read')
  process.kill(other.pid, 'SIGTERM')
  await until(() => !runs(other.pid), 'its end')
  await until(async () => !(await open(who)), 'holds to end')
  assert.is((await db.sql('select from api.usage_logs where account_id = $1', [who.accountId])).length, 1)
  await answer.body?.cancel().catch(() => {})
  await other.stop()
})

test("an error about our credentials in words is not the caller's to read, either", async () => {
  for (const error of [
    { message: 'Incorrect API key: sk-secret', code: 'invalid_api_key' },
    { message: 'sk-secret may not', type: 'permission_error', code: null },
  ])
    for (const [answer, ask] of [
      [json({ error }), asked],
      [stream(event({ error })), streaming],
    ] as const) {
      const who = await caller(proxy.url, answer)
      const thrown = await failure(who.openai.chat.completions.create(ask))
      assert.equal([thrown.status, thrown.code], [502, 'upstream_failed'])
      assert.not.match(JSON.stringify(thrown.error), 'secret')
      await charged(who, [])
    }
})

test('a refusal that says so by its status is passed on as it came', async () => {
  const text = '{ "detail": [{"loc": ["body", "messages"], "msg": "Field required"}] }'
  const who = await caller(proxy.url, (res) =>
    res.writeHead(422, { 'content-type': 'application/json' }).end(text),
  )
  for (const ask of [asked, streaming]) {
    const answer = await who.post(ask)
    assert.equal([answer.status, await answer.text()], [422, text])
  }
  await charged(who, [])
})

test('a stream that ends before anything came is no answer either', async () => {
  for (const text of ['', event('[DONE]'), ': working\n\n']) {
    const chained = await caller(proxy.url, stream(text), good)
    assert.is(await said(await chained.openai.chat.completions.create(streaming)), 'hi')
    await charged(chained, [PAID])
    const alone = await caller(proxy.url, stream(text))
    const thrown = await failure(alone.openai.chat.completions.create(streaming))
    assert.equal([thrown.status, thrown.code], [502, 'upstream_failed'])
    await charged(alone, [])
  }
})

test('a 200 without an answer that was counted all the same is charged as a try of its own', async () => {
  const who = await caller(proxy.url, json({ error: { message: 'filtered' }, usage }), good)
  assert.ok(await who.openai.chat.completions.create(asked))
  await charged(who, [PAID, PAID])
})

test('an answer that says nothing, and was counted, is an answer', async () => {
  const body = { id: 'x', choices: [], usage: { ...usage, completion_tokens: 0, total_tokens: 1000 } }
  const who = await caller(proxy.url, json(body), good)
  assert.equal(await (await who.post(asked)).json(), body)
  await charged(who, [[1000, 0]])
})

// --- streams under other names

for (const type of [
  'text/plain',
  '',
  'application/json',
  'text/event-stream; charset=utf-8',
  'application/octet-stream',
])
  test(`a stream ${type ? `of type ${type}` : 'without a type'} is a stream`, async () => {
    for (const text of [GOOD, `\uFEFF\n: hello\n\n${GOOD}`, `event: message\nid: 1\n${GOOD}`]) {
      const who = await caller(proxy.url, stream(text, type))
      const { data, response } = await who.openai.chat.completions.create(streaming).withResponse()
      assert.is(response.headers.get('content-type'), 'text/event-stream')
      assert.is(await said(data), 'hi')
      await charged(who, [PAID])
    }
  })

test('it shows in the first letters, however they are cut', async () => {
  for (const [text, ask] of [
    [GOOD, streaming],
    [`\n ${JSON.stringify(whole())}`, asked],
  ] as const) {
    const who = await caller(proxy.url, async (res) => {
      res.writeHead(200).flushHeaders()
      for (const letter of text.slice(0, 12)) {
        res.write(letter)
        await pause(5)
      }
      res.end(text.slice(12))
    })
    const answer = await who.post(ask)
    assert.is(answer.headers.get('content-type'), ask === asked ? 'application/json' : 'text/event-stream')
    assert.match(await answer.text(), '"content":"hi"')
    await charged(who, [PAID])
  }
})

test('a stream that nobody asked for is passed on as it is, and charged by its figures', async () => {
  const who = await caller(proxy.url, stream())
  const answer = await who.post(asked)
  assert.is(answer.headers.get('content-type'), 'text/event-stream')
  assert.is(await answer.text(), GOOD)
  await charged(who, [PAID])
})

// --- the ways to send the key, and pages of other origins

test('the client of Azure works unchanged, whole and streaming', async () => {
  const who = await caller(proxy.url, good)
  for (const place of [{ endpoint: proxy.url }, { baseURL: `${proxy.url}/v1` }]) {
    const azure = new AzureOpenAI({ ...place, apiKey: who.key, apiVersion: '2024-10-21', maxRetries: 0 })
    const answer = await azure.chat.completions.create(asked)
    assert.is(answer.choices[0]!.message.content, 'hi')
    assert.is(await said(await azure.chat.completions.create(streaming)), 'hi')
    assert.equal(
      (await azure.models.list()).data.map(({ id }) => id),
      ['m'],
    )
  }
  await charged(who, [PAID, PAID, PAID, PAID])
  const azure = new AzureOpenAI({
    endpoint: proxy.url,
    apiKey: 'vk_made_up',
    apiVersion: '2024-10-21',
    maxRetries: 0,
  })
  assert.is((await failure(azure.chat.completions.create(asked))).code, 'virtual_key_unknown')
})

test('a page may ask first, without a key, and read the answer', async () => {
  const narrow = await start({ CORS_ORIGIN: 'https://a.example, https://b.example' })
  const closed = await start({ CORS_ORIGIN: '' })
  try {
    for (const [url, origin, allowed] of [
      [proxy.url, 'https://any.example', '*'],
      [narrow.url, 'https://b.example', 'https://b.example'],
      [narrow.url, 'https://c.example', null],
      [closed.url, 'https://a.example', null],
    ] as const) {
      const ask = async (method: string, headers: Record<string, string>) => {
        const answer = await fetch(`${url}/v1/models`, { method, headers: { origin, ...headers } })
        await answer.arrayBuffer()
        const header = (name: string) => answer.headers.get(`access-control-${name}`)
        return [answer.status, header('allow-origin'), header('allow-methods'), header('allow-headers')]
      }
      const wanted = 'authorization, content-type, x-stainless-os'
      const preflight = { 'access-control-request-method': 'POST', 'access-control-request-headers': wanted }
      const granted = allowed ? [allowed, 'GET, POST', wanted] : [null, null, null]
      assert.equal(await ask('OPTIONS', preflight), [204, ...granted])
      // a refusal can be read, too; the origin alone opens nothing
      assert.equal(await ask('GET', preflight), [401, allowed, null, null])
      const who = await caller(url, good)
      assert.equal(await ask('GET', { authorization: `Bearer ${who.key}` }), [200, allowed, null, null])
    }
  } finally {
    await narrow.stop()
    await closed.stop()
  }
  assert.is(calls.length, 0)
})

// --- ids

test('an empty id is no id, a long one is cut, and no id keeps a charge waiting', async () => {
  const long = 'chatcmpl-'.padEnd(600, 'é')
  for (const [first, later, kept] of [
    ['', 'chatcmpl-2', 'chatcmpl-2'],
    ['', '', null],
    [long, long, long.slice(0, 512)],
    [7, null, null],
    ['a\u0000b', '', 'a\ufffdb'],
  ] as const) {
    const chunks = [chunk({}, { id: first }), chunk({ content: 'hi' }, { id: later, usage }), '[DONE]']
    const who = await caller(proxy.url, stream(chunks.map(event).join('')))
    await (await who.post(streaming)).text()
    const [paid] = await charged(who, [PAID])
    assert.is(paid!.request_id, kept)
    if (later === first || first === '') continue
    const alone = await caller(proxy.url, json(whole(undefined, { id: first })))
    assert.is((await alone.post(asked)).status, 200)
    await charged(alone, [PAID])
  }
})

// --- callers that leave

/** The gateway has seen that it is gone, as it has answered others since. */
async function gone(url: string) {
  for (let n = 0; n < 3; n++) await (await fetch(`${url}/healthz`)).arrayBuffer()
}

/** Asks, and leaves as soon as the upstream has `begun`. */
async function leave(who: Caller, body: object, begun: () => boolean, url = proxy.url) {
  const controller = new AbortController()
  const answer = who.post(body, controller.signal).catch(() => {})
  await until(begun, 'the upstream to begin')
  // the headers have been read when the next request is answered
  await gone(url)
  assert.is(await open(who), 1)
  controller.abort()
  await answer
  await gone(url)
}

test('a caller that leaves just before a whole answer pays for it, as the upstream counted it', async () => {
  let finish: (() => void) | undefined
  const who = await caller(proxy.url, (res) => {
    res.writeHead(200, { 'content-type': 'application/json' }).write(' ')
    finish = () => res.end(JSON.stringify(whole()))
  })
  await leave(who, asked, () => finish !== undefined)
  assert.is(calls[0]!.closed, false)
  finish!()
  const [paid] = await charged(who, [PAID])
  assert.equal([paid!.request_id, paid!.metadata.estimated], ['chatcmpl-1', false])
})

test('a gateway that is told to stop meanwhile sees that to its end', async () => {
  const other = await start()
  let finish: (() => void) | undefined
  const who = await caller(other.url, (res) => {
    res.writeHead(200, { 'content-type': 'application/json' }).write(' ')
    finish = () => res.end(JSON.stringify(whole()))
  })
  await leave(who, asked, () => finish !== undefined, other.url)
  process.kill(other.pid, 'SIGTERM')
  await until(
    () =>
      fetch(other.url).then(
        () => false,
        () => true,
      ),
    'it to take no more',
  )
  finish!()
  await until(() => !runs(other.pid), 'its end')
  await charged(who, [PAID])
  await other.stop()
})

for (const [name, body] of [
  ['a whole answer', asked],
  ['a stream', streaming],
] as const)
  test(`a caller that leaves before ${name} that does not come pays the prompt, once the upstream has said 200`, async () => {
    let begun = false
    const who = await caller(proxy.url, (res, { stream }) => {
      res.writeHead(200, { 'content-type': stream ? 'text/event-stream' : 'application/json' }).write('\n')
      begun = true
    })
    await leave(who, body, () => begun)
    const [paid] = await charged(who, [[promptOf(body), 0]])
    assert.is(paid!.metadata.estimated, true)
    await until(() => calls[0]!.closed, 'the upstream to be told')
  })

test('a caller that leaves before the upstream refuses pays nothing', async () => {
  let finish: (() => void) | undefined
  const who = await caller(
    proxy.url,
    (res) => {
      res.writeHead(200, { 'content-type': 'application/json' }).write(' ')
      finish = () => res.end(JSON.stringify({ error: { message: 'overloaded' } }))
    },
    good,
  )
  await leave(who, asked, () => finish !== undefined)
  finish!()
  await charged(who, [])
  assert.is(calls.length, 1)
})

// --- answers that we can't read

const odd: [name: string, message: unknown, choices?: unknown][] = [
  ['null where others leave it out', { role: 'assistant', content: 'hi', tool_calls: null }],
  ['a number for a list', { role: 'assistant', content: 'hi', tool_calls: 7 }],
  ['null in a list', { role: 'assistant', content: 'hi', tool_calls: [null] }],
  ['a text for an object', 'hi'],
  ['null for a choice', undefined, [null]],
  ['an object for a list', undefined, { 0: { message: { content: 'hi' } } }],
  ['nested deeper than we can write', JSON.parse(`${'['.repeat(3_000)}${']'.repeat(3_000)}`)],
]
for (const [name, message, choices] of odd)
  test(`${name}: the answer is the caller's, and is charged once`, async () => {
    const made = { ...whole(message as object), ...(choices ? { choices } : {}) }
    // with a node after it, and a client that repeats a call it takes for a failure
    const who = await caller(proxy.url, json(made), good)
    const openai = new OpenAI({ baseURL: `${proxy.url}/v1`, apiKey: who.key })
    assert.equal(await openai.chat.completions.create(asked), made)
    await charged(who, [PAID])
    assert.equal(calls.splice(0).length, 1)

    // the same within a stream, where the parts before and after count
    const part = choices ? { choices } : { choices: [{ index: 0, delta: message }] }
    const text = [part, chunk(), { ...part, usage }].map(event).join('') + event('[DONE]')
    const streamed = await caller(proxy.url, stream(text), good)
    const answer = await streamed.post({ ...streaming, stream_options: { include_usage: true } })
    assert.is(await answer.text(), text)
    await charged(streamed, [PAID])
    assert.equal(calls.length, 1)
  })

test('an answer is passed on letter by letter, not as we read it', async () => {
  const text =
    '{ "id": 12345678901234567890, "choices": [{}], "usage": {"prompt_tokens": 1e3, "completion_tokens": 200}, "id": "x" }'
  const who = await caller(proxy.url, (res) =>
    res.writeHead(200, { 'content-type': 'application/json' }).end(text),
  )
  assert.is(await (await who.post(asked)).text(), text)
  await charged(who, [PAID])
})

test('a meter never throws, and a part that it could not read counts as said', () => {
  for (const answer of [
    { choices: 7 },
    { choices: [null] },
    { choices: [{ delta: { tool_calls: 7 } }] },
    {
      get id(): string {
        throw new Error('of ours')
      },
    },
  ]) {
    const meter = createMeters('openai-chat', { asked: 10 })
    meter.add(answer)
    assert.equal([meter.started(), meter.counted(), meter.unread()], [true, false, true])
    assert.equal(meter.measured().meters, { input_tokens: '10', output_tokens: '1' })
  }
})

test.run()
