// Batches by itself: elements queue while calls are in flight, and go together in the next, an account in one at a time.
import { codeOf, isRetryable, KeyledgerError } from './errors.ts'
import { toJson } from './rpc.ts'

export interface BatcherOptions<Element, Answer> {
  /** Sends one batch, each element as its JSON; answers in the same order, once committed. */
  send: (elements: string[]) => Promise<Answer[]>
  /** Its JSON. Default: `toJson`. */
  encode?: (element: Element) => string
  /** An account's elements are in one batch in flight at a time: sent in order, they never contend with each other. */
  account: (element: Element) => string
  /** ms from `add` until an element that could not be delivered is given up. */
  deadline: number
  /** Batches in flight at most. Default 4. */
  lanes?: number
  /** Elements in a batch at most. Default 500. */
  maxBatch?: number
  /** Bytes of JSON in a batch, and so in an element, at most. Default 1,000,000. */
  maxBytes?: number
  /** Elements waiting at most. Default 100,000. */
  maxQueue?: number
}

export interface BatcherStats {
  queued: number
  in_flight: number
  /** Elements rejected so far. */
  failed: number
  /** Code of the last failed call; null since one succeeded. */
  error: string | null
}

export interface Batcher<Element, Answer> {
  /**
   * Resolves when committed. Rejects with 400 `invalid_input` or 413 `payload_too_large` for an element that can't be
   * sent, 503 `overloaded` at a full queue, 503 `stopped` after `stop`: none of these was sent. Deadlocks, lost
   * connections and the like are retried with the same ids until `deadline`; then it rejects with the last error, and
   * nobody knows whether it was carried out. Adding it again with the same id is safe. A rejection that is not handled
   * counts as `failed`, and does not end the process.
   */
  add(element: Element): Promise<Answer>
  /** Resolves when everything added before is settled. */
  flush(): Promise<void>
  /** Refuses what comes later, and flushes. */
  stop(): Promise<void>
  stats(): BatcherStats
}

interface Item<Answer> {
  // as it was given: every try must send the same
  json: string
  account: string
  bytes: number
  until: number
  answer: Promise<Answer>
  resolve: (answer: Answer) => void
  reject: (error: unknown) => void
}

const FIRST_PAUSE_MS = 50
const LONGEST_PAUSE_MS = 2000
// fewer are not worth a call of their own while another lane is free to take them
const WORTH_A_CALL = 32
// one element may be slow for all of them: an account somebody has locked
const slow = ['timeout', 'lock_timeout']
// these say nothing about a single element: smaller batches would fail alike
const everybodys = ['invalid_token', 'permission_denied', 'function_not_found', 'invalid_response']

