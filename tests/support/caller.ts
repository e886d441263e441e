// A process of `callers`: several connections that take the next call as soon as their last one is answered.
import pg from 'pg'
import type { Answer, Call } from './callers.ts'

interface Work {
  url: string
  calls: Call[]
  lanes: number
}

async function answer(client: pg.Client, { text, values }: Call): Promise<Answer> {
  try {
    const { rows } = await client.query(text, values)
    return { rows }
  } catch (error) {
    const { code, message } = error as pg.DatabaseError
    return { rows: [], error: { code, message } }
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
      // it waited long enough for its account, and did nothing: so many callers make one wait
      while (answers[at]!.error?.code === '55P03') answers[at] = await answer(client, call)
    }
    await client.end()
  }
  process.once('message', async () => {
    await Promise.all(clients.map(work))
    process.send!(answers, () => process.disconnect())
  })
  process.send!('ready')
})
