// Both transports, held to one suite: the same calls get the same answers and the same errors,
// through PostgREST and pg.
import { createServer, type Server } from 'node:http'
import { inspect } from 'node:util'
import pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { until } from '../../scripts/supervise.ts'
import { isRetryable, type KeyledgerError, mayBeDone } from '../../src/errors.ts'
import { jsonText } from '../../src/json.ts'
import type { Rpc } from '../../src/rpc.ts'
import { pgRpc } from '../../src/rpc-pg.ts'
import { postgrestRpc } from '../../src/rpc-postgrest.ts'
import { database } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { newId } from '../support/ids.ts'
import { startProxy } from '../support/proxy.ts'
import { seed } from '../support/seed.ts'
import { shapes } from '../support/shapes.ts'

const test = suite('rpc')
const db = await database(test)
await db.sql(shapes)
const server = await db.postgrest()

type Options = { role?: string; claims?: Record<string, unknown>; timeout?: number; via?: string }
const transports: Record<string, (options?: Options) => Rpc> = {
  postgrest: ({ role = 'keyledger_gateway', claims = {}, timeout, via = server.url } = {}) =>
    postgrestRpc({ url: via, token: () => server.token({ role, ...claims }), timeout }),
  pg: ({ via = db.loginUrl, ...options } = {}) => pgRpc({ connectionString: via, ...options }),
}

const same = (error: KeyledgerError, [code, status]: [string, number]) => {
  assert.is(error.name, 'KeyledgerError', inspect(error))
  assert.equal([error.code, error.status], [code, status], inspect(error))
}

const ID = '00000000-0000-7000-8000-000000000001'
const NASTY = "é😀 \\ \\\\ ' '' \" `$1` -- /* \n\t\r \u0001 {a,b} E'x' \\u0000 %s ; drop"

