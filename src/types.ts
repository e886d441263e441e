// The shapes that the client sends to schema `api`, and gets from it. Amounts are decimal strings,
// ids UUIDs, moments ISO 8601.

export type * from './news-types.ts'

/**
 * The answer of `api.resolve_virtual_key`, which the cache keeps: the key's user, its payer, and
 * until when both are right.
 */
export interface KeyContext {
  virtual_key_id: string
  user_id: string
  tenant_id: string | null
  /** The payer's account: the tenant's id, or the user's own. */
  account_id: string
  currency: string
  name: string | null
  /** The beginning of the key, for display. */
  key_prefix: string
  /** The nodes mounted on the key, disabled ones too. It may hold funds for the active ones. */
  config_node_ids: readonly string[]
  virtual_key_status: string
  user_status: string
  tenant_status: string | null
  /** Why the key may not be used now; null if it may. */
  code: string | null
  /** When this changes by the clock alone. */
  valid_until: string | null
  /** ms from the answer until `valid_until`, a day at most. */
  valid_for_ms: number | null
}

/** The answer of `api.resolve_virtual_keys` for a hash that no key has. */
export interface UnknownKey {
  code: 'virtual_key_unknown'
  virtual_key_id: null
}

/**
 * The result of `validate`: the maker of a request, and its payer. It has neither the key nor its
 * hash.
 */
export type UserContext = Omit<
  KeyContext,
  'virtual_key_status' | 'user_status' | 'tenant_status' | 'code' | 'valid_until' | 'valid_for_ms'
>

/** An upstream instance, with the operator's settings. */
export interface ConfigNode {
  readonly id: string
  readonly name: string
  readonly provider: string | null
  readonly model: string | null
  /** The address at which it is called. */
  readonly endpoint: string | null
  readonly created_at: string
}

/**
 * Measured use: a count per meter, `{ input_tokens: 374, output_tokens: 44 }`. Numbers, or decimal
 * strings.
 */
export type Meters = Record<string, number | string>

/**
 * The sum to hold: an amount in the account's currency, or the cost of a use of a node, priced in
 * SQL.
 */
export type HoldRequest = (
  | { amount: string }
  | {
      config_node_id: string
      meters: Meters
      /** The service tier that will serve. Default: the standard one. */
      variant?: string
      /** The tiers that may serve; the dearest counts. */
      variants?: readonly string[]
    }
) & {
  /** UUIDv7; the client makes one if it is absent. Give your own to repeat a hold safely. */
  id?: string
  /** Seconds until the hold gives itself back, up to 30 days. Default 900. */
  expires_in?: number
}

/** Money set aside for one request. */
export interface Hold {
  id: string
  account_id: string
  amount: string
  /** The account's funds that no hold sets aside. */
  available: string
  expires_at: string
}

/** One use. It may carry a whole `UserContext`: `{ ...context, config_node_id, meters }`. */
export interface UsageEvent {
  /**
   * UUIDv7: time, identity and idempotency in one. The client makes one if it is absent. To repeat
   * an event, repeat its id.
   */
  id?: string
  /** From the validation of the request: that account pays, even if the user has moved since. */
  account_id: string
  virtual_key_id: string
  config_node_id: string
  meters: Meters
  /** The service tier that served it. Default: the standard one, `''`. Without a price, it is parked. */
  variant?: string
  /**
   * The provider's own cost, a decimal text in the account's currency, or in another. It is not the
   * customer's. One that is no amount is left out.
   */
  upstream_cost?: string | { amount: string; currency: string }
  /** The quantities are estimated. */
  estimated?: boolean
  /** The hold this use draws from. */
  hold_id?: string
  /** Whether it ends its hold. Default true. */
  final?: boolean
  /**
   * Your own label, up to 512 characters. A longer or empty one is left out, and the event charged
   * without it.
   */
  request_id?: string
  /**
   * Your own object, up to 16,384 bytes of JSON. Any other value is left out, and the event charged
   * without it.
   */
  metadata?: Record<string, unknown>
}

/**
 * Each status is final. A `parked` event is kept with its `code`, and charged once its cause is
 * repaired.
 */
