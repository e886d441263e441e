// Traffic to replay: read from a CSV file, or made by a seeded generator.
import { readFileSync } from 'node:fs'

/** One request of a trace: its arrival, in ms after the first request, and its tokens. */
export interface Request {
  at: number
  input: number
  output: number
}

/** A number from 0 up to 1. */
export type Random = () => number

/** A generator whose numbers follow from its seed (mulberry32). */
export function seeded(seed: number): Random {
  let state = seed
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
}

/** Draws an index by weight. */
export function weighted(weights: number[]): (random: Random) => number {
  let sum = 0
  const ends = weights.map((weight) => {
    sum += weight
    return sum
  })
  return (random) => {
    const at = random() * sum
    let low = 0
    let high = ends.length - 1
    while (low < high) {
      const middle = (low + high) >> 1
      if (ends[middle]! > at) high = middle
      else low = middle + 1
    }
    return low
  }
}

const header = 'TIMESTAMP,ContextTokens,GeneratedTokens'
const maxTokens = 1e9

/**
 * Reads a CSV of `TIMESTAMP,ContextTokens,GeneratedTokens`. Throws an error that names the first
 * line it can't read.
 */
export function readTrace(file: string): Request[] {
  const lines = readFileSync(file, 'utf8').split(/\r?\n/)
  if (lines[0] !== header)
    throw new Error(`${file} line 1: expected ${header}, found ${JSON.stringify(lines[0]!.slice(0, 60))}`)
  while (lines.at(-1) === '') lines.pop()
  let first = 0
  const requests = lines.slice(1).map((line, index) => {
    const [, day, time, input, output] =
      /^(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d(?:\.\d+)?)Z?,(\d{1,10}),(\d{1,10})$/.exec(line) ?? []
    const at = Date.parse(`${day}T${time}Z`)
    if (Number.isNaN(at) || Number(input) > maxTokens || Number(output) > maxTokens)
      throw new Error(
        `${file} line ${index + 2}: expected a time and two numbers of tokens (up to ${maxTokens}), found ${JSON.stringify(line.slice(0, 60))}`,
      )
    first ||= at
    return { at: at - first, input: Number(input), output: Number(output) }
  })
  if (!requests.length) throw new Error(`${file} has no requests`)
  return requests
}

/**
 * Makes a trace like a chat service's: lengths are lognormal, and requests come in one by one at
 * random, some 5 a second.
 */
export function makeTrace(count: number, random: Random): Request[] {
  const normal = () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random())
  const length = (median: number, spread: number, max: number) =>
    Math.min(max, Math.max(1, Math.round(median * Math.exp(spread * normal()))))
  let at = 0
  return Array.from({ length: count }, () => {
    at -= Math.log(1 - random()) * 190
    return { at, input: length(900, 0.9, 16_000), output: length(150, 0.9, 4000) }
  })
}
