// The server's clock, as this process last read it: a host whose own clock is wrong does no harm.

// server's time less the monotonic clock; undefined before the first answer. `latest` is the most
// it can be: the server may have read its clock as soon as it was asked.
let offset: number | undefined
let latest: number | undefined

/** Ms since 1970 by the server's clock; by the host's until the server has answered once. */
export function serverNow(): number {
  return offset === undefined ? Date.now() : performance.now() + offset
}

/**
 * The latest that the server's clock can show now: a time that must not be overstepped is over by
 * it. Later than `serverNow` by half of the last answer's round trip.
 */
export function serverNowAtLatest(): number {
  return latest === undefined ? Date.now() : performance.now() + latest
}

/**
 * Takes the server's `now` from an answer. It counts for the middle between `sentAt` and
 * `receivedAt`, both of the monotonic clock.
 */
export function setServerTime(now: unknown, sentAt: number, receivedAt: number): void {
  if (typeof now !== 'number' || !Number.isFinite(now)) return
  offset = now - (sentAt + receivedAt) / 2
  latest = now - sentAt
}
