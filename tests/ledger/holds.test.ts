// Holds: the money they set aside, the events that draw on them, and their single end.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { movableClock, now } from '../support/clock.ts'
import { database, type Row } from '../support/database.ts'
import { newId } from '../support/ids.ts'
import { holdsTrue } from '../support/ledger.ts'
import { type Payer, payer } from '../support/payer.ts'

const holds = suite('holds')
const db = await database(holds)
const forward = await movableClock(db.sql)
const test = (name: string, run: () => Promise<void>) =>
  holds(name, async () => {
    await run()
    await holdsTrue(db.sql)
  })

const brief = (answer: Row | undefined): string =>
  [answer!.status, answer!.code, answer!.hold_status, answer!.mismatch && 'mismatch']
    .filter(Boolean)
    .join(' ')

// draws: an account with 10, a hold, events on it, and then the hold and the figures
const draws: [
  name: string,
  hold: string,
  events: [usd: string, final: boolean][],
  now: string,
  figures: Row,
][] = [
  [
    'the cost is drawn, the rest is given back',
    '5',
    [['3', true]],
    'captured 3/5',
    { balance: '7', available: '7' },
  ],
  ['the whole of it', '5', [['5', true]], 'captured 5/5', { balance: '5', available: '5' }],
  ['nothing of it', '5', [['0', true]], 'captured 0/5', { balance: '10', available: '10' }],
  [
    "the part that the hold doesn't cover is charged all the same",
    '2',
    [['5', true]],
    'captured 2/2',
    { balance: '5', available: '5' },
  ],
  [
    'an event beyond the money too',
    '2',
    [['15', true]],
    'captured 2/2',
    { outstanding_amount: '5', available: '-5' },
  ],
  [
    'parts, until a final one',
    '5',
    [
      ['2', false],
      ['1', false],
      ['0.5', true],
    ],
    'captured 3.5/5',
    { balance: '6.5', available: '6.5' },
  ],
  [
    'parts alone leave the hold open',
    '5',
    [
      ['2', false],
      ['1', false],
    ],
    'open 3/5',
    { balance: '7', frozen_balance: '2', available: '5' },
  ],
  [
    'parts beyond the hold',
    '5',
    [
      ['4', false],
      ['4', false],
    ],
    'open 5/5',
    { balance: '2', available: '2' },
  ],
  [
    'after the final one the rest is charged from the account',
    '5',
    [
      ['1', true],
      ['2', true],
      ['1', false],
    ],
    'captured 1/5',
    { balance: '6', available: '6' },
  ],
]
for (const [name, amount, events, now, figures] of draws) {
  test(`${name}, an event a call`, async () => {
    const account = await payer(db, { funds: '10' })
    const hold_id = await account.hold(amount)
    assert.is((await account.figures()).available, `${10 - Number(amount)}`)
    for (const [usd, final] of events)
      assert.is((await account.use(usd, { hold_id, ...(final ? {} : { final }) })).status, 'charged')
    assert.is(await account.holdNow(hold_id), now)
    assert.equal(await account.figures(), figures)
  })
  // in one call the final one counts for all
  if (events.every(([, final], i) => !final || i === events.length - 1))
    test(`${name}, in one call`, async () => {
      const account = await payer(db, { funds: '10' })
      const hold_id = await account.hold(amount)
      await account.record(...events.map(([usd, final]) => account.event(usd, { hold_id, final })))
      assert.is(await account.holdNow(hold_id), now)
      assert.equal(await account.figures(), figures)
    })
}

// each way a hold of 5 ends, and the rest of 10
const endings: [ending: string, balance: number, end: (account: Payer) => Promise<string>][] = [
  [
    'captured',
    9,
    async (account) => {
      const id = await account.hold('5')
      await account.use('1', { hold_id: id })
      return id
    },
  ],
  [
    'released',
    10,
    async (account) => {
      const id = await account.hold('5')
      assert.is(brief((await account.release(id))[0]), 'released')
      return id
    },
  ],
  [
    'expired',
    10,
    async (account) => {
      const id = await account.hold('5', { expires_in: 60 })
      await forward(60)
      return id
    },
  ],
]
for (const [ending, balance, end] of endings)
  test(`${ending} is the end of a hold, once; a late event is charged whole`, async () => {
    const account = await payer(db, { funds: '10' })
    const id = await end(account)
    const has = async (left: number) =>
      assert.equal(await account.figures(), { balance: `${left}`, available: `${left}` })
    await has(balance)
    assert.is(brief((await account.release(id))[0]), `closed hold_${ending}`)
    assert.is(brief((await account.extend(id))[0]), `closed hold_${ending}`)
    const now = await account.holdNow(id)
    assert.match(now, ending)
    await has(balance)
    assert.is(brief(await account.use('2', { hold_id: id })), 'charged')
    assert.is(await account.holdNow(id), now)
    await has(balance - 2)
  })

