// News of accounts: each crossing of their funds is told once, to whoever listens, and a charge that crosses nothing is silent.
import type pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { until } from '../../scripts/supervise.ts'
import {
  type AccountNewss,
  type BillingModuleOptions,
  createBillingModule,
  type NewsKind,
  pgRpc,
  postgrestRpc,
  type Rpc,
} from '../../src/index.ts'
import type { Transport } from '../../src/rpc.ts'
import { budgeting } from '../support/budgets.ts'
import { batch, callers, errors } from '../support/callers.ts'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { event, holdsTrue } from '../support/ledger.ts'
import { idAt, type Payer, payer } from '../support/payer.ts'
import { startProxy } from '../support/proxy.ts'
import { seed } from '../support/seed.ts'

const test = suite('news')
const db = await database(test)

interface News {
  cursor: { cluster: string; snapshot: string }
  events: Row[]
  reset: boolean
}

const news = async (cursor?: unknown): Promise<News> =>
  (
    await db.gateway('select api.account_news($1) as news', [
      cursor === undefined ? null : JSON.stringify(cursor),
    ])
  )[0]!.news

const threshold = (account: Payer, amount: string | null) =>
  account.post('set_low_balance_threshold', { amount })

/** The crossings that the work causes, as `kind funds`. */
async function told(account: Payer, work: () => Promise<unknown>): Promise<string[]> {
  const { cursor } = await news()
  await work()
  const { events, reset } = await news(cursor)
  assert.not(reset)
  return events
    .filter(({ account_id }) => account_id === account.accountId)
    .map(({ kind, funds }) => `${kind} ${Number(funds)}`)
}

test('each crossing is told as it happens, and nothing else', async () => {
  const account = await payer(db)
  assert.equal(await told(account, () => account.topUp('100')), ['back_in_funds 100'])
  assert.equal(await told(account, () => threshold(account, '10')), [])
  const steps: [string, () => Promise<unknown>, string[]][] = [
    ['down, far from the line', () => account.use('80'), []],
    ['onto the threshold', () => account.use('10'), ['low_balance 10']],
    ['further below', () => account.use('1'), []],
    ['up, onto it', () => account.topUp('1'), []],
    ['above it', () => account.topUp('0.0000000001'), []],
    ['across it again', () => account.use('0.0000000001'), ['low_balance 10']],
    ['to nothing', () => account.use('10'), ['exhausted 0']],
    ['into debt', () => account.use('5'), []],
    ['debt paid in part', () => account.topUp('4'), []],
    ['debt paid, and no more', () => account.topUp('1'), []],
    ['a free credit', () => account.grant('3'), ['back_in_funds 3']],
    ['above the threshold', () => account.topUp('20'), []],
    ['across both at once', () => account.use('30'), ['low_balance -7', 'exhausted -7']],
    ['a credit limit', () => account.limit('50'), ['back_in_funds 43']],
    ['the limit taken back', () => account.limit('0'), ['low_balance -7', 'exhausted -7']],
    ['a correction', () => account.adjust('17'), ['back_in_funds 10']],
    ['and back', () => account.adjust('-10'), ['exhausted 0']],
    ['an event that costs nothing', () => account.use('0'), []],
    ['several entries in one call', () => account.record(account.event('1'), account.event('2')), []],
  ]
  for (const [what, work, expected] of steps) assert.equal(await told(account, work), expected, what)
  await holdsTrue(db.sql)
})

test('an event says which entry crossed which line, and with what figures', async () => {
  const account = await payer(db, { funds: '5' })
  await threshold(account, '3.5')
  const { cursor } = await news()
  const { seq } = await account.use('2')
  const { events } = await news(cursor)
  assert.is(events.length, 1)
  const [entry] = await db.operator(
    `select to_jsonb(created_at) as at from api.billing_transactions where account_id = $1 and seq = $2`,
    [account.accountId, seq],
  )
  assert.equal(events[0], {
    id: events[0]!.id,
    kind: 'low_balance',
    account_id: account.accountId,
    seq,
    funds: '3.0000000000',
    threshold: '3.5000000000',
    created_at: entry!.at,
  })
  assert.type(events[0]!.id, 'number')
})

