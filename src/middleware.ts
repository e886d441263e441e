// The middleware: finds the maker of a request by its headers, or refuses it; for any framework,
// and Connect-style.
import type { IncomingMessage, ServerResponse } from 'node:http'
import { isEverybodys, KeyledgerError } from './errors.ts'
import type { UserContext } from './types.ts'

/** A request that went through the middleware. */
export type WithUserContext<Request> = Request & { userContext?: UserContext }

/**
 * For express, connect, or node:http. It answers each request that it refuses, and calls `next` for
 * the others, never with an error. If `next` throws or rejects, it warns, and answers 500
 * `internal_error`. OPTIONS without a key ends here with 204, and no handler sees it: a browser
 * asks this before a page's call. Headers set on `res` before go with each answer.
 */
export type Middleware = (
  req: WithUserContext<IncomingMessage>,
  res: ServerResponse,
  next: () => void,
) => Promise<void>

/**
 * Names in lower case, as in node:http, Express and Fastify. For a `Headers`, give
 * `Object.fromEntries(headers)`.
 */
export type RequestHeaders = Record<string, string | string[] | undefined>

/** The answer to a request that goes no further; `body` is JSON. */
export interface Refusal {
  status: number
  headers: Record<string, string>
  body: string
}

/** Either the user context, or a refusal. */
export type Authentication =
  | { userContext: UserContext; refusal?: undefined }
  | { userContext?: undefined; refusal: Refusal }

const RETRY_SECONDS = 1

/**
 * The key is the first found of `x-virtualkey`, a bearer token in `authorization`, `x-api-key`, and
 * `api-key`, which Azure's clients send. The headers stay as they are: take the key out before you
 * forward the request, or the upstream sees it. A refusal has the shape that OpenAI's clients show,
 * `{ error: { message, type, param, code } }`: 401 for no key (`virtual_key_missing`), an unknown
 * key or a dead one, 403 for a suspended owner, 503 if the key could not be checked.
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
    // a browser's OPTIONS never carries the key, and no request may reach a handler without one
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

// nobody awaits a middleware: its rejection would end the process
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

// Node joins a header that comes twice, and a framework may list both: neither form is a key
const one = (header: string | string[] | undefined) =>
  (Array.isArray(header) ? header.join(', ') : header)?.trim() || undefined

function refusalOf(error: unknown): Refusal {
  // the database may refuse our own token or role: that is not the key's fault
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