for (const [name, make] of Object.entries(transports)) {
  const rpc = make()
  db.onClose(() => rpc.close())
  const the = (what: string, run: () => Promise<void>) => test(`${name}: ${what}`, run)

  const answers: [fn: string, args: Record<string, unknown> | undefined, answer: unknown][] = [
    ['add', { a: 1 }, 3],
    ['add', { a: 1, b: 40 }, 41],
    ['add', { a: 1, b: undefined }, 3],
    ['add', { a: 1, b: null }, null],
    ['add', { a: '1', b: '2' }, 3],
    ['same_text', { value: NASTY }, NASTY],
    ['same_text', { value: '' }, ''],
    ['same_text', { value: { a: 1 } }, '{"a":1}'],
    ['same_text', { value: 5 }, '5'],
    ['same_text', { value: null }, null],
    ['same_json', { value: [1.5, { [NASTY]: NASTY }, null, 'x'] }, [1.5, { [NASTY]: NASTY }, null, 'x']],
    ['same_json', { value: 'text' }, 'text'],
    ['same_json', { value: [] }, []],
    ['same_json', { value: null }, null],
    [
      'same_json',
      { value: jsonText(JSON.stringify([{ [NASTY]: NASTY }, null])) },
      [{ [NASTY]: NASTY }, null],
    ],
    ['same_text', { value: jsonText(JSON.stringify(NASTY)) }, NASTY],
    ['same_numeric', { value: '12345.6789' }, 12345.6789],
    ['same_numeric', { value: 0.1 }, 0.1],
    ['same_numeric', { value: 'NaN' }, 'NaN'],
    ['same_moment', { value: '2026-01-02T03:04:05.1Z' }, '2026-01-02T03:04:05.1+00:00'],
    ['same_ids', { value: [ID, ID] }, [ID, ID]],
    ['same_ids', { value: [] }, []],
    ['same_ids', { value: `{${ID}}` }, [ID]],
    ['same_ids', { value: null }, null],
    ['same_id', { id: ID }, { id_again: ID, length: 36 }],
    ['nothing', {}, null],
    ['nothing', undefined, null],
    ['numbers', { up_to: 3 }, [1, 2, 3]],
    ['numbers', { up_to: 0 }, []],
    [
      'things',
      {},
      [
        {
          id: ID,
          name: 'first',
          amount: 1.5,
          big: 9007199254740992, // the largest integer that a JSON number holds exactly, and one more
          at: '2026-01-02T03:04:05.678+00:00',
          tags: ['a', 'b c', null],
          about: { rate: 1.5, on: true },
        },
        {
          id: '00000000-0000-7000-8000-000000000002',
          name: 'second',
          amount: 1e-10,
          big: -1,
          at: null,
          tags: [],
          about: null,
        },
      ],
    ],
    ['no_thing', {}, { id: null, name: null, amount: null, big: null, at: null, tags: null, about: null }],
    ['rows_of', { id: ID }, [{ id: ID, amount: 2.5 }]],
  ]
  the('every shape of arguments and answers', async () => {
    for (const [fn, args, answer] of answers)
      assert.equal(await rpc.call(fn, args), answer, `${fn} ${JSON.stringify(args)}`)
  })

  the('select names columns, and casts them', async () => {
    const call = (fn: string, select: string[], args = {}) => rpc.call(fn, args, { select })
    assert.equal(await call('one_thing', ['big::text', 'amount::text']), {
      big: '9007199254740993',
      amount: '1.5000000000',
    })
    // a column called as an argument is
    assert.equal(await call('rows_of', ['id', 'amount::text'], { id: ID }), [{ id: ID, amount: '2.50' }])
    assert.equal(await call('same_id', ['length', 'id_again'], { id: ID }), { length: 36, id_again: ID })
    assert.equal(await call('rows_of', ['*'], { id: ID }), [{ id: ID, amount: 2.5 }])
    same(await failure(call('things', ['nowhere'])), ['column_not_found', 400])
    same(await failure(call('add', ['value'], { a: 1 })), ['column_not_found', 400])
    for (const bad of [[], ['a,b'], ['a::text::text'], ['amount::text; --'], ['"a"'], ['select']])
      same(await failure(call('things', bad)), ['invalid_input', 400])
  })

  const errors: [fn: string, args: Record<string, unknown>, error: [code: string, status: number]][] = [
    ['nowhere', {}, ['function_not_found', 404]],
    ['nowhere', { a: 1 }, ['function_not_found', 404]],
    ['add', {}, ['function_not_found', 404]],
    ['add', { b: 1 }, ['function_not_found', 404]],
    ['add', { a: 1, c: 1 }, ['function_not_found', 404]],
    ['add', { a: undefined }, ['function_not_found', 404]],
    ['Add', { a: 1 }, ['invalid_input', 400]],
    ['add?select=x', { a: 1 }, ['invalid_input', 400]],
    ['add', { a: 'x' }, ['invalid_input', 400]],
    ['add', { a: 1.5 }, ['invalid_input', 400]],
    ['add', { a: 3_000_000_000 }, ['number_out_of_range', 400]],
    ['same_numeric', { value: 1e200 }, ['same', 200]],
    ['same_numeric', { value: '1e200000' }, ['number_out_of_range', 400]],
    ['same_numeric', { value: '1,5' }, ['invalid_input', 400]],
    ['same_moment', { value: 'yesterday-ish' }, ['invalid_input', 400]],
    ['same_id', { id: 'zz' }, ['invalid_input', 400]],
    ['same_id', { id: '' }, ['invalid_input', 400]],
    ['same_id', { id: 5 }, ['invalid_input', 400]],
    ['same_ids', { value: ['zz'] }, ['invalid_input', 400]],
    ['same_ids', { value: { a: 1 } }, ['invalid_input', 400]],
    ['same_text', { value: 'a\u0000b' }, ['invalid_input', 400]],
    ['same_text', { value: 'half \ud83d' }, ['invalid_input', 400]],
    ['same_text', { value: 'half \ude00' }, ['invalid_input', 400]],
    ['same_text', { value: '\\\u0000' }, ['invalid_input', 400]],
    ['same_json', { value: [{ 'a\u0000': 1 }] }, ['invalid_input', 400]],
    ['same_text', { value: 5n }, ['invalid_input', 400]],
    ['forbidden', {}, ['permission_denied', 403]],
    ['fail', { state: 'PT402', said: 'insufficient_funds' }, ['insufficient_funds', 402]],
    ['fail', { state: 'PT599', said: 'odd' }, ['odd', 599]],
    ['fail', { state: 'PTABC' }, ['internal_error', 500]],
    ['fail', { state: '40P01' }, ['deadlock', 503]],
    ['fail', { state: '57014' }, ['timeout', 504]],
    ['fail', { state: '57P03' }, ['unavailable', 503]],
    ['fail', { state: '53300' }, ['unavailable', 503]],
    ['fail', { state: '25006' }, ['unavailable', 503]],
    ['fail', { state: '55P03' }, ['lock_timeout', 503]],
    ['fail', { state: '54000' }, ['payload_too_large', 413]],
    ['fail', { state: '23505' }, ['unique_violation', 409]],
    ['fail', { state: '23503' }, ['foreign_key_violation', 409]],
    ['fail', { state: '23514' }, ['check_violation', 400]],
    ['fail', { state: '23502' }, ['not_null_violation', 400]],
    ['fail', { state: '42883' }, ['function_not_found', 404]],
    ['fail', { state: 'P0001' }, ['internal_error', 500]],
    ['fail', { state: 'XX000' }, ['internal_error', 500]],
  ]
  the('every error has its code and status', async () => {
    for (const [fn, args, error] of errors) {
      if (error[0] === 'same') assert.is(await rpc.call(fn, args), args.value)
      else same(await failure(rpc.call(fn, args)), error)
    }
    const cycle: Record<string, unknown> = {}
    cycle.self = cycle
    same(await failure(rpc.call<unknown>('same_json', { value: cycle })), ['invalid_input', 400])
  })

  the('an error carries what SQL said, and names what to change', async () => {
    const refused = await failure(rpc.call<unknown>('fail', { state: 'PT402', said: 'insufficient_funds' }))
    assert.equal([refused.detail, refused.hint], ['a detail', 'a hint'])
    assert.is(refused.message, 'insufficient_funds: a detail (a hint)')
    const misspelt = await failure(rpc.call<unknown>('add', { a: 1, c: 2 }))
    assert.match(misspelt.message, /api\.add\(a, c\).*names of its arguments/)
    assert.match(
      (await failure(rpc.call<unknown>('forbidden'))).message,
      /permission denied for function forbidden.*role/,
    )
    assert.match(
      (await failure(rpc.call<unknown>('fail', { state: 'XX000' }))).message,
      /XX000: said: a detail/,
    )
  })

  the('a key that strays into a call is in no error', async () => {
    const key = 'vk_"quoted"_0123456789abcdef'
    const { userId } = await seed(db.operator)
    const operator = make({ role: 'keyledger_operator' })
    db.onClose(() => operator.close())
    const strays = [
      () => rpc.call('resolve_billing_account', { vk: key }),
      () => rpc.call('resolve_virtual_key', { key_hash: key }),
      () => rpc.call('check_budget', { user_id: key, amount: '1' }),
      () => rpc.call('check_budget', { user_id: userId, amount: key }),
      () => rpc.call<unknown>('same_ids', { value: [key] }),
      () => rpc.call<unknown>('same_moment', { value: key }),
      () => rpc.call<unknown>('to_json', { value: 'vk_0123456789abcdef' }),
      () => operator.call('top_up', { account_id: userId, amount: '1', metadata: `${key}\u0000` }),
      () => rpc.rows('account_balances', { select: ['balance'], where: { user_id: key } }),
    ]
    for (const stray of strays) {
      const error = await failure(stray())
      assert.not.match(inspect(error, { depth: 9, showHidden: true }), '0123456789abcdef')
    }
  })

  the('the real functions: their codes, and composites with money as text', async () => {
    const { accountId, userId, keyHash, keyId, nodeId } = await seed(db.operator, { funds: '12.34' })
    const context = await rpc.call<Record<string, unknown>>('resolve_virtual_key', { key_hash: keyHash })
    assert.equal(
      [context.virtual_key_id, context.account_id, context.user_id, context.code, context.config_node_ids],
      [keyId, accountId, userId, null, [nodeId]],
    )
    same(await failure(rpc.call('resolve_virtual_key', { key_hash: 'no' })), ['virtual_key_unknown', 404])
    const select = ['allowed', 'available::text']
    const ask = (amount: unknown) =>
      rpc.call<unknown>('check_budget', { user_id: userId, amount }, { select })
    assert.equal(await ask('12.34'), { allowed: true, available: '12.3400000000' })
    assert.equal(await ask('12.35'), { allowed: false, available: '12.3400000000' })
    for (const amount of [
      '0',
      '-1',
      'NaN',
      'Infinity',
      '1e13',
      '0.12345678901',
      '0.000000000000000000000000000001',
    ])
      same(await failure(ask(amount)), ['invalid_amount', 422])
    for (const amount of [null, 'abc', '', {}]) {
      const { status } = await failure(ask(amount))
      assert.ok([400, 422].includes(status))
    }
    for (const requests of [null, {}, 'x', 5]) {
      same(await failure(rpc.call<unknown>('place_holds', { requests })), ['invalid_requests', 422])
      same(await failure(rpc.call<unknown>('record_usage', { events: requests })), ['invalid_events', 422])
    }
    assert.equal(await rpc.call('place_holds', { requests: [] }), [])
    same(await failure(rpc.call('top_up', { account_id: accountId, amount: '1' })), [
      'permission_denied',
      403,
    ])
  })

  the('5,000 elements in one call come back in order', async () => {
    const value = Array.from({ length: 5000 }, (_, i) => ({ i, text: NASTY }))
    assert.equal(await rpc.call<unknown>('same_json', { value }), value)
  })

  the('rows: filters, order, limit and casts', async () => {
    const names = [NASTY, 'a,b', '(a)', '"a"', 'eq.a', 'a b+c%20&x=1', '*', 'null', '', 'a.b:c', "it's", '{}']
    await db.sql('insert into api.thing (id, name) select gen_random_uuid(), unnest($1::text[])', [names])
    for (const name of names) {
      assert.equal(await rpc.rows<unknown>('thing', { select: ['name'], where: { name } }), [{ name }], name)
    }
    await db.sql('delete from api.thing where name = any ($1)', [names])
    const rows = (query: object) => rpc.rows<unknown>('thing', { select: ['name', 'amount::text'], ...query })
    const [first, second] = [
      { name: 'first', amount: '1.5000000000' },
      { name: 'second', amount: '0.0000000001' },
    ]
    assert.equal(await rows({ order: 'id' }), [first, second])
    assert.equal(await rows({ order: 'id.desc' }), [second, first])
    assert.equal(await rows({ order: 'name.asc,id.desc', limit: 1 }), [first])
    assert.equal(await rows({ limit: 0 }), [])
    assert.equal(await rows({ where: { id: ID, name: 'first' } }), [first])
    assert.equal(await rows({ where: { id: ID, name: 'second' } }), [])
    assert.equal((await rows({ select: ['*'], where: { id: ID } })).length, 1)

    const wrong: [query: object, error: [string, number]][] = [
      [{ where: { id: 'zz' } }, ['invalid_input', 400]],
      [{ where: { nowhere: 'x' } }, ['column_not_found', 400]],
      [{ select: ['nowhere'] }, ['column_not_found', 400]],
      [{ order: 'nowhere' }, ['column_not_found', 400]],
      [{ where: { name: 'a\u0000' } }, ['invalid_input', 400]],
      [{ where: { name: '\ud83d' } }, ['invalid_input', 400]],
      [{ where: { name: undefined } }, ['invalid_input', 400]],
      [{ where: { or: '(id.is.null)' } }, ['invalid_input', 400]],
      [{ where: { 'name"': 'x' } }, ['invalid_input', 400]],
      [{ order: 'id.sideways' }, ['invalid_input', 400]],
      [{ limit: -1 }, ['invalid_input', 400]],
      [{ limit: 1.5 }, ['invalid_input', 400]],
    ]
    for (const [query, error] of wrong) same(await failure(rows(query)), error)
    same(await failure(rpc.rows<unknown>('nowhere', { select: ['*'] })), ['view_not_found', 404])
    same(await failure(rpc.rows('billing_transactions', { select: ['seq'] })), ['permission_denied', 403])
  })

  the('role and claims are the ones given', async () => {
    assert.equal(await rpc.call<unknown>('caller'), {
      role: 'keyledger_gateway',
      claims: { role: 'keyledger_gateway' },
    })
    const { userId } = await seed(db.operator, { alone: true })
    const claims = { user_id: userId, note: NASTY }
    const member = make({ role: 'keyledger_member', claims })
    db.onClose(() => member.close())
    assert.equal(await member.call<unknown>('caller'), {
      role: 'keyledger_member',
      claims: { role: 'keyledger_member', ...claims },
    })
    assert.equal(await member.rows('account_balances', { select: ['user_id'] }), [{ user_id: userId }])
    const nobody = make({ role: 'nobody_at_all' })
    db.onClose(() => nobody.close())
    same(await failure(nobody.call<unknown>('caller')), ['invalid_input', 400])
    const owner = make({ role: 'keyledger_owner' })
    db.onClose(() => owner.close())
    same(await failure(owner.call<unknown>('caller')), ['permission_denied', 403])
  })

  the('an error leaves nothing behind', async () => {
    const id = newId()
    same(await failure(rpc.call<unknown>('write_and_fail', { id })), ['too_late', 409])
    assert.equal(await db.sql('select from api.thing where id = $1', [id]), [])
  })

  the('a call without an answer in time is timed out', async () => {
    const holder = await db.session()
    const impatient = make({ timeout: 150 })
    db.onClose(() => impatient.close())
    await holder.query('select pg_advisory_lock(1)')
    try {
      const error = await failure(impatient.call<unknown>('wait'))
      same(error, ['timeout', 504])
      assert.ok(isRetryable(error))
    } finally {
      await holder.end()
    }
    assert.is(await impatient.call<unknown>('wait'), true)
  })

  the('a lost connection is unavailable, and the next call finds another', async () => {
    const holder = await db.session()
    await holder.query('select pg_advisory_lock(1)')
    try {
      const lost = failure(rpc.call<unknown>('wait'))
      const waiting = `from pg_stat_activity where datname = current_database() and wait_event = 'advisory'`
      await until(async () => (await db.sql(`select ${waiting}`)).length, 'the call to wait')
      await db.sql(`select pg_terminate_backend(pid) ${waiting}`)
      const error = await lost
      same(error, ['unavailable', 503])
      assert.ok(isRetryable(error))
    } finally {
      await holder.end()
    }
    assert.is(await rpc.call<unknown>('wait'), true)
  })

  the('a server that is cut off, refuses or hangs is unavailable, then well again', async () => {
    const holder = await db.session()
    const proxy = await startProxy(name === 'pg' ? db.loginUrl : server.url)
    const through = make({ via: proxy.url, timeout: 300 })
    const patient = make({ via: proxy.url })
    try {
      await holder.query('select pg_advisory_lock(1)')
      const cut = failure(patient.call<unknown>('wait'))
      await until(
        async () => (await db.sql(`select from pg_stat_activity where wait_event = 'advisory'`)).length,
        'the call to wait',
      )
      proxy.cut()
      same(await cut, ['unavailable', 503])
      proxy.mode = 'refuse'
      const error = await failure(through.call<unknown>('add', { a: 1 }))
      same(error, ['unavailable', 503])
      assert.ok(error.cause instanceof Error)
      proxy.mode = 'pass'
      assert.is(await through.call<unknown>('add', { a: 1 }), 3)
      proxy.mode = 'hang'
      same(await failure(through.call<unknown>('add', { a: 1 })), ['timeout', 504])
      proxy.mode = 'pass'
      assert.is(await through.call<unknown>('add', { a: 1 }), 3)
    } finally {
      await holder.end()
      await through.close()
      await patient.close()
      await proxy.close()
    }
    const gone = make({ via: proxy.url })
    same(await failure(gone.call<unknown>('add', { a: 1 })), ['unavailable', 503])
    await gone.close()
  })
}

