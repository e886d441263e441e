// A Redis Cluster of three shards with replicas: a key that was revoked stays so when a replica
// that lagged takes over.
import { createHash } from 'node:crypto'
import { Cluster, Redis } from 'ioredis'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { temporaryDirectory } from '../../scripts/binaries.ts'
import { freePort, secret } from '../../scripts/servers.ts'
import { type Supervised, supervise, until } from '../../scripts/supervise.ts'
import { type BillingModule, type Changes, createBillingModule, pgRpc } from '../../src/index.ts'
import { database } from '../support/database.ts'
import { seed, type World } from '../support/seed.ts'

interface Node {
  port: number
  busPort: number
  process: Supervised
  admin: Redis
  id: string
}

const test = suite('redis-cluster')
const db = await database(test)
const password = secret()
const open: (() => unknown)[] = []
let nodes: Node[] = []

test.after.each(async () => {
  for (const close of open.splice(0).reverse()) await close()
})

async function startNode(): Promise<Node> {
  const [port, busPort] = [await freePort(), await freePort()]
  const dir = temporaryDirectory('redis')
  const settings = {
    port,
    bind: '127.0.0.1',
    save: '',
    dir,
    requirepass: password,
    masterauth: password,
    'cluster-enabled': 'yes',
    'cluster-port': busPort,
    'cluster-announce-ip': '127.0.0.1',
    'cluster-node-timeout': 1000,
    // however old its copy is
    'cluster-replica-validity-factor': 0,
    'repl-diskless-sync-delay': 0,
  }
  const argv = Object.entries(settings).flatMap(([name, value]) => [`--${name}`, String(value)])
  const process = await supervise({ dir, argv: ['redis-server', ...argv] })
  const admin = new Redis({ port, host: '127.0.0.1', password, retryStrategy: () => 50 }).on(
    'error',
    () => {},
  )
  const id = String(await admin.cluster('MYID'))
  return { port, busPort, process, admin, id }
}

/** Three masters and then their replicas. */
async function startCluster() {
  nodes = await Promise.all(Array.from({ length: 6 }, startNode))
  db.onClose(async () => {
    for (const { admin } of nodes) admin.disconnect()
    await Promise.all(nodes.map(({ process }) => process.end()))
  })
  const [first] = nodes as [Node]
  for (const [i, { admin }] of nodes.entries()) {
    await admin.cluster('SET-CONFIG-EPOCH', i + 1)
    if (i < 3)
      await admin.cluster('ADDSLOTSRANGE', Math.floor((16384 / 3) * i), Math.floor((16384 / 3) * (i + 1)) - 1)
    if (i > 0) await admin.call('CLUSTER', 'MEET', '127.0.0.1', first.port, first.busPort)
  }
  const everybody = (text: string) => text.trim().split('\n').length === 6
  for (const { admin } of nodes)
    await until(async () => everybody(String(await admin.call('CLUSTER', 'NODES'))), 'the nodes to meet')
  for (const [i, { admin }] of nodes.slice(3).entries())
    await admin.call('CLUSTER', 'REPLICATE', nodes[i]!.id)
  for (const { admin } of nodes.slice(3))
    await until(
      async () => (await admin.info('replication')).includes('master_link_status:up'),
      'replication',
    )
  for (const { admin } of nodes)
    await until(async () => (await admin.cluster('INFO')).includes('cluster_state:ok'), 'the cluster')
}

/** Which of the three shards has the key, by its name. */
async function shardOf(name: string): Promise<number> {
  const slot = Number(await nodes[0]!.admin.cluster('KEYSLOT', name))
  return Math.min(2, Math.floor(slot / (16384 / 3)))
}

/** Where an entry of the hash is now: the shard, and its name there. */
async function entryOf(hash: string): Promise<{ shard: number; name: string } | undefined> {
  for (const shard of [0, 1, 2]) {
    const [name] = await nodes[shard]!.admin.keys(`*${hash}`)
    if (name && !(await nodes[shard]!.admin.get(name))!.startsWith('lease:')) return { shard, name }
  }
  return undefined
}

