// Many rows written at once through the views, as postgrest-js and other clients of PostgREST write them.
import { randomUUID } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database, type Row } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { newId } from '../support/ids.ts'
import { seed } from '../support/seed.ts'

const test = suite('bulk writes')
const db = await database(test)
const { url, token } = await db.postgrest()
const authorization = `Bearer ${await token({ role: 'keyledger_operator' })}`

// as postgrest-js does: `columns` names each column of any row; `missing=default` is `defaultToNull: false`
async function send(path: string, rows: Row[], prefer: string[] = [], method = 'POST') {
  const [view, query] = path.split('?')
  const columns = [...new Set(rows.flatMap(Object.keys))].map((name) => `"${name}"`).join(',')
  const search = new URLSearchParams(query)
  search.set('columns', columns)
  const response = await fetch(`${url}/${view}?${search}`, {
    method,
    headers: {
      authorization,
      'content-type': 'application/json',
      prefer: ['return=representation', ...prefer].join(','),
    },
    body: JSON.stringify(method === 'PATCH' ? rows[0] : rows),
  })
  return { status: response.status, answer: (await response.json()) as Row }
}
const withDefaults = ['missing=default']
const merging = ['resolution=merge-duplicates']

const { keyId, nodeId } = await seed(db.operator)
const other = await seed(db.operator)
const id = randomUUID
/** Per view: rows, each of which lacks one column with a default; and the defaults. */
const [{ id: bookId }] = (await db.operator(
  `insert into api.price_books (name) values ('a book') returning id`,
)) as [Row]
let moments = 0
const newMoment = () =>
  new Date(Date.UTC(2026, 0, 1) + ++moments * 1000).toISOString().replace('.000Z', '+00:00')
const unequal: Record<string, { rows: () => Row[]; defaults: Row }> = {
  tenants: {
    rows: () => [
      { id: id(), name: 'whole', external_id: id(), currency: 'EUR', status: 'suspended' },
      { name: 'bare' },
      { name: 'bare too', external_id: id() },
    ],
    defaults: { external_id: null, currency: 'USD', status: 'active' },
  },
  user_profiles: {
    rows: () => [
      { id: id(), tenant_role: 'admin', external_id: id(), currency: 'EUR', status: 'suspended' },
      { display_name: 'bare' },
    ],
    defaults: { tenant_role: 'member', external_id: null, currency: 'USD', status: 'active' },
  },
  config_nodes: {
    rows: () => [
      { id: id(), name: `whole ${id()}`, model: 'm', status: 'disabled' },
      { name: `bare ${id()}` },
    ],
    defaults: { model: null, status: 'active' },
  },
  minimum_charges: {
    rows: () => [
      {
        config_node_id: nodeId,
        minimum: '0.5',
        currency: 'EUR',
        effective_from: newMoment(),
      },
      { config_node_id: nodeId, minimum: '0' },
    ],
    defaults: { currency: 'USD' },
  },
  price_book_factors: {
    rows: () => [
      { price_book_id: bookId, factor: '1.5', effective_from: newMoment() },
      { price_book_id: bookId, factor: '2' },
    ],
    defaults: {},
  },
  price_books: {
    rows: () => [{ id: id(), name: id(), currency: 'EUR', kind: 'price' }, { name: id() }],
    defaults: { currency: 'USD', kind: 'price' },
  },
  prices: {
    rows: () => [
      {
        ...{ config_node_id: nodeId, meter: `m${newId().slice(-9)}`, unit_price: '1.5', unit_size: 1000 },
        ...{ currency: 'EUR', effective_from: '2026-01-01T00:00:00+00:00', variant: '', context_over: 0 },
      },
      { config_node_id: nodeId, meter: `m${newId().slice(-9)}`, unit_price: '2' },
    ],
    defaults: { unit_size: 1, currency: 'USD', variant: '', context_over: 0 },
  },
  virtual_key_config_nodes: {
    rows: () => [{ virtual_key_id: keyId, config_node_id: other.nodeId }],
    defaults: {},
  },
}

