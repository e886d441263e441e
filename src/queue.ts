// The queue of a batcher: elements wait by account, and leave in groups. A group goes in one call.
//
// An account is in one call at a time: elements that arrive meanwhile wait for it. A group that
// must be sent again waits here too, beside the new elements. An account that was found busy, or
// slow by itself, is `slow`: it goes alone.
import { KeyledgerError } from './errors.ts'

/** One element, from `add` until its promise is settled. */
export interface Item<Answer> {
  /** Made once: every try sends the same text. */
  json: string
  account: string
  id: unknown
  bytes: number
  /** Its deadline, of the monotonic clock. */
  until: number
  /** How often its account was busy. */
  busy?: number
  answer: Promise<Answer>
  resolve: (answer: Answer) => void
  reject: (error: unknown) => void
}

/** Elements that go in one call. */
export interface Group<Answer> {
  items: Item<Answer>[]
  /** It is not sent again before this moment. */
  at: number
  /** ms to wait after the next failure. */
  pause: number
  /** Why its elements were not delivered yet. */
  error?: unknown
  /** Later elements of the same account: they go when these are settled. */
  next?: Group<Answer>
}

export interface QueueOptions {
  lanes: number
  maxBatch: number
  maxBytes: number
  maxQueue: number
  maxQueueBytes: number
  /** Called when something may be ready to be sent. */
  changed: () => void
}

export type Queue<Answer> = ReturnType<typeof createQueue<Answer>>

export const FIRST_PAUSE_MS = 50
// a smaller group is not worth a call of its own while another lane is free to take its elements
const WORTH_A_CALL = 32

