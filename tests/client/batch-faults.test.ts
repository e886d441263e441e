// Batches under faults: whose fault an error is, halves that wait for a lane, busy accounts, and
// bounds in bytes.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { until } from '../../scripts/supervise.ts'
import { type BatcherOptions, createBatcher } from '../../src/batch.ts'
import { fromHttp, fromServer, KeyledgerError } from '../../src/errors.ts'
import { failure } from '../support/failure.ts'

interface Element {
  id: number
  account: string
  [more: string]: unknown
}
interface Answer {
  id: number
  status: string
}
type Send = (elements: Element[]) => Answer[] | Promise<Answer[]>

const test = suite('batch-faults')
const turn = () => new Promise((resolve) => setImmediate(resolve))
const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms))
const done = (elements: Element[]) => elements.map(({ id }) => ({ id, status: 'done' }))
const outcomes = (promises: Promise<Answer>[]) =>
  Promise.all(promises.map((promise) => promise.then(({ status }) => status).catch(({ code }) => code)))

function batches(send: Send, options: Partial<BatcherOptions<Element, Answer>> = {}) {
  const calls: Element[][] = []
  const most = { inFlight: 0 }
  let inFlight = 0
  const batcher = createBatcher<Element, Answer>({
    account: ({ account }) => account,
    deadline: 10_000,
    async send(texts) {
      const elements: Element[] = texts.map((text) => JSON.parse(text))
      calls.push(elements)
      most.inFlight = Math.max(most.inFlight, ++inFlight)
      try {
        return await send(elements)
      } finally {
        inFlight--
      }
    },
    ...options,
  })
  return { ...batcher, calls, most }
}
const many = (count: number, account: (i: number) => string) =>
  Array.from({ length: count }, (_, id) => ({ id, account: account(id) }))

const nobodys: [what: string, error: () => unknown][] = [
  ['HTML 200', () => fromHttp(200)],
  ['HTML 401', () => fromHttp(401)],
  ['HTML 403', () => fromHttp(403)],
  ['HTML 404', () => fromHttp(404)],
  ['HTML 502', () => fromHttp(502)],
  ...[
    '42501',
    '42883',
    'PGRST106',
    'PGRST202',
    'PGRST205',
    'PGRST303',
    '53100',
    '58030',
    'XX000',
    'P0001',
  ].map((code): [string, () => unknown] => [code, () => fromServer({ code, message: 'it failed' })]),
  ['a refusal of the whole call', () => fromServer({ code: 'PT422', message: 'no_such_code' })],
  ['no error of ours', () => new TypeError('fetch failed')],
]
for (const [what, error] of nobodys)
  test(`usage outlasts ${what}, whole, and health says so meanwhile`, async () => {
    let tries = 0
    const codes: unknown[] = []
    const { add, calls, stats } = batches(
      (elements) => {
        if (tries > 0) codes.push(stats().error)
        if (++tries < 4) throw error()
        return done(elements)
      },
      { patient: true, lanes: 1 },
    )
    const all = many(200, (id) => `${id % 2}`).map((element) => add(element))
    assert.equal([...new Set(await outcomes(all))], ['done'])
    assert.equal(
      calls.map(({ length }) => length),
      [200, 200, 200, 200],
    )
    assert.ok(codes.every((code) => typeof code === 'string'))
    assert.is(stats().error, null)
  })

test('usage that only fails is given up at its deadline, with the last error', async () => {
  const { add, calls } = batches(
    () => {
      throw fromHttp(404)
    },
    { patient: true, deadline: 300 },
  )
  assert.equal(await outcomes([add({ id: 1, account: 'a' }), add({ id: 2, account: 'b' })]), [
    'invalid_response',
    'invalid_response',
  ])
  assert.ok(calls.length > 1)
})

for (const code of ['22P02', '22003', '23502', '23514', '23P01', '54000', '413'])
  test(`${code} is an element's fault: it alone is refused, at once, and the others are delivered`, async () => {
    const { add, calls } = batches(
      (elements) => {
        if (!elements.some(({ id }) => id === 3)) return done(elements)
        throw code === '413' ? fromHttp(413) : fromServer({ code, message: 'bad' })
      },
      { patient: true },
    )
    const all = await outcomes(many(8, (id) => `${id % 3}`).map((element) => add(element)))
    assert.equal(
      all.map((status) => status === 'done'),
      [true, true, true, false, true, true, true, true],
    )
    assert.is(calls.filter((elements) => elements.length === 1 && elements[0]!.id === 3).length, 1)
  })

test('an error that nobody knows is found in its element, which harms no other', async () => {
  const { add } = batches(
    (elements) => {
      if (elements.some(({ id }) => id === 3)) throw fromServer({ code: 'XX000', message: 'out of memory' })
      return done(elements)
    },
    { patient: true, deadline: 5000 },
  )
  const all = await outcomes(many(8, (id) => `${id}`).map((element) => add(element)))
  assert.equal(
    all.map((status) => (status === 'done' ? 1 : status)),
    [1, 1, 1, 'internal_error', 1, 1, 1, 1],
  )
})

