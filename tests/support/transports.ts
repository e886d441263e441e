// Both transports to one database, and a table of cases that must come out the same through either
// and change nothing.
import * as assert from 'uvu/assert'
import type { Rpc } from '../../src/rpc.ts'
import { pgRpc } from '../../src/rpc-pg.ts'
import { postgrestRpc } from '../../src/rpc-postgrest.ts'
import type { Database } from './database.ts'
import { failure } from './failure.ts'

/** An `Rpc` for each role that calls functions. */
export type Rpcs = Record<'gateway' | 'operator', Rpc>

export async function transports(db: Database): Promise<{ postgrest: Rpcs; pg: Rpcs }> {
  const { url, token } = await db.postgrest()
  const http = async (role: string) => postgrestRpc({ url, token: await token({ role }) })
  const direct = (role: string) => {
    const rpc = pgRpc({ connectionString: db.loginUrl, role })
    db.onClose(() => rpc.close())
    return rpc
  }
  return {
    postgrest: { gateway: await http('keyledger_gateway'), operator: await http('keyledger_operator') },
    pg: { gateway: direct('keyledger_gateway'), operator: direct('keyledger_operator') },
  }
}

/** A name, a call, and the result it must give. */
export type Case<Way = Rpcs> = [what: string, run: (way: Way) => Promise<unknown>, expected: unknown]

/**
 * Makes each case a test per transport, or other way to call; every balance, hold, grant, entry and
 * usage row must be as it was before.
 */
export function refusals<Way = Rpcs>(
  test: (name: string, run: () => Promise<void>) => void,
  db: Database,
  through: Record<string, Way>,
) {
  const tables = ['account_balance', 'billing_transaction', 'credit_grant', 'grant_draw', 'hold', 'usage_log']
  const parts = tables.map((table) => `(select jsonb_agg(t order by t::text) from data.${table} t)`)
  const state = async () =>
    (await db.sql(`select sha256(convert_to(concat_ws('|', ${parts.join(', ')}), 'UTF8'))::text as it`))[0]!
      .it
  return (...cases: Case<Way>[]) => {
    for (const [what, run, expected] of cases)
      for (const [name, way] of Object.entries(through))
        test(`${what}, by ${name}`, async () => {
          const before = await state()
          assert.equal(await run(way), expected)
          assert.is(await state(), before, 'every figure is as it was')
        })
  }
}

/** The status and code that the call fails with. */
export async function code(call: Promise<unknown>): Promise<string> {
  const error = await failure(call)
  return `${error.status} ${error.code}`
}

/** A value as part of a test's name. */
export function short(value: unknown): string {
  const text = typeof value === 'string' ? value : (JSON.stringify(value) ?? 'absent')
  return text.length > 90 ? `${text.slice(0, 80)}… (${text.length})` : text
}
