// Charging over a transport that fails as told: labels, holds that were given up, stop, and health.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { until } from '../../scripts/supervise.ts'
import { createDoubts } from '../../src/doubts.ts'
import { codeOf, fromNetwork, fromServer, KeyledgerError } from '../../src/errors.ts'
import { type BillingModuleOptions, createBillingModule, newId, type Rpc } from '../../src/index.ts'
import { failure } from '../support/failure.ts'

type Sent = { id: string; account_id: string; [more: string]: unknown }
type Handler = (elements: Sent[]) => unknown

const test = suite('charging')
const context = { account_id: newId(), virtual_key_id: newId() }
const event = (more = {}) => ({
  ...context,
  id: newId(),
  config_node_id: newId(),
  meters: { tokens: 1 },
  ...more,
})
const each =
  (status: string, more = {}) =>
  (elements: Sent[]) =>
    elements.map(({ id }) => ({ id, status, ...more }))
const answers: Record<string, Handler> = {
  place_holds: each('held', { amount: '1', available: '1', expires_at: 'later' }),
  release_holds: each('released'),
  extend_holds: each('extended'),
  record_usage: each('charged', { cost: '1' }),
}
const never = () => new Promise<never>(() => {})

// A module whose rpc is answered by `handlers`; the batched calls are in `calls`.
function billing(handlers: Record<string, Handler> = {}, options: Partial<BillingModuleOptions> = {}) {
  const calls: { fn: string; elements: Sent[] }[] = []
  const rpc = {
    async call(fn: string, args: Record<string, unknown> = {}) {
      if (fn === 'cache_changes')
        return { cursor: { cluster: '1', snapshot: '1:1:' }, keys: [], reset: false }
      if (fn === 'maintain') return null
      const elements: Sent[] = JSON.parse(JSON.stringify(args.requests ?? args.events))
      calls.push({ fn, elements })
      return (handlers[fn] ?? answers[fn]!)(elements)
    },
    rows: async () => [],
    close: async () => {},
  } as unknown as Rpc
  const of = (fn: string) => calls.filter((call) => call.fn === fn).flatMap(({ elements }) => elements)
  return { ...createBillingModule({ rpc, ...options }), calls, of }
}

const fit: [what: string, label: object][] = [
  ['none', {}],
  ['nulls', { request_id: null, metadata: null }],
  ['512 characters', { request_id: 'x'.repeat(512) }],
  ['512 characters of four bytes', { request_id: '😀'.repeat(512) }],
  ['16,384 bytes', { metadata: { a: 'x'.repeat(16_384 - 8) } }],
]
for (const [what, label] of fit)
  test(`a label that is kept: ${what}`, async () => {
    const { recordUsage, of, stop } = billing()
    const sent = event(label)
    const answer = await recordUsage(sent as never)
    assert.equal(answer, { id: sent.id, status: 'charged', cost: '1' })
    const [got] = of('record_usage')
    const { request_id, metadata } = label as Record<string, unknown>
    assert.equal([got!.request_id, got!.metadata ?? undefined], [request_id, metadata ?? undefined])
    await stop()
  })

const cycle: Record<string, unknown> = {}
cycle.self = cycle
const unfit: [what: string, label: object, left_out: string[]][] = [
  ['an empty request_id', { request_id: '' }, ['request_id']],
  ['513 characters', { request_id: 'x'.repeat(513) }, ['request_id']],
  ['513 characters of four bytes', { request_id: '😀'.repeat(513) }, ['request_id']],
  ['a number as request_id', { request_id: 5 }, ['request_id']],
  ['16,385 bytes', { metadata: { a: 'x'.repeat(16_385 - 8) } }, ['metadata']],
  ['16,385 bytes of two a character', { metadata: { a: 'é'.repeat(8190) } }, ['metadata']],
  ['a text', { metadata: 'x' }, ['metadata']],
  ['an array', { metadata: [1] }, ['metadata']],
  ['an object that JSON makes a text', { metadata: new Date(0) }, ['metadata']],
  ['a cycle', { metadata: cycle }, ['metadata']],
  ['a BigInt', { metadata: { n: 5n } }, ['metadata']],
  ['both', { request_id: '', metadata: 'x'.repeat(2_000_000) }, ['request_id', 'metadata']],
]
for (const [what, label, left_out] of unfit)
  test(`a label that is left out, said, and charged: ${what}`, async () => {
    const { recordUsage, of, stop, health } = billing()
    const sent = event(label)
    const answer = await recordUsage(sent as never)
    assert.equal(answer, { id: sent.id, status: 'charged', cost: '1', left_out: left_out as never })
    for (const name of left_out) assert.not.ok(name in of('record_usage')[0]!)
    assert.is(health().queues.record.failed, 0)
    await stop()
  })

test('the answer names the labels that SQL left out, and those the client left out', async () => {
  const { recordUsage, stop } = billing({
    record_usage: each('charged', { left_out: ['metadata'], hold: 'unknown' }),
  })
  assert.equal((await recordUsage(event())).left_out, ['metadata'])
  const answer = await recordUsage(event({ request_id: '' }))
  assert.equal([answer.left_out, answer.hold], [['request_id', 'metadata'], 'unknown'])
  await stop()
})