test('pg: nothing of a call is left on the connection, after an answer or an error', async () => {
  const pool = new pg.Pool({ connectionString: db.loginUrl, max: 1 })
  const state = async () => {
    const { rows } = await pool.query(
      `select current_user::text, current_setting('role') as role, current_setting('request.jwt.claims', true) as claims,
        current_setting('statement_timeout') as timeout, pg_backend_pid() as pid`,
    )
    return { ...rows[0], claims: rows[0].claims || null }
  }
  try {
    const before = await state()
    assert.is(before.role, 'none')
    const rpc = pgRpc({ pool, claims: { user_id: 'someone' } })
    const calls = [
      () => rpc.call<unknown>('add', { a: 1 }),
      () => rpc.rows<unknown>('thing', { select: ['id'] }),
      () => failure(rpc.call<unknown>('fail', { state: 'PT402' })),
      () => failure(rpc.call<unknown>('forbidden')),
      () => failure(rpc.rows<unknown>('nowhere', { select: ['id'] })),
    ]
    for (const call of calls) {
      await call()
      assert.equal(await state(), before)
    }
    await rpc.close()
    assert.equal(await state(), before) // the pool is its owner's to end
  } finally {
    await pool.end()
  }
})

test('pg: a call that is timed out is ended in Postgres too', async () => {
  const holder = await db.session()
  await holder.query('select pg_advisory_lock(1)')
  const rpc = pgRpc({ connectionString: db.loginUrl, timeout: 100 })
  try {
    const error = await failure(rpc.call<unknown>('wait'))
    assert.match(error.detail, 'statement timeout')
    assert.equal(await db.sql(`select from pg_locks where not granted`), [])
  } finally {
    await holder.end()
    await rpc.close()
  }
})

