// Runs one server process that cannot outlive this one: not after exit, Ctrl-C, a crash, or
// kill -9.
import { type ChildProcess, spawn } from 'node:child_process'
import { existsSync, readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'

// The wrapper holds a pipe from this process. When the pipe closes, for any reason, it ends the
// server and removes the directory. A line "<signal> keep" ends the server too, and leaves the
// directory for a restart. The signal is repeated: a server that is still starting has no handler
// yet.
const wrapper = `
dir=$1 signal=$2; shift 2
exec 3<&0
"$@" </dev/null >>"$dir/log" 2>&1 3<&- & server=$!
echo $server >"$dir/pid.new"; mv "$dir/pid.new" "$dir/pid"
(
  read -r how keep
  [ -z "$keep" ] || : >"$dir/keep"
  while [ ! -e "$dir/exit" ] && kill -"\${how:-$signal}" $server 2>/dev/null; do sleep 0.05 || sleep 1; done
) <&3 & watcher=$!
exec 3<&-
wait $server; echo $? >"$dir/exit"
wait $watcher
[ -e "$dir/keep" ] || rm -rf "$dir"
`

/** A command, its directory and its user. */
export interface Command {
  /** Directory of this server alone; removed at the end. Its `log` file takes stdout and stderr. */
  dir: string
  argv: string[]
  env?: Record<string, string | undefined>
  /** Unprivileged user to run as; default: the current one. */
  user?: { uid: number; gid: number }
  /** The signal that ends it for certain. Default `KILL`. */
  signal?: 'KILL' | 'QUIT'
}

/** A running server process. */
export interface Supervised {
  pid: number
  /** True once the server process has ended, by itself or not. */
  ended(): boolean
  /**
   * Ends it. `keep` leaves the directory for a restart and ends the server with SIGINT, in good
   * order.
   */
  end(keep?: 'keep'): Promise<void>
}

const running = new Map<ChildProcess, string>()

/** Starts the command; resolves when its pid is known, which doesn't mean that it is ready. */
export async function supervise({ dir, argv, env, user, signal = 'KILL' }: Command): Promise<Supervised> {
  for (const left of ['pid', 'exit', 'keep']) rmSync(join(dir, left), { force: true })
  const child = spawn('sh', ['-c', wrapper, 'sh', dir, signal, ...argv], {
    cwd: '/',
    detached: true, // Ctrl-C is for this process, not for the server
    env: { ...process.env, ...env },
    stdio: ['pipe', 'ignore', 'ignore'],
    ...user,
  })
  const gone = new Promise<void>((resolve) => child.once('close', () => resolve()))
  child.stdin.on('error', () => {}) // the wrapper ended first
  stopWithThisProcess()
  running.set(child, dir)
  gone.then(() => running.delete(child))
  await new Promise((resolve, reject) => child.once('spawn', resolve).once('error', reject))
  await until(() => existsSync(join(dir, 'pid')), `${argv[0]} to start`)
  child.unref()
  return {
    pid: Number(readFileSync(join(dir, 'pid'), 'utf8')),
    ended: () => !existsSync(dir) || existsSync(join(dir, 'exit')),
    async end(keep) {
      child.ref()
      child.stdin.end(keep ? 'INT keep\n' : '')
      await gone
    },
  }
}

/**
 * Waits until the condition gives a truthy value, and gives that. Throws after `seconds` (30), with
 * the name `what`.
 */
export async function until<T>(
  condition: () => T | Promise<T>,
  what: string,
  seconds = 30,
): Promise<NonNullable<T>> {
  const end = performance.now() + seconds * 1000
  for (;;) {
    const value = await condition()
    if (value) return value as NonNullable<T>
    if (performance.now() > end) throw new Error(`waited ${seconds} s for ${what}`)
    await sleep(20)
  }
}

let hooked = false

// The pipes close by themselves; this only makes the process wait until the servers are really
// gone.
function stopWithThisProcess() {
  if (hooked) return
  hooked = true
  process.on('exit', () => {
    const dirs = [...running.values()]
    for (const child of running.keys()) child.stdin!.destroy()
    const pause = new Int32Array(new SharedArrayBuffer(4))
    for (let i = 0; i < 500 && dirs.some((dir) => existsSync(dir)); i++) Atomics.wait(pause, 0, 0, 10)
  })
  process.on('SIGINT', () => process.exit(130))
  process.on('SIGTERM', () => process.exit(143))
  process.on('SIGHUP', () => process.exit(129))
}
