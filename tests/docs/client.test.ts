// docs/client.md, executed by a reader who has pasted the lines of `make dev`; it lists all options and methods.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import * as assert from 'uvu/assert'
import {
  type BillingModuleOptions,
  createBillingModule,
  type PgRpcOptions,
  type PostgrestRpcOptions,
  pgRpc,
} from '../../src/index.ts'
import { document, root } from '../readme/document.ts'

const { test, db } = await document('docs/client.md', { dev: true })
const page = readFileSync(join(root, 'docs/client.md'), 'utf8')

/** The names in the first column of the table that follows `text`. */
const listedAfter = (text: string) => {
  const [, table] = page.slice(page.indexOf(text)).match(/\n\|---.*\n((?:\|.*\n)+)/)!
  return [...table!.matchAll(/^\| `(\w+)/gm)].map(([, name]) => name!).sort()
}

test('it lists each option', () => {
  // the compiler knows when one is missing here
  const module: Record<keyof BillingModuleOptions, true> = {
    ...{ rpc: true, redis: true, redisSecret: true, changes: true, stopDeadline: true },
    ...{ maxEntries: true, maxStaleness: true, staleIfError: true },
    ...{ holdDeadline: true, recordDeadline: true, maxQueueBytes: true },
  }
  const overPg: Record<keyof PgRpcOptions, true> = {
    ...{ pool: true, connectionString: true, role: true, claims: true, timeout: true },
  }
  const overHttp: Record<keyof PostgrestRpcOptions, true> = {
    ...{ url: true, token: true, timeout: true, fetch: true },
  }
  assert.equal(listedAfter('Of `createBillingModule`'), Object.keys(module).sort())
  assert.equal(listedAfter('Of `pgRpc`'), Object.keys(overPg).sort())
  assert.equal(listedAfter('Of `postgrestRpc`'), Object.keys(overHttp).sort())
})

test('it lists each method', async () => {
  const rpc = pgRpc({ connectionString: db.loginUrl })
  assert.equal(listedAfter('## Methods'), Object.keys(createBillingModule({ rpc })).sort())
  await rpc.close()
})

test.run()
