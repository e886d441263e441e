// The batcher: elements go together, are repeated or given up, and one bad element harms no other.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { until } from '../../scripts/supervise.ts'
import { type BatcherOptions, createBatcher } from '../../src/batch.ts'
import { KeyledgerError } from '../../src/errors.ts'
import { failure } from '../support/failure.ts'

interface Element {
  id: number
  account: string
  [more: string]: unknown
}
type Batch = { ids: number[]; elements: Element[]; answer(error?: unknown): void }

const test = suite('batch')
const lost = new KeyledgerError('unavailable', 503)
const bad = new KeyledgerError('invalid_input', 400)
const turn = () => new Promise((resolve) => setImmediate(resolve))

// for tests of deadlines: the clock is their subject
const past = (ms: number) => {
  const moment = performance.now() + ms
  return until(() => performance.now() > moment, 'the moment')
}

// A batcher whose calls wait in `calls` until the test answers them; each answer is `done <id>`.
function held(options: Partial<BatcherOptions<Element, string>> = {}) {
  const calls: Batch[] = []
  const batcher = createBatcher<Element, string>({
    account: ({ account }) => account,
    deadline: 10_000,
    send: (texts) =>
      new Promise((resolve, reject) => {
        const elements: Element[] = texts.map((text) => JSON.parse(text))
        const ids = elements.map(({ id }) => id)
        const answer = (error?: unknown) => (error ? reject(error) : resolve(ids.map((id) => `done ${id}`)))
        calls.push({ ids, elements, answer })
      }),
    ...options,
  })
  const add = (id: number, account = 'a') => batcher.add({ id, account })
  return { ...batcher, add, put: batcher.add, calls }
}

// A batcher whose calls are answered by `send`, at once.
function open(send: (ids: number[]) => void, options: Partial<BatcherOptions<Element, string>> = {}) {
  const calls: number[][] = []
  const { add, ...batcher } = createBatcher<Element, string>({
    account: ({ account }) => account,
    deadline: 10_000,
    async send(texts) {
      const ids: number[] = texts.map((text) => JSON.parse(text).id)
      calls.push(ids)
      send(ids)
      return ids.map((id) => `done ${id}`)
    },
    ...options,
  })
  return { ...batcher, calls, add: (id: number, account = 'a', more = {}) => add({ id, account, ...more }) }
}

const outcomes = (promises: Promise<string>[]) =>
  Promise.all(promises.map((promise) => promise.catch((error) => error.code)))

test('elements of one turn go together; elements that come during a call go in the next, in order', async () => {
  const { add, calls } = held()
  const first = [add(1), add(2), add(3)]
  await turn()
  assert.equal(
    calls.map(({ ids }) => ids),
    [[1, 2, 3]],
  )
  const second = [add(4), add(5)]
  await turn()
  assert.is(calls.length, 1)
  calls[0]!.answer()
  assert.equal(await Promise.all(first), ['done 1', 'done 2', 'done 3'])
  await turn()
  assert.equal(
    calls.map(({ ids }) => ids),
    [
      [1, 2, 3],
      [4, 5],
    ],
  )
  calls[1]!.answer()
  assert.equal(await Promise.all(second), ['done 4', 'done 5'])
})

test('a promise is pending until its call is answered', async () => {
  const { add, calls } = held()
  let settled = false
  const promise = add(1).then(() => {
    settled = true
  })
  await turn()
  await turn()
  assert.is(settled, false)
  calls[0]!.answer()
  await promise
  assert.is(settled, true)
})

test('at most so many calls at once, in fair shares, and an account in one of them at a time', async () => {
  const { add, calls, stats } = held({ lanes: 3 })
  const accounts = Array.from({ length: 60 }, (_, i) => `account ${i}`)
  const promises = accounts.flatMap((account, i) => [add(i, account), add(100 + i, account)])
  await turn()
  assert.equal(
    calls.map(({ ids }) => ids.length),
    [40, 40, 40],
  )
  const laneOf = new Map(
    calls.flatMap(({ elements }, lane) => elements.map(({ account }) => [account, lane])),
  )
  promises.push(...accounts.map((account, i) => add(200 + i, account)), add(300, 'new'))
  await turn()
  assert.is(calls.length, 3)
  assert.equal(stats(), { queued: 61, in_flight: 120, failed: 0, error: null })
  for (const lane of [0, 1, 2]) {
    calls[lane]!.answer()
    await until(() => calls.length === 4 + lane, 'the next call')
    const { elements } = calls[3 + lane]!
    assert.ok(elements.length > 5) // spread
    assert.ok(elements.every(({ account }) => laneOf.get(account) === lane || account === 'new'))
  }
  for (const call of calls.slice(3)) call.answer()
  assert.is((await Promise.all(promises)).length, 181)
  assert.equal(stats(), { queued: 0, in_flight: 0, failed: 0, error: null })
})