for (const [view, { rows, defaults }] of Object.entries(unequal)) {
  test(`${view}: rows of unequal columns go in with missing=default`, async () => {
    const given = rows()
    const { status, answer } = await send(view, given, withDefaults)
    assert.is(status, 201, JSON.stringify(answer))
    for (const [i, row] of given.entries())
      for (const [name, value] of Object.entries({ ...defaults, ...row }))
        assert.is(String(answer[i][name]), String(value), `${view}.${name} of row ${i}`)
    if ('id' in answer[0]) assert.is(new Set(answer.map((row: Row) => row.id)).size, given.length)
  })

  for (const name of Object.keys(defaults).filter((name) => defaults[name] !== null))
    test(`${view}: a null ${name}, given or filled in, is refused in plain words`, async () => {
      const [whole, bare] = rows()
      for (const given of [[whole!, { ...whole, [name]: null }], [{ ...bare, [name]: null }]]) {
        const { status, answer } = await send(view, given, given.length > 1 ? [] : withDefaults)
        assert.equal([status, answer.message], [422, 'value_required'])
        assert.match(answer.details, new RegExp(`: ${name} is null$`))
        assert.match(answer.hint, 'missing=default')
        assert.not.match(JSON.stringify(answer), 'data.')
      }
    })
}

test('each view that takes inserts has exactly the defaults of its table', async () => {
  const columns = await db.sql(`
    select c.relname as view, a.attname as name,
      pg_get_expr(d.adbin, d.adrelid) as default, (
        select pg_get_expr(t.adbin, t.adrelid) from pg_attrdef t
        join pg_attribute b on b.attrelid = t.adrelid and b.attnum = t.adnum
        where b.attname = a.attname and t.adrelid = (
          select distinct p.refobjid from pg_rewrite r
          join pg_depend p on p.objid = r.oid and p.classid = 'pg_rewrite'::regclass and p.refclassid = 'pg_class'::regclass
          where r.ev_class = c.oid and p.refobjid <> c.oid
            and p.refobjid = to_regclass('data.' || regexp_replace(c.relname, 's$', '')))
      ) as of_table
    from pg_class c
    join pg_attribute a on a.attrelid = c.oid and a.attnum > 0
    left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
    where c.relnamespace = 'api'::regnamespace and c.relkind = 'v'
      and has_column_privilege('keyledger_operator', c.oid, a.attnum, 'insert')
    order by 1, a.attnum`)
  assert.equal([...new Set(columns.map(({ view }) => view))], Object.keys(unequal).toSorted())
  assert.is(columns.filter((column) => column.default).length, 20)
  for (const { view, name, default: own, of_table } of columns) assert.is(own, of_table, `${view}.${name}`)
})

test('a refusal names a required column that is missing, or null in an update', async () => {
  const cases: [path: string, rows: Row[], method: string, column: string][] = [
    ['tenants', [{ external_id: id() }], 'POST', 'name'],
    ['config_nodes', [{ model: 'm' }], 'POST', 'name'],
    ['prices', [{ config_node_id: nodeId, meter: 'requests' }], 'POST', 'unit_price'],
    ['virtual_key_config_nodes', [{ virtual_key_id: keyId }], 'POST', 'config_node_id'],
    [`tenants?id=eq.${other.tenantId}`, [{ name: null }], 'PATCH', 'name'],
    [`user_profiles?id=eq.${other.userId}`, [{ tenant_role: null }], 'PATCH', 'tenant_role'],
    [`config_nodes?id=eq.${other.nodeId}`, [{ status: null }], 'PATCH', 'status'],
  ]
  for (const [path, rows, method, column] of cases) {
    const { status, answer } = await send(path, rows, [], method)
    assert.equal([status, answer.message], [422, 'value_required'], path)
    assert.match(answer.details, `: ${column} is null`)
  }
})

test('a currency as other systems write it is refused, and the hint names the right one', async () => {
  const price = { config_node_id: nodeId, meter: 'requests', unit_price: '1' }
  for (const [view, row] of Object.entries({ tenants: { name: 't' }, user_profiles: {}, prices: price }))
    for (const [currency, right] of [
      ['usd', 'USD'],
      ['Eur', 'EUR'],
      ['US dollars', 'USD'],
      ['', 'USD'],
    ]) {
      const { status, answer } = await send(view, [{ ...row, currency }])
      assert.equal([status, answer.message, answer.hint], [422, 'invalid_currency', `write "${right}"`])
    }
})

