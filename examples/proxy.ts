// An OpenAI-compatible gateway: who asks, what it may cost, the node that answers, and what it did cost.
//   OPENAI_API_KEY=… node --import tsx examples/proxy.ts, and the environment that billing.ts wants
import { createServer, type IncomingMessage } from 'node:http'
import { fileURLToPath } from 'node:url'
import type { ConfigNode, UsageAnswer, UserContext, WithUserContext } from 'keyledger'
import { billing, run } from './billing.ts'
import { answering, bodyOf, failure, gone, parse, send } from './http.ts'
import { type Completion, createMeter, serverSentEvents } from './metering.ts'

// ms of an upstream's silence until it is given up
const PATIENCE = Number(process.env.UPSTREAM_TIMEOUT ?? 120_000)
// s that a hold outlives this process; while an answer lasts, it is extended
const HOLD_SECONDS = Number(process.env.HOLD_SECONDS ?? 900)
// held for the answer to a request that sets no limit; a longer one is charged all the same
const MAX_TOKENS = 4096

/** A chat completion request, as far as we look at it. */
interface Asked {
  model?: unknown
  max_tokens?: unknown
  max_completion_tokens?: unknown
  n?: unknown
  stream?: unknown
  stream_options?: { include_usage?: boolean } | null
}

/** GET /v1/models: those that the nodes mounted on the key serve. */
export const models = (context: UserContext) =>
  answering(async () => {
    const data = new Map<string, object>()
    for (const { model: id, provider, created_at } of await billing.nodes(context)) {
      const created = Math.floor(Date.parse(created_at) / 1000)
      if (id) data.set(id, { id, object: 'model', created, owned_by: provider ?? 'keyledger' })
    }
    return Response.json({ object: 'list', data: [...data.values()] })
  })

/** POST /v1/chat/completions. `signal` aborts when the caller is gone. */
export const complete = (context: UserContext, body: string, signal: AbortSignal) =>
  answering(async () => {
    const asked: Asked | undefined = parse(body)
    if (!asked) return failure(400, 'invalid_json', 'the body is no JSON object')
    const nodes = (await billing.nodes(context)).filter((node) => node.endpoint && node.model === asked.model)
    let answer = failure(404, 'model_not_found', `no node of this key serves the model ${asked.model}`)
    for (const node of nodes) {
      answer = await attempt(context, node, asked, Buffer.byteLength(body), signal)
      // another node may be less busy, or well
      if (signal.aborted || !isPassing(answer.status)) break
    }
    return answer
  })

