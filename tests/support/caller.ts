// A process of `callers`: several connections that take the next call as soon as their last one is
// answered.
import pg from 'pg'
import type { Answer, Call } from './callers.ts'
import type { Row } from './database.ts'

interface Work {
  url: string
  calls: Call[]
  lanes: number
}

async function answer(client: pg.Client, call: Call): Promise<Answer> {
  const { text, values } = call
  try {
    const { rows } = await client.query(text, values)
    if (Array.isArray(rows[0]?.answers)) await askAgain(client, call, rows[0].answers)
    return { rows }
  } catch (error) {
    const { code, message } = error as pg.DatabaseError
    // it waited long enough for its account, and did nothing: so many callers make one wait
    if (code === '55P03') return answer(client, call)
    return { rows: [], error: { code, message } }
  }
}

// the elements of an account that was busy, by themselves
async function askAgain(client: pg.Client, { role, text, values }: Call, answers: Row[]) {
  const elements: Row[] = JSON.parse(values[0] as string)
  const busy = [...elements.keys()].filter((i) => answers[i]!.status === 'busy')
  for (const account of new Set(busy.map((i) => elements[i]!.account_id))) {
    const places = busy.filter((i) => elements[i]!.account_id === account)
    const alone = JSON.stringify(places.map((i) => elements[i]))
    const { rows } = await answer(client, { role, text, values: [alone] })
    for (const [n, i] of places.entries()) answers[i] = rows[0]!.answers[n]
  }
}

process.once('message', async ({ url, calls, lanes }: Work) => {
  const clients = await Promise.all(
    Array.from({ length: lanes }, async () => {
      const client = new pg.Client(url)
      await client.connect()
      return client
    }),
  )
  const answers: Answer[] = []
  let next = 0
  const work = async (client: pg.Client) => {
    let role: string | undefined
    for (let at = next++; at < calls.length; at = next++) {
      const call = calls[at]!
      if (role !== call.role) await client.query(`set role ${call.role}`)
      role = call.role
      answers[at] = await answer(client, call)
    }
    await client.end()
  }
  process.once('message', async () => {
    await Promise.all(clients.map(work))
    process.send!(answers, () => process.disconnect())
  })
  process.send!('ready')
})
