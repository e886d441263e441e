// The example gateway with OpenAI's own client, and an upstream where everything goes wrong: exact
// charges, no hold left.
import { randomUUID } from 'node:crypto'
import { type IncomingMessage, request, type ServerResponse } from 'node:http'
import OpenAI from 'openai'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { createUpstream, scenarios } from '../../examples/upstream.ts'
import { freePort, startExample } from '../../scripts/servers.ts'
import { until } from '../../scripts/supervise.ts'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { holdsTrue, units } from '../support/ledger.ts'
import { runs } from '../support/leftovers.ts'
import { seed, type World } from '../support/seed.ts'

const test = suite('proxy')
const db = await database(test)
const postgrest = await db.postgrest()
const redis = await db.redis()

// the requests that the upstream got, and whether its answer was cut short
interface Call {
  scenario: string
  headers: IncomingMessage['headers']
  body: Record<string, unknown>
  res: ServerResponse
  aborted: boolean
}
const calls: Call[] = []
const upstream = createUpstream().on('request', (req, res) => {
  const call: Call = {
    scenario: req.url!.split('/')[1]!,
    headers: req.headers,
    body: {},
    res,
    aborted: false,
  }
  calls.push(call)
  let text = ''
  req.on('data', (data) => {
    text += data
  })
  req.on('end', () => Object.assign(call.body, text && JSON.parse(text)))
  res.on('close', () => {
    call.aborted = !res.writableFinished
  })
})
await new Promise<void>((resolve) => upstream.listen(0, '127.0.0.1', resolve))
db.onClose(() => {
  upstream.closeAllConnections()
  upstream.close()
})
const upstreamUrl = `http://127.0.0.1:${(upstream.address() as { port: number }).port}`

const start = async (UPSTREAM_TIMEOUT = '1000') =>
  startExample('proxy', {
    POSTGREST_URL: postgrest.url,
    GATEWAY_TOKEN: await postgrest.token({ role: 'keyledger_gateway' }),
    DATABASE_URL: db.loginUrl,
    REDIS_URL: redis.url,
    LOCAL_API_KEY: 'the-credential',
    UPSTREAM_TIMEOUT,
    HOLD_SECONDS: '2',
  })
const proxy = await start()
db.onClose(() => proxy.stop())
const patient = await start('60000')
db.onClose(() => patient.stop())

// model `demo`, one per scenario, a node without a server, and chains: `429+500+demo` has three
// nodes, tried in this order
const nodes = new Map<string, string>()
async function model(name: string) {
  for (const [n, scenario] of name.split('+').entries()) {
    const path = scenario === 'demo' ? '' : `/${scenario}`
    const endpoint =
      scenario === 'nobody' ? `http://127.0.0.1:${await freePort()}/v1` : `${upstreamUrl}${path}/v1/`
    const [made] = await db.operator(
      `insert into api.config_nodes (name, provider, model, endpoint) values ($1, 'local', $2, $3) returning id`,
      [`${name} ${n}`, name, endpoint],
    )
    nodes.set(`${name} ${n}`, made!.id)
    await db.operator(
      `insert into api.prices (config_node_id, meter, unit_price, unit_size, effective_from)
       select $1, meter, price * $2, 1000000, '2020-01-01' from
         (values ('input_tokens', 2.5), ('cached_input_tokens', 1.25), ('output_tokens', 10)) as p (meter, price)`,
      [made!.id, n + 1], // each node of a chain has another price
    )
  }
}
const passing = ['429', '500', '401', 'cut', 'hang', 'garbage', 'nobody']
const chains = [
  ...passing.map((scenario) => `${scenario}+demo`),
  '429+500+demo',
  'billed-500+demo',
  'demo+429',
  '429+500',
]
for (const name of ['demo', 'nobody', ...scenarios, ...chains]) await model(name)

interface Caller extends World {
  openai: OpenAI
  /** What was charged, in order. */
  events(): Promise<Row[]>
}

