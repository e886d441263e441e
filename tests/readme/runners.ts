// The psql and the shell of a document's reader: each goes on from block to block.
import { type ChildProcess, spawn } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import type pg from 'pg'
import { until } from '../../scripts/supervise.ts'

/** Runs SQL and the few commands of psql that documents have; gives the output of `psql --quiet`. */
export function psql(client: pg.Client) {
  const variables: Record<string, string> = {}
  const value = (name: string) => {
    if (variables[name] === undefined) throw new Error(`psql: no variable ${name}`)
    return variables[name]
  }

  async function run(command: string): Promise<string> {
    const [, set, text] = /^\\set (\S+) (.*)$/.exec(command) ?? []
    const [, echo] = /^\\echo :(\S+)$/.exec(command) ?? []
    if (set) {
      variables[set] = text!
      return ''
    }
    if (echo) return `${value(echo)}\n`
    const statement = command.replace(/:'(\w+)'/g, (_, name) => client.escapeLiteral(value(name)))
    const { fields, rows } = await client.query<Record<string, string>>(statement.replace(/\\gset$/, ''))
    if (!fields.length) return ''
    if (command.endsWith('\\gset')) {
      Object.assign(variables, rows[0])
      return ''
    }
    const names = fields.map(({ name }) => name)
    const lines = rows.map((row) => names.map((name) => row[name] ?? '').join('|'))
    const count = `(${rows.length} row${rows.length === 1 ? '' : 's'})`
    return `${[names.join('|'), names.map(() => '--').join('+'), ...lines, count].join('\n')}\n`
  }

  return async (code: string): Promise<string> => {
    const commands = code.replace(/^--.*$/gm, '').match(/^\\(set|echo) .*$|[^;\\\s][^;\\]*(;|\\gset)/gm)
    let printed = ''
    for (const command of commands ?? []) printed += await run(command)
    return printed
  }
}

/** A shell in `cwd`. `run` gives the output of the block, and later also that of its programs in the background. */
export function shell(cwd: string, env: NodeJS.ProcessEnv) {
  // it has a process group of its own, which ends with it; it ends with this process
  const child: ChildProcess = spawn('sh', { cwd, env, detached: true, stdio: ['pipe', 'pipe', 'inherit'] })
  let said = ''
  child.stdout!.setEncoding('utf8').on('data', (data) => {
    said += data
  })
  child.stdin!.write("exec 2>&1; trap 'kill -9 0' EXIT\n")
  let blocks = 0

  return {
    async run(code: string): Promise<() => string> {
      const from = said.length
      const end = `end of block ${++blocks}\n`
      writeFileSync(join(cwd, 'block.sh'), code)
      child.stdin!.write(`. ./block.sh </dev/null; echo '${end.trim()}'\n`)
      await until(() => said.includes(end) || child.exitCode !== null, 'the block to end')
      return () => said.slice(from).replace(end, '')
    },
    async close() {
      const gone = new Promise((resolve) => child.once('close', resolve))
      child.stdin!.end()
      await gone
    },
  }
}
