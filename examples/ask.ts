// Asks one node. Finds out from the body whether it is a document or a stream of events.
import type { ConfigNode, Flavor } from 'keyledger'
import { type Part, serverSentEvents } from './events.ts'
import { apis } from './flavors.ts'

/** A request, as far as we look at it. */
export interface Asked {
  model?: unknown
  service_tier?: unknown
  speed?: unknown
  stream?: unknown
  stream_options?: { include_usage?: unknown } | null
}

/** The body of an answer. */
export type Given = { text: string; events?: undefined } | { text?: undefined; events: AsyncGenerator<Part> }

// the nodes that refused `stream_options`, for the life of this process
const refusing = new Set<string>()

/** Posts the request. It asks a stream for its usage; `addsUsage` if the caller didn't ask. */
export async function ask(node: ConfigNode, flavor: Flavor, asked: Asked, signal: AbortSignal) {
  const { path, headers } = apis.find((api) => api.flavor === flavor)!
  const post = (body: object) =>
    fetch(`${node.endpoint!.replace(/\/+$/, '')}${path}`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', ...headers(credential(node)) },
      body: JSON.stringify(body),
      signal,
    })
  // the other APIs give the usage of a stream unasked
  if (!asked.stream || flavor !== 'openai-chat') return { response: await post(asked), addsUsage: false }

  const { stream_options, ...plain } = asked
  // other options are the caller's own: their refusal says nothing about the node
  const ours = asked.stream === true && isOurs(stream_options)
  const place = `${node.id} ${node.endpoint}`
  if (ours && refusing.has(place)) return { response: await post(plain), addsUsage: false }
  const response = await post({ ...asked, stream_options: { ...stream_options, include_usage: true } })
  const addsUsage = stream_options?.include_usage !== true
  if (!ours || (response.status !== 400 && response.status !== 422)) return { response, addsUsage }

  const said = await response.text()
  if (!/stream_options|include_usage/.test(said)) return { response: new Response(said, response), addsUsage }
  const again = await post(plain)
  // else something else was wrong, and the refusal may only repeat the caller's words
  if (again.ok) refusing.add(place)
  return { response: again, addsUsage: false }
}

const isOurs = (options: Asked['stream_options']) =>
  !options || Object.entries(options).every(([k, v]) => k === 'include_usage' && typeof v === 'boolean')

/**
 * Reads until the body shows which of the two it is. `alive` is called for each packet, now and
 * later.
 */
export async function read(response: Response, alive: () => void): Promise<Given> {
  const named = response.headers.get('content-type')?.startsWith('text/event-stream') === true
  const body = packets(response, alive)
  const seen: Uint8Array[] = []
  const decoder = new TextDecoder()
  let isStream = response.ok ? undefined : false
  for (let start = ''; isStream === undefined; ) {
    const { value } = await body.next()
    if (!value) break
    seen.push(value)
    start = (start + decoder.decode(value, { stream: true })).trimStart()
    isStream = looksLikeStream(start, named)
  }
  const all = following(seen, body)
  if (isStream) return { events: serverSentEvents(all) }
  const parts: Uint8Array[] = []
  for await (const part of all) parts.push(part)
  return { text: new TextDecoder().decode(Buffer.concat(parts)) }
}

// the fields that begin a line of a stream; the first is a comment
const FIELDS = [':', 'data:', 'event:', 'id:', 'retry:']

// By its first letters: not every upstream has the type right. Undefined if more must come.
function looksLikeStream(start: string, named: boolean): boolean | undefined {
  if (named) return !/^[{[]/.test(start)
  if (FIELDS.some((field) => start.startsWith(field))) return true
  return FIELDS.some((field) => field.startsWith(start)) ? undefined : false
}

async function* packets({ body }: Response, alive: () => void): AsyncGenerator<Uint8Array> {
  for await (const packet of body ?? []) {
    alive()
    yield packet
  }
}

/** Gives the first items, and then the rest. */
export async function* following<T>(first: T[], rest: AsyncIterable<T>): AsyncGenerator<T> {
  yield* first
  yield* rest
}

// a node's provider names the variable: openai's is OPENAI_API_KEY
const credential = ({ provider }: ConfigNode) =>
  process.env[`${(provider ?? 'upstream').toUpperCase().replace(/\W/g, '_')}_API_KEY`] ?? ''
