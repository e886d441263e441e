// Random sequences of every money operation, in turn and at once, against a model.
// After each step the model has the same figures, grants, holds and entries, and every invariant holds.
// OPERATIONS=100000 makes it a soak; SEED=… (and PATH_TO=…) repeats a failure.
import fc from 'fast-check'
import type pg from 'pg'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { movableClock } from '../support/clock.ts'
import { database } from '../support/database.ts'
import { holdsTrue } from '../support/ledger.ts'
import { Refused, shown, type World } from '../support/model.ts'
import { begin, read } from '../support/model-database.ts'
import { holds } from '../support/model-holds.ts'
import { money } from '../support/model-money.ts'
import { others } from '../support/model-others.ts'
import type { Dice, Operation } from '../support/model-steps.ts'
import { usage } from '../support/model-usage.ts'
import { seed } from '../support/seed.ts'

const test = suite('model')
const db = await database(test)
await movableClock(db.sql)
const wanted = Number(process.env.OPERATIONS ?? 2000)
const given = process.env.SEED ? Number(process.env.SEED) : Math.floor(Math.random() * 2 ** 31)

// meter `usd` costs 1 a unit, `third` 1 for 3
const { nodeId } = await seed(db.operator)
await db.operator(
  `insert into api.prices (config_node_id, meter, unit_price, unit_size, effective_from)
  values ($1, 'usd', 1, 1, '2020-01-01'), ($1, 'third', 1, 3, '2020-01-01')`,
  [nodeId],
)

const sessions: Record<string, pg.Client[]> = { keyledger_owner: [await db.session()] }
for (const role of ['keyledger_gateway', 'keyledger_operator'] as const)
  sessions[role] = await Promise.all(Array.from({ length: 4 }, () => db.session(role)))
db.onClose(() => Promise.all(Object.values(sessions).flatMap((some) => some.map((session) => session.end()))))

// counts of operations and their outcomes, to see that everything was tried
const counts = new Map<string, number>()
const count = (what: string) => counts.set(what, (counts.get(what) ?? 0) + 1)
let operations = 0

async function perform(operation: Operation, session: pg.Client): Promise<string[]> {
  for (let tries = 1; ; tries++) {
    try {
      const { rows } = await session.query(operation.text, operation.values)
      return operation.say(rows)
    } catch (error) {
      const { code, message } = error as pg.DatabaseError
      // it waited long enough for its account; nothing was done
      if (code === '55P03' && tries < 100) continue
      if (!code?.startsWith('PT4')) throw error
      return [`refused ${message}`]
    }
  }
}

// the model's answers if the operations had come in this order; undefined where they differ from `said`
function inOrder(
  world: World,
  operations: Operation[],
  said: string[][],
  order: number[],
): World | string[][] {
  let after = structuredClone(world)
  const expected: string[][] = []
  for (const n of order) {
    const next = structuredClone(after)
    try {
      expected[n] = operations[n]!.expect(next, said[n]!)
      after = next
    } catch (error) {
      if (!(error instanceof Refused)) throw error
      expected[n] = [`refused ${error.message}`]
    }
  }
  return JSON.stringify(expected) === JSON.stringify(said) ? after : expected
}

const orders = (n: number): number[][] =>
  n === 1
    ? [[0]]
    : orders(n - 1).flatMap((order) =>
        Array.from({ length: n }, (_, at) => [...order.slice(0, at), n - 1, ...order.slice(at)]),
      )

/** Does the operations, at once if there are several, and gives the world that one of their orders leads to. */
async function step(world: World, together: Operation[]): Promise<World> {
  const next: Record<string, number> = {}
  const said = await Promise.all(
    together.map((operation) => {
      const at = next[operation.role] ?? 0
      next[operation.role] = at + 1
      return perform(operation, sessions[operation.role]![at]!)
    }),
  )
  const touched = [...new Set(together.flatMap(({ accounts }) => accounts))]
  const [has, problems] = await read(db, [...world.accounts.keys()], touched)
  if (problems.length) throw new Error(`verify_balances: ${JSON.stringify({ said, problems }, null, 2)}`)

  let nearest: unknown
  for (const order of orders(together.length)) {
    const after = inOrder(world, together, said, order)
    if (Array.isArray(after)) {
      nearest ??= { said, expected: after }
      continue
    }
    const should = new Map([...after.accounts].map(([id, account]) => [id, shown(after, account)]))
    const off = [...should].find(([id, account]) => JSON.stringify(has.get(id)) !== JSON.stringify(account))
    if (!off) {
      operations += together.length
      together.forEach(({ name }, i) => {
        count(name)
        for (const answer of said[i]!)
          count(`${name}: ${answer.replace(/ ?(-?\d+\.\d+|[0-9a-f-]{36}|\d+\b)/g, '').trim()}`.trim())
      })
      if (together.length > 1) count('at once')
      return after
    }
    nearest = { said, account: off[0], has: has.get(off[0]), should: off[1] }
  }
  throw new Error(`no order of these leads to what is there: ${JSON.stringify(nearest, null, 2)}`)
}