async function gateway(changes: Changes): Promise<BillingModule> {
  const rpc = pgRpc({ connectionString: db.loginUrl })
  const redis = new Cluster(
    nodes.map(({ port }) => ({ host: '127.0.0.1', port })),
    { redisOptions: { password }, clusterRetryStrategy: () => 100, slotsRefreshInterval: 500 },
  ).on('error', () => {})
  const billing = createBillingModule({ rpc, redis, changes })
  open.push(async () => {
    await billing.stop()
    redis.disconnect()
    await rpc.close()
  })
  await billing.start()
  await trusts(billing)
  return billing
}
const trusts = (billing: BillingModule) => until(() => billing.health().cache.redis, 'trust in Redis')
const codeOf = (billing: BillingModule, { key }: World): Promise<string> =>
  billing.validate(key).then(
    () => 'accepted',
    ({ code }) => code,
  )
const refused = async (billing: BillingModule, world: World) =>
  (await codeOf(billing, world)) === 'virtual_key_disabled'

test('a revoked key stays revoked when the replica of a shard, which had not heard of it, takes over', async () => {
  await startCluster()
  const [one, follower] = [await gateway({ listen: db.loginUrl }), await gateway('follow')]
  // a key that would be in another shard than the cursor, if both went by their plain names
  let world: World
  do world = await seed(db.operator)
  while ((await shardOf(`vk:${world.keyHash}`)) === (await shardOf('vk:cursor')))
  assert.is(world.keyHash, createHash('sha256').update(world.key).digest('hex'))
  for (const billing of [one, follower])
    await until(() => billing.validate(world.key).then(Boolean, () => false), 'the key to be known')
  const { shard, name } = await until(() => entryOf(world.keyHash), 'the entry')
  const [master, replica] = [nodes[shard]!, nodes[shard + 3]!]
  await until(() => replica.admin.exists(name).catch(() => replica.admin.call('READONLY')), 'the copy')

  // the replica hears no more
  await replica.admin.config('SET', 'masterauth', 'wrong')
  await master.admin.call('CLIENT', 'KILL', 'TYPE', 'replica')
  await until(
    async () => (await replica.admin.info('replication')).includes('master_link_status:down'),
    'the lag',
  )

  await db.operator('select api.revoke_virtual_key($1)', [world.keyId])
  for (const billing of [one, follower]) await until(() => refused(billing, world), 'the key to be refused')
  process.kill(master.process.pid, 'SIGKILL')
  await until(async () => (await replica.admin.info('replication')).includes('role:master'), 'the takeover')

  // the modules that were there, and new ones, which know only the state of Redis
  for (const billing of [one, follower]) assert.ok(await refused(billing, world))
  const late = [await gateway({ listen: db.loginUrl }), await gateway('follow')]
  for (const billing of [one, follower]) await trusts(billing)
  for (const billing of [one, follower, ...late])
    for (let i = 0; i < 10; i++) assert.ok(await refused(billing, world))
})

test('clients that read from replicas are refused in plain words', () => {
  const rpc = pgRpc({ connectionString: db.loginUrl })
  const lazyConnect = true
  const clients = {
    scaleReads: new Cluster([], { lazyConnect, scaleReads: 'slave' }),
    'scaleReads ': new Cluster([], { lazyConnect, scaleReads: 'all' }),
    ' scaleReads': new Cluster([], { lazyConnect, scaleReads: (found: unknown[]) => found[0] }),
    readOnly: new Redis({ lazyConnect, readOnly: true }),
    'readOnly ': new Cluster([], { lazyConnect, redisOptions: { readOnly: true } as object }),
    role: new Redis({ lazyConnect, role: 'slave', sentinels: [{ host: '127.0.0.1', port: 1 }], name: 'm' }),
  }
  for (const [option, redis] of Object.entries(clients)) {
    const named = new RegExp(`replicas .*${option.trim()}`)
    assert.throws(() => createBillingModule({ rpc, redis }), named)
    redis.disconnect()
  }
  for (const redis of [
    new Cluster([], { lazyConnect }),
    new Redis({ lazyConnect }),
    new Redis({ lazyConnect, sentinels: [{ host: '127.0.0.1', port: 1 }], name: 'm' }),
  ]) {
    createBillingModule({ rpc, redis })
    redis.disconnect()
  }
})

test.run()