test('holds come and go without news; only their use counts', async () => {
  const account = await payer(db, { funds: '10' })
  await threshold(account, '4')
  let id = ''
  assert.equal(
    await told(account, async () => {
      id = await account.hold('10')
      await account.release(id)
      id = await account.hold('10')
      await account.use('5', { hold_id: id, final: false })
    }),
    [],
  )
  assert.equal(await told(account, () => account.use('1', { hold_id: id })), ['low_balance 4'])
  // all that is left is set aside, and a charge beside it
  await account.hold('4')
  assert.equal(await told(account, () => account.use('1')), [])
  await account.topUp('7')
  await account.hold('6')
  assert.equal(await told(account, () => account.use('6')), ['low_balance 4'])
})

test('a grant that has expired counts when the next posting settles it, before that posting', async () => {
  const account = await payer(db, { funds: '5' })
  await threshold(account, '7')
  const soon = new Date(Date.now() + 2000) // later than the grant is made
  const expires = () => until(async () => !(await account.figures()).free_credit, 'the grant to expire')
  assert.equal(await told(account, () => account.grant('5', { expires_at: soon })), [])
  assert.equal(await told(account, expires), [])
  assert.equal(await told(account, () => account.topUp('10')), ['low_balance 5'])
})

test('money taken back crosses a line as a charge does', async () => {
  const account = await payer(db, { funds: '5' })
  const top = await account.topUp('5')
  await threshold(account, '5')
  const { seq } = await account.use('3')
  assert.equal(await told(account, () => account.post('reverse_top_up', { seq: top.seq, amount: '5' })), [
    'low_balance 2',
  ])
  await account.use('2')
  assert.equal(await told(account, () => account.post('refund_charge', { seq, amount: '1' })), [
    'back_in_funds 1',
  ])
})

const { setBudget, team } = budgeting(db)
const exhausted = (events: Row[]) =>
  events.flatMap(({ kind, budget }) =>
    kind === 'budget_exhausted' ? [`${budget.scope} ${budget.period}`] : [],
  )

test('a budget is told when it is used up, once in each window', async () => {
  const { first, second } = await team()
  const made = await setBudget(first, 'user', '10', { period: 'day' })
  await setBudget(first, 'tenant', '10.5', { period: 'total' })
  await setBudget(first, 'virtual_key', '0')
  await setBudget(second, 'user', '1')
  const after = async (work: () => Promise<unknown>) => {
    const { cursor } = await news()
    await work()
    return exhausted((await news(cursor)).events)
  }
  assert.equal(await after(() => first.use('9.9999999999')), [])
  const { cursor } = await news()
  const { seq } = await first.use('0.0000000001')
  const { events } = await news(cursor)
  assert.equal(
    { ...events[0], id: 0, created_at: '' },
    {
      id: 0,
      kind: 'budget_exhausted',
      account_id: first.accountId,
      seq,
      funds: '990.0000000000',
      budget: {
        id: made.id,
        scope: 'user',
        scope_id: first.userId,
        period: 'day',
        amount: '10.0000000000',
        spent: '10.0000000000',
      },
      created_at: '',
    },
  )
  assert.is(events.length, 1)
  assert.equal(await after(() => first.use('0.1')), [], 'further past it')
  assert.equal(
    (await after(() => first.record(first.event('0.2'), second.event('2')))).sort(),
    ['tenant total', 'user month'],
    'two at once, of what both have used',
  )
  assert.equal(await after(() => setBudget(first, 'user', '5', { period: 'day' })), [], 'set lower')
  assert.equal(await after(() => setBudget(first, 'user', '20', { period: 'day' })), [], 'set higher')
  assert.equal(await after(() => first.use('9.8')), ['user day'], 'and used up again')
  await holdsTrue(db.sql)
})

