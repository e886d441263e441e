// A sealed statement as one page to print: self-contained HTML, on A4.
//   npx tsx examples/statement.ts ACCOUNT_ID PERIOD_START > statement.html, with POSTGREST_URL and OPERATOR_TOKEN (a member's does, too)
import { fileURLToPath } from 'node:url'
import { postgrestRpc } from 'keyledger'

/** The answer of `statement`; amounts are decimal strings with 10 decimals. */
export interface Statement {
  account_id: string
  owner: 'user' | 'tenant'
  owner_name: string | null
  currency: string
  period_start: string
  period_end: string
  opening: Buckets
  closing: Buckets & { overdue_amount: string; credit_limit: string }
  movements: Record<string, Buckets & { entries: number; amount: string }>
  entries: {
    seq: number | null
    at: string
    kind: string
    amount: string
    reference: string | null
    reason: string | null
    refund_of_seq: number | null
    refund_of_usage_id: string | null
    grant_seq: number | null
    credit_limit: string | null
  }[]
  usage: {
    config_node_id: string
    name: string
    provider: string | null
    model: string | null
    events: number
    cost: string
    rounding: string
    meters: Record<string, { quantity: string; cost: string }>
  }[]
  first_seq: number
  last_seq: number
  head: string
  previous_head: string
  sealed_at: string
}

interface Buckets {
  balance: string
  free_credit: string
  outstanding_amount: string
}

// of one entry, and of several
const kinds: Record<string, [one: string, several: string]> = {
  opening: ['Carried over', 'Carried over'],
  top_up: ['Payment', 'Payments'],
  top_up_reversal: ['Payment reversed', 'Payments reversed'],
  usage: ['Usage', 'Usage'],
  refund: ['Refund', 'Refunds'],
  adjustment: ['Adjustment', 'Adjustments'],
  credit_grant: ['Free credit granted', 'Free credit granted'],
  credit_expiry: ['Free credit expired', 'Free credit expired'],
  limit_change: ['Credit limit changed', 'Credit limit changed'],
}

/** The page. Every text of the statement is escaped. */
export function renderStatement(statement: Statement): string {
  const { opening, closing, currency } = statement
  const title = `Statement ${day(statement.period_start)} to ${day(statement.period_end)}`
  const moved = Object.keys(kinds).flatMap((kind) => {
    const movement = statement.movements[kind]
    if (!movement) return []
    const { entries, balance, free_credit, outstanding_amount, amount } = movement
    return [
      row(
        kinds[kind]![1],
        grouped(`${entries}`),
        ...[balance, free_credit, outstanding_amount, amount].map(money),
      ),
    ]
  })
  const used = sum(statement.usage.map(({ cost }) => cost))

  return html`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>${title}</title>
<style>${raw(css)}</style>
</head>
<body>
<header>
  <div>
    <h1>Statement</h1>
    <p class="period">${moment(statement.period_start)} – ${moment(statement.period_end)}</p>
  </div>
  <address>
    <strong>${statement.owner_name ?? statement.owner}</strong>
    <span>account ${statement.account_id}</span>
  </address>
</header>

<dl class="figures">
  <div><dt>Balance</dt><dd>${money(closing.balance)} <small>${currency}</small></dd></div>
  <div><dt>Free credit</dt><dd>${money(closing.free_credit)} <small>${currency}</small></dd></div>
  <div><dt>Used</dt><dd>${money(used)} <small>${currency}</small></dd></div>
  <div${raw(isZero(closing.outstanding_amount) ? '' : ' class="due"')}>
    <dt>To pay</dt><dd>${money(closing.outstanding_amount)} <small>${currency}</small></dd>
    ${isZero(closing.overdue_amount) ? '' : html`<dd class="note">of it overdue: ${money(closing.overdue_amount)}</dd>`}
  </div>
</dl>

<h2>Summary</h2>
<table>
  <thead>${head('', 'Entries', 'Balance', 'Free credit', 'To pay', 'Total')}</thead>
  <tbody>
    ${row('Opening', '', ...buckets(opening))}
    ${moved}
  </tbody>
  <tfoot>${row('Closing', '', ...buckets(closing))}</tfoot>
</table>
<p class="note">In ${currency}. Total is balance and free credit, less what is to pay.${
    isZero(closing.credit_limit) ? '' : ` The credit limit is ${money(closing.credit_limit)}.`
  }</p>

<h2>Usage</h2>
${
  statement.usage.length === 0
    ? html`<p>Nothing was used in this period.</p>`
    : html`<table>
  <thead>${head('', 'Quantity', 'Events', 'Cost')}</thead>
  ${statement.usage.map(
    (node) => html`<tbody>
    <tr class="group"><th scope="rowgroup">${node.name} <small>${[node.provider, node.model].filter(Boolean).join(' · ')}</small></th>
      <td></td><td>${grouped(`${node.events}`)}</td><td>${money(node.cost)}</td></tr>
    ${Object.entries(node.meters)
      .sort()
      .map(([meter, { quantity, cost }]) =>
        row(meter.replaceAll('_', ' '), grouped(quantity), '', money(cost)),
      )}
    ${isZero(node.rounding) ? '' : row('rounding of each event', '', '', money(node.rounding))}
  </tbody>`,
  )}
  <tfoot>${row('All usage', '', grouped(`${statement.usage.reduce((all, { events }) => all + events, 0)}`), money(used))}</tfoot>
</table>`
}

<h2>Payments, credit and corrections</h2>
${
  statement.entries.length === 0
    ? html`<p>There were none in this period.</p>`
    : html`<table class="entries">
  <thead><tr><th scope="col">When</th><th scope="col">What</th><th scope="col">Amount</th></tr></thead>
  <tbody>${statement.entries.map(
    (entry) => html`
    <tr><td>${moment(entry.at)}</td><td>${kinds[entry.kind]?.[0] ?? entry.kind}<small>${about(entry)}</small></td>
      <td>${money(entry.amount)}</td></tr>`,
  )}
  </tbody>
</table>`
}

<footer>
  <p>${
    statement.last_seq < statement.first_seq
      ? `No entry was posted in this period; the ledger stands at entry ${statement.last_seq}.`
      : `Entries ${statement.first_seq} to ${statement.last_seq} of the ledger.`
  } Sealed ${moment(statement.sealed_at)}. Who keeps the hash can prove later that none of them was changed.</p>
  <dl>
    <dt>Hash of the ledger before</dt><dd><code>${statement.previous_head || 'none: the first statement'}</code></dd>
    <dt>Hash of the ledger now</dt><dd><code>${statement.head || 'none: no entry yet'}</code></dd>
  </dl>
</footer>
</body>
</html>
`.html
}

