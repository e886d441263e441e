// The cost of an event: one rounding, at the price of its own time; without a price it is parked.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row } from '../support/database.ts'
import { idAt } from '../support/ids.ts'
import { chances, holdsTrue, units } from '../support/ledger.ts'
import { type Payer, payer } from '../support/payer.ts'

const pricing = suite('pricing')
const db = await database(pricing)
const test = (name: string, run: () => Promise<void>) =>
  pricing(name, async () => {
    await run()
    await holdsTrue(db.sql)
  })

const setPrice = (account: Payer, meter: string, price: string, more: Row = {}) =>
  db.operator(
    `insert into api.prices (config_node_id, meter, unit_price, unit_size, currency, effective_from)
    values ($1, $2, $3, $4, $5, $6)`,
    [
      account.nodeId,
      meter,
      price,
      more.size ?? 1,
      more.currency ?? 'USD',
      more.from ?? '2020-01-01T00:00:00Z',
    ],
  )

// Half up at 10 decimals, once per event; in whole numbers of 1e-20 / 3600000000, with no floating point.
function cost(parts: [price: string, size: number, quantity: string][]): string {
  const whole = 3_600_000_000n
  let sum = 0n
  for (const [price, size, quantity] of parts) sum += units(price) * units(quantity) * (whole / BigInt(size))
  const step = 10n ** 10n * whole
  const rounded = (2n * sum + step) / (2n * step)
  const digits = rounded.toString().padStart(11, '0')
  return `${digits.slice(0, -10)}.${digits.slice(-10)}`
}

// prices, quantities, and the cost worked out by hand
const roundings: [parts: [price: string, size: number, quantity: string][], cost: string][] = [
  [[['2.50', 1_000_000, '374']], '0.0009350000'],
  [[['1', 60, '1']], '0.0166666667'],
  [[['2', 60, '1']], '0.0333333333'],
  [[['1', 3600, '1']], '0.0002777778'],
  [[['1', 3600, '5400']], '1.5000000000'],
  // ties go up, and an amount just below goes down
  [[['0.0000000001', 60, '30']], '0.0000000001'],
  [[['0.0000000001', 60, '29.9999999999']], '0.0000000000'],
  [[['0.0000000001', 3600, '1800']], '0.0000000001'],
  [[['0.0000000001', 3600, '5400']], '0.0000000002'],
  [[['0.0000000001', 1_000_000, '500000']], '0.0000000001'],
  [[['0.0000000001', 1_000_000, '499999.9999999999']], '0.0000000000'],
  [[['0.0000000003', 1_000_000, '500000']], '0.0000000002'],
  // one rounding per event, not per meter: halves make a whole
  [
    [
      ['0.0000000001', 60, '15'],
      ['0.0000000001', 1_000_000, '250000'],
    ],
    '0.0000000001',
  ],
  [
    [
      ['1', 60, '1'],
      ['1', 60, '1'],
      ['1', 60, '1'],
    ],
    '0.0500000000',
  ],
  [
    [
      ['1', 3600, '1'],
      ['1', 3600, '1'],
    ],
    '0.0005555556',
  ],
  // far from zero
  [[['999999999999.9999999999', 1_800_000_000, '1799999999.9999999999']], '999999999999.9999999443'],
  [[['0.0000000001', 1, '0.0000000001']], '0.0000000000'],
  [[['0.0000000001', 1, '0.5']], '0.0000000001'],
  [[['0', 1, '999999999999']], '0.0000000000'],
]

test('a cost is rounded once, half up, at 10 decimals', async () => {
  const account = await payer(db)
  const events: Row[] = []
  for (const [i, [parts, expected]] of roundings.entries()) {
    assert.is(cost(parts), expected, `worked out by hand: ${JSON.stringify(parts)}`)
    const meters: Row = {}
    for (const [n, [price, size, quantity]] of parts.entries()) {
      meters[`m${i}.${n}`] = quantity
      await setPrice(account, `m${i}.${n}`, price, { size })
    }
    events.push({ ...account.event('0'), meters })
  }
  const answers = await account.record(...events)
  for (const [i, answer] of answers.entries())
    assert.equal(
      [answer.status, answer.cost],
      ['charged', roundings[i]![1]],
      JSON.stringify(roundings[i]![0]),
    )
})

