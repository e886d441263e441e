// The meters of a provider's answer, whole or as a stream: each token in exactly one meter.
import { createReader, isObject, mergeUsage } from './meters-figures.ts'
import { costOf, type Flavor, figuresOf, PARTS, variantOf } from './meters-flavors.ts'
import { foldMeters, partitionOf } from './meters-partition.ts'
import { BYTES_PER_TOKEN, saidIn } from './meters-said.ts'

export type { Flavor } from './meters-flavors.ts'

/** An answer's use, to spread into an event: `recordUsage({ ...context, …, ...metersOf(…) })`. */
export interface Measured {
  /** Decimal texts. */
  meters: Record<string, string>
  /** The service tier that was served; `''` for the standard one. */
  variant: string
  /** Figures were missing, or contradicted each other. */
  estimated: boolean
  /** The provider's own cost, where its answer gives it. */
  upstream_cost?: { amount: string; currency: string }
  /** The provider's id of the answer, at most 512 characters. */
  request_id?: string
  /** The model that answered, by the provider's name. */
  model?: string
}

/** The meters that a node prices: a list, or one per variant. */
export type Priced = Iterable<string> | ((variant: string) => Iterable<string> | undefined)

export interface MetersOptions {
  /**
   * The meters that the node prices. The tokens of others are in their parents: cached ones in
   * `input_tokens`, reasoning in `output_tokens`. Default: all meters, but `reasoning_tokens`.
   */
  priced?: Priced
  /** Input tokens for want of the provider's count, of `estimateOf`. Default 0. */
  asked?: number
}

// of an event's `request_id`
const MAX_ID = 512

/** Adds up an answer: a whole one, or event by event. No method throws, whatever it is given. */
export function createMeters(flavor: Flavor, { priced, asked = 0 }: MetersOptions = {}) {
  let usage: unknown
  let isFinal = false
  let id: string | undefined
  let model: string | undefined
  let variant = ''
  let unread = false
  let pieces = 0
  const said = { bytes: 0, tokens: 0 }
  const inAll = { bytes: 0, tokens: 0 }
  const counted: Record<string, number> = {}

  function skip() {
    if (!unread) pieces++
    unread = true
  }

  function read(event: unknown) {
    if (!isObject(event)) return
    const part = PARTS[flavor](event)
    if (typeof part.id === 'string' && part.id) id ??= part.id.slice(0, MAX_ID)
    if (typeof part.model === 'string' && part.model) model ??= part.model
    // the last one was served: the first events may repeat the caller's wish
    if (typeof part.tier === 'string') variant = variantOf(part.tier)
    for (const given of part.usage) {
      // null and {} are no count
      if (!figuresOf(given, flavor, createReader())) continue
      usage = mergeUsage(usage, given)
      if (part.isFinal) isFinal = true
    }
    const now = saidIn(part.said)
    if (now.bytes + now.tokens > 0) pieces++
    said.bytes += now.bytes
    said.tokens += now.tokens
    const whole = saidIn(part.saidInAll)
    if (whole.bytes + whole.tokens > 0) pieces = Math.max(pieces, 1)
    inAll.bytes = Math.max(inAll.bytes, whole.bytes)
    inAll.tokens = Math.max(inAll.tokens, whole.tokens)
    for (const [meter, count] of Object.entries(part.counted))
      counted[meter] = Math.max(counted[meter] ?? 0, count)
    if (part.isOdd) skip()
  }

  const tokensSaid = () => {
    const tokens = ({ bytes, tokens }: typeof said) => Math.ceil(bytes / BYTES_PER_TOKEN) + tokens
    return Math.max(pieces, tokens(said), tokens(inAll))
  }

  function measure() {
    const reader = createReader()
    const figures = figuresOf(usage, flavor, reader)
    const least = tokensSaid()
    if (!figures) {
      return {
        meters: { ...counted, input_tokens: asked, output_tokens: least, requests: 1 },
        isDoubtful: true,
      }
    }
    const { meters, isDoubtful } = partitionOf(figures, reader)
    const all = (...names: string[]) =>
      Object.keys(meters).reduce((sum, m) => (names.some((n) => m.startsWith(n)) ? sum + meters[m]! : sum), 0)
    const output = all('output_', 'reasoning_')
    const input = all('input_', 'cached_input_', 'cache_write_')
    // a zero beside text contradicts it, and so does the first count of a stream that broke off
    const isShort = least > output && (output === 0 || !isFinal)
    if (isShort) meters.output_tokens = meters.output_tokens! + least - output
    const isUnasked = input === 0 && (output > 0 || isShort)
    if (isUnasked) meters.input_tokens = asked
    for (const [meter, count] of Object.entries(counted)) meters[meter] ||= count
    meters.requests = 1
    return { meters, isDoubtful: isDoubtful || isShort || isUnasked || !isFinal }
  }

  // the reasoning, a request and pictures are apart where they are priced only
  function fold(meters: Record<string, number>) {
    const names = typeof priced === 'function' ? priced(variant) : priced
    if (names) return foldMeters(meters, new Set(names))
    const { requests: _, images: __, ...others } = meters
    return foldMeters(others, undefined)
  }

  return {
    /** An answer, or an event of one: a parsed JSON value. */
    add(event: unknown): void {
      try {
        read(event)
      } catch {
        skip()
      }
    },
    /** A part was passed on and not read; it counts as something said. */
    skip,
    /** The provider has said something, or has counted. */
    started: () => usage !== undefined || pieces > 0,
    /** A count of tokens is above 0. */
    counted(): boolean {
      const { input = 0, output = 0, total = 0 } = figuresOf(usage, flavor, createReader()) ?? {}
      return input + output + total > 0
    },
    /** A part could not be read. */
    unread: () => unread,
    /** The use so far. */
    measured(): Measured {
      const { meters, isDoubtful } = measure()
      const upstream_cost = costOf(usage)
      return {
        meters: fold(meters),
        variant,
        estimated: isDoubtful,
        ...(upstream_cost && { upstream_cost }),
        ...(id !== undefined && { request_id: id }),
        ...(model !== undefined && { model }),
      }
    },
  }
}

/**
 * The use of an answer: a whole one, or the events of a stream, in order. `priced` are the meters
 * that the node prices, and `asked` the input tokens for want of a count; see `MetersOptions`. Never
 * throws. For a stream that is still coming, use `createMeters`.
 */
export function metersOf(answer: unknown, flavor: Flavor, priced?: Priced, asked?: number): Measured {
  const meters = createMeters(flavor, { priced, asked })
  try {
    if (isIterable(answer)) for (const event of answer) meters.add(event)
    else meters.add(answer)
  } catch {
    meters.skip()
  }
  return meters.measured()
}

const isIterable = (value: unknown): value is Iterable<unknown> =>
  typeof value === 'object' && value !== null && Symbol.iterator in value
