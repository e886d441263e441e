// Bad elements of a batch: the same code through both transports; bad events are kept, and others served.
import { randomUUID } from 'node:crypto'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { fromServer, type ServerError } from '../../src/errors.ts'
import { database, type Row } from '../support/database.ts'
import { idAt, newId } from '../support/ids.ts'
import { holdsTrue } from '../support/ledger.ts'
import { payer } from '../support/payer.ts'
import { code, refusals, short, transports } from '../support/transports.ts'

const test = suite('batches')
const db = await database(test)
const through = await transports(db)
const each = refusals(test, db, through)

const good = await payer(db, { funds: '100000' })
const other = await payer(db, { funds: '10' })
const otherHold = await other.hold('1')
const open = await good.hold('1')
await db.operator(
  `insert into api.prices (config_node_id, meter, unit_price, currency, effective_from)
  values ($1, 'euros', 1, 'EUR', '2020-01-01'), ($1, 'dear', 999999999999, 'USD', '2020-01-01'),
    ($1, 'both', 1, 'USD', '2020-01-01'), ($1, 'both', 1, 'EUR', '2020-01-01')`,
  [good.nodeId],
)
const without = (element: Row, field: string): Row => {
  const { [field]: _, ...rest } = element
  return rest
}
const v4 = randomUUID()
const absent = Symbol('absent')
const noId = [
  'x',
  '',
  null,
  absent,
  42,
  true,
  {},
  [],
  [newId()],
  v4,
  v4.replace(/^(.{14})4/, '$17').replace(/^(.{19})./, '$10'),
  '0'.repeat(36),
  `${newId()} `,
  `${newId()}\n`,
  `x${newId()}`,
]
const noUuid = ['x', '', null, absent, 42, {}, [], `${v4}0`]
const [edges] = (await db.sql('select floor, ceiling from data.accepted_ids')) as {
  floor: Date
  ceiling: Date
}[]
const ancient = ['1970-01-01', '2020-01-01', new Date(edges!.floor.getTime() - 1)].map(idAt)
const future = [edges!.ceiling, '2099-01-01', '9999-12-31'].map(idAt)
const deep = (n: number) => JSON.parse(`${'['.repeat(n)}1${']'.repeat(n)}`)
const badMeters = [
  ...[absent, null, 'x', 5, true, [], [1], {}],
  ...[
    '-1',
    -1,
    '-0.0000000001',
    'NaN',
    'Infinity',
    '-Infinity',
    '1e3',
    '',
    ' 1',
    '1 ',
    '1,5',
    '+1',
    '0x10',
    '1_000',
    '１',
    null,
    true,
    {},
    [],
    [1],
    { usd: 1 },
  ].map((usd) => ({ usd })),
  ...[
    '1000000000000',
    1e12,
    1e21,
    '0.00000000001',
    1e-11,
    `0.${'1'.repeat(30)}`,
    '9'.repeat(1000),
    deep(500),
  ].map((usd) => ({ usd })),
  { usd: 1, more: -1 },
  { dear: 2 },
  { dear: '999999999999.9999999999' },
  { '': -1 },
  // invalid names of meters, whatever they count: a charge would keep them
  { 'bad name!': 1 },
  { '': 1 },
  { usd: 1, [`m${'x'.repeat(5000)}`]: 0 },
]

// a field, the values it must not have, and the code
type Bad = [field: string, values: unknown[], code: string]
const change = (element: Row, field: string, value: unknown) =>
  value === absent ? without(element, field) : { ...element, [field]: value }