const about = (entry: Statement['entries'][number]): string =>
  [
    entry.refund_of_usage_id
      ? `of event ${entry.refund_of_usage_id}`
      : entry.refund_of_seq && `of entry ${entry.refund_of_seq}`,
    entry.grant_seq && `of the grant in entry ${entry.grant_seq}`,
    entry.credit_limit && `to ${money(entry.credit_limit)}`,
    entry.reference,
    entry.reason,
  ]
    .filter(Boolean)
    .join(' · ')

const head = (...names: string[]) => html`<tr>${names.map((name) => html`<th scope="col">${name}</th>`)}</tr>`
const row = (name: string, ...cells: string[]) =>
  html`<tr><th scope="row">${name}</th>${cells.map((cell) => html`<td>${cell}</td>`)}</tr>`
const buckets = ({ balance, free_credit, outstanding_amount }: Buckets) => [
  ...[balance, free_credit, outstanding_amount].map(money),
  money(sum([balance, free_credit, negated(outstanding_amount)])),
]

/** Two decimals, and more where there are more; thousands apart, by a space that doesn't break. */
export function money(amount: string): string {
  const [whole, decimals = ''] = amount.split('.')
  return `${grouped(whole!).replace('-', '\u2212')}.${decimals.replace(/0+$/, '').padEnd(2, '0')}`
}
const grouped = (number: string) =>
  number.replace(/^-?\d+/, (whole) => whole.replace(/\B(?=(\d{3})+$)/g, '\u202f'))
const isZero = (amount: string) => /^-?0*(\.0*)?$/.test(amount)
const negated = (amount: string) => (amount.startsWith('-') ? amount.slice(1) : `-${amount}`)

/** The exact sum of amounts with 10 decimals. */
function sum(amounts: string[]): string {
  const total = amounts.reduce((all, amount) => all + BigInt(amount.replace('.', '')), 0n)
  const digits = `${total < 0n ? -total : total}`.padStart(11, '0')
  return `${total < 0n ? '-' : ''}${digits.slice(0, -10)}.${digits.slice(-10)}`
}

