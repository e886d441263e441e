// A network to Postgres that goes silent: nothing is refused, nothing is closed, no byte arrives.
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { until } from '../../scripts/supervise.ts'
import { pgRpc } from '../../src/index.ts'
import { database } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { startProxy } from '../support/proxy.ts'

const test = suite('silent')
const db = await database(test)

test('pg: the pool gets well by itself, though connections were being made meanwhile', async () => {
  const proxy = await startProxy(db.loginUrl)
  const rpc = pgRpc({ connectionString: proxy.url, timeout: 500 })
  const call = () => rpc.call('new_id')
  try {
    // the function's shape is known, so each caller needs one connection; and none is left
    await call()
    proxy.cut()
    await until(() => proxy.open === 0, 'the connection to be gone')
    proxy.mode = 'hang'
    // twenty callers, of whom ten make connections that lose their first byte, and are never closed
    // by the far side
    const codes = await Promise.all(Array.from({ length: 20 }, async () => (await failure(call())).code))
    assert.equal([...new Set(codes)], ['unavailable'])
    proxy.mode = 'pass'
    await until(() => call().catch(() => undefined), 'an answer', 10)
  } finally {
    proxy.cut()
    await rpc.close()
    await proxy.close()
  }
})

test('pg: close waits for calls under way, but not for ever', async () => {
  const proxy = await startProxy(db.loginUrl)
  const rpc = pgRpc({ connectionString: proxy.url, timeout: 60_000 })
  try {
    await rpc.call('new_id')
    proxy.mode = 'hang'
    const lost = failure(rpc.call('new_id'))
    // it takes the connection
    for (let i = 0; i < 5; i++) await new Promise((resolve) => setImmediate(resolve))
    await rpc.close()
    assert.is((await lost).code, 'unavailable')
  } finally {
    await proxy.close()
  }
})

test.run()
