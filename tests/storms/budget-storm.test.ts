// Budgets under many callers: no hold exceeds one, no hold that fits is refused, each account counts its own.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { budgeting } from '../support/budgets.ts'
import { batch, callers, elements, errors } from '../support/callers.ts'
import { database, type Row } from '../support/database.ts'
import { chances, holdsTrue, shuffled } from '../support/ledger.ts'
import type { Payer } from '../support/payer.ts'

const storm = suite('budget storm')
const db = await database(storm)
const { operator } = db
const { setBudget, shown, team } = budgeting(db)
const test = (name: string, run: () => Promise<void>) =>
  storm(name, async () => {
    await run()
    await holdsTrue(db.sql)
  })

const answersOf = async (calls: Parameters<typeof callers>[1]) => {
  const answers = await callers(db.loginUrl, calls)
  assert.equal(errors(answers), [])
  return elements(answers)
}

test('64 callers on one key’s budget: it is held to the last cent, and no refused hold would have fit', async () => {
  const { first, otherKey } = await team()
  const { id } = await setBudget(first, 'virtual_key', '99.9')
  const chance = chances(7)
  const attempts = Array.from({ length: 1200 }, () => first.request('0.37'))
  const others = Array.from({ length: 200 }, () => first.request('0.1', { virtual_key_id: otherKey }))
  const all = shuffled([...attempts, ...others], chance)
  const calls = []
  while (all.length) calls.push(batch('place_holds', all.splice(0, 1 + chance(12))))
  const answers = await answersOf(calls)
  const of = (status: string) => answers.filter((answer) => answer.status === status)
  assert.is(of('held').length, 270 + 200)
  assert.ok(
    of('refused').every(
      ({ code, remaining }) => code === 'key_budget_exceeded' && remaining === '0.0000000000',
    ),
  )
  assert.is(of('refused').length, 1200 - 270)
  assert.is(await shown(id), '0 + 99.9 of 99.9, 0')
})

test('holds, draws, releases and new budgets at once: spent and held never pass the budget, and end right', async () => {
  const { first, otherKey } = await team()
  const { id } = await setBudget(first, 'user', '20')
  const chance = chances(8)
  const made = Array.from({ length: 600 }, () =>
    first.request(`0.${1 + chance(9)}`, chance(2) ? {} : { virtual_key_id: otherKey }),
  )
  const calls = made.flatMap((request) => {
    const { id: hold_id, account_id } = request
    const part = `0.0${1 + chance(9)}`
    const draw = batch('record_usage', [first.event(part, { hold_id, final: false })])
    const release = batch('release_holds', [{ id: hold_id, account_id }])
    const place = batch('place_holds', [request])
    return [place, ...(chance(3) ? [release] : []), ...(chance(4) ? [] : [draw])]
  })
  // one caller sets the same budget again, as often as it can
  const again = {
    role: 'keyledger_operator' as const,
    text: `select null as answers from api.set_budget($1, 'user', $2, 20, 'month')`,
    values: [first.accountId, first.userId],
  }
  const watch = {
    role: 'keyledger_operator' as const,
    text: `select jsonb_agg(jsonb_build_object('status', 'seen', 'held', held)) as answers from api.budgets where id = $1 and held > 20`,
    values: [id],
  }
  const mixed = calls.flatMap((call, i) => (i % 20 ? [call] : [call, again, watch]))
  const answers = await callers(db.loginUrl, mixed)
  assert.equal(errors(answers), [])
  const seen = answers.filter((_, i) => mixed[i] === watch)
  assert.ok(seen.length > 20 && seen.every(({ rows }) => rows[0]!.answers === null), 'held past the budget')
  const refused = answers
    .flatMap(({ rows }) => (rows[0]!.answers ?? []) as Row[])
    .filter(({ status }) => status === 'refused')
  assert.ok(
    refused.length > 50 && refused.every(({ code }) => code === 'user_budget_exceeded'),
    `${refused.length}`,
  )
  const [row] = await operator(
    `select b.held - a.frozen_balance as off_held from api.budgets b join api.billing_accounts a using (account_id) where b.id = $1`,
    [id],
  )
  assert.is(Number(row!.off_held), 0)
})
test('budgets of two accounts after a user moved, from both directions: no deadlock, each account counts its own', async () => {
  const [from, to] = [await team(), await team()]
  const user = from.first
  const budgetsOf = async (account: Payer) => [
    await setBudget(account, 'user', '30', { id: user.userId }),
    await setBudget(account, 'virtual_key', '25', { id: user.keyId }),
    await setBudget(account, 'tenant', '40'),
  ]
  const old = await budgetsOf(user)
  await operator('update api.user_profiles set tenant_id = $1 where id = $2', [
    to.first.accountId,
    user.userId,
  ])
  const next = await budgetsOf({ ...user, accountId: to.first.accountId, post: to.first.post })
  const chance = chances(9)
  const on = [user.accountId, to.first.accountId]
  const calls = Array.from({ length: 240 }, () => {
    const uses = Array.from({ length: 1 + chance(6) }, () => {
      const which = chance(2)
      return user.event('0.01', { account_id: on[which] })
    })
    const holds = Array.from({ length: 1 + chance(4) }, () => [
      user.request('0.5', { account_id: on[1] }),
      from.second.request('0.25'),
      to.second.request('0.25'),
    ]).flat()
    return batch(chance(2) ? 'record_usage' : 'place_holds', shuffled(chance(2) ? uses : holds, chance))
  })
  const answers = await answersOf(calls)
  assert.ok(answers.some(({ code }) => code === 'key_budget_exceeded'))
  assert.ok(answers.some(({ code }) => code === 'tenant_budget_exceeded'))
  for (const [i, set] of [old, next].entries()) {
    const [logged] = await db.sql(
      'select count(*)::int as n, trim_scale(sum(cost))::text as cost from data.usage_log where account_id = $1 and user_id = $2',
      [on[i], user.userId],
    )
    assert.ok(logged!.n > 100)
    for (const { id } of set) {
      const { spent, held } = (await operator('select spent, held from api.budgets where id = $1', [id]))[0]!
      assert.is(Number(spent), Number(logged!.cost))
      assert.ok(i === 0 || Number(held) > 20)
    }
    const [user_, key] = [await shown(set[0]!.id), await shown(set[1]!.id)]
    if (i === 0) assert.match(`${user_} ${key}`, / \+ 0 of 30.* \+ 0 of 25/)
  }
})

storm.run()