test('an event that comes late uses up a budget of its own window in silence', async () => {
  const account = await payer(db, { funds: '10' })
  const usedUp = async (moment: Date) => {
    const { cursor } = await news()
    await account.use('6', { id: idAt(moment) })
    return exhausted((await news(cursor)).events)
  }
  await setBudget(account, 'user', '5', { period: 'day' })
  // as if it had been set long ago
  await db.sql(
    `update data.budget set counted_from = date_trunc('day', now(), 'UTC') - interval '2 days' where account_id = $1`,
    [account.accountId],
  )
  const now = Date.now()
  assert.equal(await usedUp(new Date(now - 36 * 3600 * 1000)), [])
  assert.equal(await usedUp(new Date(now)), ['user day'])
  await holdsTrue(db.sql)
})

test('64 concurrent charges across both lines: each crossing once', async () => {
  const world = await seed(db.operator, { funds: '100' })
  await db.operator('select api.set_low_balance_threshold($1, 50)', [world.accountId])
  await db.operator(`select api.set_budget($1, 'user', $2, 75, 'month')`, [world.accountId, world.userId])
  const { cursor } = await news()
  // 2.50 each: the 20th leaves 50, the 30th uses the budget up, the 40th leaves nothing
  const calls = Array.from({ length: 64 }, () => batch('record_usage', [event(world, 1_000_000)]))
  assert.equal(errors(await callers(db.loginUrl, calls)), [])
  const { events } = await news(cursor)
  assert.equal(
    events.map(({ kind, seq, funds }) => `${kind} ${seq} ${Number(funds)}`),
    ['low_balance 21 50', 'budget_exhausted 31 25', 'exhausted 41 0'],
  )
  await holdsTrue(db.sql)
})

test('many accounts in one call each have their own news', async () => {
  const accounts = await Promise.all(Array.from({ length: 6 }, () => payer(db, { funds: '10' })))
  for (const [i, account] of accounts.entries()) await threshold(account, i % 2 ? '5' : null)
  const { cursor } = await news()
  await accounts[0]!.record(...accounts.map((account, i) => account.event(i < 4 ? '6' : '10')))
  const { events } = await news(cursor)
  const kinds = accounts.map(({ accountId }) =>
    events.filter(({ account_id }) => account_id === accountId).map(({ kind }) => kind),
  )
  assert.equal(kinds, [[], ['low_balance'], [], ['low_balance'], ['exhausted'], ['low_balance', 'exhausted']])
})

let sessions: pg.Client[] = []
async function session(...args: Parameters<typeof db.session>) {
  const made = await db.session(...args)
  sessions.push(made)
  return made
}
test.after.each(async () => {
  for (const each of sessions) await each.end()
  sessions = []
})

const charge = (session: pg.Client, account: Payer, usd: string) =>
  session.query('select api.record_usage($1)', [JSON.stringify([account.event(usd)])])

test('a posting that is rolled back tells nothing, and one that committed late is not skipped', async () => {
  const [gone, late, quick] = await Promise.all([1, 2, 3].map(() => payer(db, { funds: '1' })))
  const one = await session('keyledger_gateway')
  await one.query('begin')
  await charge(one, gone!, '1')
  const { cursor } = await news()
  await one.query('rollback')

  await one.query('begin')
  await charge(one, late!, '1')
  await quick!.use('1')
  const next = await news(cursor)
  assert.equal(
    next.events.map(({ account_id }) => account_id),
    [quick!.accountId],
  )
  await one.query('commit')
  const last = await news(next.cursor)
  assert.equal(
    last.events.map(({ account_id }) => account_id),
    [late!.accountId],
  )
  assert.equal((await news(last.cursor)).events, [])
  // who repeats a cursor is told the same again
  assert.equal((await news(next.cursor)).events, last.events)
})