test('an account goes whole, and waits for its own call while lanes are free', async () => {
  const { add, calls } = held()
  const hot = Array.from({ length: 300 }, (_, i) => add(i, 'hot'))
  await turn()
  assert.is(calls[0]!.ids.length, 300)
  hot.push(add(300, 'hot'))
  const other = add(301, 'other')
  await turn()
  assert.equal(
    calls.slice(1).map(({ ids }) => ids),
    [[301]],
  )
  calls[1]!.answer()
  assert.is(await other, 'done 301')
  assert.is(calls.length, 2)
  calls[0]!.answer()
  await until(() => calls.length === 3, 'the next call')
  assert.equal(calls[2]!.ids, [300])
  calls[2]!.answer()
  assert.is((await Promise.all(hot)).length, 301)
})

test('an account that always has more takes turns with others', async () => {
  const { add, calls } = held({ lanes: 1, maxBatch: 2 })
  const promises = Array.from({ length: 6 }, (_, i) => add(i, 'hot'))
  await turn()
  promises.push(add(10, 'other'))
  const served = ({ elements }: Batch) => elements.map(({ account }) => account)
  for (let i = 0; i < 3; i++) {
    await until(() => calls.length === i + 1, 'the next call')
    promises.push(add(20 + i, 'hot'))
    calls[i]!.answer()
  }
  assert.equal(calls.map(served), [
    ['hot', 'hot'],
    ['hot', 'hot'],
    ['other', 'hot'],
  ])
  for (let i = 3; i < 5; i++) {
    await until(() => calls.length === i + 1, 'the next call')
    calls[i]!.answer()
  }
  assert.is((await Promise.all(promises)).length, 10)
})

test('an account whose next element does not fit beside others is first in the next call', async () => {
  const { add, put, calls } = held({ lanes: 1, maxBytes: 200 })
  const promises = [add(0), put({ id: 1, account: 'large', text: 'x'.repeat(160) }), add(2, 'other')]
  for (let i = 0; i < 3; i++) {
    await until(() => calls.length === i + 1, 'the next call')
    calls[i]!.answer()
  }
  assert.equal(
    calls.map(({ ids }) => ids),
    [[0], [1], [2]],
  )
  assert.is((await Promise.all(promises)).length, 3)
})

test('a few elements of many accounts are one call', async () => {
  const { add, calls } = open(() => {})
  await Promise.all(Array.from({ length: 30 }, (_, i) => add(i, `account ${i}`)))
  assert.is(calls.length, 1)
})

test('a batch is bounded in elements and in bytes', async () => {
  const few = open(() => {}, { maxBatch: 4 })
  await Promise.all(Array.from({ length: 10 }, (_, i) => few.add(i)))
  assert.equal(few.calls, [
    [0, 1, 2, 3],
    [4, 5, 6, 7],
    [8, 9],
  ])
  const element = JSON.stringify({ id: 1, account: 'a', text: 'é'.repeat(100) })
  const small = open(() => {}, { maxBytes: 2 * Buffer.byteLength(element) + 1 })
  await Promise.all([1, 2, 3, 4, 5].map((id) => small.add(id, 'a', { text: 'é'.repeat(100) })))
  assert.equal(small.calls, [[1, 2], [3, 4], [5]])
})

for (const code of ['unavailable', 'deadlock', 'serialization_failure'])
  test(`${code}: the same elements are sent again until they are answered`, async () => {
    let tries = 0
    const { add, calls, stats } = open(() => {
      if (++tries < 4) throw new KeyledgerError(code, 503)
    })
    assert.equal(await Promise.all([add(1), add(2)]), ['done 1', 'done 2'])
    assert.equal(calls, [
      [1, 2],
      [1, 2],
      [1, 2],
      [1, 2],
    ])
    assert.equal(stats(), { queued: 0, in_flight: 0, failed: 0, error: null })
  })

