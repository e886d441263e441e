// Reads the answers of each API: where the usage is, what it is called, and what was said.
import {
  addDecimals,
  createReader,
  decimalOf,
  isObject,
  type Json,
  list,
  object,
  type Reader,
} from './meters-figures.ts'
import type { Figures, Modal } from './meters-partition.ts'

/** The API that an answer is of. */
export type Flavor = 'openai-chat' | 'openai-responses' | 'anthropic' | 'gemini'

/** The parts of one answer, or of one event of a stream, that we read. */
export interface Part {
  usage: unknown[]
  id?: unknown
  model?: unknown
  tier?: unknown
  /** Said in it. */
  said: unknown[]
  /** Said in all before it as well: it counts where the events said less. */
  saidInAll: unknown[]
  /** The final count; else more may have been made than was counted. */
  isFinal: boolean
  /** It has a shape that we don't know. */
  isOdd: boolean
  /** Counted by us: searches, pictures. */
  counted: Record<string, number>
}

const part = (event: Json, more: Partial<Part>): Part => ({
  usage: [event.usage],
  id: event.id,
  model: event.model,
  tier: event.service_tier,
  said: [],
  saidInAll: [],
  isFinal: true,
  isOdd: false,
  counted: {},
  ...more,
})

// the usage is beside the choices; Moonshot gives it within one, Groq within x_groq
function chatPart(event: Json): Part {
  const { choices } = event
  const said = list(choices).map((choice) => {
    const { message, delta, text } = object(choice)
    return message ?? delta ?? text
  })
  const isOdd =
    (!Array.isArray(choices) && choices !== undefined && choices !== null) ||
    list(choices).some((choice) => !isObject(choice)) ||
    said.some((words) => isObject(words) && !Array.isArray(words.tool_calls ?? []))
  const usage = [
    object(event.x_groq).usage,
    ...list(choices).map((choice) => object(choice).usage),
    event.usage,
  ]
  return part(event, { usage, said, isOdd })
}

// an event wraps the whole response, or adds to it
function responsesPart(event: Json): Part {
  const isEvent = typeof event.type === 'string' && event.type.includes('.')
  const whole = isEvent ? object(event.response) : event
  const output = list(whole.output).map(object)
  const searches = output.filter(
    ({ type, action }) => type === 'web_search_call' && (object(action).type ?? 'search') === 'search',
  ).length
  const images = output.filter(({ type }) => type === 'image_generation_call').length
  return part(whole, {
    said: isEvent && String(event.type).endsWith('.delta') ? [event.delta] : [],
    saidInAll: output,
    isOdd: whole.output !== undefined && whole.output !== null && !Array.isArray(whole.output),
    counted: { web_searches: searches, images },
  })
}

// message_start has the input, message_delta the output; a whole answer has both
function anthropicPart(event: Json): Part {
  const whole = event.type === 'message_start' ? object(event.message) : event
  const usage = object(whole.usage)
  // the rounds of a long answer; a compaction is in no other sum
  const rounds = list(usage.iterations).map(object)
  const summed: Json = {}
  for (const name of [
    'input_tokens',
    'output_tokens',
    'cache_read_input_tokens',
    'cache_creation_input_tokens',
  ])
    if (rounds.some((round) => round[name] !== undefined))
      summed[name] = rounds.reduce((sum, round) => sum + (createReader().count(round[name]) ?? 0), 0)
  return part(whole, {
    usage: [whole.usage, rounds.length ? summed : undefined],
    tier: usage.speed === 'fast' ? 'fast' : usage.service_tier,
    said: [
      whole.content,
      event.content_block,
      event.type === 'content_block_delta' ? event.delta : undefined,
    ],
    // the count at the start is of the first token alone
    isFinal: event.type !== 'message_start',
    isOdd: whole.content !== undefined && whole.content !== null && !Array.isArray(whole.content),
  })
}

function geminiPart(event: Json): Part {
  const usage = object(event.usageMetadata ?? event.usage_metadata)
  const candidates = list(event.candidates).map(object)
  const queries = candidates.map(
    ({ groundingMetadata }) => list(object(groundingMetadata).webSearchQueries).length,
  )
  return part(event, {
    usage: [event.usageMetadata ?? event.usage_metadata],
    id: event.responseId ?? event.response_id,
    model: event.modelVersion ?? event.model_version,
    tier: usage.serviceTier ?? usage.service_tier ?? usage.trafficType ?? usage.traffic_type,
    said: candidates.map(({ content }) => content),
    isOdd: event.candidates !== undefined && event.candidates !== null && !Array.isArray(event.candidates),
    counted: { web_searches: queries.reduce((sum, count) => sum + count, 0) },
  })
}

export const PARTS: Record<Flavor, (event: Json) => Part> = {
  'openai-chat': chatPart,
  'openai-responses': responsesPart,
  anthropic: anthropicPart,
  gemini: geminiPart,
}

/** The figures of a merged usage; undefined if it has no count of tokens. */
export function figuresOf(usage: unknown, flavor: Flavor, reader: Reader): Figures | undefined {
  if (!isObject(usage)) return undefined
  const figures = READERS[flavor](usage, reader)
  const { input, output, total } = figures
  return input === undefined && output === undefined && total === undefined ? undefined : figures
}

