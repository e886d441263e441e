// A hold needs money that lasts for its whole life: free credit that expires earlier doesn't count.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { batch, callers, elements, errors } from '../support/callers.ts'
import { movableClock } from '../support/clock.ts'
import { database, type Row } from '../support/database.ts'
import { holdsTrue } from '../support/ledger.ts'
import { type Payer, payer } from '../support/payer.ts'
import { hold, seed } from '../support/seed.ts'

const backing = suite('hold backing')
const db = await database(backing)
const test = (name: string, run: () => Promise<void>) =>
  backing(name, async () => {
    await run()
    await holdsTrue(db.sql)
  })

const hour = 3600
const move = await movableClock(db.sql)
let ahead = 0
const advance = async (seconds: number) => {
  ahead += seconds
  await move(seconds)
}
const inHours = (hours: number) => new Date(Date.now() + (ahead + hours * hour) * 1000)
const brief = ({ status, code }: Row) => [status, code].filter(Boolean).join(' ')
const asked = async (account: Payer, amount: string, hours: number) =>
  brief((await account.place(account.request(amount, { expires_in: hours * hour })))[0]!)

test('free credit backs holds that end before it expires; paid money and lasting credit back any hold', async () => {
  const account = await payer(db, { funds: '2', limit: '1' })
  await account.grant('4', { expires_at: inHours(1) })
  await account.grant('8')
  await account.grant('16', { expires_at: inHours(24 * 31) }) // longer than any hold
  const refused = await account.place(account.request('27.5', { expires_in: 2 * hour }))
  assert.equal([brief(refused[0]!), refused[0]!.available], ['refused insufficient_funds', '31.0000000000'])
  assert.is(await asked(account, '27', 2), 'held')
  assert.is(await asked(account, '0.1', 2), 'refused insufficient_funds')
  assert.is(await asked(account, '4.1', 0.5), 'refused insufficient_funds')
  assert.is(await asked(account, '4', 0.5), 'held')
})

test('advice counts credit that may expire first', async () => {
  const account = await payer(db)
  await account.grant('4', { expires_at: inHours(0.1) })
  const [advice] = await db.gateway('select * from api.check_budget($1, 4)', [account.userId])
  assert.equal([advice!.allowed, advice!.available], [true, '4.0000000000'])
  assert.is(await asked(account, '4', 0.25), 'refused insufficient_funds')
})

test('a hold that ends when the grant expires needs no other money', async () => {
  const account = await payer(db, { funds: '1' })
  const grant = await account.grant('1', { expires_at: inHours(1) })
  const id = await account.hold('1', { expires_in: hour / 2 })
  const end = `update data.hold set expires_at =
    (select expires_at + $3::interval from data.credit_grant where account_id = $1 and seq = $4) where account_id = $1 and id = $2`
  await db.sql(end, [account.accountId, id, '1 us', grant.seq])
  assert.is(await asked(account, '1', 2), 'refused insufficient_funds')
  await db.sql(end, [account.accountId, id, '0 s', grant.seq])
  assert.is(await asked(account, '1', 2), 'held')
})

test('money that was captured, released or spent backs no other hold', async () => {
  const account = await payer(db, { funds: '10' })
  await account.grant('5', { expires_at: inHours(1) })
  const long = await account.hold('10', { expires_in: 2 * hour })
  assert.is(await asked(account, '1', 2), 'refused insufficient_funds')
  // free credit is spent first: the paid money stays
  await account.use('4', { hold_id: long, final: false })
  assert.is(await asked(account, '4', 2), 'held')
  assert.is(await asked(account, '1', 2), 'refused insufficient_funds')
  await account.use('1') // the last of the credit
  assert.is(await asked(account, '0.1', 0.5), 'refused insufficient_funds')
  await account.release(long)
  assert.is(await asked(account, '6.1', 2), 'refused insufficient_funds')
  assert.is(await asked(account, '6', 2), 'held')
})

