// A model of the genai-prices catalog, as rates: a list per date, with its windows of hours and tiers of context.
import type { ModelInfo, ModelPrice } from '@pydantic/genai-prices'

/** A rate as `set_rates` takes it. */
export interface Rate {
  meter: string
  unit_price: string
  unit_size: number
  context_over: number
  /** Minutes of the UTC week, from Monday 00:00: `{[540,1020),…}`; undefined is always. */
  hours?: string
}

/** Rates that are in force together from a moment on; `from` is undefined for those of the beginning. */
export interface RateList {
  from?: string
  rates: Rate[]
}

/** The meter of each price of the catalog, and the units that the price is for. */
export const METERS: Record<string, [meter: string, unit_size: number]> = {
  input_mtok: ['input_tokens', 1_000_000],
  cache_read_mtok: ['cached_input_tokens', 1_000_000],
  cache_write_mtok: ['cache_write_tokens', 1_000_000],
  cache_write_1h_mtok: ['cache_write_1h_tokens', 1_000_000],
  input_audio_mtok: ['input_audio_tokens', 1_000_000],
  cache_audio_read_mtok: ['cached_input_audio_tokens', 1_000_000],
  input_image_mtok: ['input_image_tokens', 1_000_000],
  cache_image_read_mtok: ['cached_input_image_tokens', 1_000_000],
  input_video_mtok: ['input_video_tokens', 1_000_000],
  output_mtok: ['output_tokens', 1_000_000],
  output_reasoning_mtok: ['reasoning_tokens', 1_000_000],
  output_citation_mtok: ['citation_tokens', 1_000_000],
  output_audio_mtok: ['output_audio_tokens', 1_000_000],
  output_image_mtok: ['output_image_tokens', 1_000_000],
  output_video_mtok: ['output_video_tokens', 1_000_000],
  requests_kcount: ['requests', 1000],
  web_searches_kcount: ['web_searches', 1000],
  storage_searches_kcount: ['storage_searches', 1000],
  input_text_messages_kcount: ['text_messages', 1000],
  input_document_kpages: ['pages', 1000],
  input_annotated_document_kpages: ['annotated_pages', 1000],
  audio_hours: ['seconds', 3600],
  input_audio_hours: ['input_audio_seconds', 3600],
}

// the shortest text of a catalog's number: computed there, it may have a rest of binary fractions
const decimal = (value: number) => value.toFixed(10).replace(/\.?0+$/, '')

const DAY = 1440

/**
 * A model's prices as lists of rates, oldest first, and each part of them that no rate can hold. A
 * part that can't be held is in no list.
 */
export function rateLists(
  { prices }: Pick<ModelInfo, 'prices'>,
  provider = '',
  id = '',
): { lists: RateList[]; left: string[] } {
  const entries = Array.isArray(prices) ? prices : [{ prices }]
  const left = new Set<string>()
  if (provider === 'groq' && id.startsWith('whisper-large-v3'))
    left.add('at least 10 seconds are billed: write it to minimum_charges')

  const dates = entries.flatMap(({ constraint }) =>
    constraint?.type === 'start_date' ? [constraint.start_date] : [],
  )
  const starts = [undefined, ...[...new Set(dates)].sort()]
  const lists = starts.map((from) => {
    // the last entry that fits counts; one without a constraint fits always
    const inForce = entries
      .filter(
        ({ constraint }) =>
          constraint?.type !== 'start_date' || (from !== undefined && constraint.start_date <= from),
      )
      .reverse()
    const always = inForce.findIndex(({ constraint }) => constraint?.type !== 'time_of_date')
    const base = inForce[always]?.prices ?? entries[0]!.prices
    const windowed = (always < 0 ? inForce : inForce.slice(0, always)).map(({ constraint, prices }) => ({
      prices,
      ...(constraint as { start_time: string; end_time: string }),
    }))
    return { from: from && `${from}T00:00:00Z`, rates: listOf(base, windowsOf(windowed, left), left) }
  })

  // a meter's list stays in force until the next one: an end without a successor is no list
  for (const [i, { rates }] of lists.entries())
    for (const meter of new Set(rates.map(({ meter }) => meter)))
      if (i + 1 < lists.length && !lists[i + 1]!.rates.some((rate) => rate.meter === meter))
        left.add(`${meter} has no price from ${lists[i + 1]!.from} on; the old one stays in force`)
  return { lists, left: [...left] }
}