export function createQueue<Answer>({
  lanes,
  maxBatch,
  maxBytes,
  maxQueue,
  maxQueueBytes,
  changed,
}: QueueOptions) {
  type Items = Item<Answer>[]
  // by account, in turn: the rest of an account that was served goes to the end
  const waiting = new Map<string, Items>()
  // groups to be sent again
  let again: Group<Answer>[] = []
  // elements by account that are in flight, or will be sent again
  const begun = new Map<string, number>()
  const slow = new Set<string>()
  const unsettled = new Set<Item<Answer>>()
  let queued = 0
  let inFlight = 0
  let bytesKept = 0
  let abandoned = false

  /**
   * Throws 503 `overloaded`. It is asked before the JSON is made: to make it would cost more than
   * to refuse.
   */
  function checkRoom() {
    if (queued >= maxQueue) throw overloaded(`${queued} elements are waiting`)
  }

  /** Throws 413 `payload_too_large`, 503 `overloaded`. */
  function checkBytes(bytes: number) {
    if (bytes > maxBytes) {
      throw new KeyledgerError('payload_too_large', 413, {
        detail: `${bytes} bytes of JSON, of ${maxBytes} allowed`,
        hint: 'send less in one element',
      })
    }
    if (bytesKept + bytes > maxQueueBytes) throw overloaded(`${bytesKept} bytes are waiting`)
  }

  function add(item: Item<Answer>) {
    const items = waiting.get(item.account)
    if (items) items.push(item)
    else waiting.set(item.account, [item])
    queued++
    bytesKept += item.bytes
    unsettled.add(item)
    changed()
  }

  /** Was the element still unsettled? */
  function settle(item: Item<Answer>): boolean {
    if (!unsettled.delete(item)) return false
    bytesKept -= item.bytes
    return true
  }

  /**
   * Ends the flight of an element. Its account is free as soon as none of its elements is in
   * flight, though other accounts of the batch still are. Answers as `settle`.
   */
  function land(item: Item<Answer>): boolean {
    const others = begun.get(item.account)! - 1
    if (others) begun.set(item.account, others)
    else begun.delete(item.account)
    if (!others && !waiting.has(item.account)) slow.delete(item.account)
    inFlight--
    const wasUnsettled = settle(item)
    changed()
    return wasUnsettled
  }

  // A fair share of all elements, so that free lanes get theirs. An account goes whole: once begun,
  // its rest would wait.
  function take(alone: boolean): Group<Answer> | undefined {
    const share = Math.min(maxBatch, Math.max(WORTH_A_CALL, Math.ceil((queued + inFlight) / lanes)))
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

  // The group that failed least often goes first: an account that is locked for long holds up no
  // account that was busy for a moment.
  function takeAgain(): Group<Answer> | undefined {
    const now = performance.now()
    const ready = again.filter(({ at }) => at <= now)
    if (ready.length === 0) return undefined
    const next = ready.reduce((first, group) => (group.pause < first.pause ? group : first))
    again.splice(again.indexOf(next), 1)
    return next
  }

  function depart({ items }: Group<Answer>) {
    queued -= items.length
    inFlight += items.length
  }

  function comeBack({ items }: Group<Answer>) {
    queued += items.length
    inFlight -= items.length
  }

  function putBack(group: Group<Answer>) {
    comeBack(group)
    again.push(group)
  }

  // Before the account's newer elements, and with other accounts again: a moment's lock of another
  // call costs them nothing.
  function requeue(account: string, items: Items) {
    begun.delete(account)
    comeBack({ items, at: 0, pause: FIRST_PAUSE_MS })
    waiting.set(account, [...items, ...(waiting.get(account) ?? [])])
    changed()
  }

  // `next` counts as queued since it was split off
  function follow({ next }: Group<Answer>) {
    if (next && !abandoned) again.push({ ...next, at: 0 })
  }

  /**
   * Takes out every group to be sent again whose deadline is over; they count as in flight until
   * they land.
   */
  function takeOverdue(now: number): Group<Answer>[] {
    const overdue = again.filter(({ items, error }) => error !== undefined && items.at(-1)!.until < now)
    if (overdue.length > 0) again = again.filter((group) => !overdue.includes(group))
    for (const group of overdue) depart(group)
    return overdue
  }

  /** Takes out the elements of slow accounts whose deadline is over, and settles them. */
  function dropSlow(now: number): Items {
    const dropped: Items = []
    for (const account of slow) {
      const items = waiting.get(account) ?? []
      const kept = items.findIndex(({ until }) => until >= now)
      for (const item of items.splice(0, kept < 0 ? items.length : kept)) dropped.push(item)
      if (items.length === 0) waiting.delete(account)
      if (items.length === 0 && !begun.has(account)) slow.delete(account)
    }
    queued -= dropped.length
    for (const item of dropped) settle(item)
    return dropped
  }

  /**
   * The moment at which a group can go again (if a lane is free for it) or is over; undefined if
   * there is none.
   */
  function nextMoment(free: boolean): number | undefined {
    if (again.length === 0) return undefined
    const moments = again.map(({ at, items }) =>
      Math.min(free ? at : Number.POSITIVE_INFINITY, items.at(-1)!.until),
    )
    return moments.reduce((first, moment) => Math.min(first, moment))
  }

  /** Forgets everything that waits, for good. Gives the unsettled elements, those in flight too. */
  function abandon(): Items {
    abandoned = true
    waiting.clear()
    again = []
    queued = 0
    const all = [...unsettled]
    for (const item of all) settle(item)
    return all
  }

  return {
    ...{
      checkRoom,
      checkBytes,
      add,
      settle,
      land,
      take,
      takeAgain,
      depart,
      comeBack,
      putBack,
      requeue,
      follow,
    },
    ...{ takeOverdue, dropSlow, nextMoment, abandon },
    hasBegun: (account: string) => begun.has(account),
    markSlow: (account: string) => slow.add(account),
    unmarkSlow: (account: string) => slow.delete(account),
    unsettled: () => [...unsettled],
    isAbandoned: () => abandoned,
    isEmpty: () => queued === 0,
    stats: () => ({ queued, in_flight: inFlight }),
  }
}

const overloaded = (detail: string) =>
  new KeyledgerError('overloaded', 503, { detail, hint: 'try again later' })
