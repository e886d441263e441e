// The delivery of a batcher: sends a group until each of its elements is answered, given up, or put
// back into the queue.
import { checkAnswers } from './answers.ts'
import { blamesData, codeOf, isEverybodys, isRetryable, KeyledgerError, mayBeDone } from './errors.ts'
import type { Group, Item, Queue } from './queue.ts'
import { quiet } from './quiet.ts'
import { pause } from './time-limits.ts'

export interface DeliveryOptions<Answer> {
  queue: Queue<Answer>
  send: (elements: string[]) => Promise<Answer[]>
  /** Each answer must have the element's `id`, and a `status`. */
  haveIds: boolean
  patient: boolean
  perishable: boolean
  isBusy: (answer: Answer) => boolean
  errorAge: number
}

/**
 * `final`: the error is the fault of these elements, or nobody wants to wait. `split`: it may be
 * the fault of some of them. `back`: it is about their account, which must not keep a lane. `stay`:
 * any other batch would fail alike.
 */
type Verdict = 'final' | 'split' | 'back' | 'stay'

const LONGEST_PAUSE_MS = 2000
// an account that is busy goes with others again so often; then it goes alone
const BUSY_TOGETHER = 2
// so many tries take an unknown error for the whole batch's; then smaller batches show whose it is
const TRIES_TOGETHER = 4

const jittered = (ms: number) => ms * (0.5 + Math.random() / 2)
const longer = (ms: number) => Math.min(2 * ms, LONGEST_PAUSE_MS)