const badEvents: Bad[] = [
  ['id', noId, 'invalid_id'],
  ['id', [...ancient, ...future], 'id_outside_window'],
  ['account_id', noUuid, 'invalid_account_id'],
  ['account_id', [randomUUID(), good.keyId], 'account_not_found'],
  ['virtual_key_id', noUuid, 'invalid_virtual_key_id'],
  ['virtual_key_id', [randomUUID(), good.accountId], 'virtual_key_unknown'],
  ['config_node_id', noUuid, 'invalid_config_node_id'],
  ['config_node_id', [randomUUID()], 'config_node_not_found'],
  ['id', [idAt(new Date(Date.now() + 3600_000))], 'id_not_of_now'],
  ['hold_id', ['x', '', 42, {}, []], 'invalid_hold'],
  ['final', ['yes', 'true', 0, 1, {}, []], 'invalid_final'],
  ['meters', badMeters, 'invalid_meters'],
  ['meters', [{ unknown: 1 }, { usd: 1, unknown: '0.1' }, { both: 1, unknown: 1 }], 'price_not_found'],
  ['meters', [{ euros: 1 }, { usd: 1, euros: 1 }], 'currency_mismatch'],
]
// an unfit label is left out, and so is a hold that the account doesn't have
const leftOut: [field: string, values: unknown[], note: Row][] = [
  [
    'request_id',
    ['', 'x'.repeat(513), { x: 'x'.repeat(600) }, {}, [], true, deep(1000)],
    { left_out: ['request_id'] },
  ],
  [
    'metadata',
    ['x', 5, true, [], deep(1000), { x: 'x'.repeat(16_400) }, { x: 'x'.repeat(500_000) }],
    { left_out: ['metadata'] },
  ],
  ['hold_id', [newId(), otherHold, randomUUID()], { hold: 'unknown' }],
]
const noEvents = [null, 5, 'x', true, [], [[]], [good.event('1')], deep(1000)]

const badRequests: Bad[] = [
  ['id', noId, 'invalid_id'],
  ['id', [...ancient, ...future], 'id_outside_window'],
  ['id', [-3_700_000, 180_000].map((ms) => idAt(new Date(Date.now() + ms))), 'id_not_of_now'],
  ['account_id', noUuid, 'invalid_account_id'],
  ['account_id', [randomUUID(), other.accountId], 'invalid_account'],
  ['virtual_key_id', noUuid, 'invalid_virtual_key_id'],
  ['virtual_key_id', [randomUUID()], 'virtual_key_unknown'],
  ['virtual_key_id', [other.keyId], 'invalid_account'],
  ['config_node_id', ['x', '', 42, {}], 'invalid_config_node_id'],
  ['config_node_id', [randomUUID(), other.nodeId], 'node_not_mounted'],
  [
    'expires_in',
    [0, -1, 2592001, 1.5, 'x', '', true, {}, [], 1e300, '1e3', '9'.repeat(100)],
    'invalid_expires_in',
  ],
  [
    'amount',
    [
      absent,
      null,
      '-1',
      '-0.0000000001',
      '0',
      'NaN',
      'Infinity',
      '1e12',
      '1000000000000',
      `0.${'1'.repeat(30)}`,
      {},
      [],
      true,
    ],
    'invalid_amount',
  ],
]
const priced = (): Row => ({
  ...without(good.request(''), 'amount'),
  config_node_id: good.nodeId,
  meters: { usd: 1 },
})
const badPriced: Bad[] = [
  ['config_node_id', [absent, null], 'invalid_config_node_id'],
  ['amount', ['1'], 'invalid_amount'],
  ['meters', badMeters.filter((meters) => ![absent, null].includes(meters as never)), 'invalid_meters'],
  ['meters', [{ unknown: 1 }], 'price_not_found'],
  ['meters', [{ euros: 1 }], 'currency_mismatch'],
]
const brief = (answers: Row[]) => answers.map((answer) => answer.code ?? answer.status)

for (const [field, values, expected] of badEvents)
  for (const value of values)
    each([
      `an event with ${field} ${short(value)}`,
      async ({ gateway }) => {
        const event = change(good.event('1'), field, value)
        const answers = await gateway.call<Row[]>('record_usage', { events: [event] })
        // the same again adds nothing
        await gateway.call<Row[]>('record_usage', { events: [event] })
        const kept = await db.sql('select code, resolved_at from data.parked_usage where event = $1', [
          JSON.stringify(event),
        ])
        return [answers[0]!.status, answers[0]!.code, kept]
      },
      ['parked', expected, [{ code: expected, resolved_at: null }]],
    ])
