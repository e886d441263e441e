// Money in whole steps of 1e-10, as BigInt: demo and bench compute with it the sums that SQL must
// answer.

const decimals = 10
const one = 10n ** BigInt(decimals)

/** A decimal string of at most 10 decimals, not negative, below 1e12; undefined if it isn't one. */
export function toSteps(text: string): bigint | undefined {
  const [, whole, fraction = ''] = /^(\d{1,12})(?:\.(\d{1,10}))?$/.exec(text) ?? []
  return whole === undefined ? undefined : BigInt(whole) * one + BigInt(fraction.padEnd(decimals, '0'))
}

/** With all 10 decimals, as SQL writes it. */
export function fromSteps(steps: bigint): string {
  const digits = (steps < 0n ? -steps : steps).toString().padStart(decimals + 1, '0')
  return `${steps < 0n ? '-' : ''}${digits.slice(0, -decimals)}.${digits.slice(-decimals)}`
}

/** Prices per million tokens, in steps. */
export interface Prices {
  input: bigint
  output: bigint
}

/** The cost of tokens: one rounding, half up, at 10 decimals. */
export function cost(prices: Prices, input: number, output: number): bigint {
  return (BigInt(input) * prices.input + BigInt(output) * prices.output + 500_000n) / 1_000_000n
}