for (const code of ['timeout', 'lock_timeout'])
  test(`${code}: the batch is halved, so that one slow account holds up no other`, async () => {
    const { calls, add, stats } = held({ deadline: 1200 })
    const accounts = ['slow', 'slow', 'b', 'c', 'd', 'd']
    const promises = accounts.map((account, i) => add(i, account))
    const failing = outcomes(promises.slice(0, 2))
    await turn()
    // all are answered but those of the account that is locked
    let answered = 0
    const serve = () => {
      for (; answered < calls.length; answered++) {
        const call = calls[answered]!
        const locked = call.elements.some(({ account }) => account === 'slow')
        call.answer(locked ? new KeyledgerError(code, 504) : undefined)
      }
      return true
    }
    await until(() => serve() && stats().in_flight + stats().queued <= 2, 'all but the slow ones')
    assert.equal(
      calls.slice(0, 3).map(({ ids }) => ids),
      [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2],
        [3, 4, 5],
      ],
    )
    assert.equal(await outcomes(promises.slice(2)), ['done 2', 'done 3', 'done 4', 'done 5'])
    // their accounts are free, and the slow one's is not
    const next = [add(6, 'b'), add(7, 'slow')]
    await until(() => serve() && calls.some(({ ids }) => ids[0] === 6), 'the next of b')
    assert.is(await next[0], 'done 6')
    assert.not.ok(calls.some(({ ids }) => ids.includes(7)))
    await until(() => serve() && stats().failed >= 2, 'the deadline')
    assert.equal(await failing, [code, code])
    // a lock is the account's, so that its elements stay together
    assert.is(
      calls.some(({ ids }) => ids.join() === '0'),
      code === 'timeout',
    )
    await until(() => serve() && stats().queued === 0 && stats().in_flight === 0, 'the end')
    assert.is((await outcomes(next.slice(1)))[0], code)
  })

test('each try sends the element as it was given, even if the caller has changed it since', async () => {
  const { put, calls } = held()
  const meters = { tokens: 1 }
  const promise = put({ id: 1, account: 'a', meters })
  meters.tokens = 2
  await turn()
  calls[0]!.answer(lost)
  await until(() => calls.length === 2, 'the second try')
  assert.equal(
    calls.map(({ elements }) => elements[0]!.meters),
    [{ tokens: 1 }, { tokens: 1 }],
  )
  calls[1]!.answer()
  await promise
})

test('pauses between tries grow, and end at the deadline with the last error', async () => {
  const moments: number[] = []
  const start = performance.now()
  const { add, stats } = open(
    () => {
      moments.push(performance.now())
      throw new KeyledgerError(moments.length % 2 ? 'deadlock' : 'unavailable', 503)
    },
    { deadline: 700 },
  )
  const codes = await outcomes([add(1), add(2)])
  assert.equal(codes, Array(2).fill(moments.length % 2 ? 'deadlock' : 'unavailable'))
  assert.ok(performance.now() - start < 5000)
  const pauses = moments.slice(1).map((moment, i) => moment - moments[i]!)
  assert.ok(pauses.length >= 2 && pauses.length <= 6, `${pauses}`)
  pauses.forEach((pause, i) => {
    assert.ok(pause >= 25 * 2 ** i - 2, `${pauses}`)
  })
  assert.is(stats().failed, 2)
  assert.ok(['deadlock', 'unavailable'].includes(stats().error!))
})

test('an element that comes later has its own deadline', async () => {
  let down = true
  const { add } = open(
    () => {
      if (down) throw lost
    },
    { deadline: 400 },
  )
  const early = failure(add(1))
  await past(200)
  const late = add(2)
  assert.is((await early).code, 'unavailable')
  down = false
  assert.is(await late, 'done 2')
})

test('while calls fail, late elements are given up unsent', async () => {
  const { add, calls } = held({ deadline: 100 })
  const first = failure(add(1))
  await turn()
  const second = failure(add(2))
  await past(120)
  calls[0]!.answer(lost)
  assert.is((await first).code, 'unavailable')
  const { code, cause } = await second
  assert.equal([code, cause.code], ['timeout', 'unavailable'], 'it was never sent itself')
  assert.is(calls.length, 1)
  // once they succeed, a slow one is no reason
  const third = add(3)
  await turn()
  calls[1]!.answer()
  assert.is(await third, 'done 3')
  const [fourth, fifth] = [add(4), turn().then(() => add(5))]
  await turn()
  await past(120)
  calls[2]!.answer()
  await until(() => calls.length === 4, 'the late one to be sent')
  calls[3]!.answer()
  assert.equal(await Promise.all([fourth, fifth]), ['done 4', 'done 5'])
})

