// The APIs that the gateway serves: their paths, their errors, and the ends of their streams.
import type { Flavor } from 'keyledger'

/** An answer of any of them, or an event of one, as far as we look at it. Fields may be anything. */
export interface Answer {
  type?: unknown
  error?: unknown
  usage?: unknown
  choices?: unknown
  output?: unknown
  content?: unknown
}

interface Api {
  flavor: Flavor
  /** Below `/v1` of the gateway, and below the endpoint of a node. */
  path: string
  /** The headers that carry a node's credential. */
  headers(credential: string): Record<string, string>
  /** The event ends its stream. `[DONE]` ends each. */
  isLast(event: Answer): boolean
}

const bearer = (credential: string) => ({ authorization: `Bearer ${credential}` })

/** Each API that is served. */
export const apis: Api[] = [
  { flavor: 'openai-chat', path: '/chat/completions', headers: bearer, isLast: () => false },
  {
    flavor: 'openai-responses',
    path: '/responses',
    headers: bearer,
    isLast: ({ type }) => /^response\.(completed|incomplete|failed)$/.test(String(word(type))),
  },
  {
    flavor: 'anthropic',
    path: '/messages',
    headers: (credential) => ({ 'x-api-key': credential, 'anthropic-version': '2023-06-01' }),
    isLast: ({ type }) => type === 'message_stop',
  },
]

const word = (value: unknown) => (typeof value === 'string' ? value : '')

/** The names of an Anthropic error, by status. */
const ANTHROPIC: Record<number, string> = {
  400: 'invalid_request_error',
  401: 'authentication_error',
  402: 'billing_error',
  403: 'permission_error',
  404: 'not_found_error',
  413: 'request_too_large',
  429: 'rate_limit_error',
  503: 'overloaded_error',
  504: 'timeout_error',
  529: 'overloaded_error',
}

/** An error in OpenAI's shape, in the shape that the API's clients expect. */
export function errorOf(flavor: Flavor, status: number, body: string): string {
  if (flavor !== 'anthropic') return body
  try {
    const { type, error } = JSON.parse(body)
    if (type === 'error' || typeof error !== 'object' || error === null) return body
    const { message, code } = error
    return JSON.stringify({
      type: 'error',
      error: {
        type: ANTHROPIC[status] ?? (status < 500 ? 'invalid_request_error' : 'api_error'),
        message,
        code,
      },
    })
  } catch {
    return body
  }
}

/** The same for an answer; one that is no error is given back as it is. */
export async function inShapeOf(flavor: Flavor, answer: Response): Promise<Response> {
  if (flavor !== 'anthropic' || answer.ok) return answer
  const { status, headers } = answer
  return new Response(errorOf(flavor, status, await answer.text()), { status, headers })
}

/** The error that ends a stream. */
export function lastError(flavor: Flavor, body: string): string {
  if (flavor !== 'openai-responses') return errorOf(flavor, 502, body)
  const { error } = JSON.parse(body)
  return JSON.stringify({ type: 'error', code: error.code, message: error.message, param: null, error })
}