test('an expired hold gives its money back by the clock alone, and to the next hold', async () => {
  const account = await payer(db, { funds: '10' })
  await account.use('1', { hold_id: await account.hold('4', { expires_in: 60 }), final: false })
  const rest = await account.hold('6', { expires_in: 60 })
  assert.equal(await account.figures(), { balance: '9', frozen_balance: '9' })
  assert.is(brief((await account.place(account.request('0.1')))[0]), 'refused insufficient_funds')
  await forward(60)
  assert.equal(await account.figures(), { balance: '9', available: '9' })
  assert.is(await account.holdNow(rest), 'expired 0/6')
  const [settled] = await db.sql('select status from data.hold where id = $1', [rest])
  assert.is(settled!.status, 'open') // no call has settled it: the view goes by the clock
  assert.is(brief((await account.place(account.request('9')))[0]), 'held')
  assert.is(await account.holdNow(rest), 'expired 0/6')
  assert.equal(await account.figures(), { balance: '9', frozen_balance: '9' })
})

test('a hold is extended from now, and never shortened', async () => {
  const account = await payer(db, { funds: '10' })
  const [placed] = await account.place(account.request('1', { expires_in: 10 }))
  const seconds = (at: string) => Math.round((Date.parse(at) - now()) / 1000)
  const near = (answer: Row | undefined, expected: number) => {
    assert.ok(Math.abs(seconds(answer!.expires_at) - expected) <= 2, `${answer!.expires_at}: ${expected} s`)
  }
  near(placed, 10)
  for (const [expires_in, expected] of [
    [undefined, 900],
    [60, 900],
    ['1000', 1000],
    [2592000, 2592000],
  ]) {
    const [answer] = await account.extend(placed!.id, expires_in)
    assert.is(brief(answer), 'extended')
    near(answer, expected as number)
  }
  for (const expires_in of [0, -1, 2592001, 1.5, 'soon', true, {}, 1e300])
    assert.is(brief((await account.extend(placed!.id, expires_in))[0]), 'closed invalid_expires_in')
  near((await account.place(account.request('1')))[0], 900)
})

test('a repeated hold answers the first one, and says whether they differ', async () => {
  const account = await payer(db, { funds: '10' })
  const other = await db.operator('select id from api.create_virtual_key($1)', [account.userId])
  const request = account.request('4')
  const twice = await account.place(request, request)
  assert.equal(twice.map(brief), ['held', 'duplicate open'])
  assert.equal(twice[1]!.expires_at, twice[0]!.expires_at)
  const retries: [Row, string][] = [
    [request, 'duplicate open'],
    [{ ...request, amount: '4.000' }, 'duplicate open'],
    [{ ...request, expires_in: 5 }, 'duplicate open'],
    [{ ...request, amount: '5' }, 'duplicate open mismatch'],
    [{ ...request, virtual_key_id: other[0]!.id }, 'duplicate open mismatch'],
    [{ ...request, config_node_id: account.nodeId }, 'duplicate open mismatch'],
  ]
  for (const [retry, expected] of retries) {
    const [answer] = await account.place(retry)
    assert.is(brief(answer), expected, JSON.stringify(retry))
    assert.equal([answer!.amount, answer!.available], ['4.0000000000', '6.0000000000'])
  }
  // a retry gets its first answer, whatever has changed since
  await account.use('8')
  assert.is(brief((await account.place(request))[0]), 'duplicate open')
  await db.operator('select status from api.revoke_virtual_key($1)', [account.keyId])
  assert.is(brief((await account.place(request))[0]), 'duplicate open')
  await account.release(request.id)
  assert.is(brief((await account.place(request))[0]), 'duplicate released')
  assert.is(brief((await account.place(account.request('1')))[0]), 'refused virtual_key_disabled')
})

test('a refused hold may come again with its id', async () => {
  const account = await payer(db)
  const request = account.request('4')
  assert.is(brief((await account.place(request))[0]), 'refused insufficient_funds')
  await account.topUp('4')
  assert.is(brief((await account.place(request))[0]), 'held')
})

