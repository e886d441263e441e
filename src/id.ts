// Ids of events and holds.
import { randomUUID } from 'node:crypto'

/** A UUIDv7 of now: 48 bits of Unix time in ms, the rest chance. Give it to an event or a hold that may be repeated. */
export function newId(): string {
  const time = Date.now().toString(16).padStart(12, '0')
  // what follows the version is the same in a v4, which Node makes 10 times faster than 10 random bytes
  return `${time.slice(0, 8)}-${time.slice(8)}-7${randomUUID().slice(15)}`
}
