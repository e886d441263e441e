// Trust: how long a cache tier may answer by itself after the last read that proved it complete.

/** Kept by whoever reads the changes, asked by whoever serves. All times are of the monotonic clock, in ms. */
export interface Trust {
  /** May the tier answer now? */
  holds(): boolean
  /** All changes that were committed before `sentAt` are evicted. Doesn't bring back trust that ended after it. */
  prove(sentAt: number): void
  /** Nothing proven so far counts any more: a connection broke, a read or an eviction failed. */
  end(): void
  /** Called ten times a second while changes are read. Where the calls stop, this process stood still: trust ends. */
  beat(): void
  /** Trusts a proof for `ms` at most from now on. */
  shorten(ms: number): void
  /** The moment up to which the tier is known to be complete, whether or not that is still trusted. */
  provenAt(): number
}

export const BEAT_MS = 100
// A read is sent every 300 ms. A longer gap than this, and what changed in it could be older than a second.
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
    holds() {
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
