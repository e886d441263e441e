// 64 callers from several processes on one account: each hold was affordable, each refused one was not.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { batch, type Call, callers, elements, errors } from '../support/callers.ts'
import { database, type Row } from '../support/database.ts'
import { chances, holdsTrue, units } from '../support/ledger.ts'
import { event, hold, seed, type World } from '../support/seed.ts'

const test = suite('concurrency')
const db = await database(test)

const account = async ({ accountId }: World) =>
  (await db.sql('select * from data.account_balance where account_id = $1', [accountId]))[0]!

// The elements cut into batches of 1 … most.
function batches<T>(elements: T[], most: number, chance: (n: number) => number): T[][] {
  const cut: T[][] = []
  for (let at = 0; at < elements.length; at += cut.at(-1)!.length)
    cut.push(elements.slice(at, at + 1 + chance(most)))
  return cut
}

test('64 callers, 20,000 attempts, money for some: exactly that money is held', async () => {
  const world = await seed(db.operator, { funds: '1234.5' })
  const chance = chances(1)
  const attempts = Array.from({ length: 20_000 }, () => hold(world, '0.37'))
  const calls = batches(attempts, 40, chance).map((elements) => batch('place_holds', elements))
  const answers = await callers(db.loginUrl, calls)
  assert.equal(errors(answers), [])

  const affordable = Number(units('1234.5') / units('0.37'))
  const held = elements(answers).filter(({ status }) => status === 'held')
  const refused = elements(answers).filter(({ status }) => status === 'refused')
  assert.is(held.length, affordable)
  assert.is(refused.length, attempts.length - affordable)
  const left = units('1234.5') - BigInt(affordable) * units('0.37')
  assert.ok(
    refused.every(({ code, available }) => code === 'insufficient_funds' && units(available) === left),
  )
  const { frozen_balance, available } = await account(world)
  assert.is(units(frozen_balance), BigInt(affordable) * units('0.37'))
  assert.is(units(available), left)
  await holdsTrue(db.sql)
})

// The account after each transaction, in the order of its lock: a trigger writes this log under the lock.
async function watch({ accountId }: World) {
  await db.sql(`
    create schema if not exists watch;
    create table if not exists watch.log (n bigserial primary key, account_id uuid, xid text, was numeric, available numeric);
    grant usage on schema watch to keyledger_gateway;
    grant select on watch.log to keyledger_gateway;
    create or replace function watch.note() returns trigger language plpgsql security definer as $$
      begin
        insert into watch.log (account_id, xid, was, available)
        values (new.account_id, pg_current_xact_id()::text, old.available, new.available);
        return null;
      end $$;
    create or replace trigger note after update on data.account_balance for each row execute function watch.note()`)
  return async () => {
    await db.sql('drop trigger note on data.account_balance')
    return db.sql('select * from watch.log where account_id = $1 order by n', [accountId])
  }
}

