// Runs the tests: `npm test [-- part of a file name …]`. In two lanes, each on a Postgres of its own; or one by one on
// DATABASE_URL's.
import { type ChildProcess, spawn } from 'node:child_process'
import { readdirSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { stripVTControlCharacters } from 'node:util'
import { once, type TestServer } from '../tests/support/database.ts'
import { ensureRedis } from './redis.ts'
import { migrate, prepareRoles, secret, startPostgres, withDatabase } from './servers.ts'

const secondsPerFile = Number(process.env.SECONDS_PER_FILE ?? 300)
const tests = join(dirname(dirname(fileURLToPath(import.meta.url))), 'tests')
const wanted = process.argv.slice(2)
const files = readdirSync(tests, { recursive: true, encoding: 'utf8' })
  .filter(
    (file) => file.endsWith('.test.ts') && (!wanted.length || wanted.some((part) => file.includes(part))),
  )
  .sort()
const given = process.env.DATABASE_URL
const lanes = given ? 1 : Math.min(2, files.length)
const sum = { passed: 0, failed: 0, skipped: 0 }
const failures: string[] = []
const running = new Set<ChildProcess>()
const queue = [...files]
let interrupted = false

if (files.length) {
  for (const signal of ['SIGINT', 'SIGTERM'])
    process.on(signal, () => {
      interrupted = true
      for (const child of running) child.kill('SIGTERM')
    })
  ensureRedis()
  await Promise.all(Array.from({ length: lanes }, lane))
} else {
  console.error(`no file in tests/ matches ${wanted.join(' ') || '*.test.ts'}`)
}

if (interrupted || sum.failed || !sum.passed) process.exitCode = 1
if (failures.length) console.log(`\nFailed:\n${failures.join('\n')}`)
if (sum.skipped) console.log(`${sum.skipped} skipped`)
console.log(`${sum.passed} passed, ${sum.failed} failed`)

// A server with a template, and the files of the queue one by one on copies of it.
async function lane() {
  try {
    const adminUrl = given || (await startPostgres()).url
    const template = `keyledger_test_${secret().slice(0, 8)}`
    try {
      await migrate(withDatabase(adminUrl, template))
      const { user, password } = await prepareRoles(withDatabase(adminUrl, template), template)
      while (queue.length && !interrupted)
        await run(queue.shift() as string, { adminUrl, template, login: { user, password } })
    } finally {
      const databases = await once(
        adminUrl,
        `select datname from pg_database where starts_with(datname, '${template}')`,
      )
      for (const { datname } of databases) await once(adminUrl, `drop database ${datname} with (force)`)
      await once(adminUrl, `drop role if exists ${template}`)
    }
  } catch (error) {
    sum.failed++
    console.error(error)
  }
}

// Each file in its own process, with the loader this process was started with. Its output comes whole, at its end.
async function run(file: string, server: TestServer) {
  const start = performance.now()
  const child = spawn(process.execPath, [...process.execArgv, join(tests, file)], {
    env: { ...process.env, KEYLEDGER_TEST: JSON.stringify(server) },
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  running.add(child)
  let output = ''
  for (const stream of [child.stdout, child.stderr])
    stream.setEncoding('utf8').on('data', (text) => {
      output += text
    })
  const limit = setTimeout(() => child.kill('SIGKILL'), secondsPerFile * 1000)
  const code = await new Promise((resolve) => child.on('close', (code, signal) => resolve(signal ?? code)))
  clearTimeout(limit)
  running.delete(child)

  // uvu's exit code is 0 when a `before` hook failed, and its summary is missing when the process died
  const count = (label: string) =>
    Number(output.match(new RegExp(`^\\s*${label}:\\s+(\\d+)$`, 'm'))?.[1] ?? 0)
  const [total, passed, skipped] = [count('Total'), count('Passed'), count('Skipped')]
  const failed = total - passed || (code === 0 && total ? 0 : 1)
  sum.passed += passed
  sum.failed += failed
  sum.skipped += skipped
  const seconds = ((performance.now() - start) / 1000).toFixed(1)
  console.log(`\n${file} (${seconds} s)\n${output}`)
  if (!failed) return
  const why = !total
    ? 'ended without a result'
    : code
      ? `${failed} failed`
      : 'a hook failed; uvu does not say how'
  console.log(`${file}: ${why} (exit ${code}, ${seconds} s)`)
  const named = stripVTControlCharacters(output).match(/^\s*FAIL\s.*$(?:\n.*){1,2}/gm) ?? []
  failures.push(`${file}: ${why}`, ...named)
}
