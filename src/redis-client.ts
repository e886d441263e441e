// The Redis client that a host passes in: the commands we use of it, and the settings we refuse.

/** A client of ioredis 5 or 6. It is a structural type: keyledger itself needs no ioredis. */
export interface RedisClient {
  readonly status: string
  readonly isCluster: boolean
  readonly options: object
  connect(): Promise<unknown>
  disconnect(reconnect?: boolean): void
  on(event: string, listener: () => void): unknown
  off(event: string, listener: () => void): unknown
  get(key: string): Promise<string | null>
  mget(keys: string[]): Promise<(string | null)[]>
  eval(script: string, numberOfKeys: number, ...keysAndArguments: (string | number)[]): Promise<unknown>
}

/**
 * Throws TypeError for a client that may read from replicas: they lag, and still know revoked keys.
 */
export function refuseReplicas(redis: RedisClient): void {
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