test('a thousand costs by chance are exact, and so is their sum', async () => {
  const account = await payer(db)
  const chance = chances(20261122)
  const sizes = [1, 60, 1000, 3600, 1_000_000, 1440, 3_600_000]
  const prices = sizes.map((size, n) => ({
    meter: `m${n}`,
    size,
    price: `${chance(100)}.${String(chance(1e9)).padStart(10, '0')}`,
  }))
  for (const { meter, price, size } of prices) await setPrice(account, meter, price, { size })
  const events: Row[] = []
  const expected: string[] = []
  for (let i = 0; i < 1000; i++) {
    const used = prices.filter(() => chance(2)).concat(prices[chance(7)]!)
    const meters: Row = {}
    for (const { meter } of used) meters[meter] = `${chance(1e6)}.${chance(1e6)}`
    const parts = Object.entries(meters).map(([meter, quantity]) => {
      const { price, size } = prices.find((each) => each.meter === meter)!
      return [price, size, quantity] as [string, number, string]
    })
    expected.push(cost(parts))
    events.push({ ...account.event('0'), meters })
  }
  const answers = await account.record(...events)
  assert.equal(
    answers.map((answer) => answer.cost),
    expected,
  )
  const sum = expected.reduce((total, each) => total + units(each), 0n)
  assert.is(units((await account.figures()).outstanding_amount), sum)
})

const first = new Date(Date.now() - 60_000)
const second = new Date(first.getTime() + 30_000)
const shifted = (moment: Date, ms: number) => new Date(moment.getTime() + ms)

test('an event costs the price of its own time', async () => {
  const account = await payer(db)
  await setPrice(account, 'dated', '1', { from: first })
  await setPrice(account, 'dated', '2', { from: second })
  await setPrice(account, 'dated', '9', { from: new Date(Date.now() + 3_600_000) })
  await setPrice(account, 'dated', '7', { from: first, currency: 'EUR' })
  const at = (moment: Date) => ({ ...account.event('0', { id: idAt(moment) }), meters: { dated: 1 } })
  const events = [shifted(first, -1), first, shifted(second, -1), second, new Date()].map(at)
  const answers = await account.record(...events)
  assert.equal(
    answers.map(({ status, code, cost }) => code ?? `${status} ${Number(cost)}`),
    ['price_not_found', 'charged 1', 'charged 1', 'charged 2', 'charged 2'],
  )
  // a price added later for a time that has passed changes nothing that was charged
  await setPrice(account, 'dated', '5', { from: shifted(first, 1) })
  const again = await account.record(...events.slice(1))
  assert.equal(
    again.map(({ status, cost, mismatch }) => [status, Number(cost), mismatch]),
    [1, 1, 2, 2].map((usd) => ['duplicate', usd, undefined]),
  )
})

test('an unused meter needs no price, a used one does', async () => {
  const account = await payer(db)
  const event = (meters: Row) => ({ ...account.event('0'), meters })
  const answers = await account.record(
    event({ usd: 1, nothing: 0 }),
    event({ nothing: '0.0' }),
    event({ usd: 1, unknown: 1 }),
  )
  assert.equal(
    answers.map(({ status, code, cost }) => [status, code ?? cost]),
    [
      ['charged', '1.0000000000'],
      ['charged', '0.0000000000'],
      ['parked', 'price_not_found'],
    ],
  )
})

// an event without a price, a minute old
async function parkedEvent() {
  const account = await payer(db, { funds: '10' })
  const event = account.event('0', { id: idAt(first), meters: { late: '3' } })
  const [answer] = await account.record(event)
  assert.equal([answer!.status, answer!.code], ['parked', 'price_not_found'])
  const replay = async (): Promise<Row | undefined> => {
    const rows = await db.operator('select api.replay_parked_usage() as answers')
    return rows[0]!.answers.find((each: Row) => each.id === event.id)
  }
  const rows = () =>
    db.operator(
      `select code, resolution, resolved_at is not null as resolved, event from api.parked_usage where usage_id = $1`,
      [event.id],
    )
  return { account, event, replay, rows }
}

test('a parked event is kept whole, and charged once at the price of its own time', async () => {
  const { account, event, replay, rows } = await parkedEvent()
  const parked = { code: 'price_not_found', resolution: null, resolved: false, event }
  assert.equal(await rows(), [parked])
  const still = await replay()
  assert.equal([still!.status, still!.code], ['parked', 'price_not_found'])
  assert.equal(await rows(), [parked])
  await setPrice(account, 'late', '0.5', { from: shifted(first, -1000) })
  await setPrice(account, 'late', '2', { from: second })
  const charged = await replay()
  assert.equal(
    [charged!.status, charged!.cost, charged!.available],
    ['charged', '1.5000000000', '8.5000000000'],
  )
  assert.is(await replay(), undefined)
  assert.equal(await rows(), [{ ...parked, resolution: 'charged', resolved: true }])
  assert.is((await account.record(event))[0]!.status, 'duplicate')
  assert.equal(await account.entries(1), ['usage -1.5: balance -1.5'])
  assert.is((await rows()).length, 1)
})

