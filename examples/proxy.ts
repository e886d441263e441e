// A gateway for OpenAI's and Anthropic's clients: it checks the key, holds money, asks a node, and
// charges the use.
//   OPENAI_API_KEY=… node --import tsx examples/proxy.ts, and the environment that billing.ts reads
import { createServer, type IncomingMessage } from 'node:http'
import { fileURLToPath } from 'node:url'
import {
  boundOf,
  type ConfigNode,
  createMeters,
  estimateOf,
  type Flavor,
  type UserContext,
  type WithUserContext,
} from 'keyledger'
import { type Asked, ask, following, read } from './ask.ts'
import { billing, run, seenThrough } from './billing.ts'
import { eventOf, type Part } from './events.ts'
import { type Answer, apis, inShapeOf, lastError } from './flavors.ts'
import { openHold } from './hold.ts'
import { allowPages, answering, bodyOf, failure, gone, parse, send } from './http.ts'
import { pricedBy, tiersOf } from './rates.ts'
import { isAnswer, isPassing, refusal, statusIn } from './refusals.ts'

// ms of an upstream's silence until it is given up; keep-alives break it
const PATIENCE = Number(process.env.UPSTREAM_TIMEOUT ?? 120_000)
// ms that keep-alives wait for the first event: once one is passed on, no other node may answer
const KEPT_BACK = Math.min(10_000, PATIENCE / 4)
// ms for the rest of an answer whose caller has left: the upstream bills it all the same
const LAST_WAIT = Math.min(5_000, PATIENCE)

/** GET /v1/models: the models of the nodes mounted on the key. */
export const models = (context: UserContext) =>
  answering(async () => {
    const data = new Map<string, object>()
    for (const { model: id, provider, created_at } of await billing.nodes(context)) {
      const created = Math.floor(Date.parse(created_at) / 1000)
      if (id) data.set(id, { id, object: 'model', created, owned_by: provider ?? 'keyledger' })
    }
    return Response.json({ object: 'list', data: [...data.values()] })
  })

/**
 * POST /v1/chat/completions, or another of `apis`. `signal` aborts when the caller is gone; the usage
 * is still charged.
 */
export const complete = (
  context: UserContext,
  body: string,
  signal: AbortSignal,
  flavor: Flavor = 'openai-chat',
) => seenThrough(answering(() => tryNodes(context, body, signal, flavor)).then((a) => inShapeOf(flavor, a)))

async function tryNodes(context: UserContext, body: string, signal: AbortSignal, flavor: Flavor) {
  const asked: Asked | undefined = parse(body)
  if (!asked) return failure(400, 'invalid_json', 'the body is no JSON object')
  const nodes = (await billing.nodes(context)).filter((node) => node.endpoint && node.model === asked.model)
  let answer = failure(404, 'model_not_found', `no node of this key serves the model ${asked.model}`)
  for (const node of nodes) {
    const tried = await attempt(context, node, { asked, body, flavor }, signal)
    answer = tried.answer
    // another node may be less busy, or well
    if (signal.aborted || !tried.mayPass) break
  }
  return answer
}

interface Request {
  asked: Asked
  /** The JSON of it. */
  body: string
  flavor: Flavor
}

interface Tried {
  answer: Response
  mayPass: boolean
}

