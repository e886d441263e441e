// Time limits: every wait that ends after so many ms, whether or not the work behind it has ended.

/**
 * Rejects with `late(ms)` if the work has not settled within `ms`. The work itself goes on, unseen.
 */
export function withinTime<T>(work: Promise<T>, ms: number, late: (ms: number) => Error): Promise<T> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(late(ms)), ms)
    work.then(resolve, reject).finally(() => clearTimeout(timer))
  })
}

/**
 * Resolves when the work has ended, or after `ms`: `true` if the work was first. Rejects if the
 * work does.
 */
export async function endsWithin(work: Promise<unknown> | undefined, ms: number): Promise<boolean> {
  let timer: NodeJS.Timeout | undefined
  const enough = new Promise<boolean>((resolve) => {
    timer = setTimeout(resolve, ms, false)
  })
  const ended = Promise.resolve(work).then(() => true)
  return Promise.race([ended, enough]).finally(() => clearTimeout(timer))
}

export const pause = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms))

export interface Limit {
  /** Aborts at the limit. */
  signal: AbortSignal
  /** Rejects at the limit, if the work has not settled. */
  race<T>(work: Promise<T>): Promise<T>
  end(): void
}

/**
 * One limit on all parts of a request, also on a part that can't be aborted. Its error is named
 * `TimeoutError`.
 */
export function createLimit(ms: number): Limit {
  const controller = new AbortController()
  const { signal } = controller
  // not AbortSignal.timeout: that lets a process end which waits for nothing else
  const late = () => controller.abort(new DOMException(`no answer within ${ms} ms`, 'TimeoutError'))
  const timer = setTimeout(late, ms)
  return {
    signal,
    race: <T>(work: Promise<T>) =>
      new Promise<T>((resolve, reject) => {
        work.then(resolve, reject)
        signal.addEventListener('abort', () => reject(signal.reason), { once: true })
      }),
    end: () => clearTimeout(timer),
  }
}