async function caller(options: { funds?: string } = {}, url = proxy.url): Promise<Caller> {
  const world = await seed(db.operator, options)
  await db.operator(
    `insert into api.virtual_key_config_nodes (virtual_key_id, config_node_id) select $1, unnest($2::uuid[])`,
    [world.keyId, [...nodes.values()]],
  )
  return {
    ...world,
    openai: new OpenAI({ baseURL: `${url}/v1`, apiKey: world.key, maxRetries: 0 }),
    events: () =>
      db.sql(
        `select n.name as node, u.id, u.meters, u.cost::text, u.request_id, u.metadata
         from api.usage_logs u join api.config_nodes n on n.id = u.config_node_id
         where u.account_id = $1 order by u.id`,
        [world.accountId],
      ),
  }
}

/**
 * Nothing is set aside any more, and every cent is where these events put it: 100 less their cost.
 */
async function charged({ accountId, events }: Caller, expected: [node: string, meters: Row][]) {
  await until(async () => !(await open(accountId)), 'holds to end')
  const made = await events()
  assert.equal(
    made.map(({ node, meters }) => [node, meters]),
    expected,
  )
  const per: Record<string, bigint> = {
    input_tokens: 25000n,
    cached_input_tokens: 12500n,
    output_tokens: 100000n,
  }
  let sum = 0n
  for (const { node, meters, cost } of made) {
    const place = BigInt(node.split(' ')[1]) + 1n
    const steps = Object.entries(meters as Record<string, number>).reduce(
      (steps, [meter, count]) => steps + per[meter]! * BigInt(count) * place,
      0n,
    )
    assert.is(units(cost), steps)
    sum += steps
  }
  const [account] = await db.sql(
    'select balance::text, frozen_balance::text, available::text from api.billing_accounts where account_id = $1',
    [accountId],
  )
  assert.is(units(account!.balance), units('100') - sum)
  assert.is(account!.frozen_balance, '0.0000000000')
  assert.is(account!.available, account!.balance)
  await holdsTrue(db.sql)
  return made
}

const open = async (accountId: string) =>
  Number(
    (
      await db.sql(`select count(*) from data.hold where account_id = $1 and status = 'open'`, [accountId])
    )[0]!.count,
  )

const messages = [
  { role: 'system' as const, content: 'You repeat.' },
  { role: 'user' as const, content: 'one two three four' },
]
const ANSWER = 'You said: one two three four'
const used = { input_tokens: 4, cached_input_tokens: 2, output_tokens: 6 }
// the bytes that the gateway was sent, and the three words that came
const bytesOf = (body: object) => Buffer.byteLength(JSON.stringify(body))
const estimated = (body: object, output_tokens: number) => ({
  input_tokens: Math.ceil(bytesOf(body) / 4),
  output_tokens,
})

async function streamed(stream: AsyncIterable<OpenAI.ChatCompletionChunk>) {
  const chunks: OpenAI.ChatCompletionChunk[] = []
  for await (const chunk of stream) chunks.push(chunk)
  return { chunks, said: chunks.map(({ choices }) => choices[0]?.delta.content ?? '').join('') }
}

test.before.each(() => {
  calls.length = 0
})

test('an answer comes as the upstream gave it, with its cost', async () => {
  const who = await caller()
  const { data, response } = await who.openai.chat.completions
    .create({ model: 'demo', messages })
    .withResponse()
  assert.is(data.choices[0]!.message.content, ANSWER)
  assert.equal([data.usage!.prompt_tokens, data.usage!.completion_tokens], [6, 6])
  const [event] = await charged(who, [['demo 0', used]])
  assert.is(response.headers.get('x-usage-id'), event!.id)
  assert.is(response.headers.get('x-usage-cost'), event!.cost)
  assert.is(event!.request_id, data.id)
  assert.equal(event!.metadata, { model: 'demo', estimated: false })

  // the upstream knows us, not the caller
  const [call] = calls
  assert.is(call!.headers.authorization, 'Bearer the-credential')
  assert.not.match(JSON.stringify([call!.headers, call!.body]), who.key)
  assert.equal(call!.body, { model: 'demo', messages })
})

