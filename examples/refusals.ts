// Tells an answer from a refusal, whatever its status says, and words the refusal for the caller.
import type { Answer } from './flavors.ts'
import { failure } from './http.ts'

/** A refusal, as far as it is in the API's shape or near it. */
type Refused = Answer & { message?: unknown; detail?: unknown; code?: unknown; status?: unknown }

/** It may go away, here or at another node. */
export const isPassing = (status: number) => status === 429 || status >= 500

/** A 200 may hold an error, or nothing: no choice, output or content and, if not `counted`, no tokens. */
export const isAnswer = ({ error, choices, output, content }: Answer, counted: boolean) =>
  !error &&
  (counted ||
    [choices, output, content].some((said) => (Array.isArray(said) ? said.length > 0 : Boolean(said))))

/** The status that fits an error in a 200: the one it names, or 502. */
export function statusIn(refused: Refused | undefined): number {
  const error = isObject(refused?.error) ? refused.error : {}
  if (/api_key|authentication|permission/.test(`${word(error.code)} ${word(error.type)}`)) return 401
  // Anthropic names the status by the type
  if (error.type === 'overloaded_error') return 529
  if (error.type === 'rate_limit_error') return 429
  const named = [error.code, error.status, refused?.code, refused?.status].map((code) => Number(word(code)))
  return named.find((status) => Number.isInteger(status) && status >= 400 && status < 600) ?? 502
}

/**
 * The answer to the caller of a node that refused. `text` is the body as it came, `refused` its
 * JSON. If it `wasOk` by its status, only an error in the API's shape is passed on as it came.
 */
export function refusal(
  status: number,
  wasOk: boolean,
  refused: Refused | undefined,
  text: string,
  headers: Record<string, string>,
): Response {
  // 401 and 403 are about our credentials, not the caller's
  if (!refused || status === 401 || status === 403)
    return failure(isPassing(status) ? status : 502, 'upstream_failed', 'the upstream failed')
  if (!wasOk || isObject(refused.error))
    return new Response(text, { status, headers: { ...headers, 'content-type': 'application/json' } })
  const said = [refused.error, refused.message, refused.detail].find((said) => typeof said === 'string')
  return failure(status, 'upstream_failed', (said as string) || 'the upstream gave no answer')
}

// anything else may throw when it is made text: its `toString` is the upstream's
const word = (value: unknown) => (typeof value === 'string' || typeof value === 'number' ? String(value) : '')

const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null