export interface UsageAnswer {
  id: string
  status: 'charged' | 'duplicate' | 'parked'
  code?: string
  cost?: string
  available?: string
  /** The ledger entry that charged it. */
  seq?: number
  /** A duplicate whose content differs from what was charged. */
  mismatch?: true
  /** Labels that can't be kept; the event was charged without them. */
  left_out?: ('request_id' | 'metadata' | 'estimated' | 'upstream_cost')[]
  /** The account has no hold of this `hold_id`: the event was charged without one. */
  hold?: 'unknown'
}

/**
 * In a call that names several accounts: another call has this account locked, and nothing was kept
 * for it. Send the account's elements in a call of their own; the module's methods do so.
 */
export interface BusyAnswer {
  id: string
  status: 'busy'
  code: 'account_busy'
}

/** `closed`: it was not open any more; `refused`: an operator's freeze; `code` says why. */
export interface ReleaseAnswer {
  id: string
  status: 'released' | 'closed' | 'refused'
  code?: string
  available?: string
}

/** `closed`: it was not open any more; `refused`: it stays open as it was; `code` says why. */
export interface ExtendAnswer {
  id: string
  status: 'extended' | 'closed' | 'refused'
  code?: string
  expires_at?: string
  available?: string
}

/** Says whether a user could pay an amount now. */
export interface BudgetAnswer {
  allowed: boolean
  /** The reason if not. */
  code: string | null
  available: string
  /** The rest of the tightest budget of the key, the user and the tenant; null if there is none. */
  remaining: string | null
  account_id: string
  currency: string
}

/** The payer of a user, and the payer's funds. */
export interface Balance {
  user_id: string
  tenant_id: string | null
  account_id: string
  owner: 'user' | 'tenant'
  currency: string
  /** Paid money; down to minus `credit_limit`. */
  balance: string
  /** Promotional, spent first. */
  free_credit: string
  credit_limit: string
  /** Set aside by open holds. */
  frozen_balance: string
  /** Charged, and not covered yet. */
  outstanding_amount: string
  overdue_amount: string
  /** free_credit + balance + credit_limit - frozen_balance - outstanding_amount */
  available: string
  /** Grows with every ledger entry. */
  balance_version: number
}

/** The answer of `api.place_holds` to one request. */
export interface HoldAnswer {
  id: string
  /**
   * `busy`: another session holds the account, and nothing was kept; only in calls that name
   * several accounts.
   */
  status: 'held' | 'duplicate' | 'refused' | 'busy'
  code?: string
  amount?: string
  available?: string
  /** The rest of the budget that refused it. */
  remaining?: string
  expires_at?: string
  hold_status?: 'open' | 'captured' | 'released' | 'expired'
  mismatch?: true
}

/** One request of `api.place_holds`. */
export type PlaceHoldRequest = HoldRequest & { id: string; account_id: string; virtual_key_id: string }

/** One request of `api.release_holds`. */
export interface ReleaseRequest {
  id: string
  account_id: string
}

/** One request of `api.extend_holds`. */
export interface ExtendRequest extends ReleaseRequest {
  /** Seconds from now. Default 900. */
  expires_in?: number
}

/** One event of `api.record_usage`. */
export type RecordedEvent = UsageEvent & { id: string }

/**
 * A key in use elsewhere, for `api.import_virtual_keys`: its user, and its sha-256 or the key
 * itself.
 */
export type KeyImport = ({ user_id: string } | { user_external_id: string }) &
  ({ key_hash: string } | { virtual_key: string }) & {
    name?: string | null
    /** For display, up to 12 characters. */
    key_prefix?: string | null
    expires_at?: string | null
    config_node_ids?: string[] | null
  }

export interface KeyImportAnswer {
  status: 'imported' | 'duplicate' | 'refused'
  code?: string
  id?: string
  key_prefix?: string
  /** A duplicate that differs from the key kept here. */
  mismatch?: true
}

/**
 * An account's funds elsewhere, for `api.record_openings`. Amounts are decimal strings; a negative
 * balance is owed.
 */
export type Opening = (
  | { account_id: string }
  | { tenant_external_id: string }
  | { user_external_id: string }
) & {
  balance: string
  free_credit?: string | null
  credit_limit?: string | null
  reference?: string | null
}

export interface OpeningAnswer {
  status: 'opened' | 'duplicate' | 'refused'
  code?: string
  account_id?: string
  seq?: number
  available?: string
}