test('a stream is passed on as without us; its usage is asked for, and shown to a caller that asked', async () => {
  for (const stream_options of [undefined, { include_usage: false }, { include_usage: true }]) {
    calls.length = 0
    const who = await caller()
    const body = { model: 'demo', messages, stream: true as const, stream_options }
    const { chunks, said } = await streamed(await who.openai.chat.completions.create(body))
    assert.is(said, ANSWER)
    const [event] = await charged(who, [['demo 0', used]])
    assert.is(event!.request_id, chunks[0]!.id)
    assert.equal(calls[0]!.body, { ...body, stream_options: { include_usage: true } })
    const shown = chunks.filter((chunk) => 'usage' in chunk)
    if (stream_options?.include_usage) {
      assert.is(chunks.at(-1)!.usage!.completion_tokens, 6)
      assert.is(shown.length, chunks.length)
    } else assert.equal([shown, chunks.filter(({ choices }) => !choices.length)], [[], []])
  }
})

test('a chunk of neither words nor usage is passed on', async () => {
  const who = await caller()
  const body = { model: 'filtered', messages, stream: true as const }
  const { chunks } = await streamed(await who.openai.chat.completions.create(body))
  const { choices, ...rest } = chunks[0]!
  assert.equal([choices, 'usage' in rest, 'prompt_filter_results' in rest], [[], false, true])
  await charged(who, [['filtered 0', used]])
})

test('the charge is committed before a stream says that it is done', async () => {
  const who = await caller()
  const response = await who.openai.chat.completions
    .create({ model: 'demo', messages, stream: true })
    .asResponse()
  let text = ''
  for await (const bytes of response.body!) {
    text += Buffer.from(bytes)
    if (text.endsWith('data: [DONE]\n\n')) assert.is((await who.events()).length, 1)
  }
  assert.ok(text.endsWith('data: [DONE]\n\n'))
  assert.is(response.headers.get('content-type'), 'text/event-stream')
  assert.is(response.headers.get('x-usage-id'), (await who.events())[0]!.id)
})

test('without figures of the upstream, the text passed on is charged', async () => {
  for (const stream of [true, false]) {
    const who = await caller()
    const body = { model: 'no-usage', messages, stream }
    const answer = await who.openai.chat.completions.create(body)
    const said = stream
      ? (await streamed(answer as AsyncIterable<OpenAI.ChatCompletionChunk>)).said
      : (answer as OpenAI.ChatCompletion).choices[0]!.message.content
    assert.is(said, ANSWER)
    // 28 bytes are 7 tokens, and more than the six pieces of the stream
    const [event] = await charged(who, [['no-usage 0', estimated(body, 7)]])
    assert.is(event!.metadata.estimated, true)
  }
})

test('the hold is the most that the request may cost', async () => {
  for (const [limits, output] of [
    [{}, 4096],
    [{ max_tokens: 50 }, 50],
    [{ max_completion_tokens: 70, max_tokens: 50, n: 3 }, 210],
    [{ max_tokens: -1, n: 0 }, 4096],
  ] as [object, number][]) {
    const who = await caller()
    const body = { model: 'demo', messages, ...limits }
    await who.openai.chat.completions.create(body)
    const [hold] = await db.sql('select meters, amount::text, status from api.holds where account_id = $1', [
      who.accountId,
    ])
    assert.equal(hold!.meters, { input_tokens: bytesOf(body), output_tokens: output })
    assert.is(units(hold!.amount), 25000n * BigInt(bytesOf(body)) + 100000n * BigInt(output))
    assert.is(hold!.status, 'captured')
  }
})

test('a caller that cannot pay that much is refused before the upstream is asked', async () => {
  const who = await caller({ funds: '0.01' })
  const error = await failure(
    who.openai.chat.completions.create({ model: 'demo', messages, max_tokens: 1000 }),
  )
  assert.equal([error.status, error.code, error.type], [402, 'insufficient_funds', 'insufficient_quota'])
  assert.equal(calls, [])
  assert.is(
    (await who.openai.chat.completions.create({ model: 'demo', messages, max_tokens: 500 })).choices.length,
    1,
  )
})