test('one bad element among 999 good ones: the good are delivered, in order, the bad is told why', async () => {
  const delivered: number[] = []
  const { add, calls, stats } = open((ids) => {
    if (ids.includes(637)) throw bad
    delivered.push(...ids)
  })
  const all = await outcomes(Array.from({ length: 1000 }, (_, id) => add(id)))
  assert.equal(
    all,
    Array.from({ length: 1000 }, (_, id) => (id === 637 ? 'invalid_input' : `done ${id}`)),
  )
  assert.equal(
    delivered,
    Array.from({ length: 1000 }, (_, id) => id).filter((id) => id !== 637),
  )
  assert.ok(calls.length < 25, `${calls.length} calls`)
  assert.is(stats().failed, 1)
})

test('a failure while halving is retried like any other', async () => {
  let failures = 0
  const { add } = open((ids) => {
    if (ids.includes(3)) throw bad
    if (failures++ < 3) throw lost
  })
  assert.equal(await outcomes([1, 2, 3, 4].map((id) => add(id))), [
    'done 1',
    'done 2',
    'invalid_input',
    'done 4',
  ])
})

for (const code of ['permission_denied', 'invalid_token', 'function_not_found', 'invalid_response'])
  test(`${code} is everybody's: one call, not one per element`, async () => {
    const { add, calls } = open(() => {
      throw new KeyledgerError(code, 403)
    })
    assert.equal(await outcomes([1, 2, 3].map((id) => add(id))), [code, code, code])
    assert.is(calls.length, 1)
  })

test('an error that is not ours reaches the caller as it is', async () => {
  const { add } = open(() => {
    throw new RangeError('a bug')
  })
  assert.instance(await failure(add(1)), RangeError)
})

test('an element that cannot be sent is refused alone, and not sent', async () => {
  const { calls, stats, ...batcher } = open(() => {}, { maxBytes: 1000 })
  const cycle: Record<string, unknown> = {}
  cycle.self = cycle
  const given = [1n, cycle, 'a\u0000', '\ud800', 'x'.repeat(1000), 'good'].map((more, id) =>
    batcher.add(id, 'a', { more }),
  )
  const refused = ['invalid_input', 'invalid_input', 'invalid_input', 'invalid_input', 'payload_too_large']
  assert.equal(await outcomes(given), [...refused, 'done 5'])
  assert.equal(calls, [[5]])
  assert.is(stats().failed, refused.length)
})

test('answers that do not match their elements are refused', async () => {
  for (const answers of [['only one'], null, 'text', [], [null, null], ['one', null]]) {
    const { add } = createBatcher<Element, string>({
      account: () => 'a',
      deadline: 1000,
      send: async () => answers as never,
    })
    const both = [add({ id: 1, account: 'a' }), add({ id: 2, account: 'a' })]
    assert.equal(await outcomes(both), ['invalid_response', 'invalid_response'])
  }
})

test('a full queue refuses, and takes more when it has room', async () => {
  const { add, calls, stats } = held({ maxQueue: 3 })
  const first = [add(1), add(2), add(3)]
  const refused = await failure(add(4))
  assert.equal([refused.code, refused.status], ['overloaded', 503])
  await turn()
  const more = [add(5), add(6), add(7)]
  assert.is((await failure(add(8))).code, 'overloaded')
  assert.equal(stats(), { queued: 3, in_flight: 3, failed: 2, error: null })
  calls[0]!.answer()
  await until(() => calls.length === 2, 'the next call')
  calls[1]!.answer()
  assert.is((await Promise.all([...first, ...more])).length, 6)
})

test('flush resolves when all elements added before are settled, rejected ones too', async () => {
  const { add, calls, flush } = held({ lanes: 2 })
  await flush() // nothing to wait for
  const rejected = failure(add(1, 'a'))
  await turn()
  const resolved = add(2, 'a')
  let flushed = false
  const flushing = flush().then(() => {
    flushed = true
  })
  calls[0]!.answer(bad)
  await rejected
  await until(() => calls.length === 2, 'the second call')
  await turn()
  assert.is(flushed, false)
  const later = add(3, 'a')
  calls[1]!.answer()
  await flushing
  assert.is(await resolved, 'done 2')
  await until(() => calls.length === 3, 'the third call')
  calls[2]!.answer()
  await later
})

test('stop delivers the queue, and refuses later elements', async () => {
  const { add, calls, stop } = held()
  const before = add(1)
  await turn()
  const queued = add(2)
  const stopping = stop()
  const refused = await failure(add(3))
  assert.equal([refused.code, refused.status], ['stopped', 503])
  calls[0]!.answer(lost) // retried even so
  await until(() => calls.length === 2, 'the second try')
  calls[1]!.answer()
  await until(() => calls.length === 3, 'the queued one')
  calls[2]!.answer()
  await stopping
  assert.equal(await Promise.all([before, queued]), ['done 1', 'done 2'])
  await stop()
})

test.run()
