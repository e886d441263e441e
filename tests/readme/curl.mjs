#!/usr/bin/env node
// The options of curl that documents use, for a machine without it.
import { readFileSync } from 'node:fs'
import { parseArgs } from 'node:util'

const text = { type: 'string' }
const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    silent: { type: 'boolean' },
    header: { type: 'string', multiple: true },
    data: text,
    request: text,
    'write-out': text,
  },
})
const { header = [], data, 'write-out': after = '' } = values
const body = data === '@-' ? readFileSync(0, 'utf8').replaceAll('\n', '') : data
const headers = { 'content-type': 'application/x-www-form-urlencoded' }
for (const [, name, value] of header.map((line) => /^([^:]+): *(.*)$/.exec(line))) headers[name] = value
const method = values.request ?? (body === undefined ? 'GET' : 'POST')
const answer = await fetch(positionals[0], { method, headers, body })
process.stdout.write(await answer.text())
process.stdout.write(after.replace('%{http_code}', String(answer.status)).replaceAll('\\n', '\n'))
