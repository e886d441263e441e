// Holds that were given up and may be there, or come yet: looked for and released, many in a call, one call at a time.

export interface Doubt {
  id: string
  account_id: string
}

export interface Doubts {
  /** Of a hold whose call has ended without an answer, or was answered when nobody waited any more. */
  add(hold: Doubt): void
  /** Looks once more for each, and resolves when that has been answered, or after `ms`; for good. */
  stop(ms: number): Promise<void>
  size(): number
}

type Answer = { status: string; code?: string }
type Entry = Doubt & { since: number; looked: number }

// ms after giving up. A call that was given up may wait in PostgREST for a connection, where a later one overtakes it:
// the last look comes after all that.
const LOOKS = [500, 8000, 32_000]
const PACE_MS = 100
const LONGEST_PAUSE_MS = 2000
const MAX_BATCH = 500
// the oldest of more expire by themselves
const MAX = 10_000

/** `release` answers in the same order. */
export function createDoubts(release: (holds: Doubt[]) => Promise<Answer[]>): Doubts {
  const entries = new Map<string, Entry>()
  let timer: NodeJS.Timeout | undefined
  let looking: Promise<void> | undefined
  let plannedAt = Number.POSITIVE_INFINITY
  let pause = PACE_MS
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
      pause = PACE_MS
    } catch {
      // Postgres is away: it was no look
      pause = Math.min(2 * pause, LONGEST_PAUSE_MS)
    }
  }

  function plan() {
    clearTimeout(timer)
    plannedAt = Number.POSITIVE_INFINITY
    if (stopped || looking || entries.size === 0) return
    for (const entry of entries.values()) plannedAt = Math.min(plannedAt, dueAt(entry))
    timer = setTimeout(next, Math.max(pause, plannedAt - performance.now())).unref()
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
      let end = () => {}
      const ended = new Promise<void>((resolve) => {
        end = resolve
      })
      const limit = setTimeout(end, ms)
      let over = false
      ended.then(() => {
        over = true
      })
      await Promise.race([looking, ended])
      while (entries.size > 0 && !over) {
        await Promise.race([look([...entries.values()].slice(0, MAX_BATCH)), ended])
        if (entries.size > 0 && !over)
          await Promise.race([new Promise((resolve) => setTimeout(resolve, pause)), ended])
      }
      clearTimeout(limit)
      entries.clear()
    },

    size: () => entries.size,
  }
}
