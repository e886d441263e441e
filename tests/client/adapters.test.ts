// The gateway in each framework, and in none: it admits keys, passes answers on, and notices a
// caller that leaves.
import { request } from 'node:http'
import OpenAI from 'openai'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { createUpstream } from '../../examples/upstream.ts'
import { startExample } from '../../scripts/servers.ts'
import { until } from '../../scripts/supervise.ts'
import { database } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { holdsTrue } from '../support/ledger.ts'
import { seed } from '../support/seed.ts'

const test = suite('adapters')
const db = await database(test)
const postgrest = await db.postgrest()
let called = 0
let left = 0
const upstream = createUpstream().on('request', (_req, res) => {
  called++
  res.on('close', () => {
    if (!res.writableFinished) left++
  })
})
await new Promise<void>((resolve) => upstream.listen(0, '127.0.0.1', resolve))
db.onClose(() => {
  upstream.closeAllConnections()
  upstream.close()
})
const { port } = upstream.address() as { port: number }

// a key for model `demo`, for `stall`, which says three words and no more, and for `hang`, which
// never answers
async function caller(url: string, options = {}) {
  const world = await seed(db.operator, options)
  const { nodeId, keyId, key, accountId } = world
  await db.operator(`update api.config_nodes set model = 'demo', endpoint = $2 where id = $1`, [
    nodeId,
    `http://127.0.0.1:${port}/v1`,
  ])
  for (const model of ['stall', 'hang']) {
    const [{ id }] = (await db.operator(
      `insert into api.config_nodes (name, model, endpoint) values ($1, $2, $3) returning id`,
      [`${model} ${nodeId}`, model, `http://127.0.0.1:${port}/${model}/v1`],
    )) as [{ id: string }]
    await db.operator(
      'insert into api.virtual_key_config_nodes (virtual_key_id, config_node_id) values ($1, $2)',
      [keyId, id],
    )
    await db.operator(
      `insert into api.prices (config_node_id, meter, unit_price, unit_size, effective_from)
       select $1, meter, 1, 1000000, '2020-01-01' from unnest(array['input_tokens', 'output_tokens']) as meter`,
      [id],
    )
  }
  return {
    ...world,
    openai: new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 }),
    events: () =>
      db.sql('select id, meters from api.usage_logs where account_id = $1 order by id', [accountId]),
    open: async () =>
      (await db.sql(`select from data.hold where account_id = $1 and status = 'open'`, [accountId])).length,
  }
}

const messages = [{ role: 'user' as const, content: 'one two three' }]
const used = { input_tokens: 3, cached_input_tokens: 0, output_tokens: 5 }

