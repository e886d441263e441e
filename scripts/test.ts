// Runs the tests: `npm test [-- part of a file name …]`. On a Postgres of its own, or on DATABASE_URL's.
import { type ChildProcess, spawn } from 'node:child_process'
import { readdirSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { once, type TestServer } from '../tests/support/database.ts'
import { ensureRedis } from './redis.ts'
import { migrate, prepareRoles, secret, startPostgres, withDatabase } from './servers.ts'

const secondsPerFile = Number(process.env.SECONDS_PER_FILE ?? 300)
const tests = join(dirname(dirname(fileURLToPath(import.meta.url))), 'tests')
const wanted = process.argv.slice(2)
const files = readdirSync(tests)
  .filter(
    (file) => file.endsWith('.test.ts') && (!wanted.length || wanted.some((part) => file.includes(part))),
  )
  .sort()
const sum = { passed: 0, failed: 0, skipped: 0 }
let interrupted = false
let child: ChildProcess | undefined

if (files.length) {
  for (const signal of ['SIGINT', 'SIGTERM'])
    process.on(signal, () => {
      interrupted = true
      child?.kill('SIGTERM')
    })
  ensureRedis()
  const adminUrl = process.env.DATABASE_URL || (await startPostgres()).url
  const template = `keyledger_test_${secret().slice(0, 8)}`
  try {
    await migrate(withDatabase(adminUrl, template))
    const { user, password } = await prepareRoles(withDatabase(adminUrl, template), template)
    for (const file of files)
      if (!interrupted) await run(file, { adminUrl, template, login: { user, password } })
  } catch (error) {
    sum.failed++
    console.error(error)
  } finally {
    const databases = await once(
      adminUrl,
      `select datname from pg_database where starts_with(datname, '${template}')`,
    )
    for (const { datname } of databases) await once(adminUrl, `drop database ${datname} with (force)`)
    await once(adminUrl, `drop role if exists ${template}`)
  }
} else {
  console.error(`no file in tests/ matches ${wanted.join(' ') || '*.test.ts'}`)
}

if (interrupted || sum.failed || !sum.passed) process.exitCode = 1
if (sum.skipped) console.log(`${sum.skipped} skipped`)
console.log(`${sum.passed} passed, ${sum.failed} failed`)

// Each file in its own process, with the loader this process was started with.
async function run(file: string, server: TestServer) {
  console.log(`\n${file}`)
  const start = performance.now()
  const run = spawn(process.execPath, [...process.execArgv, join(tests, file)], {
    env: { ...process.env, KEYLEDGER_TEST: JSON.stringify(server) },
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  child = run
  let output = ''
  run.stdout.setEncoding('utf8').on('data', (text) => {
    output += text
    process.stdout.write(text)
  })
  const limit = setTimeout(() => run.kill('SIGKILL'), secondsPerFile * 1000)
  const code = await new Promise((resolve) => run.on('close', (code, signal) => resolve(signal ?? code)))
  clearTimeout(limit)

  // uvu's exit code is 0 when a `before` hook failed, and its summary is missing when the process died
  const count = (label: string) =>
    Number(output.match(new RegExp(`^\\s*${label}:\\s+(\\d+)$`, 'm'))?.[1] ?? 0)
  const [total, passed, skipped] = [count('Total'), count('Passed'), count('Skipped')]
  const failed = total - passed || (code === 0 && total ? 0 : 1)
  sum.passed += passed
  sum.failed += failed
  sum.skipped += skipped
  const why = !total
    ? 'ended without a result'
    : code
      ? `${failed} failed`
      : 'a hook failed; uvu does not say how'
  const seconds = ((performance.now() - start) / 1000).toFixed(1)
  if (failed) console.log(`${file}: ${why} (exit ${code}, ${seconds} s)`)
}
