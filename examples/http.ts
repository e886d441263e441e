// HTTP for the gateway: reads bodies, sends answers, and words errors as OpenAI's clients expect.
import type { IncomingMessage, ServerResponse } from 'node:http'
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { KeyledgerError } from 'keyledger'

const MAX_BODY = 10_000_000

/** The JSON object, if it is one. */
// biome-ignore lint/suspicious/noExplicitAny: a caller may send anything
export function parse(text: string): any {
  try {
    const value = JSON.parse(text)
    return value !== null && typeof value === 'object' ? value : undefined
  } catch {
    return undefined
  }
}

/** An error as OpenAI's clients understand it. */
export function failure(status: number, code: string, message: string): Response {
  const types: Record<number, string> = {
    402: 'insufficient_quota',
    403: 'permission_error',
    429: 'rate_limit_error',
  }
  const type = types[status] ?? (status < 500 ? 'invalid_request_error' : 'server_error')
  return Response.json({ error: { message, type, param: null, code } }, { status })
}

/** Turns any error into an answer. */
export async function answering(answer: () => Promise<Response>): Promise<Response> {
  try {
    return await answer()
  } catch (error) {
    if (!(error instanceof KeyledgerError)) {
      console.error(error)
      return failure(500, 'internal_error', 'the gateway failed')
    }
    const { code, detail } = error
    // a hint is for the gateway's operator
    const message = detail ? `${code}: ${detail}` : code
    // a node without a price is not the caller's to mend
    if (code === 'price_not_found' || code === 'currency_mismatch') return failure(500, code, message)
    if (isCallers(error)) return failure(error.status, code, message)
    console.error(error)
    return failure(503, 'unavailable', 'the gateway can not answer now: try again')
  }
}

// Their money, their key, or their request. Other errors of any status are between us and Postgres.
const isCallers = ({ code, status }: KeyledgerError) =>
  [402, 413, 422].includes(status) ||
  ['node_not_mounted', 'overloaded'].includes(code) ||
  /^(virtual_key_(unknown|disabled|expired)|(user|tenant)_suspended)$/.test(code)

// Pages of these origins may call us. `*` is every page. It is safe, since there are no cookies:
// a page can do nothing without a key. A list with commas narrows it, and an empty one allows none.
const ORIGINS = (process.env.CORS_ORIGIN ?? '*').split(',').map((origin) => origin.trim())

/** Lets pages of these origins ask and read. The middleware answers OPTIONS without a key. */
export function allowPages({ method, headers }: IncomingMessage, res: ServerResponse): void {
  const anybody = ORIGINS.includes('*')
  const { origin = '' } = headers
  if (!anybody) res.setHeader('vary', 'origin')
  if (!anybody && !(origin && ORIGINS.includes(origin))) return
  res.setHeader('access-control-allow-origin', anybody ? '*' : origin)
  res.setHeader('access-control-expose-headers', 'x-usage-id, x-usage-cost, retry-after')
  if (method !== 'OPTIONS') return
  res.setHeader('access-control-allow-methods', 'GET, POST')
  res.setHeader('access-control-allow-headers', headers['access-control-request-headers'] ?? '*')
  res.setHeader('access-control-max-age', '600')
}

/** A signal that aborts when the caller is gone, for node:http and frameworks on it. */
export function gone(res: ServerResponse): AbortSignal {
  const controller = new AbortController()
  res.once('close', () => controller.abort())
  return controller.signal
}

/** Answers through node:http and frameworks on it. */
export async function send(res: ServerResponse, response: Response): Promise<void> {
  res.writeHead(response.status, Object.fromEntries(response.headers))
  // another place deals with a caller that is gone
  await pipeline(Readable.fromWeb(response.body as never), res).catch(() => {})
}

/** The whole body, if it is no larger than we want. */
export async function bodyOf(req: IncomingMessage): Promise<string> {
  const parts: Buffer[] = []
  let size = 0
  for await (const part of req) {
    size += part.length
    // read to its end all the same, or the caller sees a broken connection
    if (size <= MAX_BODY) parts.push(part)
  }
  if (size <= MAX_BODY) return Buffer.concat(parts).toString()
  throw new KeyledgerError('payload_too_large', 413, { detail: `more than ${MAX_BODY} bytes` })
}