const refusals: [model: string, status: number, code: string, calls: number][] = [
  ['429', 429, 'rate_limit_exceeded', 1],
  ['500', 500, 'overloaded', 1],
  ['400', 400, 'refused_400', 1],
  ['401', 502, 'upstream_failed', 1],
  ['garbage', 502, 'upstream_failed', 1],
  ['nobody', 502, 'upstream_unreachable', 0],
  ['hang', 504, 'upstream_timeout', 1],
  ['429+500', 500, 'overloaded', 2],
  ['no-such-model', 404, 'model_not_found', 0],
]
for (const [model, status, code, tries] of refusals)
  for (const stream of [true, false])
    test(`${model}${stream ? ', streaming' : ''}: ${status} ${code}, and nothing is charged`, async () => {
      const who = await caller()
      const error = await failure(who.openai.chat.completions.create({ model, messages, stream }))
      assert.equal([error.status, error.code], [status, code], error)
      assert.ok(error.type && error.message)
      if (model === '429') assert.is(error.headers.get('retry-after'), '7')
      await charged(who, [])
      assert.is(calls.length, tries)
      assert.ok(model !== 'hang' || calls[0]!.aborted)
    })

// a stream that has begun is the caller's
for (const chain of chains.filter((chain) => chain.endsWith('demo')))
  for (const stream of chain.startsWith('cut') ? [false] : [true, false])
    test(`${chain}${stream ? ', streaming' : ''}: another node answers, and is paid`, async () => {
      const who = await caller()
      const answer = await who.openai.chat.completions.create({ model: chain, messages, stream })
      if (stream) await streamed(answer as AsyncIterable<OpenAI.ChatCompletionChunk>)
      const last = `${chain} ${chain.split('+').length - 1}`
      // the use of the first try is an event of its own
      const first: [string, Row][] = chain.startsWith('billed') ? [[`${chain} 0`, used]] : []
      await charged(who, [...first, [last, used]])
    })

test('a node that answers is the only one asked', async () => {
  const who = await caller()
  await who.openai.chat.completions.create({ model: 'demo+429', messages })
  await charged(who, [['demo+429 0', used]])
  assert.is(calls.length, 1)
})

for (const scenario of ['cut', 'stall'])
  test(`${scenario}: a stream that breaks off ends in an error, and the part that came is charged`, async () => {
    const who = await caller()
    const body = { model: scenario, messages, stream: true as const }
    let said = ''
    const error = await failure(
      (async () => {
        for await (const { choices } of await who.openai.chat.completions.create(body))
          said += choices[0]!.delta.content
      })(),
    )
    assert.is(error.code, 'upstream_broke_off')
    assert.is(said, 'You said: one')
    // 13 bytes are 4 tokens, and more than the three pieces
    const [event] = await charged(who, [[`${scenario} 0`, estimated(body, 4)]])
    assert.is(event!.metadata.estimated, true)
  })

test('stall: a whole answer that does not come is not charged', async () => {
  const who = await caller()
  const error = await failure(who.openai.chat.completions.create({ model: 'stall', messages }))
  assert.equal([error.status, error.code], [504, 'upstream_timeout'])
  await charged(who, [])
})

test('a caller that leaves mid-stream pays for the part it got, and the upstream is told to stop', async () => {
  const who = await caller({}, patient.url)
  const body = { model: 'stall', messages, stream: true as const }
  let words = 0
  for await (const { choices } of await who.openai.chat.completions.create(body))
    if (choices[0]!.delta.content && ++words === 3) break
  await until(() => calls[0]!.aborted, 'the upstream to be told')
  await until(async () => (await who.events()).length, 'the charge')
  await charged(who, [['stall 0', estimated(body, 4)]])
})

test('a caller that stops reading, and then leaves, pays for the part passed on', async () => {
  const who = await caller({}, patient.url)
  // about 60 MB of stream: the sockets on its way may hold 20
  const said = 300_000
  const body = { model: 'demo', messages: [{ role: 'user', content: 'so '.repeat(said) }], stream: true }
  const headers = { authorization: `Bearer ${who.key}` }
  const asked = request(`${patient.url}/v1/chat/completions`, { method: 'POST', headers })
  await new Promise((resolve) => asked.on('response', resolve).end(JSON.stringify(body)))
  await until(() => calls[0]!.res.writableLength > 1_000_000, 'the stream to be full')
  asked.destroy()
  await until(async () => (await who.events()).length, 'the charge')
  const [{ meters }] = (await who.events()) as [Row]
  assert.ok(meters.output_tokens > 100 && meters.output_tokens < said, meters.output_tokens)
  await charged(who, [['demo 0', estimated(body, meters.output_tokens)]])
  await until(() => calls[0]!.aborted, 'the upstream to be told')
})

