// The gateway in Hono: a middleware that asks `authenticate`. In another runtime than Node.js,
// serve `app.fetch` as it does.
import type { Server } from 'node:http'
import { createAdaptorServer } from '@hono/node-server'
import { Hono } from 'hono'
import { bodyLimit } from 'hono/body-limit'
import type { UserContext } from 'keyledger'
import { billing, run } from './billing.ts'
import { apis } from './flavors.ts'
import { complete, models } from './proxy.ts'

const app = new Hono<{ Variables: { userContext: UserContext } }>()
app.get('/healthz', (c) => c.json(billing.health(), billing.health().http_status))
app.use(async (c, next) => {
  const { userContext, refusal } = await billing.authenticate(c.req.header())
  if (refusal) return new Response(refusal.body, refusal)
  c.set('userContext', userContext)
  await next()
})
app.get('/v1/models', (c) => models(c.get('userContext')))
for (const { path, flavor } of apis)
  app.post(`/v1${path}`, bodyLimit({ maxSize: 10_000_000 }), async (c) =>
    complete(c.get('userContext'), await c.req.text(), c.req.raw.signal, flavor),
  )

await run(createAdaptorServer({ fetch: app.fetch }) as Server)
