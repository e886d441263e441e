// Everything on this machine, for trying things by hand: servers and a small world, until Ctrl-C.
// `--help` says more.
import { parseArgs } from 'node:util'
import { createUpstream } from '../examples/upstream.ts'
import {
  migrate,
  prepareRoles,
  startExample,
  startPostgres,
  startPostgrest,
  startRedis,
  withDatabase,
} from './servers.ts'
import { sampleWorld } from './world.ts'

const help = `Starts Postgres, PostgREST and, if it is installed, Redis, with sample tenants, users, keys and prices. Prints where
they are as lines for a shell, then \`ready\`, and runs until Ctrl-C; nothing is kept.

  make dev ARGS='…'

  --proxy   also run the gateway of examples/proxy.ts, before a small upstream that needs no network
  --help    this

DATABASE_URL is the superuser's: \`set role keyledger_operator\` to be one. The tokens don't expire.`

function options() {
  const flag = { type: 'boolean' } as const
  try {
    return parseArgs({ options: { proxy: flag, help: flag } }).values
  } catch (error) {
    console.error(`dev: ${(error as Error).message}; see --help`)
    process.exit(2)
  }
}
const { proxy: withProxy, help: wantsHelp } = options()
if (wantsHelp) {
  console.log(help)
  process.exit(0)
}

process.on('uncaughtException', (error) => {
  console.error(error.constructor === Error ? `dev: ${error.message}` : error)
  process.exit(1)
})
// keeps us running. make is our parent; a killed make tells nobody
const parent = process.ppid
setInterval(() => process.ppid === parent || process.exit(1), 1000)

const say = (text: string) => void process.stderr.write(`${text}\n`)
say('starting Postgres, PostgREST and Redis …')
const [postgres, redis] = await Promise.all([startPostgres(), startRedis()])
const databaseUrl = withDatabase(postgres.url, 'keyledger')
await migrate(databaseUrl)
const { url: loginUrl } = await prepareRoles(databaseUrl)
const postgrest = await startPostgrest({ databaseUrl: loginUrl })
const upstream = createUpstream()
await new Promise<void>((resolve) => upstream.listen(0, '127.0.0.1', resolve))
const endpoint = `http://127.0.0.1:${(upstream.address() as { port: number }).port}/v1`
const world = await sampleWorld(databaseUrl, endpoint)
const servers = {
  DATABASE_URL: databaseUrl,
  POSTGREST_URL: postgrest.url,
  REDIS_URL: redis?.url,
  GATEWAY_TOKEN: await postgrest.token({ role: 'keyledger_gateway' }),
}
const proxy = withProxy ? await startExample('proxy', servers) : undefined

const lines: Record<string, string | undefined> = {
  ...servers,
  OPERATOR_TOKEN: await postgrest.token({ role: 'keyledger_operator' }),
  MEMBER_TOKEN: await postgrest.token({ role: 'keyledger_member', user_id: world.USER_ID }),
  PROXY_URL: proxy?.url,
  ...world,
}
say(`
Acme (TENANT_ID) pays for Ann, its admin (USER_ID, MEMBER_TOKEN, VIRTUAL_KEY), and for Ben; Bob pays alone.
Node demo (NODE_ID) serves model demo, at USD 2.50 a million tokens in, 1.25 cached, 10.00 out.`)
if (proxy)
  say(
    'The gateway (PROXY_URL) speaks the OpenAI API at /v1, to VIRTUAL_KEY. Its upstream repeats what it is told.',
  )
if (!redis) say('There is no REDIS_URL: redis-server is not installed.')
say(
  'Paste these lines into another terminal, after `set -a` if programs there are to see them. Ctrl-C ends it all.\n',
)
// nothing in them is special to a shell
for (const [name, value] of Object.entries(lines)) if (value !== undefined) console.log(`${name}=${value}`)
console.log('ready')