test('only a crossing notifies', async () => {
  const account = await payer(db, { funds: '10' })
  await threshold(account, '5')
  const listening = await session()
  const heard: string[] = []
  listening.on('notification', ({ channel, payload }) => heard.push(`${channel} ${payload}`))
  await listening.query('listen keyledger_account')
  await listening.query('listen keyledger_test')
  // commits are notified of in their order, so that what came before `done` has been heard by then
  const hears = async (work: () => Promise<unknown>) => {
    heard.length = 0
    await work()
    await db.sql(`notify keyledger_test, 'done'`)
    await until(() => heard.includes('keyledger_test done'), 'the notification')
    return heard.slice(0, -1)
  }
  const quiet = async () => {
    for (let i = 0; i < 4; i++) await account.use('1')
    await account.release(await account.hold('5'))
    await threshold(account, '5')
    await account.topUp('1')
    await account.use('1')
  }
  assert.equal(await hears(quiet), [])
  assert.equal(await hears(() => account.use('6')), ['keyledger_account '])
})

test('without a cursor it starts from now; a doubtful one is a reset', async () => {
  const account = await payer(db, { funds: '1' })
  await account.use('1')
  const first = await news()
  assert.equal([first.events, first.reset], [[], false])
  const { cursor } = first
  for (const each of [await news(null), await news(cursor)])
    assert.equal([each.events, each.reset], [[], false])

  const [system] = cursor.cluster.split(':') as [string]
  const [xmin, xmax] = cursor.snapshot.split(':').map(BigInt) as [bigint, bigint]
  const doubtful: unknown[] = [
    {},
    [],
    'cursor',
    7,
    { ...cursor, cluster: `${system}:00000002` },
    { ...cursor, snapshot: `${xmin}:${xmax + 1_000_000n}:` },
    { ...cursor, snapshot: 'x' },
    { cluster: cursor.cluster },
  ]
  for (const each of doubtful) {
    const { events, reset } = await news(each)
    assert.equal([events, reset], [[], true], JSON.stringify(each))
  }
})

const age = (interval: string) =>
  db.sql(`update data.account_news set created_at = now() - $1::interval`, [interval])

test('events older than 48 h are purged, and only the cursors that may have missed them are reset', async () => {
  const account = await payer(db, { funds: '1' })
  const { cursor: before } = await news()
  await account.use('1')
  await age('47 hours')
  await db.operator('select api.maintain()')
  assert.equal(
    (await news(before)).events.map(({ kind }) => kind),
    ['exhausted'],
  )
  await age('49 hours')
  const { cursor: after } = await news()
  await account.topUp('1')
  const [row] = await db.operator('select api.maintain() as m')
  assert.ok(row!.m.account_news_purged > 0)
  const missed = await news(before)
  assert.equal([missed.events, missed.reset], [[], true])
  const seen = await news(after)
  assert.equal([seen.events.map(({ kind }) => kind), seen.reset], [['back_in_funds'], false])
  // and the other outbox's cursors are none of its business
  const [changes] = await db.gateway('select api.cache_changes($1) as c', [JSON.stringify(before)])
  assert.not(changes!.c.reset)
})

test('events that came with a dump, of transactions still to come here, are not told again', async () => {
  const account = await payer(db, { funds: '1' })
  await account.use('1')
  await db.sql(`update data.account_news set xid = '9000000000000000001'`)
  await db.sql(`update data.outbox_horizon set purged_xid = '9000000000000000000'`)
  const { cursor } = await news()
  const first = await news(cursor)
  assert.equal([first.events, first.reset], [[], false])
  await account.topUp('1')
  const seen = async () => (await news(cursor)).events.map(({ kind }) => kind)
  assert.equal(await seen(), ['back_in_funds'])
  await db.operator('select api.maintain()')
  assert.equal(await db.sql('select kind from data.account_news'), [{ kind: 'back_in_funds' }])
  assert.equal(await seen(), ['back_in_funds'])
})