test('holds, captures and releases mixed: every answer follows from a serial order, every refusal was right', async () => {
  const world = await seed(db.operator, { funds: '50' })
  const [{ available: funds }] = (await db.sql(
    'select available from data.account_balance where account_id = $1',
    [world.accountId],
  )) as [Row]
  const unwatch = await watch(world)
  const chance = chances(2)

  // a caller's calls come in order: a hold is mostly placed before its draw or release; either is right
  const calls: Call[] = []
  const made: { id: string; amount: string }[] = []
  while (made.length < 4000) {
    const amounts = Array.from(
      { length: 1 + chance(12) },
      () => `${1 + chance(4)}.${chance(10)}${chance(10)}`,
    )
    const holds = amounts.map((amount) => hold(world, amount))
    calls.push(batch('place_holds', holds))
    made.push(...holds)
    const some = (n: number) =>
      Array.from({ length: n }, () => made[Math.max(0, made.length - 1 - chance(900))]!)
    const ended = some(1 + chance(14)).map(({ id }) => ({ id, account_id: world.accountId }))
    calls.push(batch('release_holds', ended))
    if (chance(3) === 0)
      calls.push(
        batch(
          'record_usage',
          some(1 + chance(3)).map(({ id }) => ({
            ...event(world, 4 * chance(300)),
            hold_id: id,
            final: chance(2) === 0,
          })),
        ),
      )
  }
  for (const call of calls)
    call.text = `select (select coalesce(max(n), 0) from watch.log) as seen, ${call.text.slice(7)},
      pg_current_xact_id_if_assigned()::text as xid`
  const answers = await callers(db.loginUrl, calls)
  assert.equal(errors(answers), [])
  const log = await unwatch()

  // states[i]: the account after the i-th transaction that changed it
  const states: { xid: string; last: bigint; was: bigint; available: bigint }[] = []
  for (const { xid, n, was, available } of log) {
    const state = states.at(-1)
    if (state && state.xid === xid) Object.assign(state, { last: BigInt(n), available: units(available) })
    else states.push({ xid, last: BigInt(n), was: units(was), available: units(available) })
  }
  const place = new Map(states.map(({ xid }, i) => [xid, i] as const))
  assert.is(place.size, states.length, 'transactions overlapped under the lock')
  let available = units(funds)
  for (const state of states) {
    assert.is(state.was, available)
    available = state.available
  }

  // replay in that order, with a model that knows nothing of SQL
  const open = new Map<string, bigint>()
  const ordered = answers
    .map(({ rows: [row] }, i) => ({ ...row, call: calls[i]! }) as Row)
    .sort(
      (a, b) =>
        (place.get(a.xid) ?? Number.POSITIVE_INFINITY) - (place.get(b.xid) ?? Number.POSITIVE_INFINITY),
    )
  let refusals = 0
  available = units(funds)
  for (const { answers, xid, seen, call } of ordered) {
    const asked: Row[] = JSON.parse(call.values[0])
    const at = place.get(xid)
    if (at !== undefined) assert.is(states[at]!.was, available)
    for (const [i, answer] of (answers as Row[]).entries()) {
      const { id, amount } = asked[i]!
      if (answer.status === 'held') {
        assert.ok(at !== undefined)
        assert.ok(units(amount) <= available, 'held past available')
        available -= units(amount)
        open.set(id, units(amount))
      } else if (answer.status === 'refused') {
        refusals++
        assert.ok(units(answer.available) < units(amount), 'a refusal although `available` covered it')
        if (at === undefined) {
          // it changed nothing: its answer was true at some moment since its snapshot
          const first = states.findIndex(({ last }) => last >= BigInt(seen))
          assert.ok(
            states.slice(Math.max(0, first)).some((state) => state.available === units(answer.available)) ||
              units(answer.available) === units(funds),
          )
          continue
        }
      } else if (answer.status === 'released') {
        available += open.get(id)!
        open.delete(id)
      }
      if (at !== undefined && !call.text.includes('record_usage'))
        assert.is(units(answer.available), available)
    }
    if (call.text.includes('record_usage')) {
      // one posting: first the whole cost, then the rest of each hold comes back
      const cost = new Map<string, bigint>()
      const final = new Set<string>()
      for (const [i, answer] of (answers as Row[]).entries()) {
        // an event doesn't draw on a hold that was not there when it was read
        const hold_id = answer.hold === 'unknown' ? '' : asked[i]!.hold_id
        assert.is(answer.status, 'charged')
        available -= units(answer.cost)
        cost.set(hold_id, (cost.get(hold_id) ?? 0n) + units(answer.cost))
        if (asked[i]!.final) final.add(hold_id)
      }
      for (const [id, spent] of cost) {
        const unspent = open.get(id)
        if (unspent === undefined) continue
        const drawn = spent < unspent ? spent : unspent
        available += final.has(id) ? unspent : drawn
        if (final.has(id)) open.delete(id)
        else open.set(id, unspent - drawn)
      }
      for (const answer of answers as Row[])
        if (answer.status === 'charged') assert.is(units(answer.available), available)
    }
    if (at !== undefined) assert.is(states[at]!.available, available)
  }
  assert.is(units((await account(world)).available), available)
  assert.ok(refusals > 300, `only ${refusals} refusals`)
  await holdsTrue(db.sql)
})

test.run()
