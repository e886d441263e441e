// The shapes of schema `api` that the client sends and gets. Amounts are decimal strings, ids UUIDs, moments ISO 8601.
import type { Cursor } from './redis.ts'

/** What `api.resolve_virtual_key` answers, and the cache keeps: who a key is, who pays, and until when that holds. */
export interface KeyContext {
  virtual_key_id: string
  user_id: string
  tenant_id: string | null
  /** Who pays: the tenant's id, or the user's own. */
  account_id: string
  currency: string
  name: string | null
  /** The beginning of the key, for display. */
  key_prefix: string
  /** The nodes mounted on the key, also those that are disabled now: it may hold funds for those that are active. */
  config_node_ids: readonly string[]
  virtual_key_status: string
  user_status: string
  tenant_status: string | null
  /** Why the key may not be used now; null if it may. */
  code: string | null
  /** When this changes by the clock alone. */
  valid_until: string | null
  /** ms from the answer until then, a day at most. */
  valid_for_ms: number | null
}

/** What `api.resolve_virtual_keys` answers for a hash that no key has. */
export interface UnknownKey {
  code: 'virtual_key_unknown'
  virtual_key_id: null
}

/** Who makes a request, and who pays for it: what `validate` gives. Neither the key nor its hash. */
export type UserContext = Omit<
  KeyContext,
  'virtual_key_status' | 'user_status' | 'tenant_status' | 'code' | 'valid_until' | 'valid_for_ms'
>

/** An upstream instance, as the operator set it up. */
export interface ConfigNode {
  readonly id: string
  readonly name: string
  readonly provider: string | null
  readonly model: string | null
  /** Where it is called. */
  readonly endpoint: string | null
  readonly created_at: string
}

/** Measured use: a count per meter, `{ input_tokens: 374, output_tokens: 44 }`. Numbers, or decimal strings. */
export type Meters = Record<string, number | string>

/** What to hold: an amount in the account's currency, or what a use would cost on a node, priced in SQL. */
export type HoldRequest = ({ amount: string } | { config_node_id: string; meters: Meters }) & {
  /** UUIDv7; one is made if absent. Give your own to repeat a hold safely. */
  id?: string
  /** Seconds until the hold gives itself back, up to 30 days. Default 900. */
  expires_in?: number
}

/** Money set aside for one request. */
export interface Hold {
  id: string
  account_id: string
  amount: string
  /** What the account has left beside its holds. */
  available: string
  expires_at: string
}

/** What was used. It may be a `UserContext` and more: `{ ...context, config_node_id, meters }`. */
export interface UsageEvent {
  /** UUIDv7: time, identity and idempotency in one; made if absent. To repeat an event, repeat its id. */
  id?: string
  /** As the request was validated: who paid then pays, wherever the user is now. */
  account_id: string
  virtual_key_id: string
  config_node_id: string
  meters: Meters
  /** The hold this use draws from. */
  hold_id?: string
  /** Whether it ends its hold. Default true. */
  final?: boolean
  /** Yours, up to 512 characters. One that is longer or empty is left out, and the event charged without it. */
  request_id?: string
  /** Yours, an object of up to 16,384 bytes of JSON. What is no such object is left out, and the event charged without it. */
  metadata?: Record<string, unknown>
}

/** All three are final: what is `parked` is kept with its `code`, to be charged once its cause is repaired. */
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
  left_out?: ('request_id' | 'metadata')[]
  /** The account has no hold of this `hold_id`: the event was charged without one. */
  hold?: 'unknown'
}

/**
 * Of a call that names several accounts: another call has this one. Nothing was kept: send its elements by themselves. The
 * methods of the module do so.
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

/** Whether a user could pay an amount now. */
export interface BudgetAnswer {
  allowed: boolean
  /** Why not. */
  code: string | null
  available: string
  /** What the tightest budget of the key, the user and the tenant has left; null if there is none. */
  remaining: string | null
  account_id: string
  currency: string
}

/** Who pays for a user, and what they have. */
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

/** As `api.place_holds` answers one request. */
export interface HoldAnswer {
  id: string
  /** `busy`: another session holds the account, and nothing was kept; only in calls that name several accounts. */
  status: 'held' | 'duplicate' | 'refused' | 'busy'
  code?: string
  amount?: string
  available?: string
  /** What the budget that refused it has left. */
  remaining?: string
  expires_at?: string
  hold_status?: 'open' | 'captured' | 'released' | 'expired'
  mismatch?: true
}

/** A crossing of an account's funds or of a budget, at the moment of the posting that caused it. */
export interface NewsOf<Kind extends string> {
  /** The same in every process that is told, so that copies can be dropped. Grows with the account's entries. */
  id: number
  kind: Kind
  account_id: string
  /** The ledger entry that changed the funds. */
  seq: number
  /** balance + free_credit + credit_limit - outstanding_amount: what open holds set aside is not taken off. */
  funds: string
  /** The account's low_balance_threshold, if it has one. */
  threshold?: string
  created_at: string
}

/** A budget that is used up: whose it is, and how far. */
export interface BudgetNews {
  id: string
  scope: 'virtual_key' | 'user' | 'tenant'
  /** The id of the key, user or tenant. */
  scope_id: string
  period: 'day' | 'week' | 'month' | 'total'
  amount: string
  spent: string
}

/** What `on` tells, by kind. */
export interface AccountNewss {
  /** Funds fell to the account's threshold or below it. */
  low_balance: NewsOf<'low_balance'> & { threshold: string }
  /** Funds fell to 0 or below. */
  exhausted: NewsOf<'exhausted'>
  /** Funds rose above 0. */
  back_in_funds: NewsOf<'back_in_funds'>
  /** What counts against a budget in its present window has reached its amount; a budget of 0 says nothing. */
  budget_exhausted: NewsOf<'budget_exhausted'> & { budget: BudgetNews }
  /** News may have been missed (Postgres failed over, or was away for 48 hours): read the accounts you care about. */
  reset: { kind: 'reset' }
}

/** What `api.account_news` answers. Keep the cursor after handling the events. */
export interface AccountNews {
  cursor: Cursor
  /** Oldest first. */
  events: AccountNewss[Exclude<keyof AccountNewss, 'reset'>][]
  /** Some may have been missed since the cursor given: read the accounts you care about. */
  reset: boolean
}

/** As `api.place_holds` takes one request. */
export type PlaceHoldRequest = HoldRequest & { id: string; account_id: string; virtual_key_id: string }

/** As `api.release_holds` takes one. */
export interface ReleaseRequest {
  id: string
  account_id: string
}

/** As `api.extend_holds` takes one. */
export interface ExtendRequest extends ReleaseRequest {
  /** Seconds from now. Default 900. */
  expires_in?: number
}

/** As `api.record_usage` takes one event. */
export type RecordedEvent = UsageEvent & { id: string }

/** A key in use elsewhere, for `api.import_virtual_keys`: whose it is, and its sha-256 or the key itself. */
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
  /** A duplicate that differs from what is here. */
  mismatch?: true
}

/** What an account had elsewhere, for `api.record_openings`. Amounts are decimal strings; a negative balance is owed. */
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
