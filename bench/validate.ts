// Validating from Redis alone, over keys this process hasn't met, against a bare ioredis `get` of
// the same entries.
import { createHash } from 'node:crypto'
import { Redis } from 'ioredis'
import pg from 'pg'
import { createBillingModule, pgRpc } from './library.ts'
import { compare, perSecondOver, type Stage, type Verdict } from './support.ts'

const inFlight = 64
const keyCount = 20_000
const rounds = 7
const target = 0.65

export async function benchValidate({ adminUrl, url, redis }: Stage): Promise<Verdict[]> {
  const admin = new pg.Client(adminUrl)
  await admin.connect()
  const { rows } = await admin.query(
    `with owner as (insert into api.user_profiles (id) values (gen_random_uuid()) returning id)
     select (api.create_virtual_key(id)).virtual_key from owner, generate_series(1, $1)`,
    [keyCount],
  )
  await admin.end()
  const keys: string[] = rows.map((row) => row.virtual_key)
  const names = keys.map((key) => `vk:${createHash('sha256').update(key).digest('hex')}`)

  const rpc = pgRpc({ connectionString: url })
  // a gateway that has just started: its memory is empty
  async function withGateway<T>(
    use: (gateway: ReturnType<typeof createBillingModule>) => Promise<T>,
  ): Promise<T> {
    const connection = new Redis(redis.url)
    const gateway = createBillingModule({ rpc, redis: connection, changes: { listen: url } })
    await connection.ping()
    await gateway.start()
    try {
      return await use(gateway)
    } finally {
      await gateway.stop()
      connection.disconnect()
    }
  }

  await withGateway((gateway) => perSecondOver(inFlight, keys, gateway.validate))
  const bare = new Redis(redis.url)
  const verdict = await compare(
    `validate from Redis, ${inFlight} in flight, ${keyCount} keys`,
    target,
    rounds,
    () =>
      perSecondOver(inFlight, names, async (name) => {
        if ((await bare.get(name)) === null) throw new Error(`${name} is not in Redis`)
      }),
    () =>
      withGateway(async (gateway) => {
        const rate = await perSecondOver(inFlight, keys, gateway.validate)
        const { answers } = gateway.health().cache
        if (answers.redis !== keyCount) throw new Error(`not all from Redis: ${JSON.stringify(answers)}`)
        return rate
      }),
  )
  bare.disconnect()
  await rpc.close()
  return [verdict]
}