test('a retry before the replay is charged, and leaves the replay nothing', async () => {
  const { account, event, replay, rows } = await parkedEvent()
  assert.is((await account.record(event))[0]!.status, 'parked')
  assert.is((await rows()).length, 1)
  await setPrice(account, 'late', '1')
  assert.is((await account.record(event))[0]!.status, 'charged')
  // the charge itself resolved it
  assert.equal(
    (await rows()).map(({ resolution }) => resolution),
    ['duplicate'],
  )
  assert.is(await replay(), undefined)
  assert.equal(await account.entries(1), ['usage -3: balance -3'])
})

test("a price in another currency doesn't count; one in the account's currency resolves the event", async () => {
  const { account, replay } = await parkedEvent()
  await setPrice(account, 'late', '1', { currency: 'EUR' })
  assert.is((await replay())!.code, 'currency_mismatch')
  await setPrice(account, 'late', '1')
  assert.is((await replay())!.status, 'charged')
})

test("events that can never be charged don't keep later ones from being replayed", async () => {
  const { account, event } = await parkedEvent()
  await db.sql(`update data.parked_usage set created_at = now() where usage_id = $1`, [event.id])
  await account.record(...[1, 2, 3].map((n) => ({ hopeless: n })))
  await db.sql(`update data.parked_usage set created_at = now() - interval '1 hour' where usage_id is null`)
  await setPrice(account, 'late', '1')
  const seen: string[] = []
  for (let i = 0; i < 3 && !seen.includes(event.id); i++) {
    const [{ answers }] = (await db.operator(
      'select api.replay_parked_usage(max_events => 3) as answers',
    )) as [Row]
    seen.push(...answers.map(({ id }: Row) => id))
  }
  assert.ok(seen.includes(event.id))
})

test('copies of an event in one call are one charge, whatever else the call has', async () => {
  const account = await payer(db, { funds: '10' })
  const [x, y] = [account.event('1'), account.event('2')]
  const bad = { ...x, meters: { usd: -1 } }
  const answers = await account.record(bad, x, y, y, { ...y, meters: { usd: '3' } })
  assert.equal(
    answers.map(({ status, code, mismatch, cost }) => [status, code ?? mismatch ?? Number(cost)]),
    [
      // not parked: the id is charged
      ['duplicate', true],
      ['charged', 1],
      ['charged', 2],
      ['duplicate', 2],
      ['duplicate', true],
    ],
  )
  assert.equal(await account.entries(1), ['usage -3: balance -3'])
})

test('a repeated event charges nothing, and says so when its content differs', async () => {
  const account = await payer(db, { funds: '10' })
  const event = account.event('1', { request_id: 'r', metadata: { a: 1, b: [2] } })
  assert.is((await account.record(event))[0]!.status, 'charged')
  const key = await db.operator('select id from api.create_virtual_key($1)', [account.userId])
  const hold_id = await account.hold('1')
  const copies: [Row, boolean][] = [
    [{}, false],
    [{ meters: { usd: '1.00' } }, false],
    [{ metadata: { b: [2], a: 1 } }, false],
    [{ final: true }, false],
    [{ meters: { usd: 2 } }, true],
    [{ meters: { usd: 1, nothing: 0 } }, true],
    [{ request_id: 's' }, true],
    [{ metadata: null }, true],
    [{ virtual_key_id: key[0]!.id }, true],
    [{ hold_id }, true],
    [{ final: false }, true],
  ]
  for (const [change, mismatch] of copies) {
    const [answer] = await account.record({ ...event, ...change })
    assert.equal(
      [answer!.status, answer!.mismatch ?? false, answer!.cost, answer!.seq],
      ['duplicate', mismatch, '1.0000000000', 2],
      JSON.stringify(change),
    )
  }
  assert.is(await account.holdNow(hold_id), 'open 0/1')
  assert.equal(await account.entries(1), ['usage -1: balance -1'])
})

pricing.run()
