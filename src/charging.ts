// Charging: puts holds and usage into batches by account, and turns the answers into results for a
// gateway.

import { checkAnswers } from './answers.ts'
import { type Batcher, type BatcherOptions, type BatcherStats, createBatcher } from './batch.ts'
import { createDoubts } from './doubts.ts'
import { codeOf, KeyledgerError, statusOf } from './errors.ts'
import { newId } from './ids.ts'
import { jsonText, toJson, toStorableJson } from './json.ts'
import { alsoLeftOut, isRequestId, metadataJson } from './labels.ts'
import { quiet } from './quiet.ts'
import type { Rpc } from './rpc.ts'
import { withinTime } from './time-limits.ts'
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
   * ms after which a hold, a release or an extension that could not be delivered is given up.
   * Default 5,000. A hold or an extension is given up then even while it is being carried out.
   */
  holdDeadline?: number | undefined
  /** ms after which usage that could not be delivered is given up. Default 30,000. */
  recordDeadline?: number | undefined
  /**
   * Bytes of JSON that each of the four queues keeps at most; past that, 503 `overloaded`. Default
   * 64,000,000.
   */
  maxQueueBytes?: number | undefined
}

export interface Charging {
  /**
   * Sets money aside before the request. A repeated id with the same content gives the open hold
   * again. 402 `insufficient_funds`, 403 `node_not_mounted` and the codes of `validate`, 422
   * `price_not_found`, `invalid_…`; 409 `hold_captured`, `hold_released`, `hold_expired`,
   * `hold_mismatch` for a repeated id. After `timeout` or `unavailable` nobody knows whether the
   * hold is placed. With an `id` of your own, repeat it; without one, the module releases it.
   */
  hold(context: Pick<UserContext, 'account_id' | 'virtual_key_id'>, request: HoldRequest): Promise<Hold>
  /** Gives back the rest of the hold. A closed hold is an answer, not an error. */
  release(hold: Pick<Hold, 'id' | 'account_id'>): Promise<ReleaseAnswer>
  /**
   * Keeps the hold open until `expires_in` seconds (900) from now. A closed hold is an answer, and
   * so is one that may not stay open for longer.
   */
  extend(hold: Pick<Hold, 'id' | 'account_id'>, expires_in?: number): Promise<ExtendAnswer>
  /**
   * Charges a use, exactly once per id; resolves when committed. A rejection means that nobody
   * knows whether the event is recorded. Repeat it then with the same `id`: so give an `id`, and
   * keep the event until it is answered. Characters that Postgres can't store (NUL, half a
   * surrogate pair) are recorded as U+FFFD. A `request_id` or `metadata` that can't be kept is left
   * out; the answer says so, and the event is charged. Every error that names no event is repeated
   * until `recordDeadline`, also a refused token or a missing function; `health()` shows its code
   * meanwhile. A rejection that is not handled counts in `health().queues.record.failed`, and does
   * not end the process; the same goes for `release`.
   */
  recordUsage(event: UsageEvent): Promise<UsageAnswer>
}

export type Queues = Record<'hold' | 'release' | 'extend' | 'record', BatcherStats>

/** Wraps the function that sends one queue's batches, to measure it. */
export type MeasureBatches = <Answer>(
  operation: keyof Queues,
  send: (elements: string[]) => Promise<Answer[]>,
) => (elements: string[]) => Promise<Answer[]>

interface Element {
  account_id: string
  [field: string]: unknown
}

/** An event as it is sent; the JSON of its label is made once. */
interface EventElement extends Element {
  event: Record<string, unknown>
  metadata?: string
}

// refusals for reasons of the database or its clock, not of the request
const databasesOwn = ['id_outside_window', 'id_not_of_now']
// ms for which `health` shows such a refusal, if no other follows
const TROUBLE_MS = 30_000