test('lasting credit that is spent before expiring credit backs one hold, and not a shorter one too', async () => {
  const account = await payer(db)
  await account.grant('10', { priority: 1 })
  await account.grant('10', { expires_at: inHours(1) })
  const long = await account.hold('8', { expires_in: 2 * hour })
  // 2 of the lasting money; 8 more if expiring credit were spent first, which it isn't
  assert.is(await asked(account, '2.1', 0.5), 'refused insufficient_funds')
  const short = await account.hold('1', { expires_in: hour / 2 })
  const answers = await account.place(
    account.request('1.1', { expires_in: hour / 2 }),
    account.request('1', { expires_in: hour / 2 }),
    account.request('0.1', { expires_in: hour / 2 }),
  )
  assert.equal(answers.map(brief), ['refused insufficient_funds', 'held', 'refused insufficient_funds'])
  await account.use('1', { hold_id: short })
  await account.use('1', { hold_id: answers[1]!.id })
  await advance(1.1 * hour)
  assert.equal([(await account.figures()).available, await account.holdNow(long)], [undefined, 'open 0/8'])
  assert.is(brief(await account.use('8', { hold_id: long })), 'charged')
  assert.equal(await account.figures(), {})

  // all of it is for short holds, if there is no long one
  const free = await payer(db)
  await free.grant('10', { priority: 1 })
  await free.grant('10', { expires_at: inHours(1) })
  const id = await free.hold('10', { expires_in: hour / 2 })
  assert.is(await asked(free, '10', 0.5), 'held')
  assert.is(brief((await free.extend(id, 2 * hour))[0]!), 'refused insufficient_funds')
  const other = await payer(db)
  await other.grant('10', { priority: 1 })
  await other.grant('10', { expires_at: inHours(1) })
  assert.is(
    brief((await other.extend(await other.hold('10', { expires_in: hour / 2 }), 2 * hour))[0]!),
    'extended',
  )
})

test('an extension that loses its backing is refused, and the hold stays as it was', async () => {
  const account = await payer(db, { funds: '3' })
  await account.grant('4', { expires_at: inHours(1) })
  const id = await account.hold('5', { expires_in: hour / 2 })
  const before = await db.sql('select * from data.hold where id = $1', [id])
  const [refused] = await account.extend(id, 2 * hour)
  assert.is(brief(refused!), 'refused insufficient_funds')
  assert.is(Date.parse(refused!.expires_at), before[0]!.expires_at.getTime())
  assert.equal(await db.sql('select * from data.hold where id = $1', [id]), before)
  assert.is(brief((await account.extend(id, hour - 60))[0]!), 'extended') // as long as the grant
  await account.use('2', { hold_id: id, final: false })
  // 3 are left to capture, and 3 outlive the grant
  assert.is(brief((await account.extend(id, 2 * hour))[0]!), 'extended')
  // the hold already outlives the grant: it has no more to lose
  assert.is(brief((await account.extend(id, 3 * hour))[0]!), 'extended')
})

test('an adjustment may take the backing away: new holds are refused, and held money is charged', async () => {
  const account = await payer(db, { funds: '5' })
  await account.grant('5', { expires_at: inHours(1) })
  const id = await account.hold('5', { expires_in: 2 * hour })
  await account.adjust('-3')
  assert.is(await asked(account, '0.1', 2), 'refused insufficient_funds')
  assert.is(await asked(account, '2', 0.5), 'held')
  await advance(1.1 * hour) // the short hold is gone too
  assert.is((await account.figures()).available, '-3')
  assert.is(brief(await account.use('5', { hold_id: id })), 'charged')
  assert.equal(await account.figures(), {
    outstanding_amount: '3',
    available: '-3',
  })
})

// Every small case against a model that checks the money at each quarter of an hour.
const quarter = hour / 4
interface Grant {
  amount: number
  /** In quarters of an hour; Infinity: never. */
  end: number
}
interface Held {
  id: string
  amount: number
  end: number
}
const stands = (balance: number, grants: Grant[], held: Held[]) =>
  Array.from({ length: 16 }, (_, quarters) => {
    const outliving = <T extends { end: number; amount: number }>(some: T[]) =>
      some.filter(({ end }) => end > quarters).reduce((sum, { amount }) => sum + amount, 0)
    return outliving(held) <= balance + outliving(grants)
  }).every(Boolean)

