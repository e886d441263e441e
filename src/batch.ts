// Batches by itself: elements queue while calls are in flight, and go together in the next, an account in one at a time.
import { blamesData, codeOf, isEverybodys, isRetryable, KeyledgerError, mayBeDone } from './errors.ts'
import { toJson } from './rpc.ts'

export interface BatcherOptions<Element, Answer> {
  /** Sends one batch, each element as its JSON; answers in the same order, once committed. */
  send: (elements: string[]) => Promise<Answer[]>
  /** Its JSON. Default: `toJson`. */
  encode?: (element: Element) => string
  /** An account's elements are in one batch in flight at a time: sent in order, they never contend with each other. */
  account: (element: Element) => string
  /** Its id, where each answer is an object with `id` and `status`: else 502 `invalid_response`. Default: not looked at. */
  id?: (element: Element) => unknown
  /** ms from `add` until an element that could not be delivered is given up. */
  deadline: number
  /**
   * `true`: every error that names no element is repeated until the deadline, also a refused token or a missing
   * function. `false`, the default: only what `isRetryable` says is repeated.
   */
  patient?: boolean
  /** Late elements are of no use: they are never sent. Default: only while calls fail. */
  perishable?: boolean
  /** Nothing of this element was kept, since its account was busy: it is sent again. Default: `status` is `busy`. */
  isBusy?: (answer: Answer) => boolean
  /** Batches in flight at most. Default 4. Repeated ones and those of busy accounts take at most half of them. */
  lanes?: number
  /** Elements in a batch at most. Default 500. */
  maxBatch?: number
  /** Bytes of JSON in a batch, and so in an element, at most. Default 1,000,000. */
  maxBytes?: number
  /** Elements waiting at most. Default 100,000. */
  maxQueue?: number
  /** Bytes of JSON that wait or are in flight, at most. Default 64,000,000. */
  maxQueueBytes?: number
  /** ms for which a failed call is in `stats`, if none follows. Default 30,000. */
  errorAge?: number
}

export interface BatcherStats {
  queued: number
  in_flight: number
  /** Elements rejected so far. */
  failed: number
  /** Code of the last failed call; null since one succeeded, or when none has failed for 30 s. */
  error: string | null
}

export interface Batcher<Element, Answer> {
  /**
   * Resolves when committed. Rejects with 400 `invalid_input` or 413 `payload_too_large` for an element that can't be
   * sent, 503 `overloaded` at a full queue, 503 `stopped` after `stop`: none of these was sent. Deadlocks, lost
   * connections and the like are retried with the same ids until `deadline`; then it rejects with the last error (with
   * 504 `timeout`, whose `cause` that is, where it may be about another element), and nobody knows whether it was carried out. Adding it again with the same id is safe. A rejection that is not handled
   * counts as `failed`, and does not end the process.
   */
  add(element: Element): Promise<Answer>
  /** Was it sent in a call of which nobody knows the outcome? `answer`: as `add` gave it. */
  inDoubt(answer: Promise<Answer>): boolean
  /** Resolves when everything added before is settled. */
  flush(): Promise<void>
  /** Refuses what comes later, and flushes. */
  stop(): Promise<void>
  /** Rejects everything that is not settled, and sends nothing more. */
  abandon(error: KeyledgerError): void
  stats(): BatcherStats
}

interface Item<Answer> {
  // as it was given: every try must send the same
  json: string
  account: string
  id: unknown
  bytes: number
  until: number
  /** How often its account was busy. */
  busy?: number
  answer: Promise<Answer>
  resolve: (answer: Answer) => void
  reject: (error: unknown) => void
}

/** Elements that go in one call. */
interface Group<Answer> {
  items: Item<Answer>[]
  /** Not before this moment. */
  at: number
  /** ms to wait after the next failure. */
  pause: number
  /** Why they were not delivered yet. */
  error?: unknown
  /** Later elements of the same account: they go when these are settled. */
  next?: Group<Answer>
}