for (const name of ['proxy', 'express', 'fastify', 'hono']) {
  const gateway = await startExample(name, {
    POSTGREST_URL: postgrest.url,
    GATEWAY_TOKEN: await postgrest.token({ role: 'keyledger_gateway' }),
    DATABASE_URL: db.loginUrl,
    REDIS_URL: undefined,
  })
  db.onClose(() => gateway.stop())
  const client = (apiKey: string) => new OpenAI({ baseURL: `${gateway.url}/v1`, apiKey, maxRetries: 0 })
  const refused = async (openai: OpenAI) => {
    const { status, code, type, headers } = await failure(
      openai.chat.completions.create({ model: 'demo', messages }),
    )
    return [status, code, type, headers.get('www-authenticate')]
  }

  test(`${name}: a valid key is served, streaming and not, and charged`, async () => {
    const { openai, events, open } = await caller(gateway.url)
    const { data, response } = await openai.chat.completions
      .create({ model: 'demo', messages })
      .withResponse()
    assert.is(data.choices[0]!.message.content, 'You said: one two three')
    let said = ''
    for await (const { choices } of await openai.chat.completions.create({
      model: 'demo',
      messages,
      stream: true,
    }))
      said += choices[0]?.delta.content ?? ''
    assert.is(said, 'You said: one two three')
    const charged = await events()
    assert.equal(
      charged.map(({ meters }) => meters),
      [used, used],
    )
    assert.is(response.headers.get('x-usage-id'), charged[0]!.id)
    assert.is(response.headers.get('x-usage-cost'), '0.0000575000')
    assert.equal((await openai.models.list()).data.map(({ id }) => id).sort(), ['demo', 'hang', 'stall'])
    assert.is(await open(), 0)
    await holdsTrue(db.sql)
  })

  test(`${name}: an unknown key and none, a revoked and an unfunded one are turned away`, async () => {
    const unauthorized = (code: string) => [401, code, 'authentication_error', 'Bearer']
    assert.equal(await refused(client('vk_made_up')), unauthorized('virtual_key_unknown'))
    const anonymous = await fetch(`${gateway.url}/v1/models`)
    assert.is(anonymous.status, 401)
    assert.is(anonymous.headers.get('cache-control'), 'no-store')
    assert.match(await anonymous.text(), '"code":"virtual_key_missing"')

    const revoked = await caller(gateway.url)
    await revoked.openai.models.list()
    await db.operator('select api.revoke_virtual_key($1)', [revoked.keyId])
    await until(async () => (await refused(revoked.openai))[0] === 401, 'the revoke')
    assert.equal(await refused(revoked.openai), unauthorized('virtual_key_disabled'))

    const unfunded = await caller(gateway.url, { funds: '0' })
    assert.equal(await refused(unfunded.openai), [402, 'insufficient_funds', 'insufficient_quota', null])
    assert.equal(await unfunded.events(), [])
  })

  test(`${name}: the older header of a gateway will do, and that of Azure's client`, async () => {
    const { key } = await caller(gateway.url)
    for (const header of ['x-virtualkey', 'api-key']) {
      const response = await fetch(`${gateway.url}/v1/models`, { headers: { [header]: key } })
      assert.is(response.status, 200, header)
    }
  })

  test(`${name}: a caller that leaves mid-stream pays for the part it got, and no hold is left`, async () => {
    const { openai, events, open } = await caller(gateway.url)
    const before = left
    let words = 0
    const stream = await openai.chat.completions.create({ model: 'stall', messages, stream: true })
    for await (const { choices } of stream) if (choices[0]!.delta.content && ++words === 3) break
    await until(() => left > before, 'the upstream to be told')
    await until(async () => !(await open()), 'the hold to end')
    const [event] = await events()
    assert.is(event!.meters.output_tokens, 4)
    await holdsTrue(db.sql)
  })

  test(`${name}: a caller that leaves before anything came pays nothing, and no hold is left`, async () => {
    const { openai, events, open } = await caller(gateway.url)
    const [before, calls] = [left, called]
    const leave = new AbortController()
    const asked = openai.chat.completions.create({ model: 'hang', messages }, { signal: leave.signal })
    await until(() => called > calls, 'the call')
    assert.is(await open(), 1)
    leave.abort()
    await failure(asked)
    await until(async () => !(await open()), 'the hold to end')
    await until(() => left > before, 'the upstream to be told')
    assert.equal(await events(), [])
  })

  test(`${name}: a body that is too large, or no JSON, gets no further`, async () => {
    const { key, open } = await caller(gateway.url)
    const url = `${gateway.url}/v1/chat/completions`
    const ask = async (body: string, type = 'application/json') => {
      const headers = { authorization: `Bearer ${key}`, 'content-type': type }
      return (await fetch(url, { method: 'POST', headers, body })).status
    }
    // announced to all, and sent to the frameworks that read it to its end. The others may close at
    // once, and a caller that still sends then may not get the answer.
    const tooLarge = new Promise<number | undefined>((resolve, reject) => {
      const headers = { authorization: `Bearer ${key}`, 'content-length': 11_000_000 }
      const asked = request(url, {
        method: 'POST',
        headers: { ...headers, 'content-type': 'application/json' },
      })
      asked.on('error', reject).on('response', ({ statusCode }) => {
        resolve(statusCode)
        asked.destroy()
      })
      if (['proxy', 'express'].includes(name)) asked.end('x'.repeat(11_000_000))
      else asked.flushHeaders()
    })
    assert.is(await tooLarge, 413)
    assert.is(await ask('{'), 400)
    assert.is(await ask(JSON.stringify({ model: 'demo', messages }), 'text/plain'), 200)
    assert.is(await open(), 0)
  })
}

test.run()
