// Trust: how long a cache tier may answer by itself after the last read that proved it complete.

/** The listener keeps it, and the cache asks it. All times are of the monotonic clock, in ms. */
export interface Trust {
  /** May the tier answer now? */
  live(): boolean
  /**
   * Says that all changes committed before `sentAt` are evicted. It doesn't bring back trust that
   * ended after `sentAt`.
   */
  prove(sentAt: number): void
  /** Nothing proven so far counts any more: a connection broke, a read or an eviction failed. */
  end(): void
  /**
   * Called ten times a second while changes are read. A gap between the calls ends trust: this
   * process stood still.
   */
  beat(): void
  /** From now on, trusts a proof for `ms` at most. */
  shorten(ms: number): void
  /**
   * The moment up to which the tier is known to be complete, whether or not that is still trusted.
   */
  provenAt(): number
}

export const BEAT_MS = 100
// A read is sent every 300 ms. After a longer gap than this, a change could be unseen for more than
// a second.
const STILL_MS = 500

export function createTrust(maxStaleness: number): Trust {
  let provenAt = -Infinity
  let endedAt = -Infinity
  let last: { monotonic: number; wall: number } | undefined

  function end() {
    endedAt = performance.now()
  }

  // by both clocks: the monotonic one stands still with a suspended machine
  function look() {
    if (!last) return
    const stood = Math.max(performance.now() - last.monotonic, Math.abs(Date.now() - last.wall))
    if (stood > STILL_MS) end()
  }

  return {
    live() {
      look()
      return provenAt > endedAt && performance.now() - provenAt <= maxStaleness
    },
    prove(sentAt) {
      provenAt = Math.max(provenAt, sentAt)
    },
    end,
    beat() {
      look()
      last = { monotonic: performance.now(), wall: Date.now() }
    },
    shorten(ms) {
      maxStaleness = Math.min(maxStaleness, ms)
    },
    provenAt: () => provenAt,
  }
}
