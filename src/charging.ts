// Holds and usage: made into batches by account, and their answers into what a gateway acts on.

import { setTimeout as sleep } from 'node:timers/promises'
import { type Batcher, type BatcherStats, createBatcher } from './batch.ts'
import { KeyledgerError, statusOf } from './errors.ts'
import { newId } from './ids.ts'
import type { Metrics } from './metrics.ts'
import { jsonText, type Rpc, toJson, toStorableJson } from './rpc.ts'
import type {
  ExtendAnswer,
  Hold,
  HoldAnswer,
  HoldRequest,
  ReleaseAnswer,
  UsageAnswer,
  UsageEvent,
  UserContext,
} from './types.ts'

export interface ChargingOptions {
  rpc: Rpc
  /**
   * ms after which a hold (its release, its extension) that could not be delivered is given up. Default 5,000. A hold or
   * an extension is given up then even while it is being carried out.
   */
  holdDeadline?: number
  /** ms after which usage that could not be delivered is given up. Default 30,000. */
  recordDeadline?: number
}

export interface Charging {
  /**
   * Sets money aside before the request. An open hold of the same id and content is the same hold. 402
   * `insufficient_funds`, 403 `node_not_mounted` and the codes of `validate`, 422 `price_not_found`, `invalid_…`; 409
   * `hold_captured`, `hold_released`, `hold_expired`, `hold_mismatch` for a repeated id. After `timeout` or `unavailable`
   * nobody knows whether it is placed: repeat it with the same `id`, or give none, and it is released.
   */
  hold(context: Pick<UserContext, 'account_id' | 'virtual_key_id'>, request: HoldRequest): Promise<Hold>
  /** Gives back what the hold still sets aside; a closed one is an answer. */
  release(hold: Pick<Hold, 'id' | 'account_id'>): Promise<ReleaseAnswer>
  /** Keeps the hold open until `expires_in` seconds (900) from now; one that is closed, or may not be kept open for longer, is an answer. */
  extend(hold: Pick<Hold, 'id' | 'account_id'>, expires_in?: number): Promise<ExtendAnswer>
  /**
   * Charges what was used, exactly once per id; resolves when committed. A rejection means that nobody knows whether
   * it is recorded: repeat it with the same `id`, so give one and keep the event until then. Characters that Postgres can't
   * store (NUL, half a surrogate pair) are recorded as U+FFFD. A rejection that is not
   * handled counts in `health().queues.record.failed`, and does not end the process; the same goes for `release`.
   */
  recordUsage(event: UsageEvent): Promise<UsageAnswer>
}

export type Queues = Record<'hold' | 'release' | 'extend' | 'record', BatcherStats>

interface Element {
  account_id: string
  [field: string]: unknown
}

// how long to wait for a hold that was given up to come: half a minute in all, longer than PostgREST waits for a connection
const FIRST_PAUSE_MS = 500
const LAST_PAUSE_MS = 16_000

