// Makes sure that redis-server is there: from PATH, else from the system's package manager.
import { spawnSync } from 'node:child_process'
import { inPath } from './binaries.ts'

const managers: [program: string, install: string][] = [
  ['apt-get', 'apt-get update -q && apt-get install -q -y --no-install-recommends redis-server'],
  ['apk', 'apk add --no-cache redis'],
  ['dnf', 'dnf install -q -y redis'],
  ['brew', 'brew install redis'],
]

/** Installs redis-server where it is missing; ends the process with one clear line where it can't. */
export function ensureRedis(): void {
  if (inPath('redis-server')) return
  const [program, install] = managers.find(([program]) => inPath(program)) ?? []
  const sudo = process.getuid!() === 0 || program === 'brew' ? '' : 'sudo -n '
  if (install && (!sudo || spawnSync('sudo', ['-n', 'true']).status === 0)) {
    console.log(`redis-server is not in PATH; installing it: ${install}`)
    // quiet, and not started as a service: a policy of the package, not ours to have
    const script = install
      .split(' && ')
      .map((step) => `${sudo}env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 ${step}`)
    spawnSync('sh', ['-c', script.join(' && ')], { stdio: ['ignore', 'ignore', 'inherit'] })
    if (inPath('redis-server')) return
  }
  console.error(
    `redis-server is not in PATH: install it${install ? ` (${sudo ? 'sudo ' : ''}${install})` : ''}`,
  )
  process.exit(1)
}
