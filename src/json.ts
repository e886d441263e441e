// JSON for Postgres: makes it, and refuses or replaces the characters that Postgres can't store.
import { invalidInput } from './errors.ts'

const unstorable = () =>
  invalidInput(
    'a text has a NUL character or half of a surrogate pair',
    'remove it: Postgres can store neither',
  )

// JSON.stringify escapes in this way the characters that can't be stored, and a few other control
// characters
const UNSTORABLE = /(?<!\\)((?:\\\\)*)\\u(?:0000|d[89a-f]..)/g

/**
 * The value as JSON that jsonb can hold. Throws 400 `invalid_input` for BigInt, a cycle, no value,
 * NUL, and half a surrogate pair.
 */
export function toJson(value: unknown): string {
  const json = stringify(value)
  if (json.includes('\\u') && json.search(UNSTORABLE) >= 0) throw unstorable()
  return json
}

/**
 * The same, with U+FFFD for each character that can't be stored: such a character must not cost us
 * the event.
 */
export function toStorableJson(value: unknown): string {
  const json = stringify(value)
  return json.includes('\\u') ? json.replace(UNSTORABLE, '$1\\ufffd') : json
}

function stringify(value: unknown): string {
  let json: string | undefined
  try {
    json = JSON.stringify(value)
  } catch (cause) {
    throw invalidInput('an argument is no JSON', 'pass no BigInt (write it as a string) and no cycles', cause)
  }
  if (json === undefined)
    throw invalidInput('an argument is no JSON', 'pass an object, not a function or undefined')
  return json
}

/**
 * Gives a text back. Throws 400 `invalid_input` for any other type, and for a text that Postgres
 * can't store.
 */
export function toText(value: string): string {
  if (typeof value !== 'string') throw invalidInput(`a text is ${typeof value}`, 'give a string')
  if (value.includes('\0') || /\p{Cs}/u.test(value)) throw unstorable()
  return value
}

const TEXT = Symbol('JSON text')

/** JSON text as an argument: it goes as it is, and is not made into a value and into text again. */
export interface JsonText {
  [TEXT]: string
  toJSON(): unknown
}

/** `json` must come from `toJson`, or be put together from its results. */
export const jsonText = (json: string): JsonText => ({ [TEXT]: json, toJSON: () => JSON.parse(json) })

export const isJsonText = (value: unknown): value is JsonText =>
  typeof value === 'object' && value !== null && TEXT in value

/** The JSON of one argument. */
export const argumentJson = (value: unknown): string => (isJsonText(value) ? value[TEXT] : toJson(value))

/** The JSON of all arguments, without the undefined ones. */
export function argumentsJson(args: Record<string, unknown>): string {
  const given = Object.entries(args).filter(([, value]) => value !== undefined)
  return `{${given.map(([name, value]) => `${toJson(name)}:${argumentJson(value)}`).join(',')}}`
}
