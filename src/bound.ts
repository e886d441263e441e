// The most tokens that a request may use, for its hold; and the usual ones, for want of a count.
// Text is bounded by its bytes. Pictures, files and addresses stand for more than they weigh, or
// less: they count by their possible cost.
import { isObject, type Json, list, object } from './meters-figures.ts'
import type { Flavor } from './meters-flavors.ts'
import { BYTES_PER_TOKEN, PICTURE_TOKENS } from './meters-said.ts'

export interface BoundOptions {
  /** The meters that the node prices: `requests` and `web_searches` are bounded where they are. */
  priced?: Iterable<string>
  /** The most input tokens that the model takes. Default 200,000. */
  context?: number
  /** The most tokens of one picture. Default 10,000, and 48,169 for gpt-4o-mini, which has the most. */
  picture?: number
  /** Output tokens of an answer without a limit; a longer one is charged all the same. Default 4,096. */
  output?: number
}

const CONTEXT = 200_000
const PICTURE = 10_000
const PICTURE_OF_4O_MINI = 48_169
const OUTPUT = 4_096
// past it, SQL refuses a count
const MOST = 1e15
// searches that a tool without a limit may make
const SEARCHES = 10

// of sounds: 32 tokens a second are the most of any provider, at 8 kbit/s at least; 10 at 128 kbit/s
// are usual
const soundAtMost = (bytes: number) => Math.ceil((bytes / 1_000) * 32)
const soundUsually = (bytes: number) => Math.ceil((bytes / 16_000) * 10)
// a page of a file is 2,000 tokens or so, and 50 KB
const fileUsually = (bytes: number) => Math.min(50_000, Math.max(2_000, Math.ceil(bytes / 25)))
// the usual tokens of a file or a conversation that is elsewhere
const ELSEWHERE = 3_000

/**
 * The meters of a hold: the most that the request may use. `body` is its JSON, as text or parsed.
 * Never throws. The tokens of `input_tokens` may turn out to be cached ones, or of any other input
 * meter.
 */
export function boundOf(body: unknown, flavor: Flavor, options: BoundOptions = {}): Record<string, string> {
  const { context = CONTEXT, output = OUTPUT } = options
  const { asked, textBytes, parts } = readRequest(body)
  const mini = typeof asked.model === 'string' && asked.model.includes('gpt-4o-mini')
  const picture = options.picture ?? (mini ? PICTURE_OF_4O_MINI : PICTURE)
  const sizes = parts.map(({ kind, bytes }) => {
    if (kind === 'picture') return picture
    return kind === 'sound' ? Math.min(context, soundAtMost(bytes)) : context
  })
  // a search, or a tool that the provider runs, adds what it finds
  const tools = list(asked.tools).map(object)
  if (tools.some(isServerTool) || asked.web_search_options) sizes.push(context)
  // pictures beyond the context are refused; text is bounded by itself
  const beside = Math.min(
    Math.max(context, picture),
    sizes.reduce((sum, size) => sum + size, 0),
  )

  const priced = options.priced && new Set(options.priced)
  const hasTokens = !priced?.size || [...priced].some((meter) => meter.endsWith('_tokens'))
  const meters: Record<string, number> = {}
  if (hasTokens) {
    meters.input_tokens = textBytes + beside
    meters.output_tokens = outputOf(asked, flavor, output)
  }
  if (priced?.has('requests')) meters.requests = 1
  if (priced?.has('web_searches')) {
    const searching = tools.filter(({ type }) => typeof type === 'string' && type.startsWith('web_search'))
    const most = searching.map(({ max_uses }) => countOf(max_uses, SEARCHES))
    if (most.length || 'google_search' in Object.assign({}, ...tools) || asked.web_search_options)
      meters.web_searches = Math.max(SEARCHES * Number(!most.length), ...most)
  }
  if (!Object.keys(meters).length) meters.requests = 1
  return Object.fromEntries(
    Object.entries(meters).map(([meter, n]) => [meter, String(BigInt(Math.min(n, MOST)))]),
  )
}

/** The usual input tokens of a request, for want of the provider's count. Never throws. */
export function estimateOf(body: unknown): number {
  const { textBytes, parts } = readRequest(body)
  return parts.reduce(
    (sum, { kind, bytes, isElsewhere }) => {
      if (kind === 'picture') return sum + PICTURE_TOKENS
      if (isElsewhere) return sum + ELSEWHERE
      return sum + (kind === 'sound' ? soundUsually(bytes) : fileUsually(bytes))
    },
    Math.ceil(textBytes / BYTES_PER_TOKEN),
  )
}

interface RequestPart {
  kind: 'picture' | 'sound' | 'file'
  /** Decoded bytes of it that are in the request. */
  bytes: number
  isElsewhere: boolean
}

