// The one error class, and the one table that turns errors of Postgres, PostgREST and the network
// into stable codes.

/** The fields of an error beside its code and status. */
export interface ErrorFields {
  detail?: string | null
  hint?: string | null
  cause?: unknown
}

/**
 * Every error this library throws. Branch on `code`: the code SQL gave (`virtual_key_unknown`,
 * `insufficient_funds`, …) or, for an error that SQL gives no code, one of `unavailable`,
 * `timeout`, `deadlock`, `serialization_failure`, `lock_timeout`, `permission_denied`,
 * `invalid_token`, `invalid_input`, `number_out_of_range`, `function_not_found`, `view_not_found`,
 * `column_not_found`, `payload_too_large`, `overloaded`, `stopped`, `invalid_response`,
 * `internal_error` and the names of violated constraint kinds. `status` is the HTTP status that
 * goes with it. Both are the same through either transport.
 */
export class KeyledgerError extends Error {
  readonly code: string
  readonly status: number
  /** The details of this one error. Never a key. */
  readonly detail: string | undefined
  /** The option, argument or setting to change. */
  readonly hint: string | undefined

  constructor(code: string, status: number, { detail, hint, cause }: ErrorFields = {}) {
    super(
      code + (detail ? `: ${detail}` : '') + (hint ? ` (${hint})` : ''),
      cause === undefined ? {} : { cause },
    )
    this.name = 'KeyledgerError'
    this.code = code
    this.status = status
    this.detail = detail || undefined
    this.hint = hint || undefined
  }
}

type Meaning = [code: string, status: number, hint?: string]

const BUSY = 'all connections are in use: allow the pool more connections'

const unavailable: Meaning = [
  'unavailable',
  503,
  'check that the server is up, and that the rpc has its address',
]
const invalidToken: Meaning = ['invalid_token', 401, 'give postgrestRpc a `token` that PostgREST accepts']

// `dbmate up` gives each role a right on schema api; a dump without privileges brings none
const notInstalled =
  'use a role of keyledger; if it is one, the database was loaded from a dump without privileges: install by `dbmate up`, and restore the data alone'

// by SQLSTATE or PostgREST code, else by its class: PGRST and a digit, or the first two characters
const meanings: Record<string, Meaning> = {
  '08': unavailable,
  '22': ['invalid_input', 400],
  '22003': ['number_out_of_range', 400],
  '23502': ['not_null_violation', 400],
  '23503': ['foreign_key_violation', 409],
  '23505': ['unique_violation', 409],
  '23514': ['check_violation', 400],
  '23': ['constraint_violation', 409],
  '25006': unavailable, // a primary that has become a replica
  '28': unavailable, // the login of the server, not of the caller
  '3D000': unavailable,
  '40': ['serialization_failure', 503],
  '40P01': ['deadlock', 503],
  '42501': [
    'permission_denied',
    403,
    'use a role that has the grant: `role` of pgRpc, or claim `role` of the token',
  ],
  '42703': ['column_not_found', 400],
  '42883': ['function_not_found', 404],
  '42P01': ['view_not_found', 404],
  '53': unavailable,
  '54': ['payload_too_large', 413],
  '55P03': ['lock_timeout', 503],
  '57': unavailable,
  '57014': ['timeout', 504],
  '58': unavailable, // its disk, not the statement
  PGRST0: unavailable,
  PGRST003: ['unavailable', 503, BUSY],
  PGRST1: ['invalid_input', 400],
  PGRST106: ['function_not_found', 404, 'let PostgREST expose schema `api` (db-schemas)'],
  PGRST202: ['function_not_found', 404],
  PGRST203: ['function_not_found', 404],
  PGRST204: ['column_not_found', 400],
  PGRST205: ['view_not_found', 404],
  PGRST3: invalidToken,
}

/** An error as `pg` throws it, or as PostgREST puts it into the body (`details` there). */
export interface ServerError {
  code: string
  message: string
  detail?: string | null
  details?: string | null
  hint?: string | null
}

/**
 * The server's error as ours. Our own SQL raises `PT402`: its message is our code, and its name has
 * the status.
 */
