// The nodes that a gateway calls: which nodes, their order, how fresh they are, and how few reads they take.
import { mock } from 'node:test'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { until } from '../../scripts/supervise.ts'
import { createBillingModule, pgRpc, postgrestRpc, type Rpc } from '../../src/index.ts'
import { createNodes } from '../../src/nodes.ts'
import { database } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { seed } from '../support/seed.ts'

const test = suite('nodes')
const db = await database(test)
const server = await db.postgrest()
const rpcs: Record<string, () => Rpc> = {
  postgrest: () =>
    postgrestRpc({ url: server.url, token: () => server.token({ role: 'keyledger_gateway' }) }),
  pg: () => pgRpc({ connectionString: db.loginUrl }),
}

for (const [name, make] of Object.entries(rpcs))
  test(`${name}: the active nodes mounted on the key, by name`, async () => {
    const rpc = make()
    const billing = createBillingModule({ rpc })
    const { keyId, key, nodeId } = await seed(db.operator)
    const [{ name: seeded }] = (await db.operator('select name from api.config_nodes where id = $1', [
      nodeId,
    ])) as [{ name: string }]
    const node = async (name: string) => {
      const [made] = await db.operator(
        `insert into api.config_nodes (name, provider, model, endpoint) values ($1, 'p', 'm', 'http://e') returning id`,
        [name],
      )
      return made!.id as string
    }
    const mount = (id: string) =>
      db.operator(
        'insert into api.virtual_key_config_nodes (virtual_key_id, config_node_id) values ($1, $2)',
        [keyId, id],
      )
    const nodes = async () => billing.nodes(await billing.validate(key))
    try {
      const [b, a] = [await node(`${name} b`), await node(`${name} a`)]
      assert.equal(
        (await nodes()).map(({ name }) => name),
        [seeded],
      )
      await mount(b)
      await mount(a)
      const [, , last] = await nodes()
      assert.equal(
        (await nodes()).map(({ name }) => name),
        [seeded, `${name} a`, `${name} b`],
      )
      const { created_at, ...rest } = last!
      assert.equal(rest, { id: b, name: `${name} b`, provider: 'p', model: 'm', endpoint: 'http://e' })
      assert.ok(Date.parse(created_at))
      await db.operator(`update api.config_nodes set status = 'disabled' where id = $1`, [a])
      const { config_node_ids } = await billing.validate(key)
      assert.ok(config_node_ids.includes(a), 'the key has not changed')
      const names = async () => (await nodes()).map(({ name }) => name)
      await until(async () => (await names()).length === 2, 'the change to be seen')
      assert.equal(await names(), [seeded, `${name} b`])
      // a node made just now is known as soon as it is mounted
      await mount(await node(`${name} c`))
      assert.equal(
        (await nodes()).map(({ name }) => name),
        [seeded, `${name} b`, `${name} c`],
      )
    } finally {
      await billing.stop()
      await rpc.close()
    }
  })

test('one read serves all keys for 5 s, or until a key has a node that the read did not return', async () => {
  let now = 1000
  const clock = mock.method(performance, 'now', () => now)
  let [reads, stored, error] = [0, ['a', 'b'], undefined as unknown]
  let gate: Promise<unknown> | undefined
  const nodes = createNodes({
    async rows<T>() {
      reads++
      const rows = stored.map((id) => ({ id, status: id === 'off' ? 'disabled' : 'active' }))
      await gate
      if (error) throw error
      return rows as T[]
    },
  })
  const ids = async (...config_node_ids: string[]) => (await nodes({ config_node_ids })).map(({ id }) => id)
  try {
    assert.equal(await Promise.all([ids('a'), ids('b', 'a'), ids()]), [['a'], ['a', 'b'], []])
    now += 5000
    assert.equal([await ids('a'), reads], [['a'], 1])
    now += 1
    assert.equal([await ids('a'), reads], [['a'], 2])

    // a disabled node is known too, and needs no new read
    stored = ['a', 'b', 'off']
    now += 5001
    assert.equal([await ids('a', 'off'), await ids('a', 'off'), reads], [['a'], ['a'], 3])

    // a node is made and mounted while a read that can't see it is under way
    let open = () => {}
    gate = new Promise<void>((resolve) => {
      open = resolve
    })
    now += 5001
    const early = ids('a')
    stored = ['a', 'b', 'c']
    const late = ids('c')
    open()
    assert.equal([await early, await late, reads], [['a'], ['c'], 5])

    // while Postgres is away known nodes serve on, and unknown ones refuse nothing
    error = new Error('away')
    now += 5001
    assert.equal(await ids('a'), ['a'])
    assert.is(await failure(ids('a', 'd')), error)
    error = undefined
    stored = ['d']
    assert.equal(await ids('a', 'd'), ['d'])
  } finally {
    clock.mock.restore()
  }
})

test.run()
