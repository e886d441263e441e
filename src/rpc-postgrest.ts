// The transport over HTTP: PostgREST's /rpc and views, by fetch.
import {
  fromHttp,
  fromNetwork,
  fromServer,
  functionNotFound,
  KeyledgerError,
  neverSent,
  noToken,
} from './errors.ts'
import { argumentsJson, toText } from './json.ts'
import { columns, count, identifier, ordering } from './query.ts'
import { type Rpc, withoutRawKey } from './rpc.ts'
import { createLimit } from './time-limits.ts'

export interface PostgrestRpcOptions {
  /** The root of PostgREST, `http://127.0.0.1:3000`. */
  url: string
  /**
   * JSON web token whose `role` claim is the role to be. Or a function that gives one: it is called
   * before each request, and has `timeout` ms.
   */
  token: string | (() => string | Promise<string>)
  /**
   * ms until a request is given up with `timeout`; PostgREST may still carry it out. Default
   * 10,000.
   */
  timeout?: number | undefined
  /** Default: Node's own, which keeps connections alive. */
  fetch?: typeof fetch | undefined
}

/**
 * An `Rpc` through PostgREST 12 or later. Errors also: 401 `invalid_token` for a token that
 * PostgREST refuses. Throws TypeError without `url`.
 */
export function postgrestRpc({
  url,
  token,
  timeout = 10_000,
  fetch = globalThis.fetch,
}: PostgrestRpcOptions): Rpc {
  if (!url) throw new TypeError('postgrestRpc: give `url`')
  const root = url.replace(/\/+$/, '')

  const bearer = async () => (typeof token === 'string' ? token : token())

  async function request(path: string, body?: string): Promise<unknown> {
    const limit = createLimit(timeout)
    let status: number
    let text: string
    try {
      const given = await limit.race(bearer()).catch((error) => {
        throw neverSent(noToken(error))
      })
      const headers: Record<string, string> = {
        accept: 'application/json',
        authorization: `Bearer ${given}`,
        // without it PostgREST means its first schema, which may be another one
        [body === undefined ? 'accept-profile' : 'content-profile']: 'api',
      }
      if (body !== undefined) headers['content-type'] = 'application/json'
      const method = body === undefined ? 'GET' : 'POST'
      const asked = async () => {
        const response = await fetch(root + path, { method, headers, body, signal: limit.signal })
        return { status: response.status, text: await response.text() }
      }
      // a caller's own `fetch` may not heed the signal
      ;({ status, text } = await limit.race(asked()))
    } catch (error) {
      throw fromNetwork(error, 'PostgREST')
    } finally {
      limit.end()
    }
    if (status === 204) return null
    const answer = parse(text)
    if (answer === undefined) throw fromHttp(status)
    if (status >= 200 && status < 300) return answer
    throw isServerError(answer) ? fromServer(answer) : fromHttp(status)
  }

  const selected = (select: readonly string[]) =>
    columns(select)
      .map(({ name, type }) => (type ? `${name}::${type}` : name))
      .join(',')

  return {
    async call<T>(
      fn: string,
      args: Record<string, unknown> = {},
      { select }: { select?: readonly string[] } = {},
    ) {
      const query = select ? `?select=${selected(select)}` : ''
      try {
        return (await request(`/rpc/${identifier(fn)}${query}`, argumentsJson(withoutRawKey(fn, args)))) as T
      } catch (error) {
        if (!(error instanceof KeyledgerError) || error.code !== 'function_not_found') throw error
        throw functionNotFound(fn, Object.keys(args))
      }
    },

    async rows<T>(view: string, { select, where = {}, limit, order }: Parameters<Rpc['rows']>[1]) {
      const query = new URLSearchParams({ select: selected(select) })
      for (const [name, value] of Object.entries(where)) {
        query.append(identifier(name), `eq.${toText(value)}`)
      }
      if (order !== undefined) {
        query.set(
          'order',
          ordering(order)
            .map(({ name, desc }) => `${name}.${desc ? 'desc' : 'asc'}`)
            .join(','),
        )
      }
      if (limit !== undefined) query.set('limit', String(count(limit)))
      return (await request(`/${identifier(view)}?${query}`)) as T[]
    },

    async close() {},
  }
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}

function isServerError(answer: unknown): answer is Parameters<typeof fromServer>[0] {
  const { code, message } = (answer ?? {}) as Record<string, unknown>
  return typeof code === 'string' && typeof message === 'string'
}