for (const [make, bad] of [
  [() => good.request('1'), badRequests],
  [priced, badPriced],
] as const)
  for (const [field, values, expected] of bad)
    for (const value of values)
      each([
        `a hold with ${field} ${short(value)}${make === priced ? ', priced' : ''}`,
        async ({ gateway }) => {
          const request = change(make(), field, value)
          const [answer] = await gateway.call<Row[]>('place_holds', { requests: [request] })
          return [answer!.status, answer!.code]
        },
        ['refused', expected],
      ])
for (const fn of ['release_holds', 'extend_holds'])
  for (const [field, values, expected] of [
    ['id', ['x', '', null, absent, 42, {}], 'invalid_id'],
    ['id', [newId(), v4, otherHold], 'hold_not_found'],
    ['account_id', noUuid, 'invalid_account_id'],
    ['account_id', [randomUUID()], 'account_not_found'],
    ['account_id', [other.accountId], 'hold_not_found'],
    ['expires_in', fn === 'extend_holds' ? [0, 1.5, 'x', 2592001] : [], 'invalid_expires_in'],
  ] as Bad[])
    for (const value of values)
      each([
        `${fn} with ${field} ${short(value)}`,
        async ({ gateway }) => {
          const request = change({ id: open, account_id: good.accountId }, field, value)
          const [answer] = await gateway.call<Row[]>(fn, { requests: [request] })
          return [answer!.status, answer!.code]
        },
        ['closed', expected],
      ])

const batches: [fn: string, param: string, element: string][] = [
  ['record_usage', 'events', 'invalid_event'],
  ['place_holds', 'requests', 'invalid_request'],
  ['release_holds', 'requests', 'invalid_request'],
  ['extend_holds', 'requests', 'invalid_request'],
]
for (const [fn, param, invalid] of batches) {
  for (const value of [null, {}, 'x', '[]', 5, true])
    each([
      `${fn} of ${short(value)}`,
      ({ gateway }) => code(gateway.call(fn, { [param]: value })),
      `422 invalid_${param}`,
    ])
  each(
    [`${fn} of nothing`, ({ gateway }) => gateway.call(fn, { [param]: [] }), []],
    [`${fn} without an array`, ({ gateway }) => code(gateway.call(fn, {})), '404 function_not_found'],
    [
      `${fn} of no objects`,
      async ({ gateway }) => brief(await gateway.call(fn, { [param]: noEvents })),
      noEvents.map(() => invalid),
    ],
    [
      `${fn} of objects of nothing`,
      async ({ gateway }) => brief(await gateway.call(fn, { [param]: [{}, {}] })),
      ['invalid_id', 'invalid_id'],
    ],
    [
      `${fn} of 5,000 bad elements`,
      async ({ gateway }) => {
        const answers = await gateway.call<Row[]>(fn, {
          [param]: Array.from({ length: 5000 }, (_, i) => ({ id: `bad ${i}` })),
        })
        return answers
          .map(({ id, code }) => `${id} ${code}`)
          .filter((text, i) => text !== `bad ${i} invalid_id`)
      },
      [],
    ],
    [
      `${fn} with NUL in a text`,
      ({ gateway }) => code(gateway.call(fn, { [param]: [{ id: 'a\0b' }] })),
      '400 invalid_input',
    ],
    [
      `${fn} with half a surrogate pair`,
      ({ gateway }) => code(gateway.call(fn, { [param]: [{ id: '\ud800' }] })),
      '400 invalid_input',
    ],
  )
}

