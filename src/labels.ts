// The labels of an event, `request_id` and `metadata`: a label that SQL can't keep is left out.
import { toStorableJson } from './json.ts'
import type { UsageAnswer } from './types.ts'

// SQL's limits: a longer label is left out
const MAX_REQUEST_ID = 512
const MAX_METADATA_BYTES = 16_384

// characters as Postgres counts them
export const isRequestId = (label: unknown) =>
  label === undefined ||
  label === null ||
  (typeof label === 'string' &&
    label !== '' &&
    (label.length <= MAX_REQUEST_ID ||
      (label.length <= 2 * MAX_REQUEST_ID && [...label].length <= MAX_REQUEST_ID)))

/** The JSON of a label; undefined if there is none, null if it can't be kept. */
export function metadataJson(label: unknown): string | undefined | null {
  if (label === undefined || label === null) return undefined
  if (typeof label !== 'object' || Array.isArray(label)) return null
  try {
    const json = toStorableJson(label)
    return json.startsWith('{') && Buffer.byteLength(json) <= MAX_METADATA_BYTES ? json : null
  } catch {
    return null
  }
}

/** The answer, with our own names added to those that SQL left out. */
export const alsoLeftOut = (
  answer: UsageAnswer,
  ours: NonNullable<UsageAnswer['left_out']>,
): UsageAnswer => ({
  ...answer,
  left_out: [...new Set([...ours, ...(answer.left_out ?? [])])],
})
