// Figures of a provider's usage: which can be trusted, and how those of several events make one.

/** A provider's JSON, of any shape. */
export type Json = Record<string, unknown>

export const isObject = (value: unknown): value is Json =>
  typeof value === 'object' && value !== null && !Array.isArray(value)

/** The object itself, or an empty one. */
export const object = (value: unknown): Json => (isObject(value) ? value : {})

/** The list itself, or an empty one. */
export const list = (value: unknown): unknown[] => (Array.isArray(value) ? value : [])

/** Reads counts, and remembers whether one was not a whole number of at least 0. */
export function createReader() {
  let odd = false

  /** The first of the values that is a count; undefined if there is none. */
  function count(...values: unknown[]): number | undefined {
    let found: number | undefined
    for (const value of values) {
      if (value === undefined || value === null) continue
      const read = typeof value === 'string' && /^\d{1,15}$/.test(value) ? Number(value) : value
      // a fraction of a token was delivered as well
      const whole = typeof read === 'number' ? Math.ceil(read) : Number.NaN
      const fits = Number.isSafeInteger(whole) && whole >= 0 && (read as number) >= 0
      if (!fits || whole !== value) odd = true
      // a provider may give one count under two names, and one of them 0
      if (fits) found = Math.max(found ?? 0, whole)
    }
    return found
  }

  return { count, isOdd: () => odd }
}

export type Reader = ReturnType<typeof createReader>

// levels of a usage that are read
const DEPTH = 5

/**
 * One usage from that of two events. Counts of a stream are cumulative, so that the larger one is
 * the later state; a zero or null after it takes nothing back.
 */
export function mergeUsage(before: unknown, after: unknown, depth = DEPTH): unknown {
  if (after === undefined || after === null) return before
  if (before === undefined || before === null || depth === 0) return after
  if (isObject(before) && isObject(after)) {
    // without a prototype, which a field's name could reach
    const merged: Json = Object.assign(Object.create(null), before)
    for (const [key, value] of Object.entries(after)) merged[key] = mergeUsage(merged[key], value, depth - 1)
    return merged
  }
  if (typeof before === 'number' && typeof after === 'number') return Math.max(before, after)
  // an empty list, or a value of another type, tells less than the first one
  if (Array.isArray(before) && Array.isArray(after)) return after.length ? after : before
  return typeof before === typeof after || typeof after === 'number' ? after : before
}

/** A number as a decimal text, without an exponent; undefined if it is no amount. */
export function decimalOf(value: unknown): string | undefined {
  const text = typeof value === 'number' ? String(value) : value
  if (typeof text !== 'string') return undefined
  const [, whole, fraction = '', exponent = '0'] =
    /^(\d{1,20})(?:\.(\d{1,40}))?(?:e([+-]\d{1,3}))?$/i.exec(text) ?? []
  if (whole === undefined) return undefined
  const shift = Number(exponent)
  if (Math.abs(shift) > 30) return undefined
  const digits = `${'0'.repeat(Math.max(0, -shift))}${whole}${fraction}${'0'.repeat(Math.max(0, shift))}`
  const point = Math.max(0, -shift) + whole.length + shift
  const trimmed = `${digits.slice(0, point)}.${digits.slice(point)}`.replace(/^0+(?=\d)/, '')
  return trimmed.replace(/0+$/, '').replace(/\.$/, '')
}

/** The sum of two decimal texts. */
export function addDecimals(one: string, other: string): string {
  const places = Math.max(...[one, other].map((text) => text.split('.')[1]?.length ?? 0))
  const scaled = (text: string) => {
    const [whole = '0', fraction = ''] = text.split('.')
    return BigInt(whole + fraction.padEnd(places, '0'))
  }
  const sum = String(scaled(one) + scaled(other)).padStart(places + 1, '0')
  return decimalOf(places ? `${sum.slice(0, -places)}.${sum.slice(-places)}` : sum)!
}
