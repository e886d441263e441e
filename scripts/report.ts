// The report of a demo run: a table for people, one line of JSON for programs.
import type { Proof } from './proof.ts'
import { type Replayed, type Stage, stages } from './replay.ts'

const listedProblems = 10

/** Answers of `validate` by the tier they came from. */
export type CacheAnswers = Record<'memory' | 'redis' | 'database', number>

export interface Run {
  requests: number
  replayed: Replayed
  proof: Proof
  cache: CacheAnswers
  /** A heading for the run. */
  title: string
  hasRedis: boolean
}

/**
 * The sample below which a share of all samples lies, in ms with three decimals; null without
 * samples.
 */
function percentile(samples: number[], share: number): number | null {
  if (!samples.length) return null
  const sorted = Float64Array.from(samples).sort()
  return rounded(sorted[Math.ceil(share * sorted.length) - 1]!, 3)
}

const rounded = (value: number, decimals: number) => Number(value.toFixed(decimals))

/** The figures as one object, in the order they are documented. */
export function figures({ requests, replayed, proof, cache }: Run) {
  const { seconds, latencies } = replayed
  const stage = (name: Stage) => ({
    [`${name}_p50_ms`]: percentile(latencies[name], 0.5),
    [`${name}_p99_ms`]: percentile(latencies[name], 0.99),
  })
  return {
    requests,
    charged_total: proof.chargedTotal,
    expected_total: proof.expectedTotal,
    overspent: proof.overspent,
    refused: replayed.refused,
    duplicates: replayed.duplicates,
    parked: proof.parked,
    verification_errors: proof.verificationErrors,
    seconds: rounded(seconds, 3),
    requests_per_second: rounded(requests / seconds, 1),
    ...stage('validate'),
    ...stage('hold'),
    ...stage('record'),
    cache,
  }
}

/** The same for people. */
export function table(run: Run): string {
  const { requests, replayed, proof, cache, title, hasRedis } = run
  const count = (value: number) => value.toLocaleString('en-US')
  const perSecond = Math.round(requests / replayed.seconds)
  const ms = (value: number | null) => (value === null ? '-' : `${value.toFixed(2)} ms`)
  const rows: (string[] | undefined)[] = [
    ['requests', count(requests), `in ${replayed.seconds.toFixed(1)} s, ${count(perSecond)} per second`],
    ['refused', count(replayed.refused), 'for lack of funds; neither used nor charged'],
    undefined,
    ['', 'p50', 'p99'.padStart(11)],
    ...stages.map((name) => {
      const samples = replayed.latencies[name]
      return [name, ms(percentile(samples, 0.5)), ms(percentile(samples, 0.99)).padStart(11)]
    }),
    undefined,
    ['validated', count(cache.memory), 'from memory'],
    ['', count(cache.redis), hasRedis ? 'from Redis' : 'from Redis, which is not installed'],
    ['', count(cache.database), 'from Postgres'],
    undefined,
    ['charged', proof.chargedTotal, "USD, the sum of the ledger's usage entries"],
    ['expected', proof.expectedTotal, 'USD, computed from the trace, without SQL'],
    ['overspent', proof.overspent, 'USD held past what was available'],
    [
      'duplicates',
      count(replayed.duplicates),
      `of ${count(replayed.repeated)} events sent twice, charged once`,
    ],
    ['parked', count(proof.parked), 'events that could not be charged'],
    ['findings', count(proof.verificationErrors), 'of verify_balances: balances, holds, entries, hashes'],
  ]
  const line = (row?: string[]) =>
    row ? `  ${row[0]!.padEnd(11)} ${row[1]!.padStart(18)}  ${row[2]}`.trimEnd() : ''
  const { problems } = proof
  const listed = problems.slice(0, listedProblems).map((problem) => `  - ${problem}`)
  if (problems.length > listed.length) listed.push(`  and ${problems.length - listed.length} more`)
  const verdict = problems.length ? ['This run does NOT verify:', ...listed] : ['Every cent is proved.']
  return [title, '', ...rows.map(line), '', ...verdict].join('\n')
}