for (const stream of [true, false])
  test(`a caller that leaves before anything came${stream ? ' of a stream' : ''} pays nothing`, async () => {
    const who = await caller({}, patient.url)
    const leave = new AbortController()
    const asked = who.openai.chat.completions.create(
      { model: 'hang', messages, stream },
      { signal: leave.signal },
    )
    await until(() => calls.length, 'the call')
    assert.is(await open(who.accountId), 1)
    leave.abort()
    await failure(asked)
    await until(() => calls[0]!.aborted, 'the upstream to be told')
    await charged(who, [])
  })

test('while a stream lasts, its hold is extended', async () => {
  const who = await caller()
  const expiry = async () =>
    (
      await db.sql('select expires_at from api.holds where account_id = $1', [who.accountId])
    )[0]!.expires_at.getTime()
  const asked = who.openai.chat.completions.create({ model: 'stall', messages, stream: true })
  await until(() => calls.length, 'the call')
  const first = await expiry()
  await until(async () => (await expiry()) > first, 'the extension')
  await failure(asked.then(streamed))
})

test('the hold of a gateway that died is given back by the clock', async () => {
  const other = await start()
  const who = await caller({}, other.url)
  const stream = await who.openai.chat.completions.create({ model: 'stall', messages, stream: true })
  await other.kill9()
  await failure(streamed(stream))
  const frozen = async () =>
    (
      await db.sql('select frozen_balance::text as it from api.billing_accounts where account_id = $1', [
        who.accountId,
      ])
    )[0]!.it
  assert.not.equal(await frozen(), '0.0000000000')
  await until(async () => (await frozen()) === '0.0000000000', 'the expiry')
  await holdsTrue(db.sql)
  await other.stop()
})

test('told to stop, it ends its open requests and delivers the queue', async () => {
  const other = await start()
  const who = await caller({}, other.url)
  const stream = await who.openai.chat.completions.create({ model: 'stall', messages, stream: true })
  process.kill(other.pid, 'SIGTERM')
  const error = await failure(streamed(stream))
  assert.is(error.code, 'upstream_broke_off')
  await charged(who, [['stall 0', estimated({ model: 'stall', messages, stream: true }, 4)]])
  await until(() => !runs(other.pid), 'its end')
  await other.stop()
})

test('a use while the database was away is charged when it is back', async () => {
  const who = await caller()
  const body = { model: 'stall', messages, stream: true as const }
  const stream = await who.openai.chat.completions.create(body)
  await postgrest.kill9()
  let broken = false
  const ending = failure(streamed(stream)).then((error) => {
    broken = true
    return error
  })
  await until(() => calls[0]!.aborted, 'the upstream to be given up')
  assert.is(broken, false)
  await postgrest.restart()
  assert.is((await ending).code, 'upstream_broke_off')
  await charged(who, [['stall 0', estimated(body, 4)]])
})

test('models are those of the nodes mounted on the key', async () => {
  const who = await caller()
  const listed = (await who.openai.models.list()).data
  assert.equal(listed.map(({ id }) => id).sort(), ['demo', 'nobody', ...scenarios, ...chains].sort())
  const { created, ...demo } = listed.find(({ id }) => id === 'demo')!
  assert.equal(demo, { id: 'demo', object: 'model', owned_by: 'local' })
  assert.ok(Math.abs(created - Date.now() / 1000) < 600)

  const other = await seed(db.operator)
  const openai = new OpenAI({ baseURL: `${proxy.url}/v1`, apiKey: other.key, maxRetries: 0 })
  assert.equal((await openai.models.list()).data, [])
  const error = await failure(openai.chat.completions.create({ model: 'demo', messages }))
  assert.equal([error.status, error.code], [404, 'model_not_found'])
})

