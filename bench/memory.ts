// Memory over ten replays of a trace through one gateway: the heap after each replay, once garbage
// is collected.
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { Redis } from 'ioredis'
import { fromSteps, toSteps } from '../scripts/money.ts'
import { populate } from '../scripts/population.ts'
import { replay } from '../scripts/replay.ts'
import { makeTrace, readTrace, seeded } from '../scripts/trace.ts'
import { createBillingModule, pgRpc } from '../src/index.ts'
import type { Stage, Verdict } from './support.ts'

const replays = 10
// unless a trace is given
const requests = 5000
// bytes of heap and buffers: the line through the replays may rise so much from the third, when
// caches are full, to the last
const allowedRise = 0.03

export async function benchMemory({ url, redis, trace: file }: Stage): Promise<Verdict[]> {
  setFlagsFromString('--expose-gc')
  const collect: () => void = runInNewContext('gc')
  const random = seeded(1)
  const prices = { input: toSteps('2.50')!, output: toSteps('10.00')! }
  const funds = toSteps('1000000')!
  const population = await populate({
    ...{ databaseUrl: url, random, users: 500, tenants: 25, funds: fromSteps(funds) },
    inputPrice: fromSteps(prices.input),
    outputPrice: fromSteps(prices.output),
  })
  const trace = file === undefined ? makeTrace(requests, random) : readTrace(file)
  const rpc = pgRpc({ connectionString: url })
  const connection = new Redis(redis.url)
  const gateway = createBillingModule({ rpc, redis: connection, changes: { listen: url } })
  await gateway.start()

  const heaps: number[] = []
  console.log(
    `memory after each of ${replays} replays of ${trace.length} requests, in MB\n  heap and buffers, RSS`,
  )
  for (let n = 0; n < replays; n++) {
    await replay({ gateways: [gateway], trace, population, prices, random, funds, speed: 'max' })
    // the closures of the last answers are gone a turn later
    await new Promise((resolve) => setTimeout(resolve, 100))
    collect()
    const { heapUsed, external, rss } = process.memoryUsage()
    heaps.push((heapUsed + external) / 2 ** 20)
    console.log(`  ${heaps.at(-1)!.toFixed(2)}  ${(rss / 2 ** 20).toFixed(1).padStart(6)}`)
  }
  await gateway.stop()
  connection.disconnect()
  await rpc.close()

  const counted = heaps.slice(2)
  const slope = slopeOf(counted)
  const rise = (slope * (counted.length - 1)) / counted[0]!
  return [
    {
      name: `memory over ${replays} replays`,
      says: `heap and buffers rise ${(slope * 1024).toFixed(0)} kB a replay, ${(rise * 100).toFixed(1)} % in all, allowed ${allowedRise * 100} %`,
      passes: rise <= allowedRise,
    },
  ]
}

// of the least-squares line, per step
function slopeOf(values: number[]): number {
  const middle = (values.length - 1) / 2
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length
  const above = values.reduce((sum, value, n) => sum + (n - middle) * (value - mean), 0)
  return above / values.reduce((sum, _, n) => sum + (n - middle) ** 2, 0)
}