test('pg: text survives with standard_conforming_strings off', async () => {
  const url = new URL(db.loginUrl)
  url.searchParams.set('options', '-c standard_conforming_strings=off -c escape_string_warning=off')
  const rpc = pgRpc({ connectionString: url.href, claims: { note: NASTY } })
  try {
    assert.is(await rpc.call<unknown>('same_text', { value: NASTY }), NASTY)
    assert.equal(await rpc.call<unknown>('same_json', { value: { [NASTY]: [NASTY] } }), { [NASTY]: [NASTY] })
    assert.equal(await rpc.rows<unknown>('thing', { select: ['id'], where: { name: NASTY } }), [])
  } finally {
    await rpc.close()
  }
})

test('pg: a call is one round trip', async () => {
  const pool = new pg.Pool({ connectionString: db.loginUrl, max: 1 })
  const texts: unknown[] = []
  pool.on('connect', (client) => {
    const query = client.query.bind(client) as (...args: unknown[]) => never
    client.query = ((...args: unknown[]) => {
      texts.push(args[0])
      return query(...args)
    }) as never
  })
  const rpc = pgRpc({ pool })
  await rpc.call<unknown>('add', { a: 1 })
  assert.is(texts.length, 2) // the function's shape is asked once
  await rpc.call<unknown>('add', { a: 2 })
  await failure(rpc.call<unknown>('add', { a: 'x' }))
  assert.is(texts.length, 4)
  assert.ok(texts.every((text) => typeof text === 'string')) // and no prepared statement, which a pooler would lose
  await pool.end()
})