export function createCharging(
  { rpc, holdDeadline = 5000, recordDeadline = 30_000, maxQueueBytes }: ChargingOptions,
  measured: MeasureBatches,
): Charging & { stats(): Queues; stop(ms: number): Promise<void> } {
  const sending = <Answer>(name: keyof Queues, fn: string, argument: string) =>
    measured(name, (elements: string[]) =>
      rpc.call<Answer[]>(fn, { [argument]: jsonText(`[${elements.join(',')}]`) }),
    )
  const batches = <Answer, Sent extends Element = Element>(
    name: keyof Queues,
    fn: string,
    argument: string,
    deadline: number,
    options: Partial<BatcherOptions<Sent, Answer>>,
  ): Batcher<Sent, Answer> =>
    createBatcher({
      send: sending(name, fn, argument),
      account: ({ account_id }) => String(account_id),
      id: (element) => element.id,
      deadline,
      maxQueueBytes,
      ...options,
    })
  // A caller waits for a hold before its request: an error that won't pass in seconds is told at
  // once, and after the deadline nobody waits. Usage and releases are facts: they wait for every
  // error that may pass.
  const waitedFor = { perishable: true }
  const facts = { patient: true }
  const holds = batches<HoldAnswer>('hold', 'place_holds', 'requests', holdDeadline, waitedFor)
  const releases = batches<ReleaseAnswer>('release', 'release_holds', 'requests', holdDeadline, facts)
  const extensions = batches<ExtendAnswer>('extend', 'extend_holds', 'requests', holdDeadline, waitedFor)
  const events = batches<UsageAnswer, EventElement>('record', 'record_usage', 'events', recordDeadline, {
    ...facts,
    encode: eventJson,
    id: ({ event }) => event.id,
  })

  // beside the queue of releases: nobody asked for these, so they must not count as failed there
  const releaseNow = sending<ReleaseAnswer>('release', 'release_holds', 'requests')
  const doubts = createDoubts(async (given) => {
    const answers = await releaseNow(given.map((hold) => toJson(hold)))
    return checkAnswers(
      answers,
      given.map(({ id }) => id),
    )
  })
  // holds that were given up while their calls had not ended
  const givenUp = new Set<Promise<void>>()
  const troubles: Record<'hold' | 'extend', Trouble> = { hold: createTrouble(), extend: createTrouble() }

  async function giveUp(placed: Promise<HoldAnswer>, hold: { id: string; account_id: string }) {
    const mayBeThere = await placed.then(
      (answer) => refusal(answer) === undefined,
      () => holds.inDoubt(placed),
    )
    if (mayBeThere) doubts.add(hold)
  }

  return {
    async hold({ account_id, virtual_key_id }, request) {
      const { id = newId(), ...asked } = request
      const placed = holds.add({ ...asked, id, account_id, virtual_key_id })
      const answer = await withinTime(placed, holdDeadline, late).catch((error) => {
        troubles.hold.failed(error)
        // nobody else knows its id: if it is placed, or is placed later, it would set money aside
        // for nothing
        if (request.id === undefined) {
          const ended: Promise<void> = giveUp(placed, { id, account_id }).finally(() => givenUp.delete(ended))
          givenUp.add(ended)
        }
        throw error
      })
      const { amount = '0', available = '0', expires_at } = answer
      const code = refusal(answer)
      troubles.hold.answered(code)
      if (code === undefined) return { id, account_id, amount, available, expires_at: expires_at! }
      throw new KeyledgerError(code, statusOf(code), { detail: shortOf(code, answer) })
    },

    release: ({ id, account_id }) => releases.add({ id, account_id }),

    extend({ id, account_id }, expires_in) {
      const extended = withinTime(extensions.add({ id, account_id, expires_in }), holdDeadline, late)
      extended.then(({ code }) => troubles.extend.answered(code), troubles.extend.failed)
      return extended
    },

    recordUsage(event) {
      const { id = newId(), account_id, virtual_key_id, config_node_id, meters, hold_id, final } = event
      const { variant, upstream_cost, estimated } = event
      const left_out: UsageAnswer['left_out'] = []
      const sent: EventElement['event'] = {
        id,
        account_id,
        virtual_key_id,
        config_node_id,
        meters,
        hold_id,
        final,
        variant,
        upstream_cost,
        estimated,
      }
      if (isRequestId(event.request_id)) sent.request_id = event.request_id
      else left_out.push('request_id')
      const metadata = metadataJson(event.metadata)
      if (metadata === null) left_out.push('metadata')
      const answer = events.add({ account_id, event: sent, metadata: metadata ?? undefined })
      return left_out.length === 0 ? answer : quiet(answer.then((given) => alsoLeftOut(given, left_out)))
    },

    stats: () => ({
      hold: troubles.hold.on(holds.stats()),
      release: releases.stats(),
      extend: troubles.extend.on(extensions.stats()),
      record: events.stats(),
    }),

    async stop(ms) {
      const all = [holds, extensions, events, releases]
      const timer = setTimeout(() => {
        for (const batcher of all) batcher.abandon(tooLate(ms))
      }, ms)
      const end = performance.now() + ms
      await Promise.all([holds, extensions, events].map((batcher) => batcher.stop()))
      await Promise.all(givenUp)
      const left = Math.min(holdDeadline, Math.max(0, end - performance.now()))
      await Promise.all([releases.stop(), doubts.stop(left)])
      clearTimeout(timer)
    },
  }
}

interface Trouble {
  failed(error: unknown): void
  answered(code: string | undefined): void
  on(stats: BatcherStats): BatcherStats
}

// Trouble that no failed call shows: no caller is answered in time, or all are refused for the
// database's own reasons.
function createTrouble(): Trouble {
  let last: { code: string; at: number } | undefined
  const set = (code: string) => {
    last = { code, at: performance.now() }
  }
  return {
    failed: (error) => codeOf(error) === 'timeout' && set('timeout'),
    answered(code) {
      if (code !== undefined && databasesOwn.includes(code)) set(code)
      else last = undefined
    },
    on(stats) {
      const told = last && performance.now() - last.at < TROUBLE_MS ? last.code : null
      return { ...stats, error: stats.error ?? told }
    },
  }
}

function eventJson({ event, metadata }: EventElement): string {
  const json = toStorableJson(event)
  return metadata === undefined ? json : `${json.slice(0, -1)},"metadata":${metadata}}`
}

const tooLate = (ms: number) =>
  new KeyledgerError('timeout', 504, {
    detail: `not delivered within ${ms} ms of \`stop\``,
    hint: 'nobody knows whether it was carried out: send it elsewhere with the same id',
  })

function refusal({ status, code, hold_status, mismatch }: HoldAnswer): string | undefined {
  if (status !== 'duplicate') return code
  if (mismatch) return 'hold_mismatch'
  return hold_status === 'open' ? undefined : `hold_${hold_status}`
}

// the amount asked and the amount there is, if that is the reason
function shortOf(code: string, { amount, available, remaining }: HoldAnswer): string | undefined {
  if (remaining !== undefined) return `${amount} asked, ${remaining} left of the budget`
  return code === 'insufficient_funds' ? `${amount} asked, ${available} available` : undefined
}

// a caller is told in time; the work goes on, unseen
const late = (ms: number) =>
  new KeyledgerError('timeout', 504, {
    detail: `no answer within ${ms} ms`,
    hint: 'ask again; with an id of your own, the same one',
  })