test('every small case is admitted, and extended, exactly when its money lasts throughout', async () => {
  const kinds: Grant[] = [1, 2].flatMap((amount) => [4, 8].map((end) => ({ amount, end })))
  kinds.push({ amount: 1, end: Infinity })
  const sets = kinds.flatMap((one, i) => [[one], ...kinds.slice(i).map((other) => [one, other])])
  const setups = [[], ...sets].flatMap((grants) => [0, 1].map((balance) => ({ grants, balance })))
  const accounts = await Promise.all(
    setups.map(async ({ grants, balance }) => {
      const account = await payer(db, { funds: `${balance}` })
      for (const { amount, end } of grants)
        await account.grant(`${amount}`, end < Infinity ? { expires_at: inHours(end / 4) } : {})
      return { account, grants, balance, held: [] as Held[] }
    }),
  )
  const send = async (fn: string, requests: Row[]): Promise<Row[]> =>
    (await db.gateway(`select api.${fn}($1) as answers`, [JSON.stringify(requests)]))[0]!.answers

  const counts: Record<string, number> = {}
  const place = async (...wanted: [amount: number, end: number][]) => {
    const requests = wanted.flatMap(([amount, end]) =>
      accounts.map(({ account }) => account.request(`${amount}`, { expires_in: end * quarter })),
    )
    const answers = await send('place_holds', requests)
    requests.forEach(({ id }, i) => {
      const [amount, end] = wanted[Math.floor(i / accounts.length)]!
      const { grants, balance, held } = accounts[i % accounts.length]!
      const it = { id: id as string, amount, end }
      const fits = stands(balance, grants, [...held, it])
      const said = brief(answers[i]!)
      assert.is(
        said,
        fits ? 'held' : 'refused insufficient_funds',
        JSON.stringify({ balance, grants, held, it }),
      )
      counts[said] = (counts[said] ?? 0) + 1
      if (fits) held.push(it)
    })
  }
  const extend = async (nth: number, end: number) => {
    const some = accounts.filter(({ held }) => held[nth] && held[nth].end < end)
    const answers = await send(
      'extend_holds',
      some.map(({ account, held }) => ({
        id: held[nth]!.id,
        account_id: account.accountId,
        expires_in: end * quarter,
      })),
    )
    some.forEach(({ grants, balance, held }, i) => {
      const longer = held.with(nth, { ...held[nth]!, end })
      const fits = stands(balance, grants, longer)
      const said = brief(answers[i]!)
      assert.is(
        said,
        fits ? 'extended' : 'refused insufficient_funds',
        JSON.stringify({ balance, grants, held, end }),
      )
      counts[`extension ${said}`] = (counts[`extension ${said}`] ?? 0) + 1
      if (fits) held[nth]!.end = end
    })
  }
  const release = async () => {
    await send(
      'release_holds',
      accounts.flatMap(({ account, held }) => held.map(({ id }) => ({ id, account_id: account.accountId }))),
    )
    for (const { held } of accounts) held.length = 0
  }

  const shapes = [1, 2].flatMap((amount) => [3, 7, 11].map((end): [number, number] => [amount, end]))
  for (const a of shapes)
    for (const b of shapes.filter((_, i) => i % 2 === 0))
      for (const to of [7, 11]) {
        await place(a, b)
        await extend(0, to)
        await place([1, 7], [1, 11])
        await release()
      }
  assert.ok(
    Object.keys(counts).length === 4 && Object.values(counts).every((n) => n > 300),
    JSON.stringify(counts),
  )
})

test('many callers at once never hold more past the grant than the money that outlasts it', async () => {
  const world = await seed(db.operator, { funds: '10' })
  await db.operator(`select seq from api.grant_credit($1, 30, $2)`, [world.accountId, inHours(1)])
  const calls = Array.from({ length: 200 }, (_, i) =>
    batch('place_holds', [{ ...hold(world, '1'), expires_in: i % 2 ? 2 * hour : hour / 2 }]),
  )
  const answers = await callers(db.loginUrl, calls)
  assert.equal(errors(answers), [])
  const held = elements(answers).filter(({ status }) => status === 'held')
  const long = held.filter(({ expires_at }) => Date.parse(expires_at) > inHours(1).getTime())
  assert.is(held.length, 40)
  assert.ok(long.length > 0 && long.length <= 10)
  await advance(1.1 * hour)
  const [now] = await db.operator('select available from api.billing_accounts where account_id = $1', [
    world.accountId,
  ])
  assert.is(Number(now!.available), 10 - long.length)
})

backing.run()