// of Chat Completions and of Responses; DeepSeek, Moonshot and gateways before Anthropic have
// names of their own for the cache
function openaiFigures(usage: Json, { count }: Reader): Figures {
  const of = object(usage.prompt_tokens_details ?? usage.input_tokens_details)
  const made = object(usage.completion_tokens_details ?? usage.output_tokens_details)
  const cachedOf = object(of.cached_tokens_details)
  const tools = object(usage.server_tool_use)
  return {
    input: count(usage.prompt_tokens, usage.input_tokens),
    output: count(usage.completion_tokens, usage.output_tokens),
    total: count(usage.total_tokens),
    cached: count(
      of.cached_tokens,
      usage.cached_tokens,
      usage.prompt_cache_hit_tokens,
      usage.cache_read_input_tokens,
    ),
    cacheWrite:
      count(of.cache_write_tokens, of.cache_creation_tokens, usage.cache_creation_input_tokens) ?? 0,
    cacheWrite1h: 0,
    reasoning: count(made.reasoning_tokens, usage.reasoning_tokens) ?? 0,
    inputOf: modal((kind) => count(of[`${kind}_tokens`])),
    cachedOf: modal((kind) => count(cachedOf[`${kind}_tokens`])),
    outputOf: modal((kind) => count(made[`${kind}_tokens`])),
    reasoningIs: 'inside',
    others: {
      web_searches: count(tools.web_search_requests, usage.num_search_queries) ?? 0,
      seconds: usage.type === 'duration' ? (count(usage.seconds) ?? 0) : 0,
    },
  }
}

// the input excludes the cached part and the written one, always
function anthropicFigures(usage: Json, { count }: Reader): Figures {
  const creation = object(usage.cache_creation)
  const hour = count(creation.ephemeral_1h_input_tokens) ?? 0
  const cached = count(usage.cache_read_input_tokens)
  const written = hour + (count(creation.ephemeral_5m_input_tokens) ?? 0)
  const cacheWrite = Math.max(count(usage.cache_creation_input_tokens) ?? 0, written)
  const input = count(usage.input_tokens)
  const beside = (cached ?? 0) + cacheWrite
  return {
    input: input === undefined && beside === 0 ? undefined : (input ?? 0) + beside,
    output: count(usage.output_tokens),
    total: undefined,
    cached,
    cacheWrite,
    cacheWrite1h: hour,
    reasoning: count(object(usage.output_tokens_details).thinking_tokens) ?? 0,
    inputOf: modal(() => 0),
    cachedOf: modal(() => 0),
    outputOf: modal(() => 0),
    reasoningIs: 'inside',
    others: { web_searches: count(object(usage.server_tool_use).web_search_requests) ?? 0 },
  }
}

// the prompt includes the cached part; thoughts and results of tools are beside
function geminiFigures(usage: Json, { count }: Reader): Figures {
  const snake = (name: string) => name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`)
  const given = (name: string) => usage[name] ?? usage[snake(name)]
  const details = (...names: string[]) => {
    const items = names.flatMap((name) => list(given(name)).map(object))
    return modal((kind) =>
      items
        .filter(({ modality }) => String(text(modality)).toLowerCase() === kind)
        .reduce((sum, item) => sum + (count(item.tokenCount ?? item.token_count) ?? 0), 0),
    )
  }
  const prompt = count(given('promptTokenCount'))
  const tools = count(given('toolUsePromptTokenCount'))
  return {
    input: prompt === undefined && tools === undefined ? undefined : (prompt ?? 0) + (tools ?? 0),
    output: count(given('candidatesTokenCount'), given('responseTokenCount')),
    total: count(given('totalTokenCount')),
    cached: count(given('cachedContentTokenCount')),
    cacheWrite: 0,
    cacheWrite1h: 0,
    reasoning: count(given('thoughtsTokenCount')) ?? 0,
    inputOf: details('promptTokensDetails', 'toolUsePromptTokensDetails'),
    cachedOf: details('cacheTokensDetails'),
    outputOf: details('candidatesTokensDetails', 'responseTokensDetails'),
    reasoningIs: 'beside',
    others: {},
  }
}

const text = (value: unknown) => (typeof value === 'string' ? value : '')

const modal = (count: (kind: keyof Modal) => number | undefined): Modal => ({
  audio: count('audio') ?? 0,
  image: count('image') ?? 0,
  video: count('video') ?? 0,
})

const READERS: Record<Flavor, (usage: Json, reader: Reader) => Figures> = {
  'openai-chat': openaiFigures,
  'openai-responses': openaiFigures,
  anthropic: anthropicFigures,
  gemini: geminiFigures,
}

// the names of the standard tier, and of none
const STANDARD = /^(|auto|default|standard|on_demand|.*unspecified)$/

/** A tier as a variant: '' for the standard one. */
export function variantOf(tier: unknown): string {
  const name = text(tier)
    .toLowerCase()
    .replace(/^service_tier_/, '')
  if (STANDARD.test(name)) return ''
  const plain = name.replace(/^on_demand_/, '').replace(/[^a-z0-9_.-]/g, '_')
  return (/^[a-z]/.test(plain) ? plain : `tier_${plain}`).slice(0, 63)
}

/**
 * The provider's own cost: OpenRouter's `cost` (with `cost_details.upstream_inference_cost` where
 * the key is your own), Perplexity's `cost.total_cost`, xAI's `cost_in_usd_ticks` of 1e-10 USD.
 */
export function costOf(usage: unknown): { amount: string; currency: string } | undefined {
  const { cost, cost_in_usd_ticks: ticks, cost_details, is_byok } = object(usage)
  const inTicks = Number.isSafeInteger(ticks) ? decimalOf(`${ticks}e-10`) : undefined
  const own = inTicks ?? decimalOf(isObject(cost) ? cost.total_cost : cost)
  const upstream = is_byok === true ? decimalOf(object(cost_details).upstream_inference_cost) : undefined
  const amount = own !== undefined && upstream !== undefined ? addDecimals(own, upstream) : own
  return amount === undefined ? undefined : { amount, currency: 'USD' }
}