const FIRST_PAUSE_MS = 50
const LONGEST_PAUSE_MS = 2000
// so often an account that is busy goes with others again, before it goes alone
const BUSY_TOGETHER = 2
// fewer are not worth a call of their own while another lane is free to take them
const WORTH_A_CALL = 32
// an error that nobody knows is the whole batch's for so many tries; then smaller batches show whose it is
const TRIES_TOGETHER = 4

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
  lanes: width = 4,
  maxBatch = 500,
  maxBytes = 1_000_000,
  maxQueue = 100_000,
  maxQueueBytes = 64_000_000,
  errorAge = 30_000,
}: BatcherOptions<Element, Answer>): Batcher<Element, Answer> {
  type Items = Item<Answer>[]
  // by account, in turn: what is left of one that was served goes to the end
  const waiting = new Map<string, Items>()
  // to be sent again: these wait for a lane like everything else
  let again: Group<Answer>[] = []
  let queued = 0
  // elements by account that are in flight, or will be sent again
  const begun = new Map<string, number>()
  // accounts that were found busy, or slow all by themselves: they go alone
  const slow = new Set<string>()
  const unsettled = new Set<Item<Answer>>()
  const doubted = new WeakSet<Promise<Answer>>()
  let bytesKept = 0
  let running = 0
  // lanes with what is sent again, or with a slow account: others always find a lane
  const half = Math.max(1, Math.floor(width / 2))
  let narrow = 0
  let wasNarrow = false
  let fresh = true
  let due = false
  let timer: NodeJS.Timeout | undefined
  let inFlight = 0
  let failed = 0
  let lastError: unknown
  let failedAt = 0
  let stopped = false
  let abandoned = false

  function settled(item: Item<Answer>) {
    if (unsettled.delete(item)) bytesKept -= item.bytes
  }

  // its account is free as soon as none of its elements is in flight, though others of the batch are
  function land(item: Item<Answer>) {
    const others = begun.get(item.account)! - 1
    if (others) begun.set(item.account, others)
    else begun.delete(item.account)
    if (!others && !waiting.has(item.account)) slow.delete(item.account)
    inFlight--
    settled(item)
    begin()
  }

  function give(items: Items, error: unknown) {
    for (const item of items) {
      if (unsettled.has(item)) failed++
      land(item)
      item.reject(error)
      quiet(item.answer)
    }
  }

  // Gives up what would be late at `moment`. An error about data is another's, or it would be final.
  function keep(items: Items, moment: number, error: unknown): Items {
    const overdue = items.filter(({ until }) => until < moment)
    if (overdue.length > 0) give(overdue, blamesData(error) ? late(error) : error)
    return overdue.length ? items.filter(({ until }) => until >= moment) : items
  }

  // A fair share of what is there, so that free lanes get theirs; and all of an account that has begun, or it would wait.
  function take(alone: boolean): Group<Answer> | undefined {
    const share = Math.min(maxBatch, Math.max(WORTH_A_CALL, Math.ceil((queued + inFlight) / width)))
    const batch: Items = []
    let bytes = 0
    for (const [account, items] of waiting) {
      if (begun.has(account) || slow.has(account) !== alone) continue
      const before = batch.length
      for (const item of items) {
        bytes += item.bytes
        if (batch.length === maxBatch || bytes > maxBytes) break
        batch.push(item)
      }
      items.splice(0, batch.length - before)
      if (batch.length > before) {
        waiting.delete(account)
        if (items.length > 0) waiting.set(account, items)
      }
      if (alone || items.length > 0 || batch.length >= share) break
    }
    if (batch.length === 0) return undefined
    for (const { account } of batch) begun.set(account, (begun.get(account) ?? 0) + 1)
    return { items: batch, at: 0, pause: FIRST_PAUSE_MS }
  }

  // What failed least often goes first: an account that is locked for long holds up none that was busy for a moment.
  function retake(): Group<Answer> | undefined {
    const now = performance.now()
    const ready = again.filter(({ at }) => at <= now)
    if (ready.length === 0) return undefined
    const next = ready.reduce((first, group) => (group.pause < first.pause ? group : first))
    again.splice(again.indexOf(next), 1)
    return next
  }

  function putBack(...groups: Group<Answer>[]) {
    for (const group of groups) {
      if (abandoned) give(group.items, group.error)
      if (abandoned) continue
      queued += group.items.length
      inFlight -= group.items.length
      again.push(group)
    }
  }

  // Before what came since, with others again: it was another call's for a moment, and costs these nothing.
  function requeue(account: string, items: Items) {
    begun.delete(account)
    queued += items.length
    inFlight -= items.length
    waiting.set(account, [...items, ...(waiting.get(account) ?? [])])
    begin()
  }

  /** Settles every item, or puts it back; never rejects. */
  async function deliver(group: Group<Answer>): Promise<void> {
    let { items, pause } = group
    const alreadyTried = group.error === undefined ? 0 : TRIES_TOGETHER
    for (let tries = 1; ; tries++) {
      // while calls fail, what is late goes unsent
      const why = group.error ?? (perishable || lastError !== undefined ? late(lastError) : undefined)
      if (why !== undefined) items = keep(items, performance.now(), why)
      if (abandoned) give(items, why)
      if (abandoned || items.length === 0) return follow(group)
      let error: unknown
      try {
        return answered(group, items, await call(items))
      } catch (reason) {
        error = reason
      }
      lastError = group.error = error
      failedAt = performance.now()
      if (mayBeDone(error)) for (const { answer } of items) doubted.add(answer)
      if (abandoned) return give(items, error)
      const verdict = verdictOn(error, items, alreadyTried + tries)
      const wait = verdict === 'split' && blamesData(error) ? 0 : pause * (0.5 + Math.random() / 2)
      items = verdict === 'final' ? items : keep(items, failedAt + wait, error)
      if (verdict === 'final') give(items, error)
      if (verdict === 'final' || items.length === 0) return follow(group)
      const rest = { ...group, items, at: failedAt + wait, pause }
      // others of it may have been late
      if (verdict === 'split') return items.length > 1 ? split(rest) : putBack(rest)
      pause = Math.min(2 * pause, LONGEST_PAUSE_MS)
      if (verdict === 'back') return putBack({ ...rest, pause })
      await new Promise((resolve) => setTimeout(resolve, wait))
    }
  }

  async function call(items: Items): Promise<Answer[]> {
    const answers = await send(items.map(({ json }) => json))
    const ids = items.map((item) => item.id)
    return checkAnswers(answers, ids, id !== undefined)
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
      slow.delete(item.account)
      land(item)
      item.resolve(answers[i]!)
    }
    const pause = Math.min(2 * group.pause, LONGEST_PAUSE_MS)
    const at = performance.now() + group.pause * (0.5 + Math.random() / 2)
    // only a group of one account has later elements, so they follow the one that is busy
    for (const [account, each] of busy) {
      if (each[0]!.busy! <= BUSY_TOGETHER && !group.next && !abandoned) {
        requeue(account, each)
        continue
      }
      slow.add(account)
      putBack({ ...group, items: each, at, pause, error: accountBusy() })
    }
    if (busy.size === 0) follow(group)
  }

  /**
   * `final`: it is these elements' fault, or nobody wants to wait. `split`: it may be the fault of some of them.
   * `back`: of their account, so that it must not keep a lane. `stay`: everybody's, so that another batch would fail alike.
   */
  function verdictOn(error: unknown, items: Items, tries: number): 'final' | 'split' | 'back' | 'stay' {
    const several = items.length > 1
    const code = codeOf(error)
    if (code === 'timeout' || code === 'lock_timeout') {
      const one = items.every(({ account }) => account === items[0]!.account)
      if (one) slow.add(items[0]!.account)
      return several && !(one && code === 'lock_timeout') ? 'split' : 'back'
    }
    if (isRetryable(error)) return 'stay'
    if (blamesData(error)) return several ? 'split' : 'final'
    if (isEverybodys(error)) return patient ? 'stay' : 'final'
    if (!patient) return several ? 'split' : 'final'
    if (tries < TRIES_TOGETHER) return 'stay'
    return several ? 'split' : 'back'
  }

  // Side by side only what shares no account: then neither half waits for the other.
  function split({ items, next, ...group }: Group<Answer>) {
    const middle = Math.ceil(items.length / 2)
    const cuts = [...items.keys()].filter((i) => i > 0 && items[i - 1]!.account !== items[i]!.account)
    const cut = cuts.sort((a, b) => Math.abs(a - middle) - Math.abs(b - middle))[0]
    const first = { ...group, items: items.slice(0, cut ?? middle) }
    const second = { ...group, items: items.slice(cut ?? middle), next }
    if (cut !== undefined) return putBack(first, second)
    putBack({ ...first, next: second })
    queued += second.items.length
    inFlight -= second.items.length
  }

  // counted as queued since it was split off
  function follow({ next }: Group<Answer>) {
    if (next && !abandoned) again.push({ ...next, at: 0 })
  }

  async function run(group: Group<Answer>, isNarrow: boolean) {
    const lane = Number(isNarrow)
    running++
    narrow += lane
    wasNarrow = isNarrow
    queued -= group.items.length
    inFlight += group.items.length
    await deliver(group)
    running--
    narrow -= lane
    begin()
  }

  // by turns, so that neither kind waits for ever
  function startNarrow(): boolean {
    if (narrow >= half) return false
    fresh = !fresh
    return start(fresh ? (take(true) ?? retake()) : (retake() ?? take(true)), true)
  }
  const startOthers = () => start(take(false), false)
  function start(group: Group<Answer> | undefined, isNarrow: boolean): boolean {
    if (group) run(group, isNarrow)
    return group !== undefined
  }

  // a deadline is kept though no lane is free: many accounts may be locked
  function sweep() {
    const now = performance.now()
    const overdue = again.filter(({ items, error }) => error !== undefined && items.at(-1)!.until < now)
    if (overdue.length > 0) again = again.filter((group) => !overdue.includes(group))
    for (const group of overdue) {
      queued -= group.items.length
      inFlight += group.items.length
      keep(group.items, Number.POSITIVE_INFINITY, group.error)
      follow(group)
    }
    for (const account of slow) {
      const items = waiting.get(account) ?? []
      const kept = items.findIndex(({ until }) => until >= now)
      const gone = items.splice(0, kept < 0 ? items.length : kept)
      if (items.length === 0) waiting.delete(account)
      if (items.length === 0 && !begun.has(account)) slow.delete(account)
      queued -= gone.length
      failed += gone.length
      for (const item of gone) {
        settled(item)
        item.reject(accountBusy())
        quiet(item.answer)
      }
    }
  }

  // at the end of this turn, so that what comes with it goes with it
  function begin() {
    if (due || queued === 0) return
    due = true
    setImmediate(() => {
      due = false
      sweep()
      while (running < width && queued) {
        // where there is one lane only, they take turns
        const others = width === 1 && wasNarrow
        if (!(others ? startOthers() || startNarrow() : startNarrow() || startOthers())) break
      }
      clearTimeout(timer)
      if (again.length === 0) return
      const free = narrow < half && running < width
      const moments = again.map(({ at, items }) =>
        Math.min(free ? at : Number.POSITIVE_INFINITY, items.at(-1)!.until),
      )
      const next = moments.reduce((first, moment) => Math.min(first, moment))
      timer = setTimeout(begin, Math.max(1, next - performance.now()))
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
    if (queued >= maxQueue) throw overloaded(`${queued} elements are waiting`)
    const json = encode(element)
    const bytes = Buffer.byteLength(json)
    if (bytes > maxBytes) {
      throw new KeyledgerError('payload_too_large', 413, {
        detail: `${bytes} bytes of JSON, of ${maxBytes} allowed`,
        hint: 'send less in one element',
      })
    }
    if (bytesKept + bytes > maxQueueBytes) throw overloaded(`${bytesKept} bytes are waiting`)
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
      bytesKept += item.bytes
      unsettled.add(item)
      begin()
      return item.answer
    },
    inDoubt: (answer) => doubted.has(answer),
    flush,
    stop() {
      stopped = true
      return flush()
    },
    abandon(error) {
      stopped = abandoned = true
      clearTimeout(timer)
      waiting.clear()
      again = []
      queued = 0
      for (const item of unsettled) {
        failed++
        settled(item)
        if (begun.has(item.account)) doubted.add(item.answer)
        item.reject(error)
        quiet(item.answer)
      }
    },
    stats: () => ({
      queued,
      in_flight: inFlight,
      failed,
      error: lastError === undefined || performance.now() - failedAt > errorAge ? null : codeOf(lastError),
    }),
  }
}