test('pg: a function that has changed is found as it is now', async () => {
  const rpc = pgRpc({ connectionString: db.loginUrl })
  const define = (body: string) =>
    db.sql(`${body}; grant execute on function api.changing to keyledger_gateway`)
  try {
    await define('create function api.changing(a integer) returns integer language sql as $$ select a $$')
    assert.is(await rpc.call<unknown>('changing', { a: 1 }), 1)
    same(await failure(rpc.call<unknown>('changing', { b: 1 })), ['function_not_found', 404])
    await db.sql('drop function api.changing')
    await define(
      'create function api.changing(b text, a integer default 0) returns setof text language sql as $$ select b $$',
    )
    assert.equal(await rpc.call<unknown>('changing', { b: 'x' }), ['x'])
    await db.sql('drop function api.changing')
    await failure(rpc.call<unknown>('changing', { b: 'x' }))
    same(await failure(rpc.call<unknown>('changing', { b: 'x' })), ['function_not_found', 404])
  } finally {
    await rpc.close()
  }
})

test('pg: an exhausted pool is unavailable, and leaks no client', async () => {
  const pool = new pg.Pool({ connectionString: db.loginUrl, max: 1 })
  const taken = await pool.connect()
  const rpc = pgRpc({ pool, timeout: 100 })
  const error = await failure(rpc.call<unknown>('add', { a: 1 }))
  same(error, ['unavailable', 503])
  assert.match(error.hint, '`max`')
  taken.release()
  await until(() => pool.idleCount === 1 && pool.waitingCount === 0, 'the client to be free')
  assert.is(await rpc.call<unknown>('add', { a: 1 }), 3)
  await pool.end()
})

