// PostgREST's OpenAPI of the API: it has a summary of each function and view, and explains each argument.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { database } from '../support/database.ts'

const test = suite('openapi')
const db = await database(test)

interface Operation {
  summary?: string
  description?: string
  parameters: { name?: string; schema?: { properties?: Record<string, unknown> } }[]
}

const operations = new Map<string, Operation>()
const { url, token } = await db.postgrest()
for (const role of ['keyledger_gateway', 'keyledger_operator', 'keyledger_member'] as const) {
  const authorization = `Bearer ${await token({ role })}`
  const { paths } = (await (await fetch(url, { headers: { authorization } })).json()) as {
    paths: Record<string, { get: Operation; post: Operation }>
  }
  for (const [path, { get, post }] of Object.entries(paths))
    if (path !== '/') operations.set(path.slice(1), path.startsWith('/rpc/') ? post : get)
}

test('every function and view is there, with a summary', async () => {
  const found = await db.sql(`
    select 'rpc/' || proname as path from pg_proc where pronamespace = 'api'::regnamespace
    union
    select relname from pg_class where relnamespace = 'api'::regnamespace and relkind = 'v'
    order by 1`)
  const told = [...operations].filter(([, { summary }]) => summary).map(([path]) => path)
  assert.equal(
    told.sort(),
    found.map(({ path }) => path),
  )
})

test('every argument is explained by its name', () => {
  const untold = [...operations].flatMap(([path, { summary, description, parameters }]) => {
    const { schema } = parameters.find(({ name }) => name === 'args') ?? {}
    return Object.keys(schema?.properties ?? {})
      .filter((argument) => !new RegExp(`\\b${argument}\\b`).test(`${summary} ${description}`))
      .map((argument) => `${path} ${argument}`)
  })
  assert.equal(untold, [])
})

test.run()
