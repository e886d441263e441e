// Makes a partition of a provider's figures: each token is in exactly one meter.
import type { Reader } from './meters-figures.ts'

/** The figures of one answer, by one set of names. Absent ones were not given. */
export interface Figures {
  /** The prompt, with or without its cached part. */
  input?: number
  output?: number
  total?: number
  cached: number | undefined
  cacheWrite: number
  /** The part of `cacheWrite` that is kept for an hour. */
  cacheWrite1h: number
  reasoning: number
  inputOf: Modal
  cachedOf: Modal
  outputOf: Modal
  /** Whether `output` has the reasoning in it, where no total tells. */
  reasoningIs: 'inside' | 'beside'
  /** Figures that count no tokens: searches, pictures, seconds. */
  others: Record<string, number>
}

/** Tokens of parts that are no text. */
export type Modal = { audio: number; image: number; video: number }

export interface Partition {
  meters: Record<string, number>
  /** Figures contradicted each other. */
  isDoubtful: boolean
}

/** `reasoning_tokens` are here apart from `output_tokens`; `foldMeters` puts them together. */
export function partitionOf(figures: Figures, reader: Reader): Partition {
  const { input, output, isDoubtful } = sumsOf(figures)
  const { cacheWrite1h, cachedOf, inputOf, outputOf, others } = figures
  const cached = Math.min(figures.cached ?? 0, input)
  const cacheWrite = Math.min(figures.cacheWrite, input - cached)
  let isCut = cached < (figures.cached ?? 0) || cacheWrite < figures.cacheWrite || cacheWrite1h > cacheWrite

  // takes a part of a sum; a part that is larger contradicts it
  const taking = (sum: number) => ({
    take(part: number) {
      const taken = Math.min(part, sum)
      if (taken < part) isCut = true
      sum -= taken
      return taken
    },
    rest: () => sum,
  })
  const ofCached = taking(cached)
  const ofInput = taking(input - cached - cacheWrite)
  const ofOutput = taking(output)
  const meters: Record<string, number> = { ...others }
  for (const kind of ['audio', 'image', 'video'] as const) {
    meters[`cached_input_${kind}_tokens`] = ofCached.take(
      Math.min(cachedOf[kind], inputOf[kind] || cachedOf[kind]),
    )
    const rest = Math.max(0, inputOf[kind] - cachedOf[kind])
    // how much of it was cached may not be given: that is no contradiction
    meters[`input_${kind}_tokens`] = cached + cacheWrite > 0 ? Math.min(rest, ofInput.rest()) : rest
    meters[`input_${kind}_tokens`] = ofInput.take(meters[`input_${kind}_tokens`]!)
    meters[`output_${kind}_tokens`] = ofOutput.take(outputOf[kind])
  }
  meters.reasoning_tokens = Math.min(figures.reasoning, ofOutput.rest())
  meters.output_tokens = ofOutput.rest() - meters.reasoning_tokens
  // a zero that was given is worth showing
  if (figures.cached === 0 || ofCached.rest() > 0) meters.cached_input_tokens = ofCached.rest()
  meters.cache_write_1h_tokens = Math.min(cacheWrite1h, cacheWrite)
  meters.cache_write_tokens = cacheWrite - meters.cache_write_1h_tokens
  meters.input_tokens = ofInput.rest()
  return { meters, isDoubtful: isDoubtful || isCut || reader.isOdd() }
}