const kinds = { ...money, ...holds, ...usage, ...others }
// the operations that happen most, and that the others are about
const often = [
  ...[
    'again',
    'again',
    'again',
    'again',
    'grant_credit',
    'grant_credit',
    'extend_holds',
    'top_up',
    'refund_charge',
  ],
  ...['place_holds', 'place_holds', 'place_holds', 'record_usage', 'record_usage'],
]
// the operations that a run of this length must include
const seen = `at once
adjust_balance: adjustment
adjust_balance: refused version_conflict
check_budget: insufficient_funds
close_period:
extend_holds: extended
freeze_funds: open
freeze_funds: refused insufficient_funds
grant_credit: credit_grant
place_holds: duplicate open
place_holds: held
place_holds: refused insufficient_funds
place_holds: refused invalid_account
record_openings: opened
record_openings: refused account_in_use
record_usage: charged
record_usage: duplicate
record_usage: duplicate mismatch
record_usage: parked price_not_found
refund_charge: refund
refund_charge: refused refund_exceeds_charge
release_holds: closed hold_released
release_holds: released
reverse_top_up: top_up_reversal
set_budget:
top_up: refused reference_mismatch
top_up: top_up
unfreeze_funds: released`.split('\n')
const dice = fc.array(fc.nat(9999), { minLength: 24, maxLength: 24 })
const kind = fc.record({ kind: fc.constantFrom(...Object.keys(kinds), ...often), dice })
const steps = fc.array(
  fc.oneof(
    { weight: 4, arbitrary: fc.tuple(kind) },
    { weight: 1, arbitrary: fc.array(kind, { minLength: 2, maxLength: 4 }) },
  ),
  { minLength: 1, maxLength: 100, size: 'max' },
)

const property = fc.asyncProperty(steps, async (all) => {
  let world = await begin(db, nodeId)
  const log: string[] = []
  const past: Operation[] = []
  for (const some of all) {
    const concrete = some.map(({ kind, dice }) => {
      let next = 0
      const roll: Dice = (n) => dice[next++ % dice.length]! % n
      return kind === 'again' && past.length
        ? past[roll(past.length)]!
        : (kinds[kind] ?? kinds.top_up!)(roll, world, { nodeId })
    })
    past.push(...concrete)
    const together = concrete.length > 1 ? concrete.filter(({ alone }) => !alone) : concrete
    if (!together.length) continue
    log.push(
      together
        .map(
          ({ name, values }) =>
            `${name} ${values.map((value) => (typeof value === 'string' ? value : JSON.stringify(value))).join(' ')}`,
        )
        .join('\n  at once: '),
    )
    try {
      world = await step(world, together)
    } catch (error) {
      throw new Error(`${(error as Error).message}\nafter\n${log.slice(-25).join('\n')}`)
    }
  }
})

test(`${wanted} operations keep the database equal to the model, and every invariant`, async () => {
  console.log(`\nmodel: SEED=${given}`)
  const path = process.env.PATH_TO
  for (let round = 0; operations < wanted; round++) {
    const { failed, seed, counterexamplePath, numShrinks, errorInstance } = await fc.check(property, {
      seed: given + round,
      numRuns: 10,
      unbiased: true,
      interruptAfterTimeLimit: 100_000,
      ...(path ? { path } : {}),
    })
    const { message } = (errorInstance ?? {}) as Partial<Error>
    if (failed) {
      console.error(
        `\n${message}\nshrunk ${numShrinks} times; repeat it with SEED=${seed} PATH_TO=${counterexamplePath}`,
      )
      assert.unreachable('the database differs from the model')
    }
    if (path) break
    if (wanted > 2000) console.log(`${operations} operations`)
  }
  if (wanted > 2000)
    console.log(
      `${operations} operations\n${[...counts]
        .sort()
        .map(([what, n]) => `${n} ${what}`)
        .join('\n')}`,
    )
  if (wanted >= 2000 && !path)
    assert.equal(
      seen.filter((what) => !counts.has(what)),
      [],
    )
  // later than any of the worlds
  await db.sql('update clock.ahead set seconds = seconds + 1e6')
  await holdsTrue(db.sql)
})

test.run()
