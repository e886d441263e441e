// Every kind of posting at once, on many accounts: no double charge, no deadlock, every invariant.
import type pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { batch, type Call, callers, elements, errors } from '../support/callers.ts'
import { database } from '../support/database.ts'
import { chances, holdsTrue, shuffled, units } from '../support/ledger.ts'
import { event, hold, seed, type World } from '../support/seed.ts'

const test = suite('storm')
const db = await database(test)

const account = async ({ accountId }: World) =>
  (await db.sql('select * from data.account_balance where account_id = $1', [accountId]))[0]!

test('1,000 copies of one event, before and after its user moved: charged once, to one payer', async () => {
  const [world, ...others] = (await Promise.all(Array.from({ length: 5 }, () => seed(db.operator)))) as [
    World,
    ...World[],
  ]
  const next = await seed(db.operator)
  const chance = chances(3)
  const copy = event(world, 1000)
  const calls = Array.from({ length: 1000 }, () =>
    batch(
      'record_usage',
      shuffled([copy, ...others.slice(chance(4)).map((other) => event(other, 10))], chance),
    ),
  )
  calls.splice(500, 0, {
    role: 'keyledger_operator',
    text: 'update api.user_profiles set tenant_id = $1 where id = $2 returning null as answers',
    values: [next.tenantId, world.userId],
  })
  const answers = await callers(db.loginUrl, calls)
  assert.equal(errors(answers), [])
  answers.splice(500, 1)
  const ofCopy = elements([
    ...answers,
    ...(await callers(db.loginUrl, [batch('record_usage', [copy])])),
  ]).filter(({ id }) => id === copy.id)

  assert.is(ofCopy.length, 1001)
  const [charged, ...more] = ofCopy.filter(({ status }) => status === 'charged')
  assert.equal(more, [])
  assert.is(units(charged!.cost), units('0.0025'))
  const { id, cost, seq } = charged!
  for (const { available, ...answer } of ofCopy.filter(({ status }) => status !== 'charged'))
    assert.equal(answer, { id, cost, seq, status: 'duplicate' })
  const logged = await db.sql('select account_id, cost, transaction_seq from data.usage_log where id = $1', [
    id,
  ])
  assert.equal(logged, [{ account_id: world.accountId, cost, transaction_seq: String(seq) }])
  assert.is((await account(next)).balance_version, '1')
  await holdsTrue(db.sql)
})