// The whole input and the whole output. Providers count the cached part and the reasoning inside
// these sums or beside them; the total tells which.
function sumsOf({ input, output, total, cached = 0, cacheWrite, reasoning, reasoningIs }: Figures) {
  // a total of 0 beside other figures tells nothing
  const all = total || undefined
  const prompt = input ?? (all === undefined ? 0 : Math.max(0, all - (output ?? 0)))
  const said = output ?? (all === undefined || input === undefined ? 0 : Math.max(0, all - prompt))
  const isMissing = input === undefined || output === undefined

  if (all !== undefined) {
    const beside = all - prompt - said
    const both = cached + cacheWrite
    const ways: [input: number, output: number][] = [
      [0, 0],
      [0, reasoning],
      ...[both, cached, cacheWrite].flatMap((apart): [number, number][] => [
        [apart, 0],
        [apart, reasoning],
      ]),
    ]
    const fitting = ways.find(
      ([more, thought]) => more + thought === beside && both <= prompt + more && reasoning <= said + thought,
    )
    if (fitting) return { input: prompt + fitting[0], output: said + fitting[1], isDoubtful: false }
  }

  // more cached than the prompt has: it is beside the prompt
  const isApart = cached + cacheWrite > prompt
  const whole = isApart ? prompt + cached + cacheWrite : prompt
  if (all === undefined) {
    const isBeside = reasoningIs === 'beside' || reasoning > said
    const doubtful = isApart || isMissing || (reasoningIs === 'inside' && reasoning > said)
    return { input: whole, output: isBeside ? said + reasoning : said, isDoubtful: doubtful }
  }
  // tokens that stand in the total only were made: thoughts, mostly
  const rest = all - whole
  const made = Math.max(reasoningIs === 'beside' ? said + reasoning : Math.max(said, reasoning), rest)
  return { input: whole, output: made, isDoubtful: isApart || isMissing || made > rest }
}

// the meters that a token falls to where the node doesn't price its own, nearest first
const PARENTS: Record<string, string[]> = {
  cached_input_audio_tokens: ['cached_input_tokens', 'input_audio_tokens', 'input_tokens'],
  cached_input_image_tokens: ['cached_input_tokens', 'input_image_tokens', 'input_tokens'],
  cached_input_video_tokens: ['cached_input_tokens', 'input_video_tokens', 'input_tokens'],
  cached_input_tokens: ['input_tokens'],
  cache_write_1h_tokens: ['cache_write_tokens', 'input_tokens'],
  cache_write_tokens: ['input_tokens'],
  input_audio_tokens: ['input_tokens'],
  input_image_tokens: ['input_tokens'],
  input_video_tokens: ['input_tokens'],
  reasoning_tokens: ['output_tokens'],
  output_audio_tokens: ['output_tokens'],
  output_image_tokens: ['output_tokens'],
  output_video_tokens: ['output_tokens'],
}

/**
 * The meters that the node prices, as decimal texts: the others fall to their parents. Without
 * `priced`, all of them, but the reasoning within the output.
 */
export function foldMeters(
  meters: Record<string, number>,
  priced: ReadonlySet<string> | undefined,
): Record<string, string> {
  const isApart = (meter: string) => (priced ? priced.has(meter) : meter !== 'reasoning_tokens')
  const hasTokens = !priced?.size || [...priced].some((meter) => meter.endsWith('_tokens'))
  // no float: each is a whole number
  const sums: Record<string, bigint> = hasTokens ? { input_tokens: 0n, output_tokens: 0n } : {}
  for (const [meter, quantity] of Object.entries(meters)) {
    const parents = PARENTS[meter]
    const isToken = meter.endsWith('_tokens')
    // a node without a price for searches gives them away, and so one without a price for tokens
    if (isToken ? !hasTokens : priced && !priced.has(meter)) continue
    const place =
      quantity === 0 || isApart(meter) || !parents ? meter : (parents.find(isApart) ?? parents.at(-1)!)
    sums[place] = (sums[place] ?? 0n) + BigInt(quantity)
  }
  const given = Object.entries(sums).filter(
    ([meter, sum]) =>
      sum > 0n ||
      ['input_tokens', 'output_tokens'].includes(meter) ||
      (meter === 'cached_input_tokens' && meter in meters),
  )
  // SQL takes no event without a meter
  if (!given.length) given.push([[...priced!][0]!, 0n])
  return Object.fromEntries(given.map(([meter, sum]) => [meter, String(sum)]))
}
