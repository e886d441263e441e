// The Redis tier: entries behind leases, and beside them the cursor: up to which change their keys
// are evicted.
import { randomUUID } from 'node:crypto'
import type { RedisClient } from './redis-client.ts'
import { createSeal } from './seal.ts'
import { createTrust, type Trust } from './trust.ts'

/** A snapshot of one cluster, as `api.cache_changes` gives and takes it. Only SQL looks inside. */
export interface Cursor {
  cluster: string
  snapshot: string
}

/**
 * The value of `vk:cursor`. Its writer had deleted every entry that changed before `cursor`.
 * Entries of another `generation` are dead. `beat` grows with every write, and no value is ever
 * written twice.
 */
export interface Coverage {
  cursor: Cursor
  generation: string
  beat: number
}

/** `vk:cursor` as it was read; `raw` is '' if Redis has none. */
export interface Found {
  raw: string
  coverage?: Coverage
}

/** The right to store one entry. It ends when its key is deleted. */
export interface Lease {
  key: string
  token: string
  generation: string
}

export interface RedisTier<Context> {
  trust: Trust
  /** The value of the key, for `open` or `lease`. */
  get(key: string): Promise<string | null>
  /**
   * The entry, if it is this key's and of the present generation. Ask whether `trust` is live after
   * `get`, not before.
   */
  open(key: string, raw: string | null): { context?: Context } | undefined
  /**
   * Takes the place of `raw`; undefined if another reader was first. Take it before you read
   * Postgres.
   */
  lease(key: string, raw: string | null): Promise<Lease | undefined>
  /**
   * Stores for `ttl` ms, unless the lease has been deleted meanwhile. The context of an unknown key
   * is `undefined`.
   */
  store(lease: Lease, context: Context | undefined, ttl: number): Promise<void>
  covered(): Promise<Found>
  /** From now on only entries of this generation count, and new entries belong to it. */
  turn(generation: string): void
  /**
   * Deletes the entries and leases of `keys`, and moves `vk:cursor` from `found` to `to` unless it
   * has changed meanwhile. Both happen at once. Answers the value of `vk:cursor` afterwards.
   */
  advance(found: Found, to: Omit<Coverage, 'beat'>, keys: string[]): Promise<Coverage | undefined>
  /** Trusts entries of this generation, complete as of `sentAt`. */
  prove(sentAt: number, generation: string): void
  close(): void
}

interface Get {
  key: string
  resolve(value: string | null): void
  reject(error: Error): void
}

export interface RedisTierOptions {
  /** As in `createTrust`. */
  maxStaleness: number
  /** Signs entries and the cursor: the first signs, all verify. Default: unsigned. */
  secrets?: readonly string[]
}

const CURSOR = 'vk:cursor'
const LEASE = 'lease:'
const LEASE_MS = 30_000
const ANSWER_MS = 200
// a socket that answers nothing for so long is dead, and nobody has told us
const SILENT_MS = 3000

// compare and set: null if done, else the value of the key ('' if it has none)
const replace = (set: string) => `
local held = redis.call('get', KEYS[1]) or ''
if held ~= ARGV[1] then return held end
redis.call('set', KEYS[1], ARGV[2]${set})
return nil`
const REPLACE_FOR = replace(", 'px', ARGV[3]")
// a thousand keys a command: Lua's stack has an end
const DELETE_AND_REPLACE = `
for i = 2, #KEYS, 1000 do redis.call('unlink', unpack(KEYS, i, math.min(i + 999, #KEYS))) end${replace('')}`

/**
 * Every command fails fast: at once if the connection is down, after 200 ms if it doesn't answer. A
 * failure ends trust in the tier, so that later readers don't each wait as long; a read of the
 * changes restores it.
 */
