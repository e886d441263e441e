// The proof: compares the sums that the replay computed without SQL with the database's own.
import pg from 'pg'
import { fromSteps, toSteps } from './money.ts'
import type { Replayed } from './replay.ts'

export interface Proof {
  /** The sum that the ledger charged, as SQL writes it. */
  chargedTotal: string
  expectedTotal: string
  overspent: string
  parked: number
  verificationErrors: number
  /** Why this run proves nothing, in words; empty when every cent is proved. */
  problems: string[]
}

/**
 * Reads as keyledger_operator, through schema `api`. `funds` is the sum each account was given, in
 * steps.
 */
export async function prove(databaseUrl: string, replayed: Replayed, funds: bigint): Promise<Proof> {
  const client = new pg.Client(databaseUrl)
  await client.connect()
  try {
    const rows = async (text: string) => (await client.query(text)).rows
    await client.query('set role keyledger_operator')
    const charges = await rows(
      `select account_id, sum(-amount)::numeric(28, 10)::text as charged
       from api.billing_transactions where kind = 'usage' group by account_id`,
    )
    const [totals] = await rows(
      `select
         (select coalesce(sum(-amount), 0)::numeric(28, 10)::text from api.billing_transactions where kind = 'usage') as charged,
         (select count(*)::integer from api.usage_logs) as events,
         (select count(*)::integer from api.holds where status = 'open') as open_holds,
         (select count(*)::integer from api.parked_usage) as parked`,
    )
    const findings = await rows(
      'select account_id, problem, seq, usage_id, expected, actual from api.verify_balances()',
    )

    const { expected } = replayed
    const charged = new Map(charges.map((row) => [row.account_id as string, toSteps(row.charged) ?? -1n]))
    const sum = (amounts: Iterable<bigint>) => [...amounts].reduce((total, amount) => total + amount, 0n)
    const expectedTotal = fromSteps(sum(expected.values()))
    const owed = sum([...charged.values()].map((amount) => (amount > funds ? amount - funds : 0n)))
    const overspent = owed > replayed.overspent ? owed : replayed.overspent

    const problems = [...replayed.problems]
    const must = (holds: boolean, problem: string) => void (holds || problems.push(problem))
    must(totals.charged === expectedTotal, `charged ${totals.charged}, expected ${expectedTotal}`)
    for (const id of new Set([...charged.keys(), ...expected.keys()])) {
      const [is, should] = [charged.get(id) ?? 0n, expected.get(id) ?? 0n]
      must(is === should, `account ${id} was charged ${fromSteps(is)}, expected ${fromSteps(should)}`)
    }
    must(overspent === 0n, `${fromSteps(overspent)} was admitted past what was available`)
    must(
      totals.events === replayed.admitted,
      `${totals.events} events recorded of ${replayed.admitted} admitted`,
    )
    must(
      replayed.duplicates === replayed.repeated,
      `${replayed.duplicates} duplicates of ${replayed.repeated} events sent twice`,
    )
    must(replayed.parked + totals.parked === 0, `${totals.parked} events are parked`)
    must(totals.open_holds === 0, `${totals.open_holds} holds are still open`)
    for (const { account_id, problem, seq, usage_id, expected, actual } of findings)
      problems.push(
        `account ${account_id}: ${problem}, entry ${seq ?? '-'}, usage ${usage_id ?? '-'}: expected ${expected}, is ${actual}`,
      )

    return {
      chargedTotal: totals.charged,
      expectedTotal,
      overspent: fromSteps(overspent),
      parked: totals.parked,
      verificationErrors: findings.length,
      problems,
    }
  } finally {
    await client.end()
  }
}
