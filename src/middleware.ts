// Who makes a request, by its headers, or why it goes no further; for any framework, and as Connect-style middleware.
import type { IncomingMessage, ServerResponse } from 'node:http'
import { isEverybodys, KeyledgerError } from './errors.ts'
import type { UserContext } from './types.ts'

/** A request that went through the middleware. */
export type WithUserContext<Request> = Request & { userContext?: UserContext }

/**
 * For express, connect, or node:http. It answers what it refuses; `next` is called for the rest, never with an error.
 * Should `next` throw or reject, it warns, and answers 500 `internal_error`.
 * OPTIONS without a key ends here with 204, and no handler sees it: browsers ask so before a page's
 * call. Headers that were set on `res` before go with it, as they go with each refusal.
 */
export type Middleware = (
  req: WithUserContext<IncomingMessage>,
  res: ServerResponse,
  next: () => void,
) => Promise<void>

/** Names in lower case, as node:http, Express and Fastify have them; of a `Headers`, `Object.fromEntries(headers)`. */
export type RequestHeaders = Record<string, string | string[] | undefined>

/** The answer to a request that goes no further; `body` is JSON. */
export interface Refusal {
  status: number
  headers: Record<string, string>
  body: string
}

/** One of the two. */
export type Authentication =
  | { userContext: UserContext; refusal?: undefined }
  | { userContext?: undefined; refusal: Refusal }

const RETRY_SECONDS = 1

/**
 * The key is the first found of `x-virtualkey`, a bearer token in `authorization`, `x-api-key`, and
 * `api-key`, which Azure's clients send. The headers are left as they are: take them out before you
 * forward the request, or the upstream sees the key. A refusal is in the shape OpenAI's clients show,
 * `{ error: { message, type, param, code } }`: 401 for no key (`virtual_key_missing`),
 * an unknown or a dead one, 403 for a suspended owner, 503 when it could not be checked.
 */
export function createAuthenticate(validate: (virtualKey: string) => Promise<UserContext>) {
  return async (headers: RequestHeaders): Promise<Authentication> => {
    try {
      const virtualKey = keyOf(headers)
      if (virtualKey === undefined) {
        throw new KeyledgerError('virtual_key_missing', 401, {
          hint: 'send it as `authorization: Bearer …`, `x-virtualkey`, `x-api-key` or `api-key`',
        })
      }
      return { userContext: await validate(virtualKey) }
    } catch (error) {
      return { refusal: refusalOf(error) }
    }
  }
}

/** `createAuthenticate` as Connect-style middleware. */
export function createMiddleware(validate: (virtualKey: string) => Promise<UserContext>): Middleware {
  const authenticate = createAuthenticate(validate)
  return async (req, res, next) => {
    // a browser's question never carries the key, and no handler may be reached without one
    if (req.method === 'OPTIONS' && keyOf(req.headers) === undefined) {
      res.writeHead(204)
      res.end()
      return
    }
    const { userContext, refusal } = await authenticate(req.headers)
    if (refusal) {
      res.writeHead(refusal.status, refusal.headers)
      res.end(refusal.body)
      return
    }
    req.userContext = userContext
    try {
      await next()
    } catch (error) {
      failed(res, error)
    }
  }
}

// nobody awaits a middleware: a rejection of it would end the process
function failed(res: ServerResponse, error: unknown) {
  process.emitWarning('a handler behind the middleware failed', {
    type: 'KeyledgerWarning',
    detail: error instanceof Error ? error.stack : String(error),
  })
  if (res.headersSent) return void res.destroy()
  const body = { message: 'the gateway failed', type: 'server_error', param: null, code: 'internal_error' }
  res.writeHead(500, { 'content-type': 'application/json' })
  res.end(JSON.stringify({ error: body }))
}

function keyOf(headers: RequestHeaders): string | undefined {
  const bearer = /^bearer +(.*)$/is.exec(one(headers.authorization) ?? '')
  return (
    one(headers['x-virtualkey']) ||
    bearer?.[1]?.trim() ||
    one(headers['x-api-key']) ||
    one(headers['api-key'])
  )
}

// Node joins a header that comes twice, and a framework may list it: neither is any key
const one = (header: string | string[] | undefined) =>
  (Array.isArray(header) ? header.join(', ') : header)?.trim() || undefined

function refusalOf(error: unknown): Refusal {
  // a token or a role of ours that the database refuses is no fault of the key's
  const refused =
    error instanceof KeyledgerError && (error.status === 401 || error.status === 403) && !isEverybodys(error)
  const status = refused ? error.status : 503
  const headers: Record<string, string> = { 'content-type': 'application/json', 'cache-control': 'no-store' }
  if (status === 401) headers['www-authenticate'] = 'Bearer'
  if (status === 503) headers['retry-after'] = String(RETRY_SECONDS)
  const body = JSON.stringify({
    error: {
      message: refused ? error.message : 'unavailable: the key could not be checked (try again)',
      type: status === 401 ? 'authentication_error' : status === 403 ? 'permission_error' : 'server_error',
      param: null,
      code: refused ? error.code : 'unavailable',
    },
  })
  return { status, headers, body }
}