export function fromServer({ code, message, ...more }: ServerError): KeyledgerError {
  const detail = more.detail ?? more.details
  const raised = /^PT(\d{3})$/.exec(code)
  if (raised) return new KeyledgerError(message, Number(raised[1]), { detail, hint: more.hint })
  const known = [code, code.slice(0, 6), code.slice(0, 2)].find((part) => Object.hasOwn(meanings, part))
  const [name, status, hint]: Meaning = known ? meanings[known]! : ['internal_error', 500]
  // errors of class 22 echo the value, and a caller may have put a secret there
  const said = [code.startsWith('22') ? message.replace(/".*"/s, '"…"') : message]
  if (detail && !code.startsWith('22')) said.push(detail)
  if (!known) said.unshift(code)
  const missing = code === '42501' && /for schema api$/.test(message) ? notInstalled : undefined
  const error = new KeyledgerError(name, status, {
    detail: said.join(': '),
    hint: more.hint || missing || hint,
  })
  return code === 'PGRST003' ? poolBusy(error) : error
}

const unconnected = ['ECONNREFUSED', 'ENOTFOUND', 'EAI_AGAIN', 'EHOSTUNREACH', 'UND_ERR_CONNECT_TIMEOUT']

// fetch keeps it one level deeper
function systemCode(error: unknown): string | undefined {
  const { code, cause } = (error ?? {}) as { code?: unknown; cause?: unknown }
  return typeof code === 'string' ? code : cause === undefined ? undefined : systemCode(cause)
}

/** The error when no server answered: 504 `timeout` after a time limit, else 503 `unavailable`. */
export function fromNetwork(cause: unknown, server: string): KeyledgerError {
  if (cause instanceof KeyledgerError) return cause
  if (cause instanceof Error && cause.name === 'TimeoutError') {
    return new KeyledgerError('timeout', 504, {
      detail: `${server} did not answer in time`,
      hint: 'give the rpc a longer `timeout`, or make the server answer faster',
      cause,
    })
  }
  const [code, status, hint] = unavailable
  const error = new KeyledgerError(code, status, { detail: `${server} could not be reached`, hint, cause })
  return unconnected.includes(systemCode(cause) ?? '') ? neverSent(error) : error
}

/** 503 `unavailable`: the caller's `token` function gave no token, or not in time. */
export const noToken = (cause: unknown) =>
  new KeyledgerError('unavailable', 503, {
    detail: 'there is no token',
    hint: 'let `token` of postgrestRpc give a token within `timeout`',
    cause,
  })

/** 504 `timeout`: Postgres did not answer a read within `ms`. */
export const noAnswer = (ms: number) =>
  new KeyledgerError('timeout', 504, { detail: `no answer from Postgres within ${ms} ms` })

/**
 * An HTTP answer that is not PostgREST's: it comes from a proxy before it, or from another server
 * altogether.
 */
export function fromHttp(httpStatus: number): KeyledgerError {
  const detail = `HTTP ${httpStatus}, and the answer is not PostgREST's`
  const [code, status, hint]: Meaning =
    httpStatus === 401 || httpStatus === 403
      ? invalidToken
      : httpStatus >= 500 || httpStatus === 408 || httpStatus === 429
        ? unavailable
        : httpStatus === 413
          ? ['payload_too_large', 413, 'raise the body limit of the proxy before PostgREST']
          : ['invalid_response', 502, 'check `url` of postgrestRpc: it must be the root of PostgREST']
  return new KeyledgerError(code, status, { detail, hint })
}

/** No function of this name takes exactly these arguments. */
export function functionNotFound(fn: string, names: string[]): KeyledgerError {
  return new KeyledgerError('function_not_found', 404, {
    detail: `there is no api.${fn}(${names.join(', ')})`,
    hint: 'check its name and the names of its arguments; after a migration, reload PostgREST (notify pgrst)',
  })
}

/** 400 `invalid_input`: an argument this library can't pass on as it is. */
export const invalidInput = (detail: string, hint?: string, cause?: unknown) =>
  new KeyledgerError('invalid_input', 400, { detail, hint, cause })