test('every kind of posting on many accounts in random orders: no deadlock, every invariant', async () => {
  const worlds = await Promise.all(
    Array.from({ length: 12 }, (_, i) => seed(db.operator, { funds: '3', alone: i % 3 === 0 })),
  )
  const chance = chances(4)
  const some = <T>(from: T[], n: number) => shuffled(from, chance).slice(0, n)
  // events that can't be charged, sent again and again in different orders
  const unpriced = Array.from({ length: 20 }, (_, i) => ({
    ...event(worlds[i % 12]!, 1),
    meters: { unpriced: 1 },
  }))
  const placed: { id: string; account_id: string }[] = []
  const one = (text: string, ...values: unknown[]): Call => ({ role: 'keyledger_operator', text, values })
  const kinds: (() => Call)[] = [
    () => {
      const holds = some(worlds, 8).map((world) => ({
        ...hold(world, `0.${1 + chance(9)}`),
        expires_in: 1 + chance(2),
      }))
      placed.push(...holds)
      return batch('place_holds', holds)
    },
    () =>
      batch('record_usage', [
        ...some(placed, 3).map(({ id, account_id }) => ({
          ...event(worlds.find(({ accountId }) => accountId === account_id)!, 1000 * chance(99)),
          hold_id: id,
          final: chance(2) === 0,
        })),
        ...some(worlds, 4).map((world) => event(world, 1000 * chance(99))),
        ...some(unpriced, 5),
      ]),
    () => batch('release_holds', some(placed, 6)),
    () => batch('extend_holds', some(placed, 6)),
    () => one('select api.top_up($1, $2)', some(worlds, 1)[0]!.accountId, `0.${1 + chance(9)}`),
    () => one('select api.set_credit_limit($1, $2)', some(worlds, 1)[0]!.accountId, String(chance(3))),
    () =>
      one(`select api.adjust_balance($1, $2, 'storm')`, some(worlds, 1)[0]!.accountId, `-0.${1 + chance(9)}`),
    () =>
      one(
        // two grants that expire at the same moment
        `select api.grant_credit($1, $2, now() + make_interval(secs => $3)),
          api.grant_credit($1, $2, now() + make_interval(secs => $3))`,
        some(worlds, 1)[0]!.accountId,
        `0.${1 + chance(9)}`,
        1 + chance(20) / 10,
      ),
    () =>
      one(
        `select api.freeze_funds($1, $2, 'storm', $3)`,
        some(worlds, 1)[0]!.accountId,
        `0.${1 + chance(9)}`,
        `case ${chance(30)}`,
      ),
    () =>
      one(
        `select api.unfreeze_funds(account_id, id) from api.holds
        where account_id = $1 and expires_at is null and status = 'open' limit 1`,
        some(worlds, 1)[0]!.accountId,
      ),
    () =>
      one(
        `select api.refund_charge(account_id, seq) from api.billing_transactions
        where account_id = $1 and kind = 'usage' order by random() limit 1`,
        some(worlds, 1)[0]!.accountId,
      ),
    () => one(`select count(*) from api.close_period(now() - interval '1 s')`),
    () => one('select count(*)::int as problems from api.verify_balances()'),
  ]
  const calls = Array.from({ length: 1500 }, (_, i) =>
    kinds[i % 150 === 0 ? kinds.length - 1 : chance(kinds.length - 1)]!(),
  )
  const answers = await callers(db.loginUrl, calls)
  // a grant that expired while it waited for the lock, a freeze of missing money, a charge refunded before,
  // a period closed after a later one, and the reference of another amount
  const refusals = [
    'invalid_expires_at',
    'insufficient_funds',
    'refund_exceeds_charge',
    'period_is_sealed',
    'reference_mismatch',
  ]
  const raised = errors(answers).filter((error) => !refusals.includes(error!.message))
  assert.equal(raised, [])
  assert.equal(
    answers.filter(({ rows: [row] }) => row?.problems),
    [],
  )
  await holdsTrue(db.sql)
  const parked = await db.sql(
    'select usage_id, count(*)::int from data.parked_usage where code = $1 group by 1',
    ['price_not_found'],
  )
  assert.ok(parked.length > 0 && parked.every(({ count }) => count === 1))
})

test('two batches that park the same events, in opposite orders: no deadlock', async () => {
  const world = await seed(db.operator)
  const events = [1, 2].map((unpriced) => ({ ...event(world, 1), meters: { unpriced } }))
  const park = (session: pg.Client, ...some: unknown[]) =>
    session.query('select api.record_usage($1)', [JSON.stringify(some)])
  const [one, two] = [await db.session('keyledger_gateway'), await db.session('keyledger_gateway')]
  try {
    // events are parked in the order of their digests
    const order = await db.sql(
      `select e from unnest($1::text[]) e order by sha256(convert_to(e::jsonb::text, 'UTF8'))`,
      [events.map((each) => JSON.stringify(each))],
    )
    const [first, second] = order.map(({ e }) => JSON.parse(e))
    // the first session stands for a batch of both, stopped between the two
    await one.query('begin')
    await park(one, first)
    const waiting = park(two, second, first)
    waiting.catch(() => {})
    await db.blocked(two)
    await park(one, second)
    await one.query('commit')
    await waiting
  } finally {
    await one.end()
    await two.end()
  }
})