test('a threshold is set, shown, changed and taken away; a value that is no amount is refused', async () => {
  const account = await payer(db, { funds: '1' })
  assert.is((await threshold(account, '2.5')).low_balance_threshold, '2.5000000000')
  for (const amount of ['0', '-1', 'NaN', 'Infinity', '0.00000000001', '1000000000000'])
    assert.is((await failure(threshold(account, amount))).message, 'invalid_amount')
  const [shown] = await db.member(account.userId)(
    'select low_balance_threshold as it from api.billing_accounts',
  )
  assert.is(shown!.it, '2.5000000000')
  assert.is((await threshold(account, null)).low_balance_threshold, null)
  assert.equal(await told(account, () => account.use('0.5')), [])
  const unknown = failure(db.operator('select api.set_low_balance_threshold($1, 1)', [account.nodeId]))
  assert.is((await unknown).message, 'account_not_found')
})

// The client.

const server = await db.postgrest()
const rpcs: Record<string, (url?: string) => Rpc> = {
  postgrest: () =>
    postgrestRpc({ url: server.url, token: () => server.token({ role: 'keyledger_gateway' }) }),
  pg: (connectionString = db.loginUrl) => pgRpc({ connectionString }),
}

/** A module, and all it is told, as `kind funds`. */
async function client(
  options: Partial<BillingModuleOptions> = {},
  kinds: NewsKind[] = ['low_balance', 'exhausted', 'back_in_funds', 'budget_exhausted', 'reset'],
) {
  const rpc = options.rpc ?? rpcs.pg!()
  const calls: string[] = []
  const counted: Rpc = {
    ...rpc,
    call: ((...call: Parameters<Transport['call']>) => {
      calls.push(call[0])
      return (rpc as Transport).call(...call)
    }) as Rpc['call'],
  }
  const billing = createBillingModule({ ...options, rpc: counted })
  const events: AccountNewss[NewsKind][] = []
  const ends = kinds.map((kind) => billing.on(kind, (event) => events.push(event)))
  await billing.start()
  return {
    billing,
    events,
    ends,
    reads: () => calls.filter((fn) => fn === 'account_news').length,
    of: ({ accountId }: Payer) =>
      events.flatMap((event) => (event.kind !== 'reset' && event.account_id === accountId ? [event] : [])),
    async stop() {
      await billing.stop()
      await rpc.close()
    },
  }
}
type Client = Awaited<ReturnType<typeof client>>

let clients: Client[] = []
async function started(...args: Parameters<typeof client>): Promise<Client> {
  const made = await client(...args)
  clients.push(made)
  return made
}
test.after.each(async () => {
  await Promise.all(clients.map((each) => each.stop()))
  clients = []
})

/** Waits for a read that was sent after this call. */
async function readAgain({ billing }: Client) {
  const since = performance.now()
  await until(() => (billing.health().news.age ?? Infinity) < performance.now() - since, 'a read')
}

for (const [name, make] of Object.entries(rpcs))
  test(`${name}: each listener of a kind is told, with figures and an id that is the same everywhere`, async () => {
    const account = await payer(db, { funds: '10' })
    await threshold(account, '5')
    const one = await started({ rpc: make(), listen: db.loginUrl })
    const other = await started({ rpc: make() }, ['exhausted'])
    await account.use('6')
    await account.use('4')
    await until(() => one.of(account).length === 2 && other.of(account).length === 1, 'the news')
    const [low, exhausted] = one.of(account)
    assert.equal(low, {
      id: low!.id,
      kind: 'low_balance',
      account_id: account.accountId,
      seq: 2,
      funds: '4.0000000000',
      threshold: '5.0000000000',
      created_at: low!.created_at,
    })
    assert.ok(Math.abs(Date.parse(low!.created_at) - Date.now()) < 60_000)
    assert.equal([exhausted!.kind, exhausted!.funds], ['exhausted', '0.0000000000'])
    assert.ok(exhausted!.id > low!.id)
    assert.equal(other.of(account), [exhausted])
  })