test('one call releases holds of several accounts, each once, and answers in the order asked', async () => {
  const [a, b] = [await payer(db, { funds: '10' }), await payer(db, { funds: '5' })]
  const [whole, drawn, other] = [await a.hold('4'), await a.hold('3'), await b.hold('2')]
  await a.use('1', { hold_id: drawn, final: false })
  const wanted: [Payer | undefined, string][] = [
    [a, whole],
    [b, other],
    [a, whole],
    [undefined, newId()],
    [a, drawn],
  ]
  const [row] = await db.gateway('select api.release_holds($1) as answers', [
    JSON.stringify(wanted.map(([account, id]) => ({ id, account_id: account?.accountId ?? newId() }))),
  ])
  const { answers }: { answers: Row[] } = row as { answers: Row[] }
  assert.equal(
    answers.map(({ id }) => id),
    wanted.map(([, id]) => id),
  )
  assert.equal(
    answers.map((answer) => `${brief(answer)} ${answer.available}`),
    [
      'released 7.0000000000',
      'released 5.0000000000',
      'closed hold_released 7.0000000000',
      'closed account_not_found undefined',
      'released 9.0000000000',
    ],
  )
  assert.equal(await a.figures(), { balance: '9', available: '9' })
  assert.equal(await b.figures(), { balance: '5', available: '5' })
})

test('one call admits holds in order as far as the money goes', async () => {
  const [a, b] = [await payer(db, { funds: '10' }), await payer(db, { limit: '1' })]
  const answers = await a.place(
    a.request('6'),
    b.request('1.0000000001'),
    a.request('5'),
    b.request('0.4'),
    a.request('4'),
    b.request('0.6'),
    a.request('0.0000000001'),
  )
  assert.equal(
    answers.map((answer) => `${brief(answer)} ${Number(answer.available)}`),
    [
      'held 4',
      'refused insufficient_funds 1',
      'refused insufficient_funds 4',
      'held 0.6',
      'held 0',
      'held 0',
      'refused insufficient_funds 0',
    ],
  )
  assert.equal([await a.version(), await b.version()], ['1', '1']) // holds are no entries
})

test('one id on two accounts is two holds, also within one call', async () => {
  const [a, b] = [await payer(db, { funds: '10' }), await payer(db, { funds: '10' })]
  const id = newId()
  const answers = await a.place(
    a.request('1', { id }),
    b.request('1', { id }),
    b.request('1', { id }),
    a.request('1', { id }),
  )
  assert.equal(answers.map(brief), ['held', 'held', 'duplicate open', 'duplicate open'])
})

test('a hold may be priced in SQL, for a node that is mounted', async () => {
  const account = await payer(db, { funds: '10' })
  const priced = (more: Row = {}): Row => {
    const { amount: _, ...request } = account.request('')
    return { ...request, config_node_id: account.nodeId, meters: { usd: '2.5' }, ...more }
  }
  const request = priced()
  const [answer] = await account.place(request)
  assert.equal([brief(answer), answer!.amount, answer!.available], ['held', '2.5000000000', '7.5000000000'])
  assert.is(brief((await account.place(request))[0]), 'duplicate open')
  assert.is(
    brief((await account.place({ ...request, meters: { usd: '2.6' } }))[0]),
    'duplicate open mismatch',
  )
  // the same quantity, written otherwise
  assert.is(brief((await account.place({ ...request, meters: { usd: 2.5 } }))[0]), 'duplicate open')
  assert.is(brief((await account.place({ ...request, meters: { usd: '2.50' } }))[0]), 'duplicate open')
  const free = await account.place(priced({ meters: { usd: 0 } }))
  assert.equal([brief(free[0]), free[0]!.amount], ['held', '0.0000000000'])
  const [other] = await db.operator(`insert into api.config_nodes (name) values ($1) returning id`, [newId()])
  assert.is(
    brief((await account.place(priced({ config_node_id: other!.id })))[0]),
    'refused node_not_mounted',
  )
  await db.operator(`update api.config_nodes set status = 'disabled' where id = $1`, [account.nodeId])
  assert.is(brief((await account.place(priced()))[0]), 'refused node_not_mounted')
})

test('a hold of another account draws nothing: the event is charged without it', async () => {
  const [a, b] = [await payer(db, { funds: '10' }), await payer(db, { funds: '10' })]
  const hold_id = await a.hold('5')
  const event = b.event('2', { hold_id })
  const [answer] = await b.record(event)
  assert.equal([answer!.status, answer!.hold], ['charged', 'unknown'])
  assert.is(brief((await b.record(event))[0]), 'duplicate')
  assert.equal([await a.holdNow(hold_id), (await b.figures()).balance], ['open 0/5', '8'])
})

holds.run()
