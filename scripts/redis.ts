// Makes sure that redis-server is there, and pgbouncer for a test: from PATH, else from the
// system's package manager.
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

/**
 * Installs the program if it is missing, and says so before. Undefined if the program is there now;
 * else the command that would install it, '' if we know none.
 */
export function missing(wanted: 'redis-server' | 'pgbouncer'): string | undefined {
  if (inPath(wanted)) return undefined
  const [program, command, redis] = managers.find(([program]) => inPath(program)) ?? []
  const install = command?.(wanted === 'pgbouncer' ? wanted : redis!)
  const sudo = process.getuid!() === 0 || program === 'brew' ? '' : 'sudo -n '
  if (install && (!sudo || spawnSync('sudo', ['-n', 'true']).status === 0)) {
    console.log(`${wanted} is not in PATH. About to install it by the system's package manager, ${program}:`)
    console.log(`  ${install}`)
    console.log(`To use your own instead, press Ctrl-C, and put a ${wanted} in PATH.`)
    // quietly, and not started as a service: whether it runs as one is not for us to decide
    const script = install
      .split(' && ')
      .map((step) => `${sudo}env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 ${step}`)
    spawnSync('sh', ['-c', script.join(' && ')], { stdio: ['ignore', 'ignore', 'inherit'] })
    if (inPath(wanted)) return undefined
  }
  return install ? (sudo ? 'sudo ' : '') + install : ''
}

/** Installs redis-server if it is missing. If it can't, it ends the process with one clear line. */
export function ensureRedis(): void {
  const install = missing('redis-server')
  if (install === undefined) return
  const how = install ? `install it (${install}), or` : 'install it, or'
  console.error(`redis-server is not in PATH: ${how} put your own in PATH`)
  process.exit(1)
}