const day = (at: string) => new Date(at).toISOString().slice(0, 10)
/** To the second, in UTC; a day's beginning is the day. */
function moment(at: string): string {
  const time = new Date(at).toISOString().slice(11, 19)
  return time === '00:00:00' ? day(at) : `${day(at)} ${time} UTC`
}

/** Text that is HTML already. */
interface Html {
  html: string
}
type Part = string | Html | Part[]
const raw = (text: string): Html => ({ html: text })
const toHtml = (part: Part): string => {
  if (Array.isArray(part)) return part.map(toHtml).join('')
  return typeof part === 'string' ? part.replace(/[&<>"']/g, (char) => `&#${char.charCodeAt(0)};`) : part.html
}
/** HTML, with every text put into it escaped. */
function html(parts: TemplateStringsArray, ...values: Part[]): Html {
  return raw(String.raw({ raw: parts }, ...values.map(toHtml)))
}

const css = `
@page { size: A4; margin: 18mm 16mm 20mm; @bottom-right { content: counter(page) ' / ' counter(pages); font: 8pt system-ui, sans-serif; color: #667 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 32px 24px; max-width: 800px; font: 10pt/1.45 system-ui, 'Segoe UI', 'Helvetica Neue', sans-serif; color: #1c2333; font-variant-numeric: tabular-nums }
header { display: flex; justify-content: space-between; gap: 24px; align-items: flex-end; padding-bottom: 12px; border-bottom: 2px solid #1c2333 }
h1 { margin: 0; font-size: 22pt; letter-spacing: -.02em; line-height: 1.1 }
.period { margin: 4px 0 0; color: #556 }
address { font-style: normal; text-align: right; overflow-wrap: anywhere }
address strong { display: block; font-size: 12pt }
address span, small, .note { color: #667; font-size: 8pt; font-weight: 400 }
.figures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 10px; margin: 18px 0 6px }
.figures div { padding: 10px 12px; border: 1px solid #d9dde6; border-radius: 6px; break-inside: avoid }
.figures dt { color: #556; font-size: 8.5pt }
.figures dd { margin: 2px 0 0; font-size: 13pt; font-weight: 600; overflow-wrap: anywhere }
.figures dd.note { font-size: 8pt; font-weight: 400 }
.figures .due { border-color: #b3261e; color: #b3261e }
h2 { margin: 24px 0 6px; font-size: 12pt; break-after: avoid }
table { width: 100%; border-collapse: collapse }
thead { display: table-header-group }
tr { break-inside: avoid }
th, td { padding: 5px 0 5px 12px; text-align: right; vertical-align: top; border-bottom: 1px solid #e6e9ef; font-weight: 400 }
th:first-child, .entries td:nth-child(-n+2), .entries th:nth-child(-n+2) { text-align: left }
th:first-child, td:first-child { padding-left: 0 }
thead th { color: #556; font-size: 8.5pt; border-bottom-color: #aab }
tbody th:first-child { overflow-wrap: anywhere }
tfoot { display: table-row-group }
tfoot th, tfoot td, .group th, .group td { font-weight: 600 }
tfoot th, tfoot td { border-top: 1px solid #1c2333; border-bottom: 0 }
.group ~ tr th { padding-left: 14px; color: #445 }
.entries td:first-child { white-space: nowrap }
.entries small { display: block; overflow-wrap: anywhere }
.note { margin: 6px 0 0 }
footer { margin-top: 28px; padding-top: 10px; border-top: 1px solid #d9dde6; color: #556; font-size: 8pt; break-inside: avoid }
footer p { margin: 0 0 6px }
footer dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 12px; margin: 0 }
footer dd { margin: 0 }
code { font: 7.5pt ui-monospace, 'DejaVu Sans Mono', monospace; overflow-wrap: anywhere }
@media print { body { max-width: none; padding: 0 } .figures div { print-color-adjust: exact } }
`

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const [account_id, period_start] = process.argv.slice(2)
  const { POSTGREST_URL, OPERATOR_TOKEN } = process.env
  if (!account_id || !period_start || !POSTGREST_URL || !OPERATOR_TOKEN) {
    console.error('statement: give ACCOUNT_ID and PERIOD_START, with POSTGREST_URL and OPERATOR_TOKEN set')
    process.exit(2)
  }
  const rpc = postgrestRpc({ url: POSTGREST_URL, token: OPERATOR_TOKEN })
  process.stdout.write(renderStatement(await rpc.call<Statement>('statement', { account_id, period_start })))
}
