// Ids: UUIDv7s on the server's time.
import { randomFillSync } from 'node:crypto'
import { serverNow } from './clock.ts'

// the ids of one process go up: a smaller correction of the clock changes nothing
const MAX_BACK_MS = 60_000
let last = 0

// 4,096 bytes cost no more to ask for than 16
const pool = Buffer.alloc(4096)
const PER_ID = 10
let spent = pool.length

function random(): Buffer {
  if (spent + PER_ID > pool.length) {
    randomFillSync(pool)
    spent = 0
  }
  spent += PER_ID
  return pool.subarray(spent - PER_ID, spent)
}

/** A UUIDv7 of now, by the server's clock. Give it to an event or a hold that may be repeated. */
export function newId(): string {
  const now = Math.floor(serverNow())
  last = now < last - MAX_BACK_MS ? now : Math.max(last, now)
  const bytes = random()
  // RFC 9562: version 7 and variant 10, each in the highest bits of its part
  bytes[0] = 0x70 | (bytes[0]! & 0x0f)
  bytes[2] = 0x80 | (bytes[2]! & 0x3f)
  const hex = last.toString(16).padStart(12, '0') + bytes.toString('hex')
  return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-${hex.slice(12, 16)}-${hex.slice(16, 20)}-${hex.slice(20)}`
}