test('draw, release, extension and expiry of one hold at once: it ends once, and frozen_balance is right', async () => {
  const world = await seed(db.operator, { funds: '1000' })
  const chance = chances(5)
  await db.sql(`
    create schema if not exists watch;
    create table watch.hold (id uuid, was text, status text);
    create function watch.hold() returns trigger language plpgsql security definer as $$
      begin
        insert into watch.hold values (new.id, old.status, new.status);
        return null;
      end $$;
    create trigger note after update on data.hold for each row execute function watch.hold()`)
  const holds = Array.from({ length: 300 }, () => hold(world, '1'))
  await callers(db.loginUrl, [batch('place_holds', holds)])
  const calls = holds.flatMap(({ id }) => {
    const of = { id, account_id: world.accountId }
    return shuffled(
      [
        batch('release_holds', [of]),
        batch('record_usage', [{ ...event(world, 200_000), hold_id: id }]), // 0.50
        ...(chance(10) ? [] : [batch('extend_holds', [{ ...of, expires_in: 1 }])]),
      ],
      chance,
    )
  })
  // all holds expire while calls compete for them
  const onReady = async () => {
    await db.sql(
      `update data.hold set expires_at = clock_timestamp() + power(random(), 4) * interval '20 s' where account_id = $1`,
      [world.accountId],
    )
    await db.sql('truncate watch.hold')
  }
  const answers = await callers(db.loginUrl, calls, { onReady })
  assert.equal(errors(answers), [])
  await db.sql('drop trigger note on data.hold')

  const ended = await db.sql(`select id, count(*)::int from watch.hold where status <> 'open' group by 1`)
  assert.ok(ended.every(({ count }) => count === 1))
  assert.equal(await db.sql(`select * from watch.hold where was <> 'open'`), [])
  const released = elements(answers).filter(({ status }) => status === 'released')
  const rows = await db.sql('select * from data.hold where account_id = $1', [world.accountId])
  const having = (status: string) => rows.filter((row) => row.status === status)
  assert.equal(
    released.map(({ id }) => id).sort(),
    having('released')
      .map(({ id }) => id)
      .sort(),
  )
  assert.ok(having('released').every(({ captured }) => Number(captured) === 0))
  assert.ok(having('captured').every(({ captured }) => Number(captured) === 0.5))
  assert.ok(['released', 'captured', 'expired'].every((status) => having(status).length > 5))
  assert.is(Number((await account(world)).balance), 850)
  await holdsTrue(db.sql)
})

test('200 top-ups with one reference at once: one entry, which every caller gets', async () => {
  const world = await seed(db.operator, { funds: '0' })
  const call: Call = {
    role: 'keyledger_operator',
    text: `select seq, reference from api.top_up($1, '5', 'payment-1')`,
    values: [world.accountId],
  }
  const answers = await callers(db.loginUrl, Array(200).fill(call))
  assert.equal(
    answers,
    answers.map(() => ({ rows: [{ seq: '1', reference: 'payment-1' }] })),
  )
  assert.is(Number((await account(world)).balance), 5)
})

test('100 adjustments decided on one version at once: one is posted, the others are refused', async () => {
  const world = await seed(db.operator)
  const answers = await callers(
    db.loginUrl,
    Array.from({ length: 100 }, (_, i) => ({
      role: 'keyledger_operator' as const,
      text: `select seq from api.adjust_balance($1, $2, 'mine', expected_version => 1)`,
      values: [world.accountId, String(i + 1)],
    })),
  )
  assert.is(answers.filter(({ error }) => !error).length, 1)
  assert.equal(errors(answers), Array(99).fill({ code: 'PT409', message: 'version_conflict' }))
  assert.is((await account(world)).balance_version, '2')
})

for (const isolation of ['repeatable read', 'serializable'])
  test(`under ${isolation} money is right, or the transaction is refused`, async () => {
    const world = await seed(db.operator, { funds: '20' })
    const url = new URL(db.loginUrl)
    url.searchParams.set('options', `-c default_transaction_isolation=${isolation.replace(' ', '\\ ')}`)
    const retry = { ...event(world, 1000), meters: { input_tokens: 4000 } } // 0.01
    const calls = Array.from({ length: 600 }, (_, i) =>
      i % 3 ? batch('place_holds', [hold(world, '0.07')]) : batch('record_usage', [retry]),
    )
    const answers = await callers(url.href, calls, { processes: 2, lanes: 8 })
    assert.equal([...new Set(errors(answers).map((error) => error!.code))], ['40001'])
    const held = elements(answers.filter(({ error }) => !error)).filter(({ status }) => status === 'held')
    const { frozen_balance, balance } = await account(world)
    assert.is(units(frozen_balance), BigInt(held.length) * units('0.07'))
    assert.is(units(balance), units('19.99'))
    await holdsTrue(db.sql)
  })

test.run()