export function createDelivery<Answer>({
  queue,
  send,
  haveIds,
  patient,
  perishable,
  isBusy,
  errorAge,
}: DeliveryOptions<Answer>) {
  type Items = Item<Answer>[]
  const doubted = new WeakSet<Promise<Answer>>()
  let failed = 0
  let lastError: unknown
  let failedAt = 0

  function fail(item: Item<Answer>, error: unknown) {
    failed++
    item.reject(error)
    quiet(item.answer)
  }

  function give(items: Items, error: unknown) {
    for (const item of items) {
      if (queue.land(item)) fail(item, error)
      else quiet(item.answer)
    }
  }

  // Gives up every element that would be late at `moment`. An error about data belongs to another
  // element, or it would be final.
  function keep(items: Items, moment: number, error: unknown): Items {
    const overdue = items.filter(({ until }) => until < moment)
    if (overdue.length > 0) give(overdue, blamesData(error) ? late(error) : error)
    return overdue.length ? items.filter(({ until }) => until >= moment) : items
  }

  function putBack(group: Group<Answer>) {
    if (queue.isAbandoned()) give(group.items, group.error)
    else queue.putBack(group)
  }

  /** Settles every item, or puts it back; never rejects. */
  async function deliver(group: Group<Answer>): Promise<void> {
    let { items, pause: wait } = group
    const alreadyTried = group.error === undefined ? 0 : TRIES_TOGETHER
    for (let tries = 1; ; tries++) {
      // while calls fail, an element past its deadline goes unsent
      const why = group.error ?? (perishable || lastError !== undefined ? late(lastError) : undefined)
      if (why !== undefined) items = keep(items, performance.now(), why)
      if (queue.isAbandoned()) give(items, why)
      if (queue.isAbandoned() || items.length === 0) return queue.follow(group)
      let error: unknown
      try {
        return answered(group, items, await call(items))
      } catch (reason) {
        error = reason
      }
      lastError = group.error = error
      failedAt = performance.now()
      if (mayBeDone(error)) for (const { answer } of items) doubted.add(answer)
      if (queue.isAbandoned()) return give(items, error)
      const verdict = verdictOn(error, items, alreadyTried + tries)
      const rest = remaining(group, items, error, verdict, wait)
      items = rest.items
      if (items.length === 0) return queue.follow(group)
      // the rest may be one element by now: others of it were late
      if (verdict === 'split') return items.length > 1 ? split(rest) : putBack(rest)
      wait = longer(wait)
      if (verdict === 'back') return putBack({ ...rest, pause: wait })
      await pause(rest.at - failedAt)
    }
  }

  async function call(items: Items): Promise<Answer[]> {
    const answers = await send(items.map(({ json }) => json))
    const ids = items.map((item) => item.id)
    return checkAnswers(answers, ids, haveIds)
  }

  // Gives up the elements for which the error is final, or which are late by the next try.
  function remaining(group: Group<Answer>, items: Items, error: unknown, verdict: Verdict, wait: number) {
    const at = failedAt + (verdict === 'split' && blamesData(error) ? 0 : jittered(wait))
    if (verdict === 'final') give(items, error)
    const kept = verdict === 'final' ? [] : keep(items, at, error)
    return { ...group, items: kept, at, pause: wait }
  }

  function answered(group: Group<Answer>, items: Items, answers: Answer[]) {
    lastError = undefined
    const busy = new Map<string, Items>()
    for (const [i, item] of items.entries()) {
      if (isBusy(answers[i]!)) {
        item.busy = (item.busy ?? 0) + 1
        busy.set(item.account, [...(busy.get(item.account) ?? []), item])
        continue
      }
      queue.unmarkSlow(item.account)
      queue.land(item)
      item.resolve(answers[i]!)
    }
    const at = performance.now() + jittered(group.pause)
    // only a group of one account has later elements, so they follow this busy account
    for (const [account, each] of busy) {
      if (each[0]!.busy! <= BUSY_TOGETHER && !group.next && !queue.isAbandoned()) {
        queue.requeue(account, each)
        continue
      }
      queue.markSlow(account)
      putBack({ ...group, items: each, at, pause: longer(group.pause), error: accountBusy() })
    }
    if (busy.size === 0) queue.follow(group)
  }

  function verdictOn(error: unknown, items: Items, tries: number): Verdict {
    const several = items.length > 1
    const code = codeOf(error)
    if (code === 'timeout' || code === 'lock_timeout') {
      const one = items.every(({ account }) => account === items[0]!.account)
      if (one) queue.markSlow(items[0]!.account)
      return several && !(one && code === 'lock_timeout') ? 'split' : 'back'
    }
    if (isRetryable(error)) return 'stay'
    if (blamesData(error)) return several ? 'split' : 'final'
    if (isEverybodys(error)) return patient ? 'stay' : 'final'
    if (!patient) return several ? 'split' : 'final'
    if (tries < TRIES_TOGETHER) return 'stay'
    return several ? 'split' : 'back'
  }

  // The halves go side by side only if they share no account: then neither waits for the other.
  function split({ items, next, ...group }: Group<Answer>) {
    const middle = Math.ceil(items.length / 2)
    const cuts = [...items.keys()].filter((i) => i > 0 && items[i - 1]!.account !== items[i]!.account)
    const cut = cuts.sort((a, b) => Math.abs(a - middle) - Math.abs(b - middle))[0]
    const first = { ...group, items: items.slice(0, cut ?? middle) }
    const second = { ...group, items: items.slice(cut ?? middle), next }
    if (cut !== undefined) {
      putBack(first)
      putBack(second)
      return
    }
    putBack({ ...first, next: second })
    queue.comeBack(second)
  }

  /**
   * Gives up whatever is past its deadline, though no lane is free for it: many accounts may be
   * locked.
   */
  function sweep() {
    const now = performance.now()
    for (const group of queue.takeOverdue(now)) {
      keep(group.items, Number.POSITIVE_INFINITY, group.error)
      queue.follow(group)
    }
    for (const item of queue.dropSlow(now)) fail(item, accountBusy())
  }

  /** Rejects every unsettled element, for good. */
  function abandon(error: unknown) {
    for (const item of queue.abandon()) {
      if (queue.hasBegun(item.account)) doubted.add(item.answer)
      fail(item, error)
    }
  }

  return {
    ...{ deliver, sweep, abandon },
    /** Counts an element that was refused before it was queued. */
    refused() {
      failed++
    },
    inDoubt: (answer: Promise<Answer>) => doubted.has(answer),
    stats: () => ({
      failed,
      error: lastError === undefined || performance.now() - failedAt > errorAge ? null : codeOf(lastError),
    }),
  }
}

// its cause: an error of other elements that kept it waiting, if there is one
const late = (cause?: unknown) =>
  new KeyledgerError('timeout', 504, {
    detail: 'not delivered before its deadline',
    hint: 'ask again, with the same id',
    cause,
  })

const accountBusy = () =>
  new KeyledgerError('lock_timeout', 503, {
    detail: 'another session holds the account',
    hint: 'try again later',
  })
