// The batcher: elements queue while calls are in flight, and go together in the next one. queue.ts
// keeps them by account, delivery.ts sends them; this file shares the lanes, the calls that may be
// in flight at once, between them.
import { createDelivery } from './delivery.ts'
import { KeyledgerError } from './errors.ts'
import { toJson } from './json.ts'
import { createQueue, type Group, type Item } from './queue.ts'
import { quiet } from './quiet.ts'

export interface BatcherOptions<Element, Answer> {
  /** Sends one batch, each element as its JSON; answers in the same order, once committed. */
  send: (elements: string[]) => Promise<Answer[]>
  /** Makes an element's JSON. Default: `toJson`. */
  encode?: (element: Element) => string
  /**
   * An account's elements are in one batch in flight at a time: they go in order, and never contend
   * with each other.
   */
  account: (element: Element) => string
  /**
   * An element's id. With it, each answer must be an object with this `id` and a `status`; else the
   * batch fails with 502 `invalid_response`. Default: answers are not looked at.
   */
  id?: (element: Element) => unknown
  /** ms from `add` until an element that could not be delivered is given up. */
  deadline: number
  /**
   * `true`: every error that names no element is repeated until the deadline, also a refused token
   * or a missing function. `false`, the default: only an error that `isRetryable` names is
   * repeated.
   */
  patient?: boolean
  /**
   * Late elements are of no use: they are never sent. Default: they are unsent only while calls
   * fail.
   */
  perishable?: boolean
  /**
   * Says that nothing of this element was kept, since its account was busy: it is sent again.
   * Default: `status` is `busy`.
   */
  isBusy?: (answer: Answer) => boolean
  /**
   * Batches in flight at most. Default 4. Repeated batches and those of slow accounts take at most
   * half of them.
   */
  lanes?: number
  /** Elements in a batch at most. Default 500. */
  maxBatch?: number
  /** Bytes of JSON in a batch at most, and so in an element. Default 1,000,000. */
  maxBytes?: number
  /** Elements waiting at most. Default 100,000. */
  maxQueue?: number
  /** Bytes of JSON, waiting and in flight, at most. Default 64,000,000. */
  maxQueueBytes?: number
  /** ms for which a failed call is in `stats`, if no other call follows. Default 30,000. */
  errorAge?: number
}

export interface BatcherStats {
  queued: number
  in_flight: number
  /** Elements rejected so far. */
  failed: number
  /**
   * Code of the last failed call; null since a call succeeded, or when no call has failed for 30 s.
   */
  error: string | null
}

export interface Batcher<Element, Answer> {
  /**
   * Resolves when committed. Rejects unsent: 400 `invalid_input` or 413 `payload_too_large` for an
   * element that can't be sent, 503 `overloaded` at a full queue, 503 `stopped` after `stop`.
   * Deadlocks, lost connections and the like are repeated with the same ids until `deadline`. Then
   * it rejects with the last error. If that may be about another element, it rejects with 504
   * `timeout`, and the error as its `cause`. Nobody knows then whether it was carried out; adding
   * it again with the same id is safe. A rejection that is not handled counts as `failed`, and does
   * not end the process.
   */
  add(element: Element): Promise<Answer>
  /** Was the element sent in a call whose outcome nobody knows? `answer`: as `add` gave it. */
  inDoubt(answer: Promise<Answer>): boolean
  /** Resolves when everything added before is settled. */
  flush(): Promise<void>
  /** Refuses all later elements, and flushes. */
  stop(): Promise<void>
  /** Rejects everything that is not settled, and sends nothing more. */
  abandon(error: KeyledgerError): void
  stats(): BatcherStats
}

const hasStatusBusy = (answer: unknown) => (answer as { status?: unknown }).status === 'busy'