function readRequest(body: unknown): { asked: Json; textBytes: number; parts: RequestPart[] } {
  try {
    const text = typeof body === 'string' ? body : (JSON.stringify(body) ?? '')
    const asked = object(typeof body === 'string' ? JSON.parse(body) : body)
    const { parts, weight } = partsOf(asked)
    return { asked, textBytes: Math.max(0, Buffer.byteLength(text) - weight), parts }
  } catch {
    return { asked: {}, textBytes: typeof body === 'string' ? Buffer.byteLength(body) : 0, parts: [] }
  }
}

// the parts that are no text, and the bytes of JSON that are theirs
function partsOf(asked: Json) {
  const parts: RequestPart[] = []
  let weight = 0
  // a list of its own: a request may be nested deeper than we may call
  const open: unknown[] = [asked]
  while (open.length) {
    const item = open.pop()
    const found = isObject(item) ? partOf(item) : undefined
    if (found) {
      const { data, ...part } = found
      weight += data.length
      const isText = part.kind === 'file' && /^data:text\//i.test(data)
      // a text file is text, in four letters for three bytes
      if (isText) weight -= data.length
      else parts.push({ ...part, bytes: Math.ceil((data.length * 3) / 4), isElsewhere: !data })
    } else if (Array.isArray(item) || isObject(item)) open.push(...Object.values(item as object))
  }
  // these name a text, or a file, that is kept by the provider
  const elsewhere = [
    asked.previous_response_id,
    asked.conversation,
    asked.cachedContent,
    asked.cached_content,
  ]
  if (isObject(asked.prompt)) elsewhere.push(asked.prompt.id)
  for (const id of elsewhere) if (id) parts.push({ kind: 'file', bytes: 0, isElsewhere: true })
  return { parts, weight }
}

const PICTURES = ['image_url', 'input_image', 'image', 'image_file']
const SOUNDS = ['input_audio', 'audio', 'audio_url']
const FILES = [
  'file',
  'input_file',
  'document',
  'video_url',
  'input_video',
  'video',
  'container_upload',
  'item_reference',
]

type Found = Omit<RequestPart, 'bytes' | 'isElsewhere'> & { data: string }

// a part of a message, by the names of any API; undefined for text, and for any other object
function partOf(item: Json): Found | undefined {
  const { type } = item
  const name = typeof type === 'string' ? type : ''
  if (PICTURES.includes(name)) return { kind: 'picture', data: dataOf(item) }
  if (SOUNDS.includes(name)) return { kind: 'sound', data: dataOf(item) || '' }
  if (FILES.includes(name)) {
    const source = object(item.source)
    // Anthropic's document may hold plain text, or parts of its own
    return source.type === 'text' || source.type === 'content'
      ? undefined
      : { kind: 'file', data: dataOf(item) }
  }
  const given = object(item.inlineData ?? item.inline_data ?? item.fileData ?? item.file_data)
  const mime = given.mimeType ?? given.mime_type
  if (typeof mime !== 'string') return undefined
  const data = typeof given.data === 'string' ? given.data : ''
  if (mime.startsWith('image/')) return { kind: 'picture', data }
  if (mime.startsWith('text/')) return data ? undefined : { kind: 'file', data }
  return { kind: mime.startsWith('audio/') && data ? 'sound' : 'file', data }
}

// the base64 of a part; empty if it is elsewhere: an address, an id
function dataOf(item: Json): string {
  for (const place of [item, ...PLACES.map((name) => object(item[name]))]) {
    for (const value of [place.data, place.file_data, place.url, place.image_url, place.file_url]) {
      if (typeof value !== 'string') continue
      if (value === place.data || value === place.file_data || value.startsWith('data:')) return value
    }
  }
  return ''
}
const PLACES = ['image_url', 'input_audio', 'audio_url', 'file', 'source', 'video_url']

// run by the provider: all but functions, and tools that the caller runs
const isServerTool = (tool: Json) =>
  Object.keys(tool).some((name) =>
    /^(google_?search|url_?context|google_search_retrieval|code_?execution)$/i.test(name),
  ) ||
  (typeof tool.type === 'string' &&
    /^(web_search|web_fetch|file_search|code_interpreter|code_execution|mcp|x_search|computer_use_preview|image_generation)/.test(
      tool.type,
    ))

function outputOf(asked: Json, flavor: Flavor, otherwise: number): number {
  const config = object(asked.generationConfig ?? asked.generation_config)
  if (flavor === 'anthropic') return countOf(asked.max_tokens, otherwise)
  if (flavor === 'openai-responses') return countOf(asked.max_output_tokens, otherwise)
  if (flavor === 'gemini')
    return (
      countOf(config.maxOutputTokens ?? config.max_output_tokens, otherwise) *
      countOf(config.candidateCount ?? config.candidate_count, 1)
    )
  return countOf(asked.max_completion_tokens ?? asked.max_tokens, otherwise) * countOf(asked.n, 1)
}

const countOf = (value: unknown, otherwise: number) =>
  Number.isInteger(value) && (value as number) > 0 ? (value as number) : otherwise
