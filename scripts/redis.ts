// Makes sure that redis-server (and, for a test, pgbouncer) is there: from PATH, else from the system's package manager.
import { spawnSync } from 'node:child_process'
import { inPath } from './binaries.ts'

const managers: [program: string, install: (name: string) => string, redis: string][] = [
  [
    'apt-get',
    (name) => `apt-get update -q && apt-get install -q -y --no-install-recommends ${name}`,
    'redis-server',
  ],
  ['apk', (name) => `apk add --no-cache ${name}`, 'redis'],
  ['dnf', (name) => `dnf install -q -y ${name}`, 'redis'],
  ['brew', (name) => `brew install ${name}`, 'redis'],
]

/** Installs the program where it is missing; undefined where it is there then, else what would install it ('' if unknown). */
export function missing(wanted: 'redis-server' | 'pgbouncer'): string | undefined {
  if (inPath(wanted)) return undefined
  const [program, command, redis] = managers.find(([program]) => inPath(program)) ?? []
  const install = command?.(wanted === 'pgbouncer' ? wanted : redis!)
  const sudo = process.getuid!() === 0 || program === 'brew' ? '' : 'sudo -n '
  if (install && (!sudo || spawnSync('sudo', ['-n', 'true']).status === 0)) {
    console.log(`${wanted} is not in PATH; installing it: ${install}`)
    // quiet, and not started as a service: a policy of the package, not ours to have
    const script = install
      .split(' && ')
      .map((step) => `${sudo}env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 ${step}`)
    spawnSync('sh', ['-c', script.join(' && ')], { stdio: ['ignore', 'ignore', 'inherit'] })
    if (inPath(wanted)) return undefined
  }
  return install ? (sudo ? 'sudo ' : '') + install : ''
}

/** Installs redis-server where it is missing; ends the process with one clear line where it can't. */
export function ensureRedis(): void {
  const install = missing('redis-server')
  if (install === undefined) return
  console.error(`redis-server is not in PATH: install it${install ? ` (${install})` : ''}`)
  process.exit(1)
}