/** The answers, if there is one for each of the elements with these ids: else nobody knows what was carried out. */
export function checkAnswers<Answer>(answers: Answer[], ids: unknown[], haveIds = true): Answer[] {
  const isAnswer = (answer: unknown, i: number) => answer !== null && (!haveIds || answersTo(answer, ids[i]))
  if (Array.isArray(answers) && answers.length === ids.length && answers.every(isAnswer)) return answers
  throw new KeyledgerError('invalid_response', 502, {
    detail: 'a batch was not answered element by element',
  })
}

// Of an id that is no text there may be no echo, or one as text.
function answersTo(answer: unknown, id: unknown): boolean {
  if (typeof answer !== 'object') return false
  const given = answer as { id?: unknown; status?: unknown }
  if (typeof given.status !== 'string') return false
  return typeof id !== 'string' || (typeof given.id === 'string' && spelled(given.id) === spelled(id))
}

// SQL echoes a uuid in lower case and without braces, and U+FFFD for each character that can't be stored
const spelled = (id: string) =>
  id
    .toLowerCase()
    .replace(/[{}-]/g, '')
    .replace(/\0|\p{Cs}/gu, '\ufffd')

const overloaded = (detail: string) =>
  new KeyledgerError('overloaded', 503, { detail, hint: 'try again later' })

// with an error of others that kept it waiting, if there is one
const late = (cause?: unknown) =>
  new KeyledgerError('timeout', 504, {
    detail: 'not delivered before its deadline',
    hint: 'ask again',
    cause,
  })

const accountBusy = () =>
  new KeyledgerError('lock_timeout', 503, {
    detail: 'another session holds the account',
    hint: 'try again later',
  })

const rejected = (error: unknown): Promise<never> => quiet(Promise.reject(error))

/** A promise whose rejection needs no handler; who wants to know of it still does. */
export function quiet<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => {})
  return promise
}
