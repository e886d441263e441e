// The command `keyledger prices`: rates of nodes from the genai-prices catalog, shown or written.
import { parseArgs } from 'node:util'
import type { ModelInfo, Provider } from '@pydantic/genai-prices'
import pg from 'pg'
import { type Change, changesOf, type Known, type Node } from './price-changes.ts'
import { rateLists } from './price-list.ts'
import type { Rpc } from './rpc.ts'
import { pgRpc } from './rpc-pg.ts'
import { postgrestRpc } from './rpc-postgrest.ts'

const help = `Loads prices for config nodes from the genai-prices catalog (npm: @pydantic/genai-prices).

  npx keyledger prices --provider NAME [--node NAME] [--model NAME] [--book NAME] [--from DATE] [--write]
  npx keyledger prices --book NAME --factor NUMBER [--from DATE] [--write]

  --provider NAME  as the catalog names it: openai, anthropic, google, azure, …
  --node NAME      this node only; by default all whose provider is NAME
  --model NAME     the catalog's model of that node, where the node's own model has another name
  --book NAME      the own rates of this price book (of a cost book too); by default the list prices
  --factor NUMBER  the book's factor on list prices, instead of own rates: 1.2 is the list + 20 %
  --from DATE      when the prices of today come into force: 2026-12-01 (in UTC), or a moment with its zone (default:
                   now). Changes that the catalog dates later come into force at their dates. With an early date the
                   catalog's whole history is loaded.
  --write          write what is shown; without it nothing is written
  --help           this

A node's model is looked up as the catalog does it. Prices are in USD. Tiers of context and hours become rates. Rates in
force already are left alone. Parts of the catalog that no rate can hold are listed as "left out", each with its reason.
It works as keyledger_operator, over DATABASE_URL or over POSTGREST_URL with OPERATOR_TOKEN.

Exit code: 0 if done, 1 if something failed, 2 for a wrong option.`

interface Options {
  provider?: string
  node?: string
  model?: string
  book?: string
  factor?: string
  from?: string
  write: boolean
}

function options(args: string[]): Options | undefined {
  const text = { type: 'string' } as const
  const flag = { type: 'boolean' } as const
  const { values } = parseArgs({
    args,
    options: {
      ...{ provider: text, node: text, model: text, book: text, factor: text, from: text },
      ...{ write: flag, help: flag },
    },
  })
  if (values.help) return undefined
  const { provider, node, model, book, factor, from, write = false } = values
  if (factor !== undefined && book === undefined) throw new Error('--factor needs a --book')
  if (factor !== undefined && !(/^\d{1,4}(\.\d{1,6})?$/.test(factor) && Number(factor) <= 1000))
    throw new Error(`--factor must be a number up to 1000 of at most 6 decimals, like 1.2, not ${factor}`)
  if (factor !== undefined && (provider ?? node ?? model) !== undefined)
    throw new Error("--factor is the whole book's: leave out --provider, --node and --model")
  if (factor === undefined && !provider) throw new Error('--provider is missing; see --help')
  if (model !== undefined && node === undefined) throw new Error('--model needs a --node')
  return { provider, node, model, book, factor, from: from === undefined ? undefined : moment(from), write }
}

function moment(from: string): string {
  const day = /^\d{4}-\d\d-\d\d$/.test(from)
  const at = new Date(day ? `${from}T00:00:00Z` : from)
  // JavaScript reads February 30th as March 2nd, and a moment without a zone as local
  const known = day
    ? !Number.isNaN(at.getTime()) && at.toISOString().startsWith(from)
    : /T.*(Z|[+-]\d\d:\d\d)$/.test(from)
  if (!known || Number.isNaN(at.getTime()))
    throw new Error(
      `--from must be a date like 2026-12-01 or a moment like 2026-12-01T00:00:00Z, not ${from}`,
    )
  return at.toISOString()
}

interface Server {
  rpc: Rpc
  setFactor(row: { price_book_id: string; factor: string; effective_from: string }): Promise<void>
}

