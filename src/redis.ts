// The Redis tier: entries behind leases and, beside them, the cursor that says which changes they have been rid of.
import { randomUUID } from 'node:crypto'
import type { Cluster, Redis } from 'ioredis'
import { createSeal } from './seal.ts'
import { createTrust, type Trust } from './trust.ts'

/** A snapshot of one cluster, as `api.cache_changes` gives and takes it. Only SQL looks inside. */
export interface Cursor {
  cluster: string
  snapshot: string
}

/**
 * What `vk:cursor` holds: whoever wrote it had deleted every entry changed before `cursor`. Entries of another
 * `generation` are dead. `beat` grows with every write, and no value is ever written twice.
 */
export interface Coverage {
  cursor: Cursor
  generation: string
  beat: number
}

/** `vk:cursor` as it was read; `raw` is '' where there is none. */
export interface Found {
  raw: string
  coverage?: Coverage
}

/** The right to store one entry, until someone deletes its key. */
export interface Lease {
  key: string
  token: string
  generation: string
}

export interface RedisTier<Context> {
  trust: Trust
  /** What the key holds, for `open` or `lease`. */
  get(key: string): Promise<string | null>
  /** The entry, if it is this key's and of the present generation. Ask whether `trust` holds after `get`, not before. */
  open(key: string, raw: string | null): { context?: Context } | undefined
  /** Takes the place of `raw`; undefined if somebody else was first. Take it before reading Postgres. */
  lease(key: string, raw: string | null): Promise<Lease | undefined>
  /** Stores for `ttl` ms, unless the lease has been deleted meanwhile. `undefined` is an unknown key. */
  store(lease: Lease, context: Context | undefined, ttl: number): Promise<void>
  covered(): Promise<Found>
  /** From now on only entries of this generation are any, and what is stored belongs to it. */
  turn(generation: string): void
  /**
   * Deletes the entries and leases of `keys`, and moves `vk:cursor` from `found` to `to` unless it has changed meanwhile, both
   * at once; answers what it holds afterwards.
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
// an answer to nothing for so long: the socket is dead, and nobody has told us
const SILENT_MS = 3000

/** Throws TypeError where a client may read from replicas: they lag, and know revoked keys. */
export function refuseReplicas(redis: Redis | Cluster): void {
  const { scaleReads, redisOptions, readOnly, role } = redis.options as Record<string, unknown> & {
    redisOptions?: Record<string, unknown>
  }
  const found = [
    scaleReads !== undefined && scaleReads !== 'master' && 'scaleReads',
    (readOnly || redisOptions?.readOnly) && 'readOnly',
    (role === 'slave' || redisOptions?.role === 'slave') && "role: 'slave'",
  ].find(Boolean)
  if (!found) return
  const why = 'a replica lags behind, and would bring revoked keys back'
  throw new TypeError(
    `createBillingModule: \`redis\` reads from replicas (\`${found}\`). Leave that out: ${why}`,
  )
}

// compare and set: null if done, else what the key holds ('' if nothing)
const replace = (set: string) => `
local held = redis.call('get', KEYS[1]) or ''
if held ~= ARGV[1] then return held end
redis.call('set', KEYS[1], ARGV[2]${set})
return nil`
const REPLACE_FOR = replace(", 'px', ARGV[3]")
// a thousand a command: Lua's stack has an end
const DELETE_AND_REPLACE = `
for i = 2, #KEYS, 1000 do redis.call('unlink', unpack(KEYS, i, math.min(i + 999, #KEYS))) end${replace('')}`

/**
 * Every command fails fast: at once where the connection is down, after 200 ms where it doesn't answer. A failure
 * ends trust in the tier, so that readers don't each wait for the next one; a read of the changes restores it.
 */
export function createRedisTier<Context>(
  redis: Redis | Cluster,
  { maxStaleness, secrets = [] }: RedisTierOptions,
): RedisTier<Context> {
  const trust = createTrust(maxStaleness)
  const seal = createSeal(secrets)
  let generation = ''
  let silentSince: number | undefined

  // In a Cluster all in one slot: a shard that fails over takes the cursor along with the entries it speaks for.
  const at = redis.isCluster ? (key: string) => `{vk}:${key}` : (key: string) => key
  const cursorAt = at(CURSOR)

  const lost = () => {
    silentSince = undefined
    trust.end()
  }
  redis.on('close', lost)
  redis.on('node error', lost) // of a Cluster
  if (redis.status === 'wait') redis.connect().catch(() => {})

  // A socket may be dead without a word, and ioredis waits for it for ever. Only of a client that connects again by itself.
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
      // in an immediate: after a pause of this process, an answer that is here already is read before it
      const timer = setTimeout(() => setImmediate(giveUp), ANSWER_MS)
      if (redis.status !== 'ready') {
        clearTimeout(timer)
        // it has a socket, which has not said that it is ready
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

  // What one turn of the event loop asks for leaves as one command: each by itself costs more than all the rest of a hit.
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
      // the generation of now: what is read from here on belongs to it, and to no later one
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

    // The deletes and the cursor are one script. ioredis may send it again, to a Redis that came back older with `found`:
    // whichever Redis takes the cursor has lost the entries too. A slow writer finds another value, and only deletes.
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
