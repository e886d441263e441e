// Shared by the benches: servers, callers in flight, and runs that alternate so that both sides
// meet the same machine.
import {
  migrate,
  prepareRoles,
  type Server,
  startPostgres,
  startRedis,
  withDatabase,
} from '../scripts/servers.ts'

export interface Stage {
  /** Superuser's, on the migrated database. Postgres has its default, durable settings. */
  adminUrl: string
  /** Of the login that becomes keyledger_gateway or keyledger_operator. */
  url: string
  redis: Server
  /** A CSV to replay, if one was given. */
  trace?: string
  stop(): Promise<void>
}

/** One comparison with its target. */
export interface Verdict {
  name: string
  /** In words: the figure and its target. */
  says: string
  passes: boolean
}

/** Starts Postgres and Redis, and migrates a database. */
export async function stage(): Promise<Stage> {
  const [postgres, redis] = await Promise.all([startPostgres(), startRedis()])
  if (!redis) throw new Error('redis-server is not in PATH: install it')
  const adminUrl = withDatabase(postgres.url, 'keyledger')
  await migrate(adminUrl)
  const { url } = await prepareRoles(adminUrl)
  return { adminUrl, url, redis, stop: () => Promise.all([postgres.stop(), redis.stop()]).then(() => {}) }
}

/**
 * So many callers, each making its next request when its last one is answered, for `seconds`;
 * answers per second.
 */
export async function perSecond(
  callers: number,
  seconds: number,
  request: () => Promise<unknown>,
): Promise<number> {
  const start = performance.now()
  const end = start + seconds * 1000
  let done = 0
  const caller = async () => {
    while (performance.now() < end) {
      await request()
      done++
    }
  }
  await Promise.all(Array.from({ length: callers }, caller))
  return (done / (performance.now() - start)) * 1000
}

/** The same, until each item has been requested once. */
export async function perSecondOver<T>(
  callers: number,
  items: T[],
  request: (item: T) => Promise<unknown>,
): Promise<number> {
  const start = performance.now()
  let next = 0
  const caller = async () => {
    while (next < items.length) await request(items[next++]!)
  }
  await Promise.all(Array.from({ length: callers }, caller))
  return (items.length / (performance.now() - start)) * 1000
}

/**
 * Runs both sides in turn, `rounds` times after a round to warm up, and compares the two runs of
 * each round: a disturbance of the machine hits both. The verdict is on the median ratio.
 */
export async function compare(
  name: string,
  target: number,
  rounds: number,
  baseline: () => Promise<number>,
  measured: () => Promise<number>,
): Promise<Verdict> {
  const pairs: { base: number; ours: number; ratio: number }[] = []
  for (let round = 0; round <= rounds; round++) {
    const base = await baseline()
    const ours = await measured()
    if (round) pairs.push({ base, ours, ratio: ours / base })
  }
  const each = (pick: (pair: (typeof pairs)[number]) => number, decimals: number) =>
    pairs.map((pair) => pick(pair).toFixed(decimals)).join(' ')
  const ratio = median(pairs.map((pair) => pair.ratio))
  const passes = ratio >= target
  const figure = (values: number[]) => `${Math.round(median(values))}/s`
  console.log(`${name}
  baseline   ${figure(pairs.map(({ base }) => base)).padStart(9)}   ${each(({ base }) => base, 0)}
  keyledger  ${figure(pairs.map(({ ours }) => ours)).padStart(9)}   ${each(({ ours }) => ours, 0)}
  ratio      ${ratio.toFixed(2).padStart(9)}   ${each((pair) => pair.ratio, 2)}
`)
  return { name, says: `${ratio.toFixed(2)} times the baseline, target ${target}`, passes }
}

export function median(values: number[]): number {
  const sorted = [...values].sort((a, b) => a - b)
  return (sorted[(sorted.length - 1) >> 1]! + sorted[sorted.length >> 1]!) / 2
}