// Texts that JSON.stringify would never write, as they come over the wire
const { url, token } = await db.postgrest()
const authorization = `Bearer ${await token({ role: 'keyledger_gateway' })}`
type Send = (fn: string, param: string, json: string) => Promise<Row[]>
const wire: Record<string, Send> = {
  async postgrest(fn, param, json) {
    const headers = { authorization, 'content-type': 'application/json' }
    const response = await fetch(`${url}/rpc/${fn}`, {
      method: 'POST',
      headers,
      body: `{"${param}": ${json}}`,
    })
    const answer = (await response.json()) as Row[] & ServerError
    if (!response.ok) throw fromServer(answer)
    return answer
  },
  pg: (fn, param, json) =>
    db.gateway(`select api.${fn}(${param} => $1::jsonb) as it`, [json]).then(
      (rows) => rows[0]!.it,
      (error) => {
        throw fromServer(error)
      },
    ),
}
const badTexts: [json: string, code: string][] = [
  ['[', '400 invalid_input'],
  ['', '400 invalid_input'],
  ['[{"id": 1,}]', '400 invalid_input'],
  ["[{'id': 1}]", '400 invalid_input'],
  ['[NaN]', '400 invalid_input'],
  ['[{"id": "a\\u0000b"}]', '400 invalid_input'],
  ['[{"id": "\\ud800"}]', '400 invalid_input'],
  ['[{"expires_in": 1e200000}]', '400 number_out_of_range'],
  [`${'['.repeat(100_000)}${']'.repeat(100_000)}`, '413 payload_too_large'],
]
const eachText = refusals(test, db, wire)
for (const [fn, param] of batches)
  for (const [json, expected] of badTexts)
    eachText([`${fn} of the text ${short(json)}`, (send) => code(send(fn, param, json)), expected])

for (const [name, send] of Object.entries(wire)) {
  test(`a repeated name in an object: the last one counts, by ${name}`, async () => {
    const { id, account_id, virtual_key_id, config_node_id } = good.event('1')
    const json = JSON.stringify({ account_id, virtual_key_id, config_node_id }).slice(1, -1)
    const [answer] = await send(
      'record_usage',
      'events',
      `[{"id": "x", ${json}, "meters": {"usd": 9, "usd": 1}, "id": "${id}"}]`,
    )
    assert.equal([answer!.status, answer!.cost], ['charged', '1.0000000000'])
  })

  test(`a number no float can hold is read exactly, by ${name}`, async () => {
    const [one, other] = [good.event('1'), good.event('1')].map(({ meters: _, ...event }) =>
      JSON.stringify(event).slice(0, -1),
    )
    const answers = await send(
      'record_usage',
      'events',
      `[${one}, "meters": {"usd": 1234.0000000001}}, ${other}, "meters": {"usd": 1e400}}]`,
    )
    assert.equal([answers[0]!.cost, answers[1]!.code], ['1234.0000000001', 'invalid_meters'])
  })
}

