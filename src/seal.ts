// The seal of a value in Redis: an HMAC of its name and its text, so that a stranger who may write
// there can't forge it.
import { createHmac, timingSafeEqual } from 'node:crypto'

export interface Seal {
  /** Seals the text for `name`: store the result there. */
  close(name: string, text: string): string
  /** The text, if the stored value is sealed for this name; undefined else. */
  open(name: string, stored: string): string | undefined
}

// a sha-256 in base64url
const MAC_LENGTH = 43
const LEAST_SECRET = 16

/**
 * The first secret seals, and every secret opens. Without any, values are stored as they are.
 * Throws TypeError for a short one.
 */
export function createSeal(secrets: readonly string[]): Seal {
  if (secrets.some((secret) => typeof secret !== 'string' || secret.length < LEAST_SECRET))
    throw new TypeError(`createBillingModule: a \`redisSecret\` has at least ${LEAST_SECRET} characters`)
  const [first] = secrets
  if (first === undefined) return { close: (_, text) => text, open: (_, stored) => stored }

  const mac = (secret: string, name: string, text: string) =>
    createHmac('sha256', secret).update(`${name}\n${text}`).digest('base64url')

  return {
    close: (name, text) => mac(first, name, text) + text,
    open(name, stored) {
      if (stored.length < MAC_LENGTH) return undefined
      const [given, text] = [Buffer.from(stored.slice(0, MAC_LENGTH)), stored.slice(MAC_LENGTH)]
      const fits = (secret: string) => {
        const expected = Buffer.from(mac(secret, name, text))
        return given.length === expected.length && timingSafeEqual(given, expected)
      }
      return secrets.some(fits) ? text : undefined
    },
  }
}