test('usage of a refused token is charged when the token is well; a hold is refused at once', async () => {
  let wrong = true
  const refusing = (answer: Handler) => (elements: Sent[]) => {
    if (wrong) throw new KeyledgerError('invalid_token', 401)
    return answer(elements)
  }
  const { hold, recordUsage, release, health, stop } = billing({
    place_holds: refusing(answers.place_holds!),
    record_usage: refusing(answers.record_usage!),
    release_holds: refusing(answers.release_holds!),
  })
  const recorded = recordUsage(event())
  const released = release({ id: newId(), account_id: context.account_id })
  assert.is((await failure(hold(context, { amount: '1' }))).code, 'invalid_token')
  await until(() => health().queues.record.error && health().queues.release.error, 'the code')
  assert.is(health().queues.record.error, 'invalid_token')
  wrong = false
  assert.equal([(await recorded).status, (await released).status], ['charged', 'released'])
  await stop()
})

const warnings: Error[] = []
process.on('warning', (warning) => warnings.push(warning))

// SQL writes a uuid in its own way
const written = (id: string) => `{${id.toUpperCase().replaceAll('-', '')}}`
const noAnswers: [what: string, answer: (id: string) => unknown][] = [
  ['an empty object', () => ({})],
  ['a number', () => 42],
  ['a text', (id) => id],
  ['a list', (id) => [id]],
  ["another's", () => ({ id: newId(), status: 'charged' })],
  ['no id', () => ({ status: 'charged' })],
  ['no status', (id) => ({ id })],
]
for (const [what, answer] of noAnswers)
  test(`a malformed answer is no commit: ${what}`, async () => {
    const tries: Record<string, number> = {}
    // the first try of each is answered wrongly; a hold's release then finds it
    const once = (fn: string) => (elements: Sent[]) => {
      tries[fn] = (tries[fn] ?? 0) + 1
      return tries[fn] === 1 ? elements.map(({ id }) => answer(id)) : answers[fn]!(elements)
    }
    const { recordUsage, release, hold, extend, stop } = billing(
      Object.fromEntries(Object.keys(answers).map((fn) => [fn, once(fn)])),
    )
    assert.is((await recordUsage(event() as never)).status, 'charged')
    assert.is((await release({ ...context, id: newId() })).status, 'released')
    assert.equal([tries.record_usage, tries.release_holds], [2, 2])
    const asked = { id: newId(), amount: '1' }
    for (const refused of [
      await failure(hold(context, asked)),
      await failure(extend({ ...context, id: newId() })),
    ])
      assert.equal([refused.code, refused.status], ['invalid_response', 502])
    await stop()
  })

test('an answer is known by its id, in whichever spelling, and where the id is none', async () => {
  const lower = billing({
    record_usage: (elements) =>
      elements.map(({ id }) => ({ id: id.replace(/[{}]/g, '').toLowerCase(), status: 'charged' })),
  })
  assert.is((await lower.recordUsage(event({ id: written(newId()) }) as never)).status, 'charged')
  // as SQL echoes an id that it can't read
  const echoed = billing({ record_usage: each('parked', { code: 'invalid_id' }) })
  for (const id of ['no uuid', 'half \ud800', '', null, 5, { a: 1 }, [1]])
    assert.is((await echoed.recordUsage(event({ id }) as never)).status, 'parked', JSON.stringify(id))
  const texts = billing({
    release_holds: (elements) =>
      elements.map(({ id }) => ({
        ...(id === null ? {} : { id: typeof id === 'string' ? id : JSON.stringify(id) }),
        status: 'closed',
        code: 'invalid_id',
      })),
  })
  for (const id of ['no uuid', null, 5])
    assert.is((await texts.release({ ...context, id } as never)).status, 'closed', JSON.stringify(id))
  for (const { stop } of [lower, echoed, texts]) await stop()
})

test('given-up holds: no warning, no release of a hold that was never sent, no failure counted', async () => {
  const refused = Object.assign(new Error('refused'), { code: 'ECONNREFUSED', syscall: 'connect' })
  const { hold, of, health, stop } = billing(
    {
      place_holds: () => {
        throw fromNetwork(refused, 'Postgres')
      },
    },
    { holdDeadline: 1500 },
  )
  const codes = await Promise.all(
    Array.from({ length: 5000 }, () => hold(context, { amount: '1' }).catch(codeOf)),
  )
  assert.ok(codes.every((code) => code === 'unavailable' || code === 'timeout'))
  assert.ok(codes.includes('unavailable'))
  await stop()
  assert.is(of('release_holds').length, 0)
  assert.is(health().queues.release.failed, 0)
  assert.equal(warnings, [])
})