/** One try at one node: with a hold of its own and, if it used anything, an event of its own. */
async function attempt(
  context: UserContext,
  node: ConfigNode,
  { asked, body, flavor }: Request,
  signal: AbortSignal,
): Promise<Tried> {
  const tiers = await pricedBy(node, context)
  // no token of text is shorter than a byte; a picture or a file may be worth more than it weighs
  const most = boundOf(body, flavor, { priced: tiers.get('') })
  const hold = await openHold(context, node, most, tiersOf(asked, tiers))
  const headers: Record<string, string> = { 'x-usage-id': hold.id }
  const priced = (variant: string) => tiers.get(variant)
  const meter = createMeters(flavor, { priced, asked: estimateOf(body) })
  let tooLarge = false
  const call = new AbortController()
  const silence = setTimeout(() => call.abort(), PATIENCE).unref()
  let state: 'asked' | 'accepted' | 'relayed' | 'refused' = 'asked'

  // the one way out: it charges the use, and ends the hold
  function settle() {
    clearTimeout(silence)
    signal.removeEventListener('abort', leave)
    call.abort()
    // once the upstream has said 200 the prompt is owed, though nobody waits any more
    const left = signal.aborted && state !== 'asked'
    const owes = state === 'refused' ? meter.counted() : meter.started() || left
    if (!owes) return hold.end()
    const { model: _, ...used } = meter.measured()
    const unread = tooLarge ? 'event_too_large' : meter.unread() ? 'unreadable' : undefined
    return hold.end({ ...used, metadata: { model: asked.model, estimated: used.estimated, unread } })
  }
  function leave() {
    if (state === 'accepted') setTimeout(() => call.abort(), LAST_WAIT).unref()
    else settle()
  }
  signal.addEventListener('abort', leave)
  if (signal.aborted) leave()

  // only the network may fail in here: our own error is no reason to ask another node
  async function receive() {
    const { response, addsUsage } = await ask(node, flavor, asked, call.signal)
    // no status of HTTP's, so that nobody can pass it on
    if (response.status < 200 || response.status > 599) throw new Error(`status ${response.status}`)
    if (response.ok) state = 'accepted'
    const { text, events } = await read(response, () => silence.refresh())
    return { response, addsUsage, text, events, begun: events ? await beginning(events) : [] }
  }
  const received = await receive().catch(() => undefined)
  if (!received) {
    const late = call.signal.aborted
    await settle()
    const answer = late
      ? failure(504, 'upstream_timeout', 'the upstream did not answer in time')
      : failure(502, 'upstream_unreachable', 'the upstream could not be reached, or broke off')
    return { answer, mayPass: true }
  }

  const { response, addsUsage, events, begun } = received
  // of a stream, its first event: an error there is the whole answer
  const text = received.text ?? begun.at(-1)?.data ?? ''
  const said: Answer | undefined = parse(text)
  const isError = Boolean(said?.error) || (events !== undefined && said?.type === 'error')
  if (said && (!events || isError)) meter.add(said)
  const isGood = events
    ? begun.length > 0 && text !== '[DONE]' && !isError
    : response.ok && said !== undefined && isAnswer(said, meter.counted())
  const retryAfter = response.headers.get('retry-after')
  if (retryAfter) headers['retry-after'] = retryAfter

  if (isGood && events) {
    state = 'relayed'
    // also when nobody reads it any more
    if (signal.aborted) settle()
    const shown = (data: string, chunk?: Answer) => (addsUsage ? withoutUsage(data, chunk) : data)
    function add(chunk: Answer | undefined) {
      if (chunk) return meter.add(chunk)
      tooLarge = true
      meter.skip()
    }
    const stream = ReadableStream.from(
      relay(following(begun, events), { add, shown, settle, signal, flavor }),
    )
    headers['content-type'] = 'text/event-stream'
    return { answer: new Response(stream, { headers }), mayPass: false }
  }
  if (!isGood) state = 'refused'
  const charged = await settle()
  if (charged?.cost) headers['x-usage-cost'] = charged.cost
  if (!isGood) {
    const status = response.ok ? statusIn(said) : response.status
    const answer = refusal(status, response.ok, said, text, headers)
    return { answer, mayPass: response.ok || isPassing(answer.status) }
  }
  // as it came, not as we read it
  headers['content-type'] = 'application/json'
  return { answer: new Response(text, { status: response.status, headers }), mayPass: false }
}

// Reads up to the first event. Keep-alives before it wait, but not for ever. Empty if none comes.
async function beginning(events: AsyncGenerator<Part>): Promise<Part[]> {
  const begun: Part[] = []
  const end = Date.now() + KEPT_BACK
  for (;;) {
    const { value: part, done } = await events.next()
    if (done) return []
    begun.push(part)
    if (part.data !== undefined || part.tooLarge || Date.now() > end) return begun
  }
}

