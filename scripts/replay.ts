// Replays a trace through the client: each request is a validate, a hold and a recorded usage, as a
// gateway makes them.
import { type BillingModule, KeyledgerError, newId } from '../src/index.ts'
import { cost, type Prices } from './money.ts'
import type { Population } from './population.ts'
import type { Random, Request } from './trace.ts'

export interface ReplayOptions {
  /** Gateways the requests go to in turn, and a retry to the next one. */
  gateways: BillingModule[]
  trace: Request[]
  population: Population
  prices: Prices
  random: Random
  /** Times real time, or as fast as it goes. */
  speed: number | 'max'
  /** Steps of money each account was given: it must never owe more. */
  funds: bigint
  /** Called after each request with how many are done. */
  progress?: (done: number) => void
}

export interface Replayed {
  seconds: number
  /**
   * Steps of money the admitted requests must have cost, by account; computed here, not asked of
   * SQL.
   */
  expected: Map<string, bigint>
  /** Steps of money admitted past an account's funds, summed over the accounts. */
  overspent: bigint
  /** Requests that were given a hold; the others were refused for lack of funds. */
  admitted: number
  refused: number
  /** Usage sent twice, and how much of that was answered as a duplicate. */
  repeated: number
  duplicates: number
  /** Answers that are neither `charged` nor `duplicate`. */
  parked: number
  /** ms by stage, in no order. */
  latencies: Record<Stage, number[]>
  /** The problems of this run, in words: there must be none. */
  problems: string[]
}

export const stages = ['validate', 'hold', 'record'] as const
export type Stage = (typeof stages)[number]

const inFlight = 128
const repeatShare = 0.01
// A caller allows so many tokens for the answer, since nobody knows its length before. No answer is
// longer than allowed.
const maxTokens = 1024

export const allowed = ({ output }: Request) => Math.max(output, maxTokens)

export async function replay(options: ReplayOptions): Promise<Replayed> {
  const { gateways, trace, population, prices, random, speed, funds, progress = () => {} } = options
  const latencies: Record<Stage, number[]> = { validate: [], hold: [], record: [] }
  const accounts = new Map<string, { admitted: bigint; committed: bigint; most: bigint }>()
  const counts = { admitted: 0, refused: 0, repeated: 0, duplicates: 0, parked: 0 }
  const problems: string[] = []
  // the sender of each request is drawn before, so that it follows from the seed alone
  const plan = trace.map((request) => {
    const key = population.pick()
    const node = key.nodes[Math.floor(random() * key.nodes.length)]!
    return { request, key, node, repeat: random() < repeatShare }
  })

  const account = (id: string) => {
    const known = accounts.get(id) ?? { admitted: 0n, committed: 0n, most: 0n }
    accounts.set(id, known)
    return known
  }
  async function timed<T>(stage: Stage, work: Promise<T>): Promise<T> {
    const start = performance.now()
    const value = await work
    latencies[stage].push(performance.now() - start)
    return value
  }

  async function run({ request, key, node, repeat }: (typeof plan)[number], turn: number) {
    const gateway = gateways[turn % gateways.length]!
    const context = await timed('validate', gateway.validate(key.virtualKey))
    const estimate = { input_tokens: request.input, output_tokens: allowed(request) }
    const hold = await timed(
      'hold',
      gateway.hold(context, { config_node_id: node, meters: estimate }).catch((error) => {
        if (error instanceof KeyledgerError && error.code === 'insufficient_funds') return undefined
        throw error
      }),
    )
    if (!hold) {
      counts.refused++
      return
    }

    counts.admitted++

    // A hold that is not recorded yet is surely set aside now. A use that is recorded, or on its
    // way, surely costs its price. If their sum passes the funds, a hold was admitted without
    // enough money.
    const amount = cost(prices, request.input, allowed(request))
    const actual = cost(prices, request.input, request.output)
    const figures = account(context.account_id)
    figures.committed += amount
    if (figures.committed > figures.most) figures.most = figures.committed
    figures.committed -= amount - actual
    figures.admitted += actual

    const usage = {
      ...context,
      id: newId(),
      config_node_id: node,
      hold_id: hold.id,
      meters: { input_tokens: request.input, output_tokens: request.output },
    }
    const answers = [timed('record', gateway.recordUsage(usage))]
    // a caller that lost patience sends it again, to another gateway, while the first try is on its
    // way
    if (repeat) {
      counts.repeated++
      answers.push(gateways[(turn + 1) % gateways.length]!.recordUsage(usage))
    }
    for (const answer of await Promise.all(answers)) {
      if (answer.status === 'duplicate') counts.duplicates++
      else if (answer.status !== 'charged') counts.parked++
      if (answer.mismatch) problems.push(`usage ${usage.id} was answered as a mismatch`)
    }
  }

  let next = 0
  let done = 0
  const start = performance.now()
  await Promise.all(
    Array.from({ length: inFlight }, async () => {
      while (next < plan.length) {
        const turn = next++
        const { request } = plan[turn]!
        if (speed !== 'max') {
          const early = start + request.at / speed - performance.now()
          if (early > 0) await new Promise((resolve) => setTimeout(resolve, early))
        }
        await run(plan[turn]!, turn)
        progress(++done)
      }
    }),
  )
  const seconds = (performance.now() - start) / 1000
  const past = [...accounts.values()].map(({ most }) => most - funds).filter((steps) => steps > 0n)
  return {
    ...counts,
    seconds,
    latencies,
    problems,
    expected: new Map([...accounts].map(([id, { admitted }]) => [id, admitted])),
    overspent: past.reduce((sum, steps) => sum + steps, 0n),
  }
}