test('a key that may not be used gets no further', async () => {
  const ask = async (key: string) => {
    const openai = new OpenAI({ baseURL: `${proxy.url}/v1`, apiKey: key, maxRetries: 0 })
    const error = await failure(openai.chat.completions.create({ model: 'demo', messages }))
    return [error.status, error.code]
  }
  assert.equal(await ask('vk_made_up'), [401, 'virtual_key_unknown'])
  const revoked = await caller()
  await revoked.openai.chat.completions.create({ model: 'demo', messages })
  await db.operator('select api.revoke_virtual_key($1)', [revoked.keyId])
  await until(async () => (await ask(revoked.key))[0] === 401, 'the revoke')
  const suspended = await caller()
  await db.operator(`update api.tenants set status = 'suspended' where id = $1`, [suspended.tenantId])
  assert.equal(await ask(suspended.key), [403, 'tenant_suspended'])
})

test('a call that is no request of the API is refused in its shape', async () => {
  const { key, accountId } = await caller()
  const ask = async (path: string, method: string, body?: string) => {
    const headers = { authorization: `Bearer ${key}`, 'content-type': 'application/json' }
    const response = await fetch(`${proxy.url}${path}`, { method, headers, body })
    const { error } = (await response.json()) as { error: { code: string; type: string } }
    return [response.status, error.code, error.type]
  }
  const invalid = 'invalid_request_error'
  assert.equal(await ask('/v1/embeddings', 'POST', '{}'), [404, 'not_found', invalid])
  assert.equal(await ask('/v1/chat/completions', 'GET'), [404, 'not_found', invalid])
  for (const body of ['', '{', '"text"', 'null'])
    assert.equal(await ask('/v1/chat/completions', 'POST', body), [400, 'invalid_json', invalid], body)
  assert.equal(await ask('/v1/chat/completions', 'POST', 'x'.repeat(10_000_001)), [
    413,
    'payload_too_large',
    invalid,
  ])
  // more tokens than anything may count
  const body = JSON.stringify({ model: 'demo', messages, max_tokens: 1e15 })
  assert.equal(await ask('/v1/chat/completions', 'POST', body), [422, 'invalid_meters', invalid])
  assert.is(await open(accountId), 0)
  assert.equal(calls, [])
})

test('a path that is none is refused as any other, and ends nothing', async () => {
  const { key } = await caller()
  const ask = (path: string, headers: Record<string, string>) =>
    new Promise((resolve, reject) => {
      // as it is: fetch would mend it
      const { hostname, port } = new URL(proxy.url)
      request({ hostname, port, path, headers }, (response) => {
        response.resume()
        resolve(response.statusCode)
      })
        .on('error', reject)
        .end()
    })
  for (const path of ['//', '///', '//:0', '/%', 'http://', '*']) {
    assert.is(await ask(path, {}), 401, path)
    assert.is(await ask(path, { authorization: `Bearer ${key}` }), 404, path)
  }
  for (const path of ['/healthz?now', 'http://any.host/healthz']) assert.is(await ask(path, {}), 200, path)
})

test('a node without a price is our failure, and is not called', async () => {
  const { key, keyId } = await caller()
  const [node] = await db.operator(
    `insert into api.config_nodes (name, model, endpoint) values ($1, 'free', $2) returning id`,
    [randomUUID(), `${upstreamUrl}/v1`],
  )
  await db.operator(
    'insert into api.virtual_key_config_nodes (virtual_key_id, config_node_id) values ($1, $2)',
    [keyId, node!.id],
  )
  const openai = new OpenAI({ baseURL: `${proxy.url}/v1`, apiKey: key, maxRetries: 0 })
  const ask = () => failure(openai.chat.completions.create({ model: 'free', messages }))
  await until(async () => (await ask()).status !== 404, 'the mount to be seen')
  const error = await ask()
  assert.equal([error.status, error.code, error.type], [500, 'price_not_found', 'server_error'])
  assert.equal(calls, [])
})

test('GET /healthz says how it is, to anybody', async () => {
  const ask = async () => {
    const response = await fetch(`${proxy.url}/healthz`)
    return [response.status, ((await response.json()) as { status: string }).status].join(' ')
  }
  // a Redis that was slow for a moment is not trusted for half a second
  await until(async () => (await ask()) === '200 ok', 'health')
})

test.run()