test('a notification leads to a read sooner than the poll would', async () => {
  const one = await started({ listen: db.loginUrl })
  await until(() => one.billing.health().listener.listening, 'LISTEN')
  const account = await payer(db)
  const startedAt = performance.now()
  for (let i = 1; i <= 10; i++) {
    await (i % 2 ? account.topUp('1') : account.use('1'))
    await until(() => one.of(account).length === i, 'the news')
  }
  assert.ok(performance.now() - startedAt < 2500, 'ten polls take 5 s')
})

test('events missed while Postgres was away are told when it is back, each once', async () => {
  const postgres = await startProxy(db.loginUrl)
  try {
    const one = await started({ rpc: rpcs.pg!(postgres.url), listen: postgres.url })
    await until(() => one.billing.health().listener.listening, 'LISTEN')
    const account = await payer(db, { funds: '1' })
    await until(() => one.of(account).length === 1, 'the first')
    for (let round = 0; round < 3; round++) {
      // killed where it is, and then out of reach
      await db.sql(
        `select pg_terminate_backend(pid) from pg_stat_activity
        where application_name = 'keyledger listener' and datname = current_database()`,
      )
      await account.use('1')
      postgres.mode = 'refuse'
      postgres.cut()
      await until(() => one.billing.health().news.error === 'unavailable', 'the loss to be seen')
      await account.topUp('1')
      await account.use('1')
      postgres.mode = 'pass'
      await until(() => one.of(account).length === 4 + 4 * round, 'the news')
      await account.topUp('1')
      await until(() => one.of(account).length === 5 + 4 * round, 'more')
      assert.is(one.billing.health().news.error, null)
    }
    const ids = one.of(account).map(({ id }) => id)
    assert.equal(
      ids,
      [...new Set(ids)].sort((a, b) => a - b),
    )
    assert.equal(
      one.of(account).map(({ seq }) => seq),
      ids.map((_, i) => i + 1),
    )
    assert.not(one.events.some(({ kind }) => kind === 'reset'))
  } finally {
    await postgres.close()
  }
})

test('away for longer than events are kept: the app is told to look for itself, and then gets new events', async () => {
  const postgres = await startProxy(db.loginUrl)
  try {
    const one = await started({ rpc: rpcs.pg!(postgres.url) })
    const account = await payer(db)
    postgres.mode = 'refuse'
    postgres.cut()
    await until(() => one.billing.health().news.error === 'unavailable', 'the loss to be seen')
    await account.topUp('1')
    await age('49 hours')
    await db.operator('select api.maintain()')
    postgres.mode = 'pass'
    await until(() => one.events.length > 0, 'the news')
    assert.equal(one.events, [{ kind: 'reset' }])
    await account.use('1')
    await until(() => one.events.length > 1, 'the news')
    assert.equal(
      one.events.map(({ kind }) => kind),
      ['reset', 'exhausted'],
    )
  } finally {
    await postgres.close()
  }
})

test('nothing is read while nobody listens, and events of that time are not told', async () => {
  const account = await payer(db)
  const one = await started({}, [])
  await until(() => (one.billing.health().listener.age ?? Infinity) < 400, 'the cache to be read')
  assert.equal(one.billing.health().news, { age: null, error: null })
  const seen: unknown[] = []
  const end = one.billing.on('exhausted', (event) => seen.push(event))
  assert.is(one.reads(), 1)
  await readAgain(one)
  end()
  end()
  await account.topUp('1')
  await account.use('1')
  const reads = one.reads()
  const since = performance.now()
  await until(() => performance.now() - since > 1200, 'two polls')
  assert.is(one.reads(), reads)
  assert.equal(one.billing.health().news, { age: null, error: null })
  one.billing.on('exhausted', (event) => seen.push(event))
  await readAgain(one)
  assert.equal(seen, [])
  await account.topUp('1')
  await account.use('1')
  await until(() => seen.length === 1, 'the news')
})

