// The shapes of account news: the events that `on` tells, and the answer of `api.account_news`.
import type { Cursor } from './redis.ts'

/** A crossing of an account's funds or of a budget, at the moment of the posting that caused it. */
export interface NewsOf<Kind extends string> {
  /**
   * The same in every process that is told, so that you can drop copies. Grows with the account's
   * entries.
   */
  id: number
  kind: Kind
  account_id: string
  /** The ledger entry that changed the funds. */
  seq: number
  /** balance + free_credit + credit_limit - outstanding_amount. Open holds are not taken off. */
  funds: string
  /** The account's low_balance_threshold, if it has one. */
  threshold?: string
  created_at: string
}

/** A budget that is used up: its owner, its amount and the sum spent. */
export interface BudgetNews {
  id: string
  scope: 'virtual_key' | 'user' | 'tenant'
  /** The id of the key, user or tenant. */
  scope_id: string
  period: 'day' | 'week' | 'month' | 'total'
  amount: string
  spent: string
}

/** The events that `on` tells, by kind. */
export interface AccountNewss {
  /** Funds fell to the account's threshold or below it. */
  low_balance: NewsOf<'low_balance'> & { threshold: string }
  /** Funds fell to 0 or below. */
  exhausted: NewsOf<'exhausted'>
  /** Funds rose above 0. */
  back_in_funds: NewsOf<'back_in_funds'>
  /**
   * The spending in a budget's present window has reached its amount. A budget of 0 says nothing.
   */
  budget_exhausted: NewsOf<'budget_exhausted'> & { budget: BudgetNews }
  /**
   * News may have been missed (Postgres failed over, or was away for 48 hours): read the accounts
   * you care about.
   */
  reset: { kind: 'reset' }
}

/** The answer of `api.account_news`. Keep the cursor after you have handled the events. */
export interface AccountNews {
  cursor: Cursor
  /** Oldest first. */
  events: AccountNewss[Exclude<keyof AccountNewss, 'reset'>][]
  /** Some may have been missed since the cursor given: read the accounts you care about. */
  reset: boolean
}