interface Relay {
  /** Meters an event; undefined for a part of one that is too large. */
  add(chunk: Answer | undefined): void
  /** The part of an event's data that the caller sees; undefined for nothing. */
  shown(data: string, chunk?: Answer): string | undefined
  settle(): Promise<unknown>
  signal: AbortSignal
  flavor: Flavor
}

// Passes a stream on. The use is charged before the last event.
async function* relay(
  parts: AsyncIterable<Part>,
  { add, shown, settle, signal, flavor }: Relay,
): AsyncGenerator<Uint8Array> {
  const { isLast } = apis.find((api) => api.flavor === flavor)!
  // events of Chat Completions have no name
  const nameOf = (chunk: Answer | undefined) => (flavor === 'openai-chat' ? undefined : chunk?.type)
  let last = ''
  try {
    for await (const part of parts) {
      if (part.data === '[DONE]') {
        last = eventOf(part.data)
        break
      }
      if (part.tooLarge) add(undefined)
      const chunk: Answer | undefined = part.data === undefined ? undefined : parse(part.data)
      if (chunk) add(chunk)
      const data = part.data === undefined ? undefined : shown(part.data, chunk)
      const text = data === undefined ? part.text : eventOf(data, nameOf(chunk))
      if (text && chunk && isLast(chunk)) {
        last = text
        break
      }
      if (text) yield Buffer.from(text)
    }
  } catch {
    const broken = failure(502, 'upstream_broke_off', 'the upstream broke off; what came is charged')
    const text = lastError(flavor, await broken.text())
    last ||= eventOf(text, nameOf(parse(text)))
  }
  await settle()
  if (last && !signal.aborted) yield Buffer.from(last)
}

// usage that only we asked for is not the caller's to see
function withoutUsage(data: string, chunk: Answer | undefined): string | undefined {
  if (chunk?.usage === undefined) return data
  if (chunk.usage && !(Array.isArray(chunk.choices) && chunk.choices.length)) return undefined
  try {
    return JSON.stringify({ ...chunk, usage: undefined })
  } catch {
    // nested too deep for us
    return data
  }
}

// OpenAI's and Anthropic's paths, and those of Azure's client, which repeats the model as a deployment
const ROUTE =
  /^\/(?:v1|openai|openai\/v1)(?:\/deployments\/[^/]+)?(\/models|\/chat\/completions|\/responses|\/messages)$/

// a text that is no URL is no path of ours
const pathOf = (url: string) => (URL.canParse(url, BASE) ? new URL(url, BASE).pathname : url)
const BASE = 'http://gateway'

// run, not imported
if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const authenticate = billing.middleware()
  const server = createServer((req: WithUserContext<IncomingMessage>, res) => {
    const pathname = pathOf(req.url!)
    if (pathname === '/healthz') {
      const health = billing.health()
      return send(res, Response.json(health, { status: health.http_status }))
    }
    allowPages(req, res)
    const path = ROUTE.exec(pathname)?.[1]
    const flavor = apis.find((api) => api.path === path)?.flavor ?? 'openai-chat'
    const answer = async (context: UserContext) => {
      const signal = gone(res)
      if (req.method === 'GET' && path === '/models') return send(res, await models(context))
      if (req.method !== 'POST' || !path || path === '/models')
        return send(
          res,
          await inShapeOf(flavor, failure(404, 'not_found', `there is no ${req.method} ${pathname}`)),
        )
      const given = await answering(async () => complete(context, await bodyOf(req), signal, flavor))
      // it may be our own refusal of the body
      send(res, await inShapeOf(flavor, given))
    }
    if (flavor !== 'anthropic' || req.method === 'OPTIONS')
      return authenticate(req, res, () => answer(req.userContext!))
    // the middleware's refusals are in OpenAI's shape
    const admit = async () => {
      const { userContext, refusal } = await billing.authenticate(req.headers)
      if (userContext) return answer(userContext)
      const { status, headers, body } = refusal
      return send(res, await inShapeOf(flavor, new Response(body, { status, headers })))
    }
    admit().catch((error) => {
      console.error(error)
      res.destroy()
    })
  })
  await run(server)
}
