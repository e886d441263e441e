// The demo's progress line on standard error; in a pipe or a file it says nothing.

const EVERY_MS = 100

export function createProgress(total: number, out: NodeJS.WriteStream = process.stderr) {
  const beganAt = performance.now()
  let shownAt = beganAt
  return {
    update(done: number) {
      const now = performance.now()
      if (!out.isTTY || now - shownAt < EVERY_MS) return
      shownAt = now
      const seconds = Math.ceil(((now - beganAt) / 1000 / done) * (total - done))
      out.write(`\r\x1b[K${done} of ${total} requests, ${seconds} s to go`)
    },
    /** Takes the line away. */
    clear() {
      if (out.isTTY) out.write('\r\x1b[K')
    },
  }
}