export function createBatcher<Element, Answer>({
  send,
  encode = toJson,
  account,
  id,
  deadline,
  patient = false,
  perishable = false,
  isBusy = hasStatusBusy,
  lanes = 4,
  maxBatch = 500,
  maxBytes = 1_000_000,
  maxQueue = 100_000,
  maxQueueBytes = 64_000_000,
  errorAge = 30_000,
}: BatcherOptions<Element, Answer>): Batcher<Element, Answer> {
  const limits = { maxBatch, maxBytes, maxQueue, maxQueueBytes }
  const queue = createQueue<Answer>({ lanes, ...limits, changed: begin })
  const delivery = createDelivery({
    ...{ queue, send, haveIds: id !== undefined },
    ...{ patient, perishable, isBusy, errorAge },
  })
  // A narrow lane carries a repeated group, or a slow account. They take half at most: other
  // accounts always find a lane.
  const half = Math.max(1, Math.floor(lanes / 2))
  let running = 0
  let narrow = 0
  let wasNarrow = false
  let preferNew = true
  let due = false
  let timer: NodeJS.Timeout | undefined
  let stopped = false

  async function run(group: Group<Answer>, isNarrow: boolean) {
    const lane = Number(isNarrow)
    running++
    narrow += lane
    wasNarrow = isNarrow
    queue.depart(group)
    await delivery.deliver(group)
    running--
    narrow -= lane
    begin()
  }

  function start(group: Group<Answer> | undefined, isNarrow: boolean): boolean {
    if (group) run(group, isNarrow)
    return group !== undefined
  }

  // new elements and repeated groups by turns, so that neither kind waits for ever
  function startNarrow(): boolean {
    if (narrow >= half) return false
    preferNew = !preferNew
    const group = preferNew
      ? (queue.take(true) ?? queue.takeAgain())
      : (queue.takeAgain() ?? queue.take(true))
    return start(group, true)
  }

  const startOthers = () => start(queue.take(false), false)

  // at the end of this turn of the event loop, so that all elements of the turn go together
  function begin() {
    if (due || queue.isEmpty()) return
    due = true
    setImmediate(() => {
      due = false
      delivery.sweep()
      while (running < lanes && !queue.isEmpty()) {
        // a single lane alternates between narrow and other groups
        const othersFirst = lanes === 1 && wasNarrow
        if (!(othersFirst ? startOthers() || startNarrow() : startNarrow() || startOthers())) break
      }
      clearTimeout(timer)
      const moment = queue.nextMoment(narrow < half && running < lanes)
      if (moment !== undefined) timer = setTimeout(begin, Math.max(1, moment - performance.now()))
    })
  }

  async function flush() {
    await Promise.allSettled(queue.unsettled().map(({ answer }) => answer))
  }

  function toItem(element: Element): Item<Answer> {
    if (stopped)
      throw new KeyledgerError('stopped', 503, {
        detail: 'the module was stopped',
        hint: 'send it elsewhere',
      })
    queue.checkRoom()
    const json = encode(element)
    const bytes = Buffer.byteLength(json)
    queue.checkBytes(bytes)
    const item = {
      json,
      account: account(element),
      id: id?.(element),
      bytes,
      until: performance.now() + deadline,
    } as Item<Answer>
    item.answer = new Promise<Answer>((resolve, reject) => {
      item.resolve = resolve
      item.reject = reject
    })
    return item
  }

  return {
    // not async, and no `then` of its own: one more promise is a tenth of an element's whole cost
    // here
    add(element) {
      let item: Item<Answer>
      try {
        item = toItem(element)
      } catch (error) {
        delivery.refused()
        return quiet(Promise.reject(error))
      }
      queue.add(item)
      return item.answer
    },
    inDoubt: delivery.inDoubt,
    flush,
    stop() {
      stopped = true
      return flush()
    },
    abandon(error) {
      stopped = true
      clearTimeout(timer)
      delivery.abandon(error)
    },
    stats: () => ({ ...queue.stats(), ...delivery.stats() }),
  }
}
