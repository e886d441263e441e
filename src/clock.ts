// The server's clock, as this process last read it: a host whose own clock is wrong does no harm.

// server's time less the monotonic clock; undefined before the first answer
let offset: number | undefined

/** Ms since 1970 by the server's clock; by the host's until the server has answered once. */
export function serverNow(): number {
  return offset === undefined ? Date.now() : performance.now() + offset
}

/**
 * Takes the server's `now` from an answer. It counts for the middle between `sentAt` and
 * `receivedAt`, both of the monotonic clock.
 */
export function setServerTime(now: unknown, sentAt: number, receivedAt: number): void {
  if (typeof now === 'number' && Number.isFinite(now)) offset = now - (sentAt + receivedAt) / 2
}
