// The exports of the package.
export { type BoundOptions, boundOf, estimateOf } from './bound.ts'
export type { Functions, Views } from './catalog.ts'
export { isRetryable, KeyledgerError } from './errors.ts'
export type { Health } from './health.ts'
export { newId } from './ids.ts'
export {
  createMeters,
  type Flavor,
  type Measured,
  type MetersOptions,
  metersOf,
  type Priced,
} from './meters.ts'
export type {
  Authentication,
  Middleware,
  Refusal,
  RequestHeaders,
  WithUserContext,
} from './middleware.ts'
export { type BillingModule, type BillingModuleOptions, type Changes, createBillingModule } from './module.ts'
export type { NewsKind, NewsListener } from './news.ts'
export type { RedisClient } from './redis-client.ts'
export type { CallOptions, RowsQuery, Rpc, Selected } from './rpc.ts'
export { type PgRpcOptions, pgRpc } from './rpc-pg.ts'
export { type PostgrestRpcOptions, postgrestRpc } from './rpc-postgrest.ts'
export type * from './types.ts'
