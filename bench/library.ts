// The library as its users run it: compiled. tsx, which runs the bench, slows closures down by
// keeping their names.
import { execFileSync } from 'node:child_process'
import { dirname } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
execFileSync('npm', ['run', '-s', 'build'], { cwd: root, stdio: ['ignore', 'inherit', 'inherit'] })

const compiled: typeof import('../src/index.ts') = await import(`${root}/dist/index.js`)
export const { createBillingModule, newId, pgRpc } = compiled
