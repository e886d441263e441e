// Doubts: holds that were given up, and may be placed all the same. They are looked for and
// released, many in a call.
import { endsWithin, pause } from './time-limits.ts'

export interface Doubt {
  id: string
  account_id: string
}

export interface Doubts {
  /**
   * Takes a hold whose call ended without an answer, or was answered when nobody waited any more.
   */
  add(hold: Doubt): void
  /**
   * Looks once more for each hold, for good. Resolves when the look was answered, or after `ms`.
   */
  stop(ms: number): Promise<void>
  size(): number
}

type Answer = { status: string; code?: string }
type Entry = Doubt & { since: number; looked: number }

// ms after the hold was given up. Its call may still wait in PostgREST for a connection, and a
// later call may overtake it: the last look comes after all that.
const LOOKS = [500, 8000, 32_000]
const PACE_MS = 100
const LONGEST_PAUSE_MS = 2000
const MAX_BATCH = 500
// past it, the oldest holds are forgotten: they expire by themselves
const MAX = 10_000

/** `release` answers in the same order. */
export function createDoubts(release: (holds: Doubt[]) => Promise<Answer[]>): Doubts {
  const entries = new Map<string, Entry>()
  let timer: NodeJS.Timeout | undefined
  let looking: Promise<void> | undefined
  let plannedAt = Number.POSITIVE_INFINITY
  let pace = PACE_MS
  let stopped = false

  const dueAt = ({ since, looked }: Entry) => since + (LOOKS.find((after) => since + after > looked) ?? 0)

  async function look(holds: Entry[]): Promise<void> {
    const moment = performance.now()
    try {
      const answers = await release(holds.map(({ id, account_id }) => ({ id, account_id })))
      for (const [i, hold] of holds.entries()) {
        const { status, code } = answers[i]!
        if (status === 'busy') continue
        hold.looked = moment
        const isLast = stopped || moment >= hold.since + LOOKS.at(-1)!
        if (code !== 'hold_not_found' || isLast) entries.delete(hold.id)
      }
      pace = PACE_MS
    } catch {
      // Postgres is away: that was no look
      pace = Math.min(2 * pace, LONGEST_PAUSE_MS)
    }
  }

  function plan() {
    clearTimeout(timer)
    plannedAt = Number.POSITIVE_INFINITY
    if (stopped || looking || entries.size === 0) return
    for (const entry of entries.values()) plannedAt = Math.min(plannedAt, dueAt(entry))
    timer = setTimeout(next, Math.max(pace, plannedAt - performance.now())).unref()
  }

  function next() {
    plannedAt = Number.POSITIVE_INFINITY
    const now = performance.now()
    const due = [...entries.values()].filter((entry) => dueAt(entry) <= now).slice(0, MAX_BATCH)
    if (due.length > 0)
      looking = look(due).then(() => {
        looking = undefined
        plan()
      })
    else plan()
  }

  return {
    add({ id, account_id }) {
      const entry = { id, account_id, since: performance.now(), looked: 0 }
      entries.set(id, entry)
      if (entries.size > MAX) entries.delete(entries.keys().next().value!)
      if (!looking && dueAt(entry) < plannedAt) plan()
    },

    async stop(ms) {
      stopped = true
      clearTimeout(timer)
      let isOver = false
      async function lookAtAll() {
        await looking
        while (entries.size > 0 && !isOver) {
          await look([...entries.values()].slice(0, MAX_BATCH))
          if (entries.size > 0 && !isOver) await pause(pace)
        }
      }
      await endsWithin(lookAtAll(), ms)
      isOver = true
      entries.clear()
    },

    size: () => entries.size,
  }
}
