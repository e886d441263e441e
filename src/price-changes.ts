// The rates of a catalog beside those in force: which are to be written, from when on, and a line for each meter.
import type { Rate, RateList } from './price-list.ts'

export interface Node {
  id: string
  name: string
  provider: string | null
  model: string | null
}

/** A rate of the node, of the standard tier, in the list or book that is written. */
export interface Known extends Rate {
  effective_from: string
}

// a list's rates, each as one text that tells whether two are the same: a price per unit, in whole steps
const written = ({ context_over, hours, unit_price, unit_size }: Rate) => {
  const [whole, fraction = ''] = unit_price.split('.')
  const steps = BigInt(whole! + fraction.padEnd(10, '0')) * BigInt(3_600_000_000 / unit_size)
  return `${hours ?? ''} ${context_over} ${steps}`
}
const sameRates = (a: Rate[], b: Rate[]) =>
  a.length === b.length && new Set([...a, ...b].map(written)).size === a.length
// the times of Monday stand for all days: the catalog's windows are daily
const timesOf = (hours: string) =>
  [...hours.matchAll(/\[(\d+),(\d+)\)/g)]
    .filter(([, first]) => Number(first) < 1440)
    .map(([, first, beyond]) => `${clock(Number(first))}-${clock(Number(beyond))} UTC`)
    .join(' and ')
const clock = (minute: number) => new Date((minute % 1440) * 60_000).toISOString().slice(11, 16)
const shown = (rates: Rate[]) =>
  rates.length
    ? rates
        .map(
          ({ unit_price, unit_size, context_over, hours }) =>
            `${unit_price}${unit_size === 1_000_000 ? '' : ` per ${unit_size}`}${context_over ? ` above ${context_over}` : ''}${hours ? ` in ${timesOf(hours)}` : ''}`,
        )
        .join(', ')
    : '-'

export interface Change {
  node: Node
  from: string
  rates: Rate[]
}

/** The lists to write: that of `from`, and the later ones at their dates; each without the meters that have it already. */
export function changesOf(node: Node, lists: RateList[], known: Known[], from: string) {
  const first = lists.findLastIndex(
    (list) => list.from === undefined || Date.parse(list.from) <= Date.parse(from),
  )
  const due = lists.slice(first).map((list, i) => (i ? { ...list, from: list.from! } : { ...list, from }))
  const changes: Change[] = []
  const lines: string[][] = []
  // each meter as it will be before the next list
  const before = new Map<string, Rate[]>()
  for (const list of due) {
    const rates: Rate[] = []
    for (const meter of new Set(list.rates.map(({ meter }) => meter))) {
      const wanted = list.rates.filter((rate) => rate.meter === meter)
      const older = known.filter(
        (rate) => rate.meter === meter && Date.parse(rate.effective_from) <= Date.parse(list.from),
      )
      const newest = older.reduce((last, rate) => Math.max(last, Date.parse(rate.effective_from)), -Infinity)
      const inForce = older.filter((rate) => Date.parse(rate.effective_from) === newest)
      const previous = before.get(meter)
      const old = previous && newest < Date.parse(due[0]!.from) ? previous : inForce
      const same = sameRates(old, wanted)
      if (!same && old === inForce && newest === Date.parse(list.from))
        throw new Error(`${node.name} has another ${meter} price from that very moment; give a later --from`)
      if (!same) rates.push(...wanted)
      before.set(meter, wanted)
      const since = list === due[0] ? '' : ` from ${list.from.slice(0, 10)}`
      lines.push([
        node.name,
        node.model ?? '-',
        meter,
        shown(old),
        shown(wanted),
        (same ? 'in force' : old.length ? 'changes' : 'new') + since,
      ])
    }
    if (rates.length) changes.push({ node, from: list.from, rates })
  }
  for (const meter of new Set(known.map(({ meter }) => meter)))
    if (!due.some(({ rates }) => rates.some((rate) => rate.meter === meter)))
      lines.push([node.name, node.model ?? '-', meter, 'as it is', '-', 'not in the catalog'])
  return { changes, lines }
}
