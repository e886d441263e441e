// The middleware in front of node:http: the headers it reads, the context it sets, and each
// refusal.
import { createServer, type IncomingMessage, request, type Server, type ServerResponse } from 'node:http'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { KeyledgerError } from '../../src/errors.ts'
import { createBillingModule, pgRpc, type UserContext } from '../../src/index.ts'
import { createAuthenticate, createMiddleware, type Middleware } from '../../src/middleware.ts'
import { database } from '../support/database.ts'
import { seed } from '../support/seed.ts'

const test = suite('middleware')
const db = await database(test)
const servers: Server[] = []

// The answer of a server with the middleware to these headers; `passed` is the handler's own
// answer.
async function serve(middleware: Middleware) {
  const server = createServer((req, res) => {
    middleware(req, res, () => {
      const { userContext } = req as typeof req & { userContext?: UserContext }
      res.end(JSON.stringify({ passed: userContext, url: req.url }))
    })
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as { port: number }
  const ask = async (headers: Record<string, string | string[]>, method = 'POST') => {
    const response = await new Promise<IncomingMessage>((resolve, reject) => {
      request({ port, host: '127.0.0.1', path: '/v1/chat', method, headers }, resolve)
        .on('error', reject)
        .end()
    })
    const text = (await response.toArray()).join('')
    return { status: response.statusCode!, headers: response.headers, body: text && JSON.parse(text) }
  }
  servers.push(server)
  return ask
}

test.after.each(() => {
  for (const server of servers.splice(0)) {
    server.closeAllConnections()
    server.close()
  }
})

test('x-virtualkey counts before the bearer token, that before x-api-key, and that before api-key', async () => {
  const seen: string[] = []
  const ask = await serve(
    createMiddleware(async (virtualKey) => {
      seen.push(virtualKey)
      return { user_id: virtualKey } as UserContext
    }),
  )
  const cases: [headers: Record<string, string | string[]>, key: string | undefined][] = [
    [{ 'x-virtualkey': 'a', authorization: 'Bearer b', 'x-api-key': 'c' }, 'a'],
    [{ authorization: 'Bearer b', 'x-api-key': 'c' }, 'b'],
    [{ 'x-api-key': 'c' }, 'c'],
    [{ 'x-virtualkey': 'a', 'api-key': 'd' }, 'a'],
    [{ authorization: 'Bearer b', 'api-key': 'd' }, 'b'],
    [{ 'x-api-key': 'c', 'api-key': 'd' }, 'c'],
    [{ 'api-key': 'd' }, 'd'],
    [{ authorization: 'Bearer ', 'x-api-key': ' ', 'api-key': ' d ' }, 'd'],
    [{ 'api-key': ['d', 'd2'] }, 'd, d2'],
    [{ authorization: 'bearer b' }, 'b'],
    [{ authorization: 'BEARER   b  ' }, 'b'],
    [{ authorization: 'Bearer b b' }, 'b b'],
    [{ authorization: 'Basic Yjpi', 'x-api-key': 'c' }, 'c'],
    [{ authorization: 'Bearer ', 'x-api-key': 'c' }, 'c'],
    [{ 'x-virtualkey': ' ', 'x-api-key': 'c' }, 'c'],
    [{ 'x-virtualkey': ['a', 'a2'] }, 'a, a2'], // two keys are no key
    [{}, undefined],
    [{ authorization: 'Basic Yjpi' }, undefined],
    [{ authorization: 'Bearer' }, undefined],
    [{ authorization: 'vk_no_scheme' }, undefined],
  ]
  for (const [headers, key] of cases) {
    const { status, body } = await ask(headers)
    if (key === undefined) assert.equal([status, body.error.code], [401, 'virtual_key_missing'])
    else assert.equal([status, body.passed], [200, { user_id: key }], JSON.stringify(headers))
  }
  assert.equal(
    seen,
    cases.flatMap(([, key]) => key ?? []),
  )
})

test('a list of headers, as a framework may make it, is no key either', async () => {
  const seen: string[] = []
  const middleware = createMiddleware(async (virtualKey) => {
    seen.push(virtualKey)
    return {} as UserContext
  })
  const req = { headers: { 'x-virtualkey': ['a', 'b'] } } as never
  await middleware(req, {} as never, () => seen.push('passed'))
  assert.equal(seen, ['a, b', 'passed'])
})

test('each refusal has its status, its headers and a body that says why', async () => {
  const cases: [error: unknown, status: number, code: string, type: string][] = [
    [new KeyledgerError('virtual_key_unknown', 401), 401, 'virtual_key_unknown', 'authentication_error'],
    [new KeyledgerError('virtual_key_disabled', 401), 401, 'virtual_key_disabled', 'authentication_error'],
    [new KeyledgerError('tenant_suspended', 403), 403, 'tenant_suspended', 'permission_error'],
    [new KeyledgerError('unavailable', 503), 503, 'unavailable', 'server_error'],
    [new KeyledgerError('timeout', 504), 503, 'unavailable', 'server_error'],
    [new KeyledgerError('internal_error', 500), 503, 'unavailable', 'server_error'],
    // the gateway's own trouble with the database is not the caller's
    [new KeyledgerError('invalid_token', 401), 503, 'unavailable', 'server_error'],
    [new KeyledgerError('permission_denied', 403), 503, 'unavailable', 'server_error'],
    [new TypeError('secret inside'), 503, 'unavailable', 'server_error'],
    ['thrown text', 503, 'unavailable', 'server_error'],
  ]
  let error: unknown
  const ask = await serve(createMiddleware(() => Promise.reject(error)))
  for (const [thrown, status, code, type] of cases) {
    error = thrown
    const { body, headers, ...answer } = await ask({ 'x-virtualkey': 'vk_given' })
    assert.is(answer.status, status)
    assert.equal(body, { error: { message: body.error.message, type, param: null, code } })
    assert.match(body.error.message, code)
    assert.not.match(JSON.stringify(body), /secret|vk_given/)
    assert.is(headers['content-type'], 'application/json')
    assert.is(headers['cache-control'], 'no-store')
    assert.is(headers['www-authenticate'], status === 401 ? 'Bearer' : undefined)
    assert.is(headers['retry-after'], status === 503 ? '1' : undefined)
    assert.equal(
      await ask({ 'x-virtualkey': 'vk_given' }, 'HEAD').then(({ status, body }) => [status, body]),
      [status, ''],
    )
  }
})

test('OPTIONS without a key ends in 204: no handler sees it, and headers set before go with it', async () => {
  const validated: string[] = []
  const handled: string[] = []
  const middleware = createMiddleware(async (virtualKey) => {
    validated.push(virtualKey)
    if (virtualKey === 'a') return { user_id: 'a' } as UserContext
    throw new KeyledgerError('virtual_key_unknown', 401)
  })
  const preflight = {
    origin: 'https://page.example',
    'access-control-request-method': 'POST',
    'access-control-request-headers': 'authorization',
  }
  const ask = await serve((req, res, next) => {
    res.setHeader('access-control-allow-origin', 'https://page.example')
    return middleware(req, res, () => {
      handled.push(`${req.method} ${req.userContext?.user_id}`)
      next()
    })
  })
  for (const headers of [preflight, {}, { ...preflight, authorization: 'Basic Yjpi' }]) {
    const { status, body, ...answer } = await ask(headers, 'OPTIONS')
    assert.equal([status, body], [204, ''])
    assert.is(answer.headers['access-control-allow-origin'], 'https://page.example')
  }
  assert.equal([validated, handled], [[], []])

  // the same headers open no other method, and a key is looked at whatever the method is
  for (const method of ['POST', 'GET', 'HEAD']) {
    const { status, headers } = await ask(preflight, method)
    assert.is(status, 401, method)
    assert.is(headers['access-control-allow-origin'], 'https://page.example')
  }
  assert.is((await ask({ ...preflight, 'x-virtualkey': 'b' }, 'OPTIONS')).status, 401)
  assert.equal(handled, [])
  assert.is((await ask({ ...preflight, 'api-key': 'a' }, 'OPTIONS')).status, 200)
  assert.equal([validated, handled], [['b', 'a'], ['OPTIONS a']])
})

test('without a server: the context, or the answer that turns the request away', async () => {
  const userContext = { user_id: 'a' } as UserContext
  const authenticate = createAuthenticate(async (virtualKey) => {
    if (virtualKey === 'a') return userContext
    throw new KeyledgerError('virtual_key_unknown', 401)
  })
  const headers = Object.fromEntries(new Headers({ 'X-VirtualKey': 'a' }))
  assert.equal(await authenticate(headers), { userContext })
  const { refusal } = await authenticate({ 'x-virtualkey': 'b' })
  assert.is(refusal!.status, 401)
  assert.is(refusal!.headers['www-authenticate'], 'Bearer')
  assert.is(JSON.parse(refusal!.body).error.code, 'virtual_key_unknown')
})

test('with the module on Postgres: the context without the key, and 401, 403, 503', async () => {
  const world = await seed(db.operator)
  const rpc = pgRpc({ connectionString: db.loginUrl })
  const billing = createBillingModule({ rpc })
  const ask = await serve(billing.middleware())
  const status = async (key: string) => {
    const { status, body } = await ask({ authorization: `Bearer ${key}` })
    return [status, body.error?.code]
  }
  try {
    const { body } = await ask({ authorization: `Bearer ${world.key}` })
    assert.equal(body, { passed: await billing.validate(world.key), url: '/v1/chat' })
    assert.ok(!JSON.stringify(body).includes(world.key) && !JSON.stringify(body).includes(world.keyHash))
    assert.equal(await status(`${world.key}x`), [401, 'virtual_key_unknown'])
    assert.equal(await status(`${world.key}, ${world.key}`), [401, 'virtual_key_unknown'])
    assert.equal(await status('x'.repeat(5000)), [401, 'virtual_key_unknown'])
    await db.operator(`update api.tenants set status = 'suspended' where id = $1`, [world.tenantId])
    assert.equal(await status(world.key), [403, 'tenant_suspended'])
    await db.operator(`update api.tenants set status = 'active' where id = $1`, [world.tenantId])
    await db.operator('select api.revoke_virtual_key($1)', [world.keyId])
    assert.equal(await status(world.key), [401, 'virtual_key_disabled'])
    await rpc.close()
    assert.equal(await status(`${world.key}y`), [503, 'unavailable'])
  } finally {
    await billing.stop()
    await rpc.close()
  }
})

test('a handler that throws or rejects is a 500 and a warning, not a refused key, and does not end the process', async () => {
  const thrown = new Error('secret inside')
  const handlers: [name: string, handler: (res: ServerResponse) => void][] = [
    [
      'throws',
      () => {
        throw thrown
      },
    ],
    ['rejects', () => Promise.reject(thrown)],
    [
      'throws when it has begun',
      (res) => {
        res.writeHead(200).write('begun')
        throw thrown
      },
    ],
  ]
  const warnings: string[] = []
  const heard = (warning: Error & { detail?: string }) => warnings.push(String(warning.detail))
  process.on('warning', heard)
  for (const [name, handler] of handlers) {
    const middleware = createMiddleware(async () => ({}) as UserContext)
    const server = createServer((req, res) => middleware(req, res, () => handler(res)))
    servers.push(server)
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    const { port } = server.address() as { port: number }
    const ask = fetch(`http://127.0.0.1:${port}`, { headers: { 'x-virtualkey': 'vk' } })
    const answer = await ask.then(async (response) => `${response.status} ${await response.text()}`, String)
    if (name.includes('begun')) assert.not.match(answer, '200 ', name)
    else assert.match(answer, /^500 .*internal_error/, name)
    assert.not.match(answer, 'secret')
  }
  process.off('warning', heard)
  assert.is(warnings.filter((detail) => detail.includes('secret inside')).length, handlers.length)
})

test.run()