interface Window {
  prices: ModelPrice
  minutes: [first: number, beyond: number][]
}

// The minutes of a day that are each window's own: the first window counts where two overlap.
function windowsOf(
  windows: { prices: ModelPrice; start_time: string; end_time: string }[],
  left: Set<string>,
): Window[] {
  const owner = new Array<number>(DAY).fill(-1)
  for (const [i, { start_time, end_time }] of windows.entries()) {
    const [first, beyond] = [minuteOf(start_time), minuteOf(end_time)]
    if (first === undefined || beyond === undefined) {
      left.add(`hours from ${start_time} to ${end_time} are no whole minutes`)
      continue
    }
    for (let n = first; n !== beyond; n = (n + 1) % DAY) if (owner[n]! < 0) owner[n] = i
  }
  return windows.map(({ prices }, i) => {
    const minutes: [number, number][] = []
    for (let n = 0; n < DAY; n++)
      if (owner[n] === i) {
        const last = minutes.at(-1)
        if (last?.[1] === n) last[1] = n + 1
        else minutes.push([n, n + 1])
      }
    return { prices, minutes }
  })
}

function minuteOf(time: string): number | undefined {
  const [, hour, minute, second, sign, hours = '0', minutes = '0'] =
    /^(\d\d):(\d\d):(\d\d)(?:Z|([+-])(\d\d):(\d\d))$/.exec(time) ?? []
  if (second !== '00') return undefined
  const offset = (Number(hours) * 60 + Number(minutes)) * (sign === '-' ? -1 : 1)
  return (Number(hour) * 60 + Number(minute) - offset + DAY) % DAY
}

const hoursOf = ({ minutes }: Window) =>
  `{${Array.from({ length: 7 }, (_, day) => minutes.map(([a, b]) => [day * DAY + a, day * DAY + b]))
    .flat()
    // midnight parts no window
    .reduce<number[][]>((all, [a, b]) => {
      const last = all.at(-1)
      if (last && last[1] === a) last[1] = b!
      else all.push([a!, b!])
      return all
    }, [])
    .map(([a, b]) => `[${a},${b})`)
    .join(',')}}`

// The tiers of one price: above each number of tokens, that price.
const tiersOf = (price: ModelPrice[string]): [over: number, price: number][] =>
  typeof price === 'object'
    ? [[0, price.base], ...price.tiers.map(({ start, price }): [number, number] => [start, price])]
    : [[0, price ?? 0]]
const priceAt = (tiers: [number, number][], over: number) =>
  tiers.reduce((found, [start, price]) => (start <= over ? price : found), tiers[0]![1])

function listOf(base: ModelPrice, windows: Window[], left: Set<string>): Rate[] {
  const rates: Rate[] = []
  const own = windows.filter(({ minutes }) => minutes.length)
  const keys = Object.keys(base).filter((key) => base[key] !== undefined)
  for (const { prices } of own)
    for (const key of Object.keys(prices).filter((key) => !keys.includes(key)))
      left.add(`${key} is priced in some hours only`)
  for (const key of keys) {
    const [meter, unit_size] = METERS[key] ?? []
    if (!meter || !unit_size) {
      left.add(`${key} is no meter`)
      continue
    }
    if (own.some(({ prices }) => prices[key] === undefined)) {
      left.add(`${key} has no price in some hours`)
      continue
    }
    const all = [base, ...own.map(({ prices }) => prices)].map((prices) => tiersOf(prices[key]))
    if (all.some((tiers) => tiers.some(([over], i) => i > 0 && over === 0)))
      left.add(`${key} has a tier above 0 tokens`)
    // each window has every tier of the list
    const overs = [...new Set(all.flatMap((tiers) => tiers.map(([over]) => over)))].sort((a, b) => a - b)
    for (const [i, tiers] of all.entries())
      for (const context_over of overs)
        rates.push({
          meter,
          unit_price: decimal(priceAt(tiers, context_over)),
          unit_size,
          context_over,
          ...(i ? { hours: hoursOf(own[i - 1]!) } : {}),
        })
  }
  return rates
}
