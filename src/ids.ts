// Ids on the server's time: a host whose clock is wrong makes ids like any other.

import { randomFillSync } from 'node:crypto'
import { v7 } from 'uuid'

// what a small correction may not undo: ids of one process go up
const MAX_BACK_MS = 60_000

// server's time less the monotonic clock; undefined before the first answer
let offset: number | undefined
let last = 0

/** Ms since 1970 by the server's clock as it was last read; by the host's before. */
export function serverNow(): number {
  return offset === undefined ? Date.now() : performance.now() + offset
}

/** Takes the server's `now` from an answer: it is of the middle between `sentAt` and `receivedAt`, of the monotonic clock. */
export function setServerTime(now: unknown, sentAt: number, receivedAt: number): void {
  if (typeof now === 'number' && Number.isFinite(now)) offset = now - (sentAt + receivedAt) / 2
}

// bought in bulk: to ask for 16 bytes costs as much as for 4,096
const chance = new Uint8Array(4096)
let spent = chance.length

function random(): Uint8Array {
  if (spent === chance.length) {
    randomFillSync(chance)
    spent = 0
  }
  spent += 16
  return chance.subarray(spent - 16, spent)
}

/** A UUIDv7 of now, by the server's clock. Give it to an event or a hold that may be repeated. */
export function newId(): string {
  const now = Math.floor(serverNow())
  last = now < last - MAX_BACK_MS ? now : Math.max(last, now)
  return v7({ msecs: last, random: random() })
}