export function createCharging(
  { rpc, holdDeadline = 5000, recordDeadline = 30_000 }: ChargingOptions,
  metrics: Metrics,
): Charging & { stats(): Queues; stop(): Promise<void> } {
  const batches = <Answer>(
    name: keyof Queues,
    fn: string,
    argument: string,
    deadline: number,
    encode: (element: Element) => string = toJson,
  ): Batcher<Element, Answer> =>
    createBatcher({
      send: metrics.batches(name, (elements: string[]) =>
        rpc.call<Answer[]>(fn, { [argument]: jsonText(`[${elements.join(',')}]`) }),
      ),
      encode,
      account: ({ account_id }) => String(account_id),
      deadline,
    })
  const holds = batches<HoldAnswer>('hold', 'place_holds', 'requests', holdDeadline)
  const releases = batches<ReleaseAnswer>('release', 'release_holds', 'requests', holdDeadline)
  const extensions = batches<ExtendAnswer>('extend', 'extend_holds', 'requests', holdDeadline)
  const events = batches<UsageAnswer>('record', 'record_usage', 'events', recordDeadline, toStorableJson)

  // Holds that were given up, and may be there or come yet: a call that was given up waits in PostgREST for a connection, where a later one
  // may overtake it.
  const givenUp = new Set<Promise<void>>()
  const stopping = new AbortController()

  async function giveUp(placed: Promise<HoldAnswer>, hold: Element) {
    const mayBeThere = await placed.then((answer) => refusal(answer) === undefined, isInDoubt)
    for (let pause = FIRST_PAUSE_MS; mayBeThere && pause <= LAST_PAUSE_MS; pause *= 2) {
      const answer = await releases.add(hold).catch(() => undefined)
      if (stopping.signal.aborted || (answer && answer.code !== 'hold_not_found')) return
      await sleep(pause, undefined, { signal: stopping.signal, ref: false }).catch(() => {})
    }
  }

  return {
    async hold({ account_id, virtual_key_id }, request) {
      const { id = newId(), ...asked } = request
      const placed = holds.add({ ...asked, id, account_id, virtual_key_id })
      const answer = await soon(placed, holdDeadline).catch((error) => {
        // nobody else knows its id: should it be there, or come yet, it would be held for nothing
        if (request.id === undefined) {
          const ended: Promise<void> = giveUp(placed, { id, account_id }).finally(() => givenUp.delete(ended))
          givenUp.add(ended)
        }
        throw error
      })
      const { amount = '0', available = '0', expires_at } = answer
      const code = refusal(answer)
      if (code === undefined) return { id, account_id, amount, available, expires_at: expires_at! }
      throw new KeyledgerError(code, statusOf(code), { detail: shortOf(code, answer) })
    },

    release: ({ id, account_id }) => releases.add({ id, account_id }),

    extend: ({ id, account_id }, expires_in) =>
      soon(extensions.add({ id, account_id, expires_in }), holdDeadline),

    recordUsage(event) {
      const { id = newId(), account_id, virtual_key_id, config_node_id, meters } = event
      const { hold_id, final, request_id, metadata } = event
      const use = { id, account_id, virtual_key_id, config_node_id, meters }
      return events.add(Object.assign(use, { hold_id, final, request_id, metadata }))
    },

    stats: () => ({
      hold: holds.stats(),
      release: releases.stats(),
      extend: extensions.stats(),
      record: events.stats(),
    }),

    async stop() {
      await Promise.all([holds, extensions, events].map((batcher) => batcher.stop()))
      stopping.abort()
      await Promise.all(givenUp)
      await releases.stop()
    },
  }
}

function refusal({ status, code, hold_status, mismatch }: HoldAnswer): string | undefined {
  if (status !== 'duplicate') return code
  if (mismatch) return 'hold_mismatch'
  return hold_status === 'open' ? undefined : `hold_${hold_status}`
}

// was it carried out, though it was not answered?
const isInDoubt = (error: unknown) =>
  !(error instanceof KeyledgerError) ||
  (error.status >= 500 && !['overloaded', 'stopped'].includes(error.code))

// what was asked for, and what there is, where that is why
function shortOf(code: string, { amount, available, remaining }: HoldAnswer): string | undefined {
  if (remaining !== undefined) return `${amount} asked, ${remaining} left of the budget`
  return code === 'insufficient_funds' ? `${amount} asked, ${available} available` : undefined
}

// who waits is told in time; the work goes on, unseen
function soon<T>(answer: Promise<T>, ms: number): Promise<T> {
  return new Promise((resolve, reject) => {
    const late = () =>
      reject(
        new KeyledgerError('timeout', 504, {
          detail: `no answer within ${ms} ms`,
          hint: 'ask again; with an id of your own, the same one',
        }),
      )
    const timer = setTimeout(late, ms)
    answer.then(resolve, reject).finally(() => clearTimeout(timer))
  })
}