test('pg: an idle connection that breaks ends neither the process nor the next call', async () => {
  const url = new URL(db.loginUrl)
  url.searchParams.set('application_name', 'idle')
  const rpc = pgRpc({ connectionString: url.href })
  const idle = `from pg_stat_activity where application_name = 'idle'`
  await rpc.call<unknown>('add', { a: 1 })
  await db.sql(`select pg_terminate_backend(pid, 5000) ${idle}`)
  assert.equal(await db.sql(`select ${idle}`), [])
  await until(() => rpc.call<unknown>('add', { a: 1 }).catch(() => 0), 'another connection')
  await rpc.close()
  await rpc.close()
})

test('pg: needs a pool or a connection string; wrong ones are unavailable', async () => {
  assert.throws(() => pgRpc({}), /`pool` or `connectionString`/)
  const wrong = new URL(db.loginUrl)
  wrong.password = 'wrong'
  const nowhere = new URL(db.loginUrl)
  nowhere.pathname = '/nowhere'
  for (const { href } of [wrong, nowhere]) {
    const rpc = pgRpc({ connectionString: href })
    const error = await failure(rpc.call<unknown>('add', { a: 1 }))
    same(error, ['unavailable', 503])
    assert.not.match(inspect(error, { depth: 9 }), new URL(db.loginUrl).password)
    await rpc.close()
  }
})

