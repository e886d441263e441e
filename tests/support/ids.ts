// Ids of tests: a UUIDv7 of a moment, or of now.
import { randomBytes } from 'node:crypto'
import { now } from './clock.ts'

/** A UUIDv7 of that moment. */
export function idAt(moment: Date | string | number): string {
  const time = new Date(moment).getTime().toString(16).padStart(12, '0')
  const [, a, b, c] = randomBytes(10)
    .toString('hex')
    .match(/^(.{3})(.{3})(.{12})/)!
  const variant = '89ab'[randomBytes(1)[0]! % 4]
  return `${time.slice(0, 8)}-${time.slice(8)}-7${a}-${variant}${b}-${c}`
}

/** A UUIDv7 of now, by the test's clock. */
export const newId = (): string => idAt(now())
