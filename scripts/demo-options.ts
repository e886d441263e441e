// The demo's command line.
import { resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { toSteps } from './money.ts'

export interface DemoOptions {
  /** Full path of a CSV file; undefined: a generated trace. */
  trace?: string
  speed: number | 'max'
  users: number
  tenants: number
  inputPrice: string
  outputPrice: string
  /** Undefined: enough for each account to pay for the whole trace. */
  funds?: string
  transport: 'postgrest' | 'pg'
  seed: number
  json: boolean
}

const help = `Replays LLM traffic through keyledger on real servers of its own, and proves every cent of it.

  make demo ARGS='…'   or   npm run -s demo -- …

  --trace FILE          CSV of TIMESTAMP,ContextTokens,GeneratedTokens (default: a generated trace of 5,000 requests)
  --speed max|N         as fast as it goes, or N times real time (max)
  --users N             users, a tenth of them without a tenant (500)
  --tenants N           tenants (25)
  --input-price AMOUNT  per million input tokens (2.50)
  --output-price AMOUNT per million output tokens (10.00)
  --funds AMOUNT        paid into each account (default: enough for the whole trace)
  --transport NAME      postgrest or pg (postgrest)
  --seed N              of everything that is drawn at random (1)
  --json                print the figures as one JSON object, in the last line
  --help                this

Exit code: 0 if everything verifies, 1 if not, 2 for a wrong option.`

/**
 * Reads the command line. Ends the process for `--help` (0), and with one line for a wrong option
 * (2).
 */
export function demoOptions(args = process.argv.slice(2)): DemoOptions {
  try {
    return read(args)
  } catch (error) {
    wrongOption(`${(error as Error).message.replaceAll('\n', ' ')}; see --help`)
  }
}

/** Names the mistake in one line, and ends the process with code 2. */
export function wrongOption(message: string): never {
  console.error(`demo: ${message}`)
  process.exit(2)
}

function read(args: string[]): DemoOptions {
  const text = { type: 'string' } as const
  const flag = { type: 'boolean' } as const
  const { values } = parseArgs({
    // parseArgs takes a negative number for an option of its own
    args: args
      .join('\0')
      .replace(/(^|\0)(--[a-z-]+)\0(?=-[\d.])/g, '$1$2=')
      .split('\0')
      .filter(Boolean),
    options: {
      trace: text,
      speed: text,
      users: text,
      tenants: text,
      'input-price': text,
      'output-price': text,
      funds: text,
      transport: text,
      seed: text,
      json: flag,
      help: flag,
    },
  })
  if (values.help) {
    console.log(help)
    process.exit(0)
  }

  type Name = keyof typeof values
  const wrong = (name: Name, expected: string) =>
    new Error(`--${name} must be ${expected}, not ${JSON.stringify(values[name])}`)
  const whole = (name: Name, otherwise: number, min: number, max: number) => {
    const given = String(values[name] ?? otherwise)
    if (/^\d{1,10}$/.test(given) && Number(given) >= min && Number(given) <= max) return Number(given)
    throw wrong(name, `a whole number from ${min} to ${max}`)
  }
  const amount = (name: Name) => {
    const given = values[name]
    if (given === undefined || toSteps(String(given)) !== undefined) return given as string | undefined
    throw wrong(name, 'a decimal like 2.50: not negative, below 1e12, at most 10 decimals')
  }

  const { speed = 'max', transport = 'postgrest' } = values
  if (speed !== 'max' && !(/^\d+(\.\d+)?$/.test(speed) && Number(speed) > 0))
    throw wrong('speed', 'max or a number above 0')
  if (transport !== 'postgrest' && transport !== 'pg') throw wrong('transport', 'postgrest or pg')
  // npm runs scripts in the project's directory, not in the caller's
  const directory = process.env.INIT_CWD ?? '.'
  return {
    trace: values.trace === undefined ? undefined : resolve(directory, values.trace),
    speed: speed === 'max' ? speed : Number(speed),
    users: whole('users', 500, 1, 100_000),
    tenants: whole('tenants', 25, 0, 100_000),
    inputPrice: amount('input-price') ?? '2.50',
    outputPrice: amount('output-price') ?? '10.00',
    funds: amount('funds'),
    transport,
    seed: whole('seed', 1, 0, 2 ** 32 - 1),
    json: values.json ?? false,
  }
}