const repeated: Record<string, { row: () => Row; key: string; change: Row }> = {
  tenants: {
    row: () => ({ id: id(), name: 'first', external_id: id(), currency: 'EUR', status: 'active' }),
    ...{ key: 'external_id', change: { name: 'second' } },
  },
  user_profiles: {
    row: () => ({
      ...{ id: id(), tenant_id: null, tenant_role: 'member', external_id: id(), display_name: 'first' },
      ...{ currency: 'EUR', status: 'active' },
    }),
    ...{ key: 'external_id', change: { display_name: 'second' } },
  },
  config_nodes: {
    row: () => ({ id: id(), name: id(), provider: 'p', model: 'm', endpoint: 'first', status: 'active' }),
    ...{ key: 'name', change: { endpoint: 'second' } },
  },
}
for (const [view, { row, key, change }] of Object.entries(repeated))
  test(`${view}: an upsert of whole rows accepts unchanged fixed columns, and refuses a change of them`, async () => {
    const first = row()
    assert.is((await send(view, [first], merging)).status, 201)
    const again = { ...first, ...change }
    for (const path of [view, `${view}?on_conflict=${key}`]) {
      const { status, answer } = await send(path, [again, row()], merging)
      assert.ok(status === 200 || status === 201, JSON.stringify(answer))
      for (const [name, value] of Object.entries(again)) assert.is(answer[0][name], value, name)
    }
    const fixed: [Row, string][] = [[{ ...first, id: id() }, 'id_is_fixed']]
    if ('currency' in first) fixed.push([{ ...first, currency: 'USD' }, 'currency_is_fixed'])
    for (const [changed, code] of fixed) {
      const { status, answer } = await send(`${view}?on_conflict=${key}`, [changed], merging)
      assert.equal([status, answer.message], [409, code])
    }
    const [kept] = await db.operator(`select id, ${key} from api.${view} where id = $1`, [first.id])
    assert.equal(kept, { id: first.id, [key]: first[key] })
  })

test('a mount may be sent twice, and moved', async () => {
  const mount = { virtual_key_id: other.keyId, config_node_id: nodeId }
  for (const prefer of [merging, merging, ['resolution=ignore-duplicates']]) {
    const { status, answer } = await send('virtual_key_config_nodes', [mount], prefer)
    assert.ok(status === 200 || status === 201, JSON.stringify(answer))
  }
})

test('a mount that moves to another node evicts its key', async () => {
  const world = await seed(db.operator)
  const cursor = (await db.gateway('select api.cache_changes() as c'))[0]!.c.cursor
  const moved = `update api.virtual_key_config_nodes set config_node_id = $2 where virtual_key_id = $1`
  await db.operator(moved, [world.keyId, nodeId])
  const [context] = await db.gateway('select * from api.resolve_virtual_key($1)', [world.keyHash])
  assert.equal(context!.config_node_ids, [nodeId])
  const [changes] = await db.gateway('select api.cache_changes($1) as c', [cursor])
  assert.ok(changes!.c.keys.includes(`vk:${world.keyHash}`))
  const gone = failure(db.operator(moved, [world.keyId, id()]))
  assert.is((await gone).code, '23503')
})

test('PostgREST embeds views in each other exactly where docs/api.md says so', async () => {
  const text = readFileSync(new URL('../../docs/api.md', import.meta.url), 'utf8')
  const [, list] = text.match(/between these views only: ([^:]+):/)!
  const said = [...list!.matchAll(/`(\w+)` and\s+`(\w+)`/g)].flatMap(([, a, b]) => [`${a} ${b}`, `${b} ${a}`])
  const views = (
    await db.sql(
      `select relname as name from pg_class
        where relnamespace = 'api'::regnamespace and relkind = 'v' and has_table_privilege('keyledger_operator', oid, 'select')`,
    )
  ).map(({ name }) => name as string)
  const embedded: string[] = []
  for (const a of views)
    for (const b of views) {
      const response = await fetch(`${url}/${a}?select=*,${b}(*)&limit=0`, { headers: { authorization } })
      const { code } = response.ok ? { code: null } : ((await response.json()) as Row)
      assert.ok([null, 'PGRST200'].includes(code), `${a} ${b}: ${code}`)
      if (!code) embedded.push(`${a} ${b}`)
    }
  assert.equal(embedded.toSorted(), said.toSorted())
})

test.run()