for (const [name, { gateway }] of Object.entries(through)) {
  test(`odd but good: charged, and kept to the letter, by ${name}`, async () => {
    const odd = {
      ключ: ['😀', '\u2028', '\u0001', '\\', '"', null, 1.5, true],
      '': {},
      deep: deep(200),
      __proto__x: 'مرحبا',
    }
    const events = [
      good.event('1', { metadata: odd, request_id: '🔑'.repeat(512) }),
      good.event('1', { metadata: { x: 'x'.repeat(16_000) }, unknown_field: 1 }),
      good.event('1', { hold_id: null, final: null, request_id: null, metadata: null }),
      good.event('1', { meters: { usd: 1 } }),
      good.event('1', { meters: { usd: '000000000001.0' } }),
      { ...good.event('1'), id: newId().toUpperCase(), account_id: good.accountId.toUpperCase() },
    ]
    const answers = await gateway.call<Row[]>('record_usage', { events })
    assert.equal(
      answers.map(({ status, cost }) => `${status} ${cost}`),
      events.map(() => 'charged 1.0000000000'),
    )
    const [kept] = await db.sql(
      'select metadata, request_id from data.usage_log where account_id = $1 and id = $2',
      [good.accountId, events[0]!.id],
    )
    assert.equal(kept, { metadata: odd, request_id: '🔑'.repeat(512) })
  })

  for (const [field, values, note] of leftOut)
    for (const value of values)
      test(`an event with ${field} ${short(value)} is charged without it, by ${name}`, async () => {
        const event = change(good.event('1'), field, value)
        const [answer] = await gateway.call<Row[]>('record_usage', { events: [event] })
        // the same again is the same event
        const [again] = await gateway.call<Row[]>('record_usage', { events: [event] })
        const [kept] = await db.sql(
          'select request_id, metadata, hold_id from data.usage_log where id = $1',
          [event.id],
        )
        const { status, left_out, hold } = answer!
        assert.equal(
          [status, { left_out, hold }],
          ['charged', { left_out: undefined, hold: undefined, ...note }],
        )
        assert.equal([again!.status, again!.mismatch], ['duplicate', undefined])
        assert.equal(kept, { request_id: null, metadata: null, hold_id: null })
      })

  test(`ids from the window's floor to two minutes ahead are in it, by ${name}`, async () => {
    const [window] = await db.sql('select floor from data.accepted_ids')
    const ids = [idAt(window!.floor), idAt(new Date(Date.now() + 110_000))]
    const answers = await gateway.call<Row[]>('record_usage', {
      events: ids.map((id) => good.event('1', { id })),
    })
    assert.equal(brief(answers), ['charged', 'charged'])
  })

  // one bad element among 999 good ones, first, in the middle and last
  for (const [i, [what, bad]] of (
    [
      ['no object', () => null],
      ['of no price', () => good.event('1', { meters: { unknown: 1 } })],
      ['with a hold that is no id', () => good.event('1', { hold_id: 'x' })],
      ['of a cost beyond all money', () => good.event('1', { meters: { dear: '999999999999' } })],
    ] as [string, () => Row | null][]
  ).entries())
    test(`999 good events and one ${what}, by ${name}`, async () => {
      const events: (Row | null)[] = Array.from({ length: 999 }, () => good.event('0.001'))
      const at = [0, 500, 999, 250][i]!
      events.splice(at, 0, bad())
      const before = Number((await good.figures()).balance)
      const answers = await gateway.call<Row[]>('record_usage', { events })
      assert.is(answers.length, 1000)
      assert.equal(
        answers
          .map(({ status }, n) => (n === at ? 'charged' : status))
          .filter((status) => status !== 'charged'),
        [],
      )
      assert.is(answers[at]!.status, 'parked')
      assert.is((before - Number((await good.figures()).balance)).toFixed(6), '0.999000')
    })

  test(`good and bad holds in one call, by ${name}`, async () => {
    const bad = [
      null,
      ...badRequests.flatMap(([field, values]) =>
        values.map((value) => change(good.request('1'), field, value)),
      ),
    ]
    const requests = bad.flatMap((each) => [each, good.request('0.001')])
    const answers = await gateway.call<Row[]>('place_holds', { requests })
    assert.equal(
      answers.map(({ status }) => status),
      bad.flatMap(() => ['refused', 'held']),
    )
  })

  test(`every bad event in one call with as many good ones, by ${name}`, async () => {
    const bad = badEvents.flatMap(([field, values]) =>
      values.map((value) => change(good.event('1'), field, value)),
    )
    const events = bad.flatMap((each) => [each, good.event('0.001')])
    const answers = await gateway.call<Row[]>('record_usage', { events })
    assert.equal(
      answers.map(({ status }) => status),
      bad.flatMap(() => ['parked', 'charged']),
    )
  })

  test(`5,000 events of two accounts in one call, by ${name}`, async () => {
    const events = Array.from({ length: 5000 }, (_, i) => (i % 3 ? good : other).event('0.001'))
    for (const event of events) event.config_node_id = good.nodeId
    const answers = await gateway.call<Row[]>('record_usage', { events })
    assert.equal(
      answers.map(({ id, status }) => `${id} ${status}`),
      events.map(({ id }) => `${id} charged`),
    )
  })
}

test('ids from a moment on are id_at of that moment, or higher', async () => {
  const [row] = await db.gateway(
    `select api.id_at('2026-11-01T00:00Z') as first, api.id_at('1970-01-01T00:00Z') as epoch,
      api.id_at('2026-11-01T00:00:00.0009Z') as later_that_millisecond,
      api.id_at(now()) <= api.new_id() and api.id_at(now() + interval '1 s') > api.new_id() as parted`,
  )
  const first = idAt('2026-11-01T00:00Z').slice(0, 13).concat('-7000-8000-000000000000')
  assert.equal(row, {
    first,
    later_that_millisecond: first,
    epoch: '00000000-0000-7000-8000-000000000000',
    parted: true,
  })
})

test('the ledger is whole after all these tests', () => holdsTrue(db.sql))

test.run()