function open(): Server {
  const { DATABASE_URL, POSTGREST_URL, OPERATOR_TOKEN } = process.env
  if (POSTGREST_URL && OPERATOR_TOKEN) {
    return {
      rpc: postgrestRpc({ url: POSTGREST_URL, token: OPERATOR_TOKEN }),
      async setFactor(row) {
        const response = await fetch(`${POSTGREST_URL.replace(/\/+$/, '')}/price_book_factors`, {
          method: 'POST',
          headers: {
            authorization: `Bearer ${OPERATOR_TOKEN}`,
            'content-type': 'application/json',
            'content-profile': 'api',
          },
          body: JSON.stringify(row),
        })
        if (!response.ok) throw new Error(((await response.json()) as { message: string }).message)
      },
    }
  }
  if (DATABASE_URL) {
    return {
      rpc: pgRpc({ connectionString: DATABASE_URL, role: 'keyledger_operator' }),
      async setFactor({ price_book_id, factor, effective_from }) {
        const client = new pg.Client(DATABASE_URL)
        await client.connect()
        try {
          await client.query('set role keyledger_operator')
          await client.query(
            'insert into api.price_book_factors (price_book_id, factor, effective_from) values ($1, $2, $3)',
            [price_book_id, factor, effective_from],
          )
        } finally {
          await client.end()
        }
      },
    }
  }
  throw new Error('set DATABASE_URL, or POSTGREST_URL and OPERATOR_TOKEN')
}

async function nodesOf(rpc: Rpc, { provider, node }: Options): Promise<Node[]> {
  const select = ['id', 'name', 'provider', 'model']
  const where: Record<string, string> = node === undefined ? { provider: provider! } : { name: node }
  const nodes = await rpc.rows<Node>('config_nodes', { select, where, order: 'name' })
  const [one] = nodes
  if (node === undefined && !one)
    throw new Error(
      `no config node has provider ${provider}: set it in api.config_nodes, or name one with --node`,
    )
  if (node === undefined) return nodes
  if (!one) throw new Error(`there is no config node ${node}`)
  if (one.provider !== null && one.provider !== provider)
    throw new Error(`config node ${node} has provider ${one.provider}, not ${provider}`)
  return nodes
}

async function bookOf(rpc: Rpc, name: string | undefined): Promise<string | null> {
  if (name === undefined) return null
  const [book] = await rpc.rows<{ id: string; currency: string }>('price_books', {
    select: ['id', 'currency'],
    where: { name },
  })
  if (!book) throw new Error(`there is no price book ${name}: make it in api.price_books`)
  if (book.currency !== 'USD')
    throw new Error(`price book ${name} is in ${book.currency}; the catalog is in USD`)
  return book.id
}

function table(lines: string[][]): string {
  const widths = lines[0]!.map((_, i) => Math.max(...lines.map((line) => line[i]!.length)))
  return lines
    .map((line) =>
      line
        .map((cell, i) => cell.padEnd(widths[i]!))
        .join('  ')
        .trimEnd(),
    )
    .join('\n')
}

async function catalogOf(name: string) {
  const { calcPrice, waitForUpdate } = await import('@pydantic/genai-prices')
  const providers = (await waitForUpdate()) ?? []
  const provider: Provider | undefined = providers.find(({ id }) => id === name)
  if (!provider)
    throw new Error(`the catalog has no provider ${name}; it has ${providers.map(({ id }) => id).join(', ')}`)
  const find = (model: string): ModelInfo | undefined => {
    const exact = provider.models.find(({ id }) => id === model)
    return exact ?? calcPrice({}, model, { providerId: name })?.model
  }
  return { provider, find }
}