test('given-up holds that may be there are looked for in few calls, once Postgres answers', async () => {
  let down = true
  const { hold, calls, of, health, stop } = billing(
    {
      place_holds: () => {
        throw new KeyledgerError('timeout', 504)
      },
      release_holds: (elements) => {
        if (down) throw new KeyledgerError('unavailable', 503)
        return each('closed', { code: 'hold_not_found' })(elements)
      },
    },
    { holdDeadline: 1500 },
  )
  const held = Array.from({ length: 5000 }, (_, i) => ({ ...context, account_id: `account ${i % 100}` }))
  await Promise.all(held.map((each) => hold(each, { amount: '1' }).catch(codeOf)))
  assert.ok(of('place_holds').length >= 1000)
  await until(() => of('release_holds').length > 0, 'a first try')
  await until(() => calls.at(-1)!.fn === 'release_holds', 'it')
  const tried = calls.filter(({ fn }) => fn === 'release_holds').length
  down = false
  // those that were sent: one account's go one batch after the other
  const sent = new Set(of('place_holds').map(({ id }) => id))
  await until(() => new Set(of('release_holds').map(({ id }) => id)).size === sent.size, 'all of them')
  const looks = calls.filter(({ fn }) => fn === 'release_holds').length - tried
  assert.ok(looks <= 15, `${looks} calls`)
  assert.equal(health().queues.release, { queued: 0, in_flight: 0, failed: 0, error: null })
  await stop()
  assert.equal(warnings, [])
})

test('a hold in doubt is looked for until it is found, a busy account once more', async () => {
  const given = ['busy', 'hold_not_found', 'released']
  const asked: string[] = []
  const doubts = createDoubts(async ([hold]) => {
    const answer = given[asked.length]!
    asked.push(hold!.id)
    return [{ status: answer === 'busy' ? 'busy' : 'closed', code: answer }]
  })
  doubts.add({ id: 'x', account_id: 'a' })
  await until(() => asked.length === 2, 'two looks')
  assert.is(doubts.size(), 1)
  await doubts.stop(1000)
  assert.is(asked.length, 3)
  assert.is(doubts.size(), 0)
})

test('stop ends at its own deadline: elements that are not delivered are rejected', async () => {
  for (const fails of [never, () => Promise.reject(new KeyledgerError('unavailable', 503))]) {
    const { recordUsage, release, hold, stop, health } = billing(
      { record_usage: fails, release_holds: fails, place_holds: fails },
      { stopDeadline: 300 },
    )
    const given = [
      recordUsage(event()),
      recordUsage(event({ account_id: newId() })),
      release({ id: newId(), account_id: context.account_id }),
      hold(context, { amount: '1' }),
    ].map((promise) => (promise as Promise<unknown>).catch(codeOf))
    await new Promise((resolve) => setImmediate(resolve))
    const began = performance.now()
    await stop()
    assert.ok(performance.now() - began < 2500)
    const codes = await Promise.all(given)
    assert.equal(codes.slice(0, 3), ['timeout', 'timeout', 'timeout'])
    assert.is(health().queues.record.failed, 2)
    assert.is((await failure(recordUsage(event()))).code, 'stopped')
  }
})

test("health is not ok while every hold is refused for the database's own reason, or is answered too late", async () => {
  let place: Handler = each('refused', { code: 'id_outside_window' })
  const { hold, start, stop, health } = billing(
    { place_holds: (elements) => place(elements) },
    { holdDeadline: 200, stopDeadline: 500 },
  )
  await start()
  await until(() => health().status === 'ok', 'ok')
  await failure(hold(context, { amount: '1' }))
  assert.equal([health().status, health().queues.hold.error], ['degraded', 'id_outside_window'])
  place = answers.place_holds!
  await hold(context, { amount: '1' })
  assert.is(health().status, 'ok')
  place = each('refused', { code: 'insufficient_funds' })
  await failure(hold(context, { amount: '1' }))
  assert.is(health().status, 'ok', 'for want of money')
  place = never
  await failure(hold(context, { amount: '1' }))
  assert.equal([health().status, health().queues.hold.error], ['degraded', 'timeout'])
  await stop()
})

test('the code of anything thrown is one of the list', () => {
  const system = (code: string) => Object.assign(new Error('no'), { code, syscall: 'connect' })
  const server = (code: string) => Object.assign(new Error('no'), { code, severity: 'FATAL' })
  const given: [unknown, string][] = [
    [server('53300'), 'unavailable'],
    [server('57P03'), 'unavailable'],
    [server('28P01'), 'unavailable'],
    [server('42501'), 'permission_denied'],
    [system('ECONNREFUSED'), 'unavailable'],
    [system('ECONNRESET'), 'unavailable'],
    [Object.assign(new Error('no'), { name: 'TimeoutError' }), 'timeout'],
    [fromServer({ code: '23P01', message: 'no' }), 'constraint_violation'],
    [new Error('a bug'), 'internal_error'],
    ['text', 'internal_error'],
  ]
  for (const [error, code] of given) assert.is(codeOf(error), code)
})

test('a read of the changes that takes too long is a timeout in health', async () => {
  const rpc = {
    call: (fn: string) => (fn === 'cache_changes' ? never() : Promise.resolve(null)),
    rows: async () => [],
    close: async () => {},
  } as unknown as Rpc
  const { start, stop, health } = createBillingModule({ rpc })
  await start()
  assert.is(health().listener.error, 'timeout')
  await stop()
})

test.run()
