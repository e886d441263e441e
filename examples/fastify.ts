// The gateway in Fastify: a hook that asks `authenticate`.
import fastify from 'fastify'
import type { UserContext } from 'keyledger'
import { billing, run } from './billing.ts'
import { apis } from './flavors.ts'
import { gone } from './http.ts'
import { complete, models } from './proxy.ts'

declare module 'fastify' {
  interface FastifyRequest {
    userContext: UserContext
  }
}

const app = fastify({ bodyLimit: 10_000_000 })
app.get('/healthz', (_request, reply) => reply.code(billing.health().http_status).send(billing.health()))
app.register(async (gateway) => {
  gateway.addHook('onRequest', async (request, reply) => {
    const { userContext, refusal } = await billing.authenticate(request.headers)
    if (refusal) return reply.code(refusal.status).headers(refusal.headers).send(refusal.body)
    request.userContext = userContext
  })
  // the gateway reads the JSON itself
  gateway.removeAllContentTypeParsers()
  gateway.addContentTypeParser('*', { parseAs: 'string' }, (_request, body, done) => done(null, body))
  gateway.get('/v1/models', (request) => models(request.userContext))
  for (const { path, flavor } of apis)
    gateway.post(`/v1${path}`, (request, reply) =>
      complete(request.userContext, request.body as string, gone(reply.raw), flavor),
    )
})

await app.ready()
await run(app.server)
