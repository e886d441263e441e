// News of accounts: while somebody listens, reads which funds and budgets crossed a line, and tells
// each listener.
import { invalidInput, noAnswer } from './errors.ts'
import type { Cursor } from './redis.ts'
import type { Rpc } from './rpc.ts'
import { withinTime } from './time-limits.ts'
import type { AccountNewss } from './types.ts'
import { createLoop, type Loop, READ_MS } from './wake.ts'

export type NewsKind = keyof AccountNewss
export type NewsListener<Kind extends NewsKind> = (event: AccountNewss[Kind]) => unknown

export interface NewsState {
  /** ms since the last complete read was sent; null before the first, and while nobody listens. */
  age: number | null
  /** Why the last read failed. */
  error?: unknown
}

export interface News {
  /**
   * Gives the function that ends the subscription. Throws 400 `invalid_input` for an unknown kind.
   */
  on<Kind extends NewsKind>(kind: Kind, listener: NewsListener<Kind>): () => void
  /** Reads now, if somebody listens. */
  wake(): void
  /** Resolves after the first read, even if that failed. */
  start(): Promise<void>
  stop(): Promise<void>
  state(): NewsState
}

const kinds: NewsKind[] = ['low_balance', 'exhausted', 'back_in_funds', 'budget_exhausted', 'reset']

export function createNews(rpc: Pick<Rpc, 'call'>): News {
  const listeners = new Map(kinds.map((kind) => [kind, new Set<NewsListener<never>>()]))
  let started = false
  let stopped = false
  let loop: Loop | undefined
  let readAt: number | undefined
  let failure: unknown

  // from now on, for as long as somebody listens; each loop has a cursor of its own
  function follow(): Loop {
    let cursor: Cursor | null = null
    const own = createLoop(async () => {
      const sentAt = performance.now()
      try {
        const read = await withinTime(rpc.call('account_news', { cursor }), READ_MS, noAnswer)
        if (loop !== own) return
        if (read.reset) tell({ kind: 'reset' })
        for (const event of read.events) tell(event)
        cursor = read.cursor
        readAt = sentAt
        failure = undefined
      } catch (error) {
        if (loop === own) failure = error
      }
    })
    return own
  }

  function tell(event: AccountNewss[NewsKind]) {
    for (const listener of [...(listeners.get(event.kind) ?? [])]) {
      // in a promise: a throw is then the same as a rejection, and stops no other listener
      new Promise((resolve) => resolve(listener(event as never))).catch((error) =>
        process.emitWarning(`a listener of account news failed on ${event.kind}`, {
          type: 'KeyledgerWarning',
          detail: error instanceof Error ? error.stack : String(error),
        }),
      )
    }
  }

  const listened = () => [...listeners.values()].some(({ size }) => size > 0)

  async function begin() {
    if (!started || stopped || !listened()) return
    loop ??= follow()
    await loop.wake()
  }

  async function end() {
    const ending = loop
    loop = undefined
    readAt = undefined
    failure = undefined
    await ending?.stop()
  }

  return {
    on(kind, listener) {
      const those = listeners.get(kind)
      if (!those)
        throw invalidInput(`there is no news of kind ${JSON.stringify(kind)}`, `one of: ${kinds.join(', ')}`)
      // a wrapper of its own, so that one function may be given twice, and ended once
      const own: NewsListener<typeof kind> = (event) => listener(event)
      those.add(own)
      begin()
      return () => {
        those.delete(own)
        if (!listened()) end()
      }
    },
    wake() {
      loop?.wake()
    },
    async start() {
      started = true
      await begin()
    },
    async stop() {
      stopped = true
      await end()
    },
    state: () => ({ age: readAt === undefined ? null : performance.now() - readAt, error: failure }),
  }
}
