// What the package exports.
export type { Functions, Views } from './catalog.ts'
export { isRetryable, KeyledgerError } from './errors.ts'
export { newId } from './ids.ts'
export type {
  Authentication,
  Middleware,
  Refusal,
  RequestHeaders,
  WithUserContext,
} from './middleware.ts'
export { type BillingModule, type BillingModuleOptions, createBillingModule, type Health } from './module.ts'
export type { NewsKind, NewsListener } from './news.ts'
export type { CallOptions, RowsQuery, Rpc, Selected } from './rpc.ts'
export { type PgRpcOptions, pgRpc } from './rpc-pg.ts'
export { type PostgrestRpcOptions, postgrestRpc } from './rpc-postgrest.ts'
export type * from './types.ts'