test('events read for a listener that has ended are not told to later ones', async () => {
  const account = await payer(db, { funds: '1' })
  const made = rpcs.pg!()
  let open = () => {}
  let reached = () => {}
  const held = new Promise<void>((resolve) => {
    reached = resolve
  })
  const rpc: Rpc = {
    ...made,
    async call<T>(fn: string, args?: Record<string, unknown>) {
      const answer = await made.call<T>(fn, args)
      if (fn === 'account_news' && (answer as News).events.some(({ seq }) => seq === 2)) {
        reached()
        await new Promise<void>((resolve) => {
          open = resolve
        })
      }
      return answer
    },
  }
  const one = await started({ rpc }, [])
  const end = one.billing.on('exhausted', () => {})
  await readAgain(one)
  await account.use('1')
  await held
  end()
  const seen: unknown[] = []
  one.billing.on('exhausted', (event) => seen.push(event))
  await readAgain(one)
  open()
  await readAgain(one)
  assert.equal(seen, [])
})

test('a listener that throws, or rejects, stops no other, and is a warning', async () => {
  const account = await payer(db)
  const one = await started({}, [])
  const warnings: Row[] = []
  const warn = (warning: Row) => void (warning.name === 'KeyledgerWarning' && warnings.push(warning))
  const printers = process.listeners('warning')
  process.removeAllListeners('warning').on('warning', warn)
  try {
    const told: string[] = []
    one.billing.on('back_in_funds', () => {
      throw new Error('thrown')
    })
    one.billing.on('back_in_funds', () => Promise.reject('rejected'))
    one.billing.on('back_in_funds', ({ kind }) => told.push(kind))
    one.billing.on('exhausted', ({ kind }) => told.push(kind))
    await readAgain(one)
    await account.topUp('1')
    await account.use('1')
    await until(() => told.length === 2 && warnings.length === 2, 'the news')
    assert.equal(told, ['back_in_funds', 'exhausted'])
    assert.match(warnings[0]!.message, 'back_in_funds')
    assert.match(warnings[0]!.detail, 'Error: thrown')
    assert.is(warnings[1]!.detail, 'rejected')
    assert.is(one.billing.health().news.error, null)
  } finally {
    process.off('warning', warn)
    for (const print of printers) process.on('warning', print)
  }
})

test('a listener that ends in the midst is told no more; the same function may listen twice', async () => {
  const [first, second] = [await payer(db), await payer(db)]
  const one = await started({}, [])
  const told: string[] = []
  const end = one.billing.on('back_in_funds', ({ account_id }) => {
    told.push(account_id)
    end()
  })
  await readAgain(one)
  const together = await session()
  await together.query('begin')
  for (const { accountId } of [first, second]) await together.query(`select api.top_up($1, 1)`, [accountId])
  await together.query('commit')
  await until(() => told.length > 0, 'the news')
  const twice = () => told.push('twice')
  const ends = [one.billing.on('exhausted', twice), one.billing.on('exhausted', twice)]
  ends[0]!()
  await readAgain(one)
  await first.use('1')
  await until(() => told.includes('twice'), 'the news')
  await readAgain(one)
  assert.equal(told, [first.accountId, 'twice'])
})

test('a kind that is none is refused', async () => {
  const one = await started({}, [])
  assert.throws(
    () => one.billing.on('typo' as NewsKind, () => {}),
    ({ code, message }: { code: string; message: string }) =>
      code === 'invalid_input' && /low_balance/.test(message),
  )
})

test.run()
