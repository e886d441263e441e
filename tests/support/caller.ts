// A process of `callers`: several connections that take the next call as soon as their last one is answered.
import pg from 'pg'
import type { Answer, Call } from './callers.ts'

interface Work {
  url: string
  calls: Call[]
  lanes: number
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
      try {
        const { rows } = await client.query(call.text, call.values)
        answers[at] = { rows }
      } catch (error) {
        const { code, message } = error as pg.DatabaseError
        answers[at] = { rows: [], error: { code, message } }
      }
    }
    await client.end()
  }
  process.once('message', async () => {
    await Promise.all(clients.map(work))
    process.send!(answers, () => process.disconnect())
  })
  process.send!('ready')
})