test('however often calls time out, there are never more than there are lanes', async () => {
  const { add, calls, most, stop, abandon, stats } = batches(
    async () => {
      await pause(20)
      throw new KeyledgerError('timeout', 504)
    },
    { patient: true },
  )
  const all = outcomes(many(2000, (id) => `account ${id}`).map((element) => add(element)))
  await until(() => calls.some(({ length }) => length < 50), 'halves of halves')
  assert.is(most.inFlight, 4)
  assert.equal(stats().queued + stats().in_flight, 2000)
  const stopping = stop()
  abandon(new KeyledgerError('timeout', 504))
  await stopping
  assert.equal([...new Set(await all)], ['timeout'])
  const sent = calls.length
  await until(() => stats().in_flight === 0, 'the calls under way')
  assert.is(calls.length, sent)
  assert.equal({ ...stats(), error: '' }, { queued: 0, in_flight: 0, failed: 2000, error: '' })
})

// answers as SQL does: a locked account is busy among others, and a lock_timeout by itself
function locking(locked: Set<string>, wait: () => Promise<void>): Send {
  return async (elements) => {
    const accounts = new Set(elements.map(({ account }) => account))
    if (accounts.size === 1 && locked.has(elements[0]!.account)) {
      await wait()
      if (locked.has(elements[0]!.account)) throw new KeyledgerError('lock_timeout', 503)
    }
    return elements.map(({ id, account }) =>
      locked.has(account) ? { id, status: 'busy' } : { id, status: 'done' },
    )
  }
}

test('a locked account is sent by itself until it is free; the others wait for nothing', async () => {
  const locked = new Set(['z'])
  const { add, calls, stats } = batches(locking(locked, turn as () => Promise<void>))
  const others = many(40, (id) => `account ${id}`).map((element) => add(element))
  let free = false
  const busy = [100, 101, 102].map((id) =>
    add({ id, account: 'z' }).then((answer) => {
      assert.ok(free)
      return answer
    }),
  )
  assert.equal([...new Set(await outcomes(others))], ['done'])
  await until(
    () => calls.filter((elements) => elements.every(({ account }) => account === 'z')).length > 2,
    'z',
  )
  const later = add({ id: 103, account: 'z' })
  assert.is((await add({ id: 50, account: 'account 1' })).status, 'done')
  free = true
  locked.clear()
  assert.equal(await outcomes([...busy, later]), ['done', 'done', 'done', 'done'])
  // in order, and only once beside others
  const ofZ = calls.map((elements) => elements.filter(({ account }) => account === 'z').map(({ id }) => id))
  assert.is(calls.filter((elements, i) => ofZ[i]!.length > 0 && ofZ[i]!.length < elements.length).length, 1)
  assert.equal(stats(), { queued: 0, in_flight: 0, failed: 0, error: null })
})

test('busy accounts take half the lanes at most, though each of their calls waits', async () => {
  const locked = new Set(Array.from({ length: 24 }, (_, i) => `locked ${i}`))
  let waits = 0
  let most = 0
  const release: (() => void)[] = []
  const { add } = batches(
    locking(locked, async () => {
      most = Math.max(most, ++waits)
      await new Promise<void>((resolve) => release.push(resolve))
      waits--
    }),
  )
  const stuck = [...locked].map((account, id) => add({ id, account }))
  await until(() => waits === 2, 'their calls')
  for (let round = 0; round < 20; round++)
    assert.is((await add({ id: round, account: 'other' })).status, 'done', 'another account is not delayed')
  assert.is(waits, 2)
  // new elements of theirs find no lane either
  const more = [...locked].map((account, id) => add({ id: 100 + id, account }))
  assert.is((await add({ id: 1, account: 'third' })).status, 'done')
  locked.clear()
  await until(() => {
    for (const go of release.splice(0)) go()
    return waits === 0 && release.length === 0
  }, 'the locks')
  const freeing = setInterval(() => {
    for (const go of release.splice(0)) go()
  }, 5)
  assert.equal([...new Set(await outcomes([...stuck, ...more]))], ['done'])
  clearInterval(freeing)
  assert.is(most, 2)
})

test('an account that stays busy is given up at its deadline, also while no lane is free for it', async () => {
  const locked = new Set(Array.from({ length: 50 }, (_, i) => `locked ${i}`))
  const { add, stats } = batches(
    locking(locked, () => pause(200) as Promise<void>),
    { deadline: 600 },
  )
  const began = performance.now()
  const all = await outcomes([...locked].map((account, id) => add({ id, account })))
  assert.equal([...new Set(all)], ['lock_timeout'])
  // fifty of them by two lanes of 200 ms would take five seconds
  assert.ok(performance.now() - began < 3000)
  assert.is(stats().failed, 50)
  assert.is((await add({ id: 1, account: 'other' })).status, 'done')
})