/** One try at one node: with a hold of its own and, if it used anything, an event of its own. */
async function attempt(
  context: UserContext,
  node: ConfigNode,
  asked: Asked,
  size: number,
  signal: AbortSignal,
) {
  // no token is shorter than a byte
  const most = { input_tokens: size, output_tokens: limitOf(asked) }
  const hold = await billing.hold(context, {
    config_node_id: node.id,
    meters: most,
    expires_in: HOLD_SECONDS,
  })
  const headers: Record<string, string> = { 'x-usage-id': hold.id }
  const meter = createMeter(size)
  const call = new AbortController()
  const silence = setTimeout(() => call.abort(), PATIENCE).unref()
  // three times in the life of the hold
  const extending = setInterval(() => billing.extend(hold, HOLD_SECONDS).catch(() => {}), HOLD_SECONDS * 333)
  let settled: Promise<UsageAnswer | undefined> | undefined

  // the one way out, taken once: what was used is charged, and the hold ends
  function settle() {
    clearTimeout(silence)
    clearInterval(extending)
    settled ??= meter.started() ? charge() : release()
    call.abort()
    return settled
  }
  async function charge() {
    // one event a hold, so that the hold's id will do
    const { virtual_key_id, account_id } = context
    const of = { id: hold.id, hold_id: hold.id, account_id, virtual_key_id, config_node_id: node.id }
    const metadata = { model: asked.model, estimated: meter.estimated() }
    const event = { ...of, meters: meter.meters(), request_id: meter.id(), metadata }
    try {
      return await billing.recordUsage(event)
    } catch (error) {
      console.error(`nobody knows if this is recorded; repeat it as it is: ${JSON.stringify(event)}`, error)
    }
  }
  async function release() {
    // should it fail, the hold expires
    await billing.release(hold).catch(() => {})
    return undefined
  }

  try {
    const response = await fetch(`${node.endpoint!.replace(/\/+$/, '')}/chat/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', authorization: `Bearer ${credential(node)}` },
      body: JSON.stringify(asked.stream ? withUsage(asked) : asked),
      signal: AbortSignal.any([signal, call.signal]),
    })
    if (response.ok && response.headers.get('content-type')?.startsWith('text/event-stream')) {
      const events = serverSentEvents(response.body!)
      // until something came, another node may do it
      const { value: first } = await events.next()
      if (!first || parse(first)?.error) throw new Error('nothing came')
      // also when nobody reads it any more
      signal.throwIfAborted()
      signal.addEventListener('abort', settle)
      const body = ReadableStream.from(relay(first, events))
      return new Response(body, { headers: { ...headers, 'content-type': 'text/event-stream' } })
    }

    const answer: Completion | undefined = parse(await response.text())
    if (answer) meter.add(answer)
    const charged = await settle()
    if (charged?.cost) headers['x-usage-cost'] = charged.cost
    // 401 and 403 are about our credentials, not the caller's
    if (!answer || response.status === 401 || response.status === 403)
      return failure(
        isPassing(response.status) ? response.status : 502,
        'upstream_failed',
        'the upstream failed',
      )
    const retryAfter = response.headers.get('retry-after')
    if (retryAfter) headers['retry-after'] = retryAfter
    return Response.json(answer, { status: response.status, headers })
  } catch {
    const late = call.signal.aborted
    settle()
    if (late) return failure(504, 'upstream_timeout', 'the upstream did not answer in time')
    return failure(502, 'upstream_unreachable', 'the upstream could not be reached, or broke off')
  }

  // Passes the stream on, and the usage to whoever asked for it. What was used is charged before the last event.
  async function* relay(first: string, events: AsyncGenerator<string>) {
    const wanted = asked.stream_options?.include_usage === true
    let data: string | undefined = first
    try {
      for (; data && data !== '[DONE]'; data = (await events.next()).value) {
        silence.refresh()
        const chunk: Completion | undefined = parse(data)
        if (chunk) meter.add(chunk)
        if (wanted || chunk?.usage === undefined) yield event(data)
        else if (!chunk.usage || chunk.choices?.length)
          yield event(JSON.stringify({ ...chunk, usage: undefined }))
      }
      await settle()
      if (data) yield event(data)
    } catch {
      await settle()
      if (signal.aborted) return
      yield event(
        await failure(502, 'upstream_broke_off', 'the upstream broke off; what came is charged').text(),
      )
    }
  }
}

// what is no URL is no path of ours
const pathOf = (url: string) => (URL.canParse(url, BASE) ? new URL(url, BASE).pathname : url)
const BASE = 'http://gateway'

const event = (data: string) => Buffer.from(`data: ${data}\n\n`)

// may go away, here or at another node
const isPassing = (status: number) => status === 429 || status >= 500

function limitOf({ max_completion_tokens, max_tokens, n }: Asked): number {
  const count = (value: unknown, otherwise: number) =>
    Number.isInteger(value) && (value as number) > 0 ? (value as number) : otherwise
  return count(max_completion_tokens ?? max_tokens, MAX_TOKENS) * count(n, 1)
}

const withUsage = (asked: Asked) => ({
  ...asked,
  stream_options: { ...asked.stream_options, include_usage: true },
})

// a node's provider names the variable: openai's is OPENAI_API_KEY
const credential = ({ provider }: ConfigNode) =>
  process.env[`${(provider ?? 'upstream').toUpperCase().replace(/\W/g, '_')}_API_KEY`] ?? ''

// run, not imported
if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const authenticate = billing.middleware()
  const server = createServer((req: WithUserContext<IncomingMessage>, res) => {
    const pathname = pathOf(req.url!)
    if (pathname === '/healthz') {
      const health = billing.health()
      return send(res, Response.json(health, { status: health.http_status }))
    }
    authenticate(req, res, async () => {
      const [context, signal] = [req.userContext!, gone(res)]
      const route = `${req.method} ${pathname}`
      if (route === 'GET /v1/models') send(res, await models(context))
      else if (route === 'POST /v1/chat/completions')
        send(res, await answering(async () => complete(context, await bodyOf(req), signal)))
      else send(res, failure(404, 'not_found', `there is no ${route}`))
    })
  })
  await run(server)
}