test('postgrest: tokens are asked per request; a refused one has its own code', async () => {
  let asked = 0
  const rpc = postgrestRpc({
    url: `${server.url}/`,
    token: async () => {
      asked++
      return server.token({ role: 'keyledger_gateway' })
    },
  })
  await rpc.call<unknown>('add', { a: 1 })
  await rpc.rows<unknown>('thing', { select: ['id'] })
  assert.is(asked, 2)
  const fixed = await server.token({ role: 'keyledger_gateway' })
  assert.is(await postgrestRpc({ url: server.url, token: fixed }).call<unknown>('add', { a: 1 }), 3)

  const expired = { role: 'keyledger_gateway', exp: 1000 }
  for (const token of [await server.token(expired), `${fixed}x`, 'nonsense', '']) {
    const error = await failure(postgrestRpc({ url: server.url, token }).call<unknown>('add', { a: 1 }))
    same(error, ['invalid_token', 401])
    assert.ok(!isRetryable(error))
    assert.not.match(inspect(error, { depth: 9 }), fixed)
  }
  const none = await failure(
    postgrestRpc({ url: server.url, token: () => Promise.reject(new Error('no token')) }).call<unknown>(
      'add',
    ),
  )
  same(none, ['unavailable', 503])
  assert.is(none.cause.message, 'no token')
})

test('postgrest: a token or a fetch that never comes is given up in time, and may be asked again', async () => {
  const never = () => new Promise<never>(() => {})
  const asked = { url: server.url, timeout: 100 }
  const noToken = await failure(postgrestRpc({ ...asked, token: never }).call<unknown>('add', { a: 1 }))
  same(noToken, ['unavailable', 503])
  const noFetch = await failure(
    postgrestRpc({ ...asked, token: 't', fetch: never }).call<unknown>('add', { a: 1 }),
  )
  same(noFetch, ['timeout', 504])
  assert.ok(isRetryable(noToken) && isRetryable(noFetch))
  assert.equal([mayBeDone(noToken), mayBeDone(noFetch)], [false, true])
})

test('postgrest: an answer that is not its own gets a code all the same', async () => {
  const replies: [status: number, body: string, error: [string, number]][] = [
    [200, '<html>', ['invalid_response', 502]],
    [404, '<html>not here</html>', ['invalid_response', 502]],
    [404, '{"message":"no Route matched"}', ['invalid_response', 502]],
    [302, '', ['invalid_response', 502]],
    [401, '{"message":"No API key found in request"}', ['invalid_token', 401]],
    [413, '<html>', ['payload_too_large', 413]],
    [429, 'slow down', ['unavailable', 503]],
    [500, '', ['unavailable', 503]],
    [502, '<html>bad gateway</html>', ['unavailable', 503]],
    [503, '{"code":"PGRST001","message":"no connection"}', ['unavailable', 503]],
    [504, '{"code":"PGRST003","message":"pool timeout"}', ['unavailable', 503]],
    [500, '{"code":"40001","message":"could not serialize"}', ['serialization_failure', 503]],
    [404, '{"code":"PGRST205","message":"no such table"}', ['view_not_found', 404]],
    [500, 'null', ['unavailable', 503]],
  ]
  let reply = replies[0]!
  const proxy: Server = createServer((_, response) => response.writeHead(reply[0]).end(reply[1]))
  await new Promise<void>((resolve) => proxy.listen(0, '127.0.0.1', resolve))
  const rpc = postgrestRpc({
    url: `http://127.0.0.1:${(proxy.address() as { port: number }).port}`,
    token: 't',
  })
  for (reply of replies) same(await failure(rpc.call<unknown>('add', { a: 1 })), reply[2])
  proxy.closeAllConnections()
  proxy.close()
})

test.run()