export function createRedisTier<Context>(
  redis: RedisClient,
  { maxStaleness, secrets = [] }: RedisTierOptions,
): RedisTier<Context> {
  const trust = createTrust(maxStaleness)
  const seal = createSeal(secrets)
  let generation = ''
  let silentSince: number | undefined

  // In a Cluster all keys share one slot: a shard that fails over takes the cursor along with the
  // entries it covers.
  const at = redis.isCluster ? (key: string) => `{vk}:${key}` : (key: string) => key
  const cursorAt = at(CURSOR)

  const lost = () => {
    silentSince = undefined
    trust.end()
  }
  redis.on('close', lost)
  redis.on('node error', lost) // of a Cluster
  if (redis.status === 'wait') redis.connect().catch(() => {})

  // A socket may be dead without a word, and ioredis waits for it for ever. We hang up only a
  // client that connects again by itself.
  function hangUpIfSilent() {
    silentSince ??= performance.now()
    const { retryStrategy, clusterRetryStrategy } = redis.options as Record<string, unknown>
    if (performance.now() - silentSince < SILENT_MS || !(retryStrategy || clusterRetryStrategy)) return
    silentSince = undefined
    redis.disconnect(true)
  }

  function ask<T>(command: () => Promise<T>): Promise<T> {
    return new Promise<T>((resolve, reject) => {
      let waiting = true
      const settle = (act: () => void) => {
        silentSince = undefined
        if (!waiting) return
        waiting = false
        clearTimeout(timer)
        act()
      }
      const fail = (error: Error) => {
        trust.end()
        reject(error)
      }
      const giveUp = () => {
        if (!waiting) return
        waiting = false
        hangUpIfSilent()
        fail(new Error('redis: no answer'))
      }
      // in an immediate: after a pause of this process, an answer that is here already is read
      // first
      const timer = setTimeout(() => setImmediate(giveUp), ANSWER_MS)
      if (redis.status !== 'ready') {
        clearTimeout(timer)
        // it has a socket, and the server has not said that it is ready
        if (redis.status === 'connect') hangUpIfSilent()
        return fail(new Error(`redis: not connected (${redis.status})`))
      }
      silentSince ??= performance.now()
      command().then(
        (answer) => settle(() => resolve(answer)),
        (error) => settle(() => fail(error)),
      )
    })
  }

  // All gets of one turn of the event loop leave as one command: a command by itself costs more
  // than the rest of a hit.
  let gets: Get[] = []

  function getTogether(key: string): Promise<string | null> {
    if (gets.length === 0) process.nextTick(sendGets)
    return new Promise((resolve, reject) => gets.push({ key, resolve, reject }))
  }

  function sendGets() {
    const sent = gets
    gets = []
    ask(() => redis.mget(sent.map(({ key }) => at(key)))).then(
      (values) => {
        for (let i = 0; i < sent.length; i++) sent[i]!.resolve(values[i]!)
      },
      (error) => {
        for (const { reject } of sent) reject(error)
      },
    )
  }

  const read = (raw: string) => parse<Coverage>(seal.open(cursorAt, raw))

  return {
    trust,
    get: getTogether,

    open(key, raw) {
      if (!raw || raw.startsWith(LEASE)) return undefined
      const entry = parse<{ generation: string; context: Context | null }>(seal.open(at(key), raw))
      return entry?.generation === generation ? { context: entry.context ?? undefined } : undefined
    },

    async lease(key, raw) {
      if (raw?.startsWith(LEASE)) return undefined
      // the generation of now: a context read from here on belongs to it, and to no later one
      const lease = { key, token: LEASE + randomUUID(), generation }
      const held = await ask(() => redis.eval(REPLACE_FOR, 1, at(key), raw ?? '', lease.token, LEASE_MS))
      return held === null ? lease : undefined
    },

    async store({ key, token, generation }, context, ttl) {
      const entry = seal.close(at(key), JSON.stringify({ generation, context: context ?? null }))
      await ask(() => redis.eval(REPLACE_FOR, 1, at(key), token, entry, ttl))
    },

    async covered() {
      const raw = (await ask(() => redis.get(cursorAt))) ?? ''
      return { raw, coverage: read(raw) }
    },

    turn(next) {
      generation = next
    },

    // The deletes and the cursor are one script. ioredis may send it again, to a Redis that came
    // back older with `found`: each Redis that takes the cursor has lost the entries too. A slow
    // writer finds another value, and only deletes.
    async advance(found, to, keys) {
      const coverage = { ...to, beat: (read(found.raw)?.beat ?? 0) + 1 }
      const next = seal.close(cursorAt, JSON.stringify(coverage))
      const names = [cursorAt, ...keys.map(at)]
      const held = await ask(() => redis.eval(DELETE_AND_REPLACE, names.length, ...names, found.raw, next))
      return held === null ? coverage : read(String(held))
    },

    prove(sentAt, proven) {
      generation = proven
      trust.prove(sentAt)
    },

    close() {
      redis.off('close', lost)
      redis.off('node error', lost)
    },
  }
}

function parse<T>(json: string | undefined): T | undefined {
  if (json === undefined) return undefined
  try {
    return JSON.parse(json)
  } catch {
    return undefined
  }
}