async function load({ rpc }: Server, given: Options) {
  const { provider, find } = await catalogOf(given.provider!)
  const book = await bookOf(rpc, given.book)
  const from = given.from ?? new Date().toISOString()
  const lines = [['node', 'model', 'meter', 'in force', 'catalog', '']]
  const changes: Change[] = []
  for (const node of await nodesOf(rpc, given)) {
    const name = given.model ?? node.model
    const model = name === null ? undefined : find(name)
    if (!model) {
      const why = name === null ? 'it has no model' : `the catalog has no price of ${provider.id}'s ${name}`
      if (given.node !== undefined) {
        const near = provider.models.filter(
          ({ id }) => name !== null && (id.startsWith(name) || name.startsWith(id)),
        )
        throw new Error(
          `config node ${node.name}: ${why}${near.length ? `; it has ${near.map(({ id }) => id).join(', ')}` : ''}`,
        )
      }
      lines.push([node.name, name ?? '-', '-', '-', '-', why])
      continue
    }
    const { lists, left } = rateLists(model, provider.id, model.id)
    const known = (
      await rpc.rows<Known & { variant: string; price_book_id: string | null }>('prices', {
        select: [
          ...['meter', 'variant', 'context_over', 'hours::text', 'unit_price::text', 'unit_size'],
          ...['effective_from', 'price_book_id'],
        ],
        where: { config_node_id: node.id, currency: 'USD' },
      })
    )
      .filter((rate) => rate.variant === '' && rate.price_book_id === book)
      .map((rate) => ({ ...rate, context_over: Number(rate.context_over), hours: rate.hours ?? undefined }))
    const found = changesOf({ ...node, model: model.id }, lists, known, from)
    lines.push(...found.lines)
    for (const why of left) lines.push([node.name, model.id, '-', '-', '-', `left out: ${why}`])
    changes.push(...found.changes)
  }
  console.log(table(lines))
  const rates = changes.reduce((sum, { rates }) => sum + rates.length, 0)
  const count = `${rates} price${rates === 1 ? '' : 's'}`
  const when = `in USD, from ${given.from ?? 'now'}`
  if (!rates) console.log('\nNothing to write.')
  else if (!given.write)
    console.log(`\n${count} to write, ${when}. Nothing was written: repeat it with --write.`)
  else {
    for (const change of changes)
      await rpc.call<unknown>('set_rates', {
        config_node_id: change.node.id,
        rates: change.rates,
        price_book_id: book,
        effective_from: change.from,
      })
    console.log(`\n${count} written, ${when}.`)
  }
}

async function loadFactor({ rpc, setFactor }: Server, { book, factor, from, write }: Options) {
  const price_book_id = (await bookOf(rpc, book))!
  const effective_from = from ?? new Date().toISOString()
  const factors = await rpc.rows<{ factor: string; effective_from: string }>('price_book_factors', {
    select: ['factor::text', 'effective_from'],
    where: { price_book_id },
    order: 'effective_from.desc',
  })
  const old = factors.find((each) => Date.parse(each.effective_from) <= Date.parse(effective_from))
  console.log(`price book ${book}: factor ${old?.factor ?? '-'} -> ${factor}, from ${from ?? 'now'}`)
  if (Number(old?.factor) === Number(factor)) console.log('\nNothing to write.')
  else if (!write) console.log('\nNothing was written: repeat it with --write.')
  else {
    await setFactor({ price_book_id, factor: factor!, effective_from })
    console.log('\nThe factor is written.')
  }
}

/** Runs the command with its arguments; sets the exit code. */
export async function prices(args: string[]): Promise<void> {
  let given: Options | undefined
  try {
    given = options(args)
  } catch (error) {
    console.error(`prices: ${(error as Error).message.replaceAll('\n', ' ')}`)
    process.exitCode = 2
    return
  }
  if (!given) return console.log(help)
  let server: Server | undefined
  try {
    server = open()
    await (given.factor === undefined ? load : loadFactor)(server, given)
  } catch (error) {
    console.error(`prices: ${(error as Error).message}`)
    process.exitCode = 1
  } finally {
    await server?.rpc.close()
  }
}