test('the queue is bounded in bytes, and takes more when it has room', async () => {
  let answer = () => {}
  const held = new Promise<void>((resolve) => {
    answer = resolve
  })
  const { add, stats } = batches(async (elements) => held.then(() => done(elements)), { maxQueueBytes: 3000 })
  const large = (id: number) => add({ id, account: 'a', text: 'é'.repeat(450) })
  const kept = [large(1), large(2), large(3)]
  const refused = await failure(large(4))
  assert.equal([refused.code, refused.status], ['overloaded', 503])
  await turn()
  await turn()
  assert.is((await failure(large(5))).code, 'overloaded', 'what is in flight counts')
  answer()
  assert.equal(await outcomes(kept), ['done', 'done', 'done'])
  assert.is((await large(6)).status, 'done')
  assert.is(stats().failed, 2)
})

test('an element that is of no use when late is not sent late', async () => {
  let answer = () => {}
  const held = new Promise<void>((resolve) => {
    answer = resolve
  })
  const { add, calls, inDoubt } = batches(async (elements) => held.then(() => done(elements)), {
    perishable: true,
    deadline: 100,
  })
  const first = add({ id: 1, account: 'a' })
  await turn()
  const second = add({ id: 2, account: 'a' })
  const moment = performance.now() + 120
  await until(() => performance.now() > moment, 'the deadline')
  answer()
  assert.is((await first).status, 'done')
  assert.is((await failure(second)).code, 'timeout')
  assert.is(calls.length, 1)
  assert.is(inDoubt(second), false)
})

test('a failed call is told for a while, not for ever', async () => {
  const { add, stats } = batches(
    () => {
      throw fromServer({ code: '42501', message: 'no' })
    },
    { errorAge: 50 },
  )
  await failure(add({ id: 1, account: 'a' }))
  assert.is(stats().error, 'permission_denied')
  await until(() => stats().error === null, 'it to be forgotten')
})

test('an element is in doubt only if it may have been carried out', async () => {
  const errors: [error: unknown, doubt: boolean][] = [
    [new KeyledgerError('timeout', 504), true],
    [new KeyledgerError('unavailable', 503), true],
    [fromHttp(502), true],
    [fromServer({ code: '42501', message: 'no' }), false],
    [new KeyledgerError('deadlock', 503), false],
  ]
  for (const [error, doubt] of errors) {
    const { add, inDoubt } = batches(
      () => {
        throw error
      },
      { deadline: 20 },
    )
    const answer = add({ id: 1, account: 'a' })
    await failure(answer)
    assert.is(inDoubt(answer), doubt, String(error))
  }
})

test("nobody is given up with an error about another's data", async () => {
  // both go together, and the error is about one of them; it comes after their deadline
  const { add } = batches(
    async () => {
      await pause(120)
      throw new KeyledgerError('invalid_input', 400, { detail: 'of the first' })
    },
    { patient: true, deadline: 100, lanes: 1 },
  )
  const together = [add({ id: 1, account: 'a' }), add({ id: 2, account: 'b' })].map(failure)
  await turn()
  // the next batch is late when that has failed, and is never sent
  const another = failure(add({ id: 3, account: 'c' }))
  for (const error of [...(await Promise.all(together)), await another]) {
    assert.equal([error.code, error.status], ['timeout', 504])
    assert.is(error.cause.code, 'invalid_input')
  }
})

test('a half that is late before its turn gets an error of its own, not that of the whole batch', async () => {
  const { add } = batches(
    async (elements) => {
      if (elements.some(({ id }) => id === 1) && elements.length > 1)
        throw new KeyledgerError('invalid_input', 400)
      await pause(120)
      throw new KeyledgerError('unavailable', 503)
    },
    { patient: true, deadline: 100, lanes: 1 },
  )
  const errors = await Promise.all([1, 2].map((id) => failure(add({ id, account: `${id}` }))))
  assert.equal(
    errors.map(({ code }) => code),
    ['unavailable', 'timeout'],
  )
})

test('an account whose elements are all given up is as any other when it comes again', async () => {
  const locked = new Set(['y', 'z'])
  let answer = () => {}
  const held = new Promise<void>((resolve) => {
    answer = resolve
  })
  // one lane for busy accounts: the first of them keeps it, and the other waits
  const { add, calls } = batches(
    locking(locked, () => held),
    { deadline: 200, lanes: 2 },
  )
  const busy = ['y', 'z'].map((account, id) => failure(add({ id, account })))
  // they go together some times before each goes alone
  await until(() => calls.some((elements) => elements.length === 1), 'the call of one of them')
  const later = ['y', 'z'].map((account, id) => failure(add({ id: 10 + id, account })))
  const moment = performance.now() + 250
  await until(() => performance.now() > moment, 'the deadline')
  // any other element makes it look
  await add({ id: 20, account: 'a' })
  answer()
  for (const error of await Promise.all([...busy, ...later])) assert.is(error.code, 'lock_timeout')
  locked.clear()
  const from = calls.length
  await Promise.all(['y', 'z', 'a'].map((account, id) => add({ id, account })))
  assert.equal(
    calls.slice(from).map((elements) => elements.map(({ account }) => account)),
    [['y', 'z', 'a']],
  )
})

test.run()
