// Makes calls from several processes with several connections each, all at once.
import { type ChildProcess, fork } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import type { Role, Row } from './database.ts'

/** One statement, in a transaction of its own. */
export interface Call {
  role: Role
  text: string
  values: unknown[]
}

/** What a call gave: its rows, or the error's SQLSTATE and message. */
export interface Answer {
  rows: Row[]
  error?: { code?: string; message: string }
}

/**
 * Makes the calls as the login role of `url`; the answers come in the order of the calls. Each
 * process works through its share (every 4th call, by default) in order. All are connected before
 * the first call; then `onReady` runs.
 */
export async function callers(
  url: string,
  calls: Call[],
  { processes = 4, lanes = 16, onReady = async () => {} } = {},
): Promise<Answer[]> {
  const children = Array.from({ length: processes }, (_, i) => {
    const child = fork(fileURLToPath(new URL('caller.ts', import.meta.url)))
    child.send({ url, lanes, calls: calls.filter((_, n) => n % processes === i) })
    return child
  })
  try {
    await Promise.all(children.map(said))
    await onReady()
    for (const child of children) child.send('go')
    const answers = (await Promise.all(children.map(said))) as Answer[][]
    return calls.map((_, n) => answers[n % processes]![Math.floor(n / processes)]!)
  } finally {
    for (const child of children) child.kill()
  }
}

const said = (child: ChildProcess) =>
  new Promise((resolve, reject) => {
    child.once('message', resolve)
    child.once('exit', (code, signal) => reject(new Error(`a caller process ended with ${code ?? signal}`)))
  })

/** A call of a batch function, as the gateway. */
export const batch = (fn: string, elements: unknown[]): Call => ({
  role: 'keyledger_gateway',
  text: `select api.${fn}($1) as answers`,
  values: [JSON.stringify(elements)],
})

/** The errors among the answers. */
export const errors = (answers: Answer[]) =>
  answers.filter((answer) => answer.error).map((answer) => answer.error)

/** What the batch functions answered, element by element. */
export const elements = (answers: Answer[]): Row[] =>
  answers.flatMap((answer) => answer.rows[0]!.answers as Row[])