const busy = new WeakSet<KeyledgerError>()

/** Marks the error: all connections were in use, which says nothing about the server. */
export function poolBusy(error: KeyledgerError): KeyledgerError {
  busy.add(error)
  return error
}

/**
 * Does the error say by itself that the server could not be reached? A full pool doesn't, nor does
 * a time limit.
 */
export const isAway = (error: unknown): boolean =>
  error instanceof KeyledgerError && error.code === 'unavailable' && !busy.has(error)

/** May the error mean that the server could not be reached? */
export const mayBeAway = (error: unknown): boolean =>
  error instanceof KeyledgerError && ['unavailable', 'timeout'].includes(error.code)

const passing = ['unavailable', 'timeout', 'deadlock', 'serialization_failure', 'lock_timeout']

/**
 * May the same call succeed if it is made again? After `unavailable` and `timeout` nobody knows
 * whether the first call was carried out: repeat a write only with the same ids (or `reference`).
 */
export function isRetryable(error: unknown): boolean {
  return error instanceof KeyledgerError && passing.includes(error.code)
}

// SQLSTATE 22, 23 and 54, and HTTP 413
const ofData = [
  ...['invalid_input', 'number_out_of_range', 'not_null_violation', 'foreign_key_violation'],
  ...['unique_violation', 'check_violation', 'constraint_violation', 'payload_too_large'],
]

/** Is it the fault of an element that was sent? */
export const blamesData = (error: unknown): boolean =>
  error instanceof KeyledgerError && ofData.includes(error.code)

const ofEverybody = [
  ...['invalid_token', 'permission_denied', 'invalid_response'],
  ...['function_not_found', 'view_not_found', 'column_not_found'],
]

/** Is it no element's fault? Then a smaller batch would fail in the same way. */
export const isEverybodys = (error: unknown): boolean =>
  error instanceof KeyledgerError && ofEverybody.includes(error.code)

const unsent = new WeakSet<KeyledgerError>()

/** Marks the error: the call never reached the server. */
export function neverSent(error: KeyledgerError): KeyledgerError {
  unsent.add(error)
  return error
}

const undone = ['overloaded', 'stopped', 'deadlock', 'serialization_failure', 'lock_timeout']

/** Nobody answered the call: may it have been carried out, or be carried out later? */
export const mayBeDone = (error: unknown): boolean =>
  !(error instanceof KeyledgerError) ||
  (error.status >= 500 && !undone.includes(error.code) && !unsent.has(error))

const statuses: Record<string, number> = {
  insufficient_funds: 402,
  key_budget_exceeded: 402,
  user_budget_exceeded: 402,
  tenant_budget_exceeded: 402,
  virtual_key_disabled: 403,
  virtual_key_expired: 403,
  user_suspended: 403,
  tenant_suspended: 403,
  node_not_mounted: 403,
  virtual_key_unknown: 404,
  account_not_found: 404,
  hold_not_found: 404,
  hold_captured: 409,
  hold_released: 409,
  hold_expired: 409,
  hold_frozen: 409,
  hold_mismatch: 409,
}

/**
 * The HTTP status of a code in an element's answer (for single calls SQL gives the status). Default
 * 422.
 */
export const statusOf = (code: string): number => statuses[code] ?? 422

/** The HTTP status for a key that may not be used: 403 if its owner is suspended, else 401. */
export const keyStatus = (code: string): number => (code.endsWith('_suspended') ? 403 : 401)

/**
 * The code of anything thrown, for metrics and `health`: ours, also for an error of `pg` or the
 * network; else `internal_error`.
 */
export function codeOf(error: unknown): string {
  if (error instanceof KeyledgerError) return error.code
  if (!(error instanceof Error)) return 'internal_error'
  if (error.name === 'TimeoutError') return 'timeout'
  const code = systemCode(error)
  if (code === undefined) return 'internal_error'
  if (/^[0-9A-Z]{5}$/.test(code) && 'severity' in error) return fromServer({ code, message: '' }).code
  return /^(E[A-Z]+|UND_ERR_\w+)$/.test(code) && 'syscall' in error ? 'unavailable' : 'internal_error'
}
