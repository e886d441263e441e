// The demo: real servers, LLM traffic through the client, and a proof of every cent. `--help` lists
// the options.
import { basename } from 'node:path'
import { Redis } from 'ioredis'
import { createBillingModule, pgRpc, postgrestRpc } from '../src/index.ts'
import { demoOptions, wrongOption } from './demo-options.ts'
import { cost, fromSteps, toSteps } from './money.ts'
import { populate } from './population.ts'
import { createProgress } from './progress.ts'
import { prove } from './proof.ts'
import { allowed, replay } from './replay.ts'
import { type CacheAnswers, figures, table } from './report.ts'
import { migrate, prepareRoles, startPostgres, startPostgrest, startRedis, withDatabase } from './servers.ts'
import { makeTrace, readTrace, seeded } from './trace.ts'

// they share Redis, as gateways behind a load balancer do
const gatewayCount = 2
const generatedRequests = 5000

const options = demoOptions()
const random = seeded(options.seed)
const trace = (() => {
  if (!options.trace) return makeTrace(generatedRequests, random)
  try {
    return readTrace(options.trace)
  } catch (error) {
    wrongOption(`--trace: ${(error as Error).message}`)
  }
})()
const prices = { input: toSteps(options.inputPrice)!, output: toSteps(options.outputPrice)! }
const enough = trace.reduce((sum, request) => sum + cost(prices, request.input, allowed(request)), 0n)
const funds = options.funds === undefined ? enough : toSteps(options.funds)!
if (enough >= 10n ** 22n)
  wrongOption('the trace would cost 1e12 or more: lower --input-price and --output-price')

process.on('uncaughtException', (error) => {
  // our own words are enough; anything else needs its stack
  console.error(error.constructor === Error ? `demo: ${error.message}` : error)
  process.exit(1)
})
const say = (text: string) => void process.stderr.write(`${text}\n`)
say(`starting Postgres${options.transport === 'postgrest' ? ', PostgREST' : ''} and Redis …`)
const [postgres, redis] = await Promise.all([startPostgres(), startRedis()])
const adminUrl = withDatabase(postgres.url, 'keyledger')
await migrate(adminUrl)
const { url } = await prepareRoles(adminUrl)
const postgrest = options.transport === 'postgrest' ? await startPostgrest({ databaseUrl: url }) : undefined
const token = await postgrest?.token({ role: 'keyledger_gateway' })

say(`making ${options.users} users, ${options.tenants} tenants, their keys, nodes and prices …`)
const population = await populate({ ...options, databaseUrl: url, random, funds: fromSteps(funds) })

const progress = createProgress(trace.length)
const rpcs = Array.from({ length: gatewayCount }, () =>
  postgrest ? postgrestRpc({ url: postgrest.url, token: token! }) : pgRpc({ connectionString: url }),
)
const caches = rpcs.map(() => (redis ? new Redis(redis.url) : undefined))
const gateways = rpcs.map((rpc, n) =>
  createBillingModule({ rpc, redis: caches[n], changes: { listen: url } }),
)
for (const gateway of gateways) await gateway.start()
const replayed = await replay({
  ...{ gateways, trace, population, prices, random, funds },
  speed: options.speed,
  progress: progress.update,
}).finally(progress.clear)
const cache: CacheAnswers = { memory: 0, redis: 0, database: 0 }
for (const gateway of gateways) {
  const { answers } = gateway.health().cache
  for (const tier of ['memory', 'redis', 'database'] as const) cache[tier] += answers[tier]
  await gateway.stop()
}
for (const rpc of rpcs) await rpc.close()
for (const cache of caches) cache?.disconnect()

say('verifying …')
const proof = await prove(url, replayed, funds)
if (replayed.refused && funds >= enough)
  proof.problems.push(`${replayed.refused} requests were refused, and every account could pay for all`)
const what = options.trace ? basename(options.trace) : 'a generated trace'
const run = {
  ...{ requests: trace.length, replayed, proof, cache, hasRedis: redis !== undefined },
  title: `keyledger: ${what}, ${population.keys.length} keys of ${options.users} users and ${options.tenants} tenants, ${gatewayCount} gateways, through ${options.transport === 'pg' ? 'pg' : 'PostgREST'}`,
}
console.log(table(run))
if (options.json) console.log(JSON.stringify(figures(run)))
process.exitCode = proof.problems.length ? 1 : 0
await Promise.all([postgrest, postgres, redis].map((server) => server?.stop()))
