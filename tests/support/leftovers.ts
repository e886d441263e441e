// Leftovers of servers started below a temporary directory: their directories, and processes that still run.
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'

/** Directories of the servers in `dir`; tsx has one there too. A server's wrapper removes it as its last act. */
export const homes = (dir: string) => readdirSync(dir).filter((name) => name.startsWith('keyledger-'))

/** Ids of the server processes that were started in `dir`. */
export const pidsIn = (dir: string): number[] =>
  homes(dir).flatMap((home) => {
    const file = join(dir, home, 'pid')
    return existsSync(file) ? Number(readFileSync(file, 'utf8')) : []
  })

/** Whether the process is there. */
export function runs(pid: number): boolean {
  try {
    return process.kill(pid, 0)
  } catch {
    return false
  }
}
