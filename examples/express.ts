// The gateway in Express: the middleware as it is.
import { createServer } from 'node:http'
import express, { type Request } from 'express'
import type { WithUserContext } from 'keyledger'
import { billing, run } from './billing.ts'
import { apis } from './flavors.ts'
import { gone, send } from './http.ts'
import { complete, models } from './proxy.ts'

const app = express()
app.get('/healthz', (_req, res) => void res.status(billing.health().http_status).json(billing.health()))
app.use(billing.middleware())
app.get('/v1/models', async (req: WithUserContext<Request>, res) => send(res, await models(req.userContext!)))
for (const { path, flavor } of apis)
  app.post(
    `/v1${path}`,
    express.text({ type: () => true, limit: '10mb' }),
    async (req: WithUserContext<Request>, res) =>
      send(res, await complete(req.userContext!, req.body, gone(res), flavor)),
  )

await run(createServer(app))
