// Trust: how long a cache tier may answer by itself after the last read that proved it complete.

/** Kept by whoever reads the changes, asked by whoever serves. All times are of the monotonic clock, in ms. */
export interface Trust {
  /** May the tier answer now? */
  holds(): boolean
  /** All changes that were committed before `sentAt` are evicted. Doesn't bring back trust that ended after it. */
  prove(sentAt: number): void
  /** Nothing proven so far counts any more: a connection broke, a read or an eviction failed. */
  end(): void
  /** The moment up to which the tier is known to be complete, whether or not that is still trusted. */
  provenAt(): number
}

export function createTrust(maxStaleness: number): Trust {
  let provenAt = -Infinity
  let endedAt = -Infinity
  return {
    holds: () => provenAt > endedAt && performance.now() - provenAt <= maxStaleness,
    prove(sentAt) {
      provenAt = Math.max(provenAt, sentAt)
    },
    end() {
      endedAt = performance.now()
    },
    provenAt: () => provenAt,
  }
}