export function createBatcher<Element, Answer>({
  send,
  encode = toJson,
  account,
  deadline,
  lanes: width = 4,
  maxBatch = 500,
  maxBytes = 1_000_000,
  maxQueue = 100_000,
}: BatcherOptions<Element, Answer>): Batcher<Element, Answer> {
  type Items = Item<Answer>[]
  // by account, in turn: what is left of one that was served goes to the end
  const waiting = new Map<string, Items>()
  let queued = 0
  // elements in flight by account
  const busy = new Map<string, number>()
  const unsettled = new Set<Item<Answer>>()
  let running = 0
  let due = false
  let inFlight = 0
  let failed = 0
  let lastError: unknown
  let stopped = false

  // its account is free as soon as none of its elements is in flight, though others of the batch are
  function land(item: Item<Answer>) {
    const others = busy.get(item.account)! - 1
    if (others) busy.set(item.account, others)
    else busy.delete(item.account)
    inFlight--
    unsettled.delete(item)
    begin()
  }

  function give(items: Items, error: unknown) {
    failed += items.length
    for (const item of items) {
      land(item)
      item.reject(error)
      quiet(item.answer)
    }
  }

  // gives up what would be late at `moment`
  function keep(items: Items, moment: number, error: unknown): Items {
    const late = items.filter(({ until }) => until < moment)
    give(late, error)
    return late.length ? items.filter(({ until }) => until >= moment) : items
  }

  // A fair share of what is there, so that free lanes get theirs; and all of an account that has begun, or it would wait.
  function take(): Items {
    const share = Math.min(maxBatch, Math.max(WORTH_A_CALL, Math.ceil((queued + inFlight) / width)))
    const batch: Items = []
    let bytes = 0
    for (const [account, items] of waiting) {
      if (busy.has(account)) continue
      const begun = batch.length
      for (const item of items) {
        bytes += item.bytes
        if (batch.length === maxBatch || bytes > maxBytes) break
        batch.push(item)
      }
      items.splice(0, batch.length - begun)
      if (batch.length > begun) {
        waiting.delete(account)
        if (items.length > 0) waiting.set(account, items)
      }
      if (items.length > 0 || batch.length >= share) break
    }
    queued -= batch.length
    return batch
  }

  /** Settles every item; never rejects. */
  async function deliver(items: Items): Promise<void> {
    for (let pause = FIRST_PAUSE_MS; items.length; pause = Math.min(2 * pause, LONGEST_PAUSE_MS)) {
      try {
        const answers = await send(items.map(({ json }) => json))
        if (!Array.isArray(answers) || answers.length !== items.length || answers.includes(null as never)) {
          throw new KeyledgerError('invalid_response', 502, {
            detail: 'a batch was not answered element by element',
          })
        }
        lastError = undefined
        for (const [i, item] of items.entries()) {
          land(item)
          item.resolve(answers[i]!)
        }
        return
      } catch (error) {
        lastError = error
        if (!isRetryable(error)) return refuse(items, error)
        const wait = pause * (0.5 + Math.random() / 2)
        items = keep(items, performance.now() + wait, error)
        if (items.length) await new Promise((resolve) => setTimeout(resolve, wait))
        if (items.length > 1 && slow.includes(codeOf(error))) return halve(items, true)
      }
    }
  }

  // one bad element must not sink the others
  async function refuse(items: Items, error: unknown) {
    if (items.length === 1 || everybodys.includes(codeOf(error))) give(items, error)
    else await halve(items, false)
  }

  // Side by side only what shares no account: then neither half waits for the other.
  async function halve(items: Items, sideBySide: boolean) {
    const middle = Math.ceil(items.length / 2)
    const begins = (i: number) => items[i - 1]?.account !== items[i]?.account
    const cuts = sideBySide ? [...items.keys()].filter((i) => i > 0 && begins(i)) : []
    const cut = cuts.sort((a, b) => Math.abs(a - middle) - Math.abs(b - middle))[0]
    const first = deliver(items.slice(0, cut ?? middle))
    if (cut === undefined) await first
    await Promise.all([first, deliver(items.slice(cut ?? middle))])
  }

  async function run(batch: Items) {
    for (const { account } of batch) busy.set(account, (busy.get(account) ?? 0) + 1)
    running++
    inFlight += batch.length
    // while calls fail, what is late goes unsent
    await deliver(lastError === undefined ? batch : keep(batch, performance.now(), lastError))
    running--
    begin()
  }

  // at the end of this turn, so that what comes with it goes with it
  function begin() {
    if (due || queued === 0) return
    due = true
    setImmediate(() => {
      due = false
      while (running < width && queued) {
        const batch = take()
        if (batch.length === 0) return
        run(batch)
      }
    })
  }

  async function flush() {
    await Promise.allSettled([...unsettled].map(({ answer }) => answer))
  }

  function toItem(element: Element): Item<Answer> {
    if (stopped)
      throw new KeyledgerError('stopped', 503, {
        detail: 'the module was stopped',
        hint: 'send it elsewhere',
      })
    if (queued >= maxQueue) {
      throw new KeyledgerError('overloaded', 503, {
        detail: `${queued} elements are waiting`,
        hint: 'try again later',
      })
    }
    const json = encode(element)
    const bytes = Buffer.byteLength(json)
    if (bytes > maxBytes) {
      throw new KeyledgerError('payload_too_large', 413, {
        detail: `${bytes} bytes of JSON, of ${maxBytes} allowed`,
        hint: 'send less in one element',
      })
    }
    const item = {
      json,
      account: account(element),
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
    // not async, and no `then` of its own: a promise more is a tenth of what an element costs here
    add(element) {
      let item: Item<Answer>
      try {
        item = toItem(element)
      } catch (error) {
        failed++
        return rejected(error)
      }
      const items = waiting.get(item.account)
      if (items) items.push(item)
      else waiting.set(item.account, [item])
      queued++
      unsettled.add(item)
      begin()
      return item.answer
    },
    flush,
    stop() {
      stopped = true
      return flush()
    },
    stats: () => ({
      queued,
      in_flight: inFlight,
      failed,
      error: lastError === undefined ? null : codeOf(lastError),
    }),
  }
}

const rejected = (error: unknown): Promise<never> => quiet(Promise.reject(error))

/** A promise whose rejection needs no handler; who wants to know of it still does. */
export function quiet<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => {})
  return promise
}
