// Wake-ups: loops that read on each wake-up and now and then anyway, and the one LISTEN connection
// that wakes them.
import pgListen from 'pg-listen'
import { endsWithin, pause } from './time-limits.ts'

export interface Loop {
  /** Resolves when a read that began after this call, or with it, has been tried. */
  wake(): Promise<void>
  /** Resolves when the read under way has ended; the loop never reads again. */
  stop(): Promise<void>
}

const POLL_MS = 500
// any login may notify, as often as it likes
const LEAST_MS = 20
/** ms that one read of Postgres may take. */
export const READ_MS = 5000
const RECONNECT_MS = 500

/**
 * Begins with the first wake-up, and reads every `poll` ms at least, every 20 ms at most. `read`
 * must not reject.
 */
export function createLoop(read: () => Promise<void>, poll = POLL_MS): Loop {
  let stopped = false
  let wakened = false
  let reading: Promise<void> | undefined
  let timer: NodeJS.Timeout | undefined
  let sentAt = -Infinity
  let endPause = () => {}

  function wait(ms: number) {
    return new Promise<void>((resolve) => {
      endPause = resolve
      timer = setTimeout(resolve, ms)
    })
  }

  // one read at a time; a wake-up during a read means another read, since the change may be newer
  // than its snapshot
  async function readAll() {
    while (wakened && !stopped) {
      const early = sentAt + LEAST_MS - performance.now()
      if (early > 0) await wait(early)
      if (stopped) break
      wakened = false
      sentAt = performance.now()
      await read()
    }
    reading = undefined
    if (!stopped) timer = setTimeout(wake, Math.max(0, sentAt + poll - performance.now()))
  }

  function wake() {
    wakened = true
    if (reading === undefined) {
      clearTimeout(timer)
      reading = readAll()
    }
    return reading
  }

  return {
    wake,
    async stop() {
      stopped = true
      clearTimeout(timer)
      endPause()
      await reading
    },
  }
}

export interface SubscriptionOptions {
  /** Any login of the database, not through a transaction pooler. */
  connectionString: string
  /**
   * The function to call at each notification, and when LISTEN takes effect: a change committed
   * before woke nobody.
   */
  channels: Record<string, () => unknown>
  lost: () => void
}

export interface Subscription {
  start(): void
  stop(): Promise<void>
  state(): { listening: boolean; error?: Error }
}

/**
 * Comes back however long Postgres was away. It never looks at the payload: any login can notify.
 */
export function createSubscription({ connectionString, channels, lost }: SubscriptionOptions): Subscription {
  let listening = false
  let stopped = false
  let error: Error | undefined
  let connecting: Promise<void> | undefined
  let release = () => {}
  const released = new Promise<void>((resolve) => {
    release = resolve
  })

  // One subscriber per connection. This loop replaces pg-listen's own reconnecting: that ends by
  // itself after retryTimeout (3 s) or if LISTEN fails, and doesn't end on close.
  async function connect() {
    while (!stopped) {
      const subscriber = pgListen.default(
        {
          connectionString,
          application_name: 'keyledger listener',
          connectionTimeoutMillis: READ_MS,
          query_timeout: READ_MS,
        },
        { retryLimit: 1, parse: String },
      )
      const broken = new Promise<void>((resolve) => {
        subscriber.events.on('error', (reason) => {
          error ??= reason
          resolve()
        })
      })
      for (const [channel, wake] of Object.entries(channels)) subscriber.notifications.on(channel, wake)
      try {
        await subscriber.connect()
        for (const channel of Object.keys(channels)) await subscriber.listenTo(channel)
        listening = true
        error = undefined
        for (const wake of Object.values(channels)) wake()
        await Promise.race([broken, released])
      } catch (reason) {
        error = reason as Error
      }
      if (listening && !stopped) {
        listening = false
        lost()
      }
      await endsWithin(
        subscriber.close().catch(() => {}),
        RECONNECT_MS,
      )
      if (!stopped) await Promise.race([pause(RECONNECT_MS), released])
    }
    listening = false
  }

  return {
    start() {
      connecting ??= connect()
    },
    async stop() {
      stopped = true
      release()
      await connecting
    },
    state: () => ({ listening, error }),
  }
}
