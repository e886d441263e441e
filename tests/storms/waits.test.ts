// A locked account stops no other: calls serve the free accounts, and wait for one account a stated time.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row } from '../support/database.ts'
import { holdsTrue } from '../support/ledger.ts'
import { type Payer, payer } from '../support/payer.ts'

const test = suite('waits')
const db = await database(test)
const [free, taken] = [await payer(db, { funds: '100' }), await payer(db, { funds: '100' })]
const codeOf = (call: Promise<unknown>) => call.then(() => 'done').catch(({ code }) => code)
const call = async (fn: string, elements: Row[]): Promise<Row[]> =>
  (await db.gateway(`select api.${fn}($1) as answers`, [JSON.stringify(elements)]))[0]!.answers

/** Locks the account as a DBA would, for as long as `work` takes. */
async function whileLocked(account: Payer, work: () => Promise<void>) {
  const dba = await db.session()
  try {
    await dba.query('begin')
    await dba.query('select from data.account_balance where account_id = $1 for update', [account.accountId])
    await work()
    await dba.query('rollback')
  } finally {
    await dba.end()
  }
}
const brief = (answers: Row[]) => answers.map(({ status, code }) => [status, code].filter(Boolean).join(' '))

test('a call on several accounts serves the free ones, and says which account was busy', async () => {
  const held = { free: await free.hold('1'), taken: await taken.hold('1') }
  const before = await taken.figures()
  await whileLocked(taken, async () => {
    assert.equal(
      brief(await call('place_holds', [taken.request('1'), free.request('1'), taken.request('2')])),
      ['busy account_busy', 'held', 'busy account_busy'],
    )
    assert.equal(brief(await call('record_usage', [free.event('1'), taken.event('1')])), [
      'charged',
      'busy account_busy',
    ])
    for (const fn of ['extend_holds', 'release_holds'])
      assert.equal(
        brief(
          await call(fn, [
            { id: held.taken, account_id: taken.accountId },
            { id: held.free, account_id: free.accountId },
          ]),
        ),
        ['busy account_busy', fn === 'extend_holds' ? 'extended' : 'released'],
      )
  })
  // busy elements left nothing behind
  assert.equal(await taken.figures(), before)
  assert.is(await taken.holdNow(held.taken), 'open 0/1')
  assert.is((await db.sql('select from data.parked_usage')).length, 0)
})

test('an event that can only be parked is busy too, if the account of its hold is busy', async () => {
  const hold_id = await taken.hold('1')
  const event = taken.event('', { meters: { unpriced: 1 }, hold_id })
  await whileLocked(taken, async () => {
    assert.equal(brief(await call('record_usage', [free.event('1'), event])), [
      'charged',
      'busy account_busy',
    ])
  })
  assert.is((await db.sql('select from data.parked_usage')).length, 0)
  assert.is((await taken.record(event))[0]!.status, 'parked')
  assert.is(await taken.holdNow(hold_id), 'parked 0/1')
})

test('a call on one account gives up by itself, changes nothing, and succeeds once the account is free', async () => {
  const [event, request] = [taken.event('1'), taken.request('1')]
  await whileLocked(taken, async () => {
    assert.is(await codeOf(taken.record(event)), '55P03')
    assert.is(await codeOf(taken.place(request)), '55P03')
    assert.is(await codeOf(taken.release(request.id)), '55P03')
    assert.is(await codeOf(taken.extend(request.id)), '55P03')
  })
  assert.is((await taken.record(event))[0]!.status, 'charged')
  assert.is((await taken.place(request))[0]!.status, 'held')
})

test('a locked table makes hot calls give up too', async () => {
  const dba = await db.session()
  await dba.query('begin')
  await dba.query('lock table data.virtual_key, data.price in access exclusive mode')
  assert.is(await codeOf(free.place(free.request('1'))), '55P03')
  assert.is(await codeOf(free.use('1')), '55P03')
  await dba.query('rollback')
  await dba.end()
})

test('a hold that waited for its account is refused if its key was revoked meanwhile', async () => {
  const account = await payer(db, { funds: '10' })
  const [dba, gateway] = [await db.session(), await db.session('keyledger_gateway')]
  await gateway.query('set lock_timeout = 0')
  await dba.query('begin')
  await dba.query('select from data.account_balance where account_id = $1 for update', [account.accountId])
  // longer than the function allows: the test is slower than half a second
  await db.sql(`alter function api.place_holds(jsonb) set lock_timeout = '60s'`)
  const waiting = gateway.query('select api.place_holds($1) as answers', [
    JSON.stringify([account.request('1')]),
  ])
  await db.blocked(gateway)
  await db.operator('select from api.revoke_virtual_key($1)', [account.keyId])
  await dba.query('commit')
  const [answer] = (await waiting).rows[0]!.answers
  assert.equal([answer.status, answer.code], ['refused', 'virtual_key_disabled'])
  await db.sql(`alter function api.place_holds(jsonb) set lock_timeout = '500ms'`)
  await Promise.all([dba.end(), gateway.end()])
})

test('arrays of more than 10,000 elements are refused at once', async () => {
  for (const fn of ['place_holds', 'record_usage', 'release_holds', 'extend_holds']) {
    const error = await db
      .gateway(`select api.${fn}(jsonb_agg(1)) from generate_series(1, 10001)`)
      .catch((error) => error)
    assert.equal([error.code, error.message], ['PT422', 'too_many_elements'])
  }
})

// ten times the elements may take ten times as long, not a hundred times
test('the time to find many copies and holds in one call grows with their number', async () => {
  const account = await payer(db, { funds: '1000' })
  const time = async (n: number) => {
    const requests = Array.from({ length: n }, () => account.request('0.001'))
    // each twice
    const started = performance.now()
    const answers = await call('place_holds', [...requests, ...requests])
    const took = performance.now() - started
    assert.equal(
      [...new Set(answers.map(({ status }, i) => `${i < n} ${status}`))],
      ['true held', 'false duplicate'],
    )
    return took
  }
  await time(100)
  const few = Math.min(await time(500), await time(500), await time(500))
  const many = Math.min(await time(5000), await time(5000))
  assert.ok(many < few * 40, `${few.toFixed()} ms for 1,000 requests, ${many.toFixed()} ms for 10,000`)
})

test('a hold lasts its seconds, whenever clocks change in the time zone of the session', async () => {
  const session = await db.session('keyledger_gateway')
  try {
    // this zone changes its clock in less than 30 days, at any time of the year
    const soon = new Date(Date.now() + 9 * 86_400_000)
    const day = Math.floor((soon.getTime() - Date.UTC(soon.getUTCFullYear(), 0, 1)) / 86_400_000)
    await session.query(`set timezone = 'AAA5BBB,${day},${(day + 100) % 365}'`)
    const { rows } = await session.query('select api.place_holds($1) as answers', [
      JSON.stringify([free.request('1', { expires_in: 2_592_000 })]),
    ])
    const [hold] = await db.sql(
      'select extract(epoch from expires_at - created_at)::int as seconds from data.hold where id = $1',
      [rows[0]!.answers[0].id],
    )
    assert.is(hold!.seconds, 2_592_000)
  } finally {
    await session.end()
  }
})

test('the ledger is whole after all these tests', () => holdsTrue(db.sql))

test.run()
