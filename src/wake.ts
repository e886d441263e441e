// Wake-ups: loops that read on each wake-up and twice a second anyway, and the one LISTEN connection that wakes them.
import pgListen from 'pg-listen'

export interface Loop {
  /** Resolves when what was to be read at this moment has been tried. */
  wake(): Promise<void>
  /** Resolves when the read under way has ended; for good. */
  stop(): Promise<void>
}

// half of the second within which a change is promised to be seen, wake-up or not
const POLL_MS = 500
/** ms that one read of Postgres may take. */
export const READ_MS = 5000
const RECONNECT_MS = 500

/** Begins with the first wake-up. `read` must not reject. */
export function createLoop(read: () => Promise<void>): Loop {
  let stopped = false
  let wakened = false
  let reading: Promise<void> | undefined
  let timer: NodeJS.Timeout | undefined

  // one read at a time; a wake-up during it means another one, since the change may be newer than its snapshot
  function wake() {
    clearTimeout(timer)
    wakened = true
    reading ??= (async () => {
      const startedAt = performance.now()
      while (wakened && !stopped) {
        wakened = false
        await read()
      }
      reading = undefined
      if (!stopped) timer = setTimeout(wake, Math.max(0, startedAt + POLL_MS - performance.now()))
    })()
    return reading
  }

  return {
    wake,
    async stop() {
      stopped = true
      clearTimeout(timer)
      await reading
    },
  }
}

export interface SubscriptionOptions {
  /** Any login of the database, not through a transaction pooler. */
  connectionString: string
  /** What to call at each notification, and when LISTEN takes effect: what was committed before woke nobody. */
  channels: Record<string, () => unknown>
  lost: () => void
}

export interface Subscription {
  start(): void
  stop(): Promise<void>
  state(): { listening: boolean; error?: Error }
}

/** Comes back however long Postgres was away. The payload is never looked at: anyone can notify. */
export function createSubscription({ connectionString, channels, lost }: SubscriptionOptions): Subscription {
  let listening = false
  let stopped = false
  let error: Error | undefined
  let connecting: Promise<void> | undefined
  let release = () => {}
  const released = new Promise<void>((resolve) => {
    release = resolve
  })

  // One subscriber per connection, and this loop in place of pg-listen's own reconnecting, which ends by itself after
  // retryTimeout (3 s) or if LISTEN fails, and doesn't end on close.
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
      await Promise.race([subscriber.close().catch(() => {}), pause(RECONNECT_MS)])
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

const pause = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms))
