// Made by `npm run types` from the database's catalog: the arguments and answers of the functions of schema api, the rows of its views.
import type {
  AccountNews,
  BusyAnswer,
  ExtendAnswer,
  ExtendRequest,
  HoldAnswer,
  KeyContext,
  KeyImport,
  KeyImportAnswer,
  Opening,
  OpeningAnswer,
  PlaceHoldRequest,
  RecordedEvent,
  ReleaseAnswer,
  ReleaseRequest,
  UnknownKey,
  UsageAnswer,
} from './types.ts'

/**
 * The rows in JSON. The catalog doesn't say which columns are never null. A `number` may be a
 * decimal, which loses digits: select it `::text`. Amounts among the arguments are decimal
 * strings.
 */
export interface Views {
  /** Each user's payer and the payer's figures: one row per user. */
  account_balances: {
    user_id: string | null
    external_id: string | null
    tenant_id: string | null
    account_id: string | null
    owner: string | null
    currency: string | null
    balance: number | null
    free_credit: number | null
    credit_limit: number | null
    frozen_balance: number | null
    outstanding_amount: number | null
    overdue_amount: number | null
    available: number | null
    balance_version: number | null
    last_charged_at: string | null
  }
  /** Sealed statements. */
  accounting_snapshots: {
    account_id: string | null
    period_start: string | null
    period_end: string | null
    first_seq: number | null
    last_seq: number | null
    owner_name: string | null
    currency: string | null
    balance_opening: number | null
    free_credit_opening: number | null
    outstanding_opening: number | null
    balance_closing: number | null
    free_credit_closing: number | null
    outstanding_closing: number | null
    expiry_due: number | null
    overdue_amount: number | null
    movements: unknown
    usage: unknown
    head_hash: string | null
    sealed_at: string | null
  }
  /** An account's figures: one row per payer. */
  billing_accounts: {
    account_id: string | null
    owner: string | null
    owner_user_id: string | null
    owner_tenant_id: string | null
    currency: string | null
    balance: number | null
    free_credit: number | null
    credit_limit: number | null
    frozen_balance: number | null
    outstanding_amount: number | null
    overdue_amount: number | null
    available: number | null
    low_balance_threshold: number | null
    time_zone: string | null
    balance_version: number | null
    last_charged_at: string | null
    created_at: string | null
    head: string | null
  }
  /** The ledger: every entry of an account, in order of seq, chained by hash. */
  billing_transactions: {
    account_id: string | null
    seq: number | null
    kind: string | null
    amount: number | null
    balance_delta: number | null
    free_credit_delta: number | null
    outstanding_delta: number | null
    balance_after: number | null
    free_credit_after: number | null
    outstanding_after: number | null
    credit_limit_after: number | null
    reference: string | null
    actor: string | null
    reason: string | null
    usage_count: number | null
    usage_digest: string | null
    refund_of_seq: number | null
    refund_of_usage_id: string | null
    metadata: unknown
    prev_hash: string | null
    hash: string | null
    created_at: string | null
    counter_account: string | null
  }
  /** Budgets of keys, users and tenants on an account, each with the amount left in its present window. */
  budgets: {
    id: string | null
    account_id: string | null
    scope: string | null
    scope_id: string | null
    amount: number | null
    period: string | null
    window_start: string | null
    window_end: string | null
    spent: number | null
    held: number | null
    remaining: number | null
    created_at: string | null
  }
  /** Upstream instances (deployments, channels); each has prices. */
  config_nodes: {
    id: string | null
    name: string | null
    provider: string | null
    model: string | null
    endpoint: string | null
    status: string | null
    created_at: string | null
    context_meters: string[] | null
  }
  /** Money set aside for requests: open, parked, captured, released or expired. */
  holds: {
    account_id: string | null
    id: string | null
    amount: number | null
    captured: number | null
    status: string | null
    expires_at: string | null
    virtual_key_id: string | null
    config_node_id: string | null
    meters: unknown
    created_at: string | null
    ended_at: string | null
    reference: string | null
    reason: string | null
    actor: string | null
    ended_by: string | null
    end_reason: string | null
  }
  /** Dated minimum charges of an event: of a book, or of a node. The book's counts before the node's. */
  minimum_charges: {
    id: number | null
    price_book_id: string | null
    config_node_id: string | null
    minimum: number | null
    currency: string | null
    effective_from: string | null
    created_at: string | null
  }
  /** The prices a member pays: of each model mounted on a key that the member sees, as it is charged now. */
  my_prices: {
    config_node_id: string | null
    name: string | null
    provider: string | null
    model: string | null
    meter: string | null
    variant: string | null
    context_over: number | null
    hours: string | null
    unit_price: number | null
    unit_size: number | null
    currency: string | null
    effective_from: string | null
    minimum: number | null
  }
  /** Events that could not be charged, with the code that says why; kept until resolved. */
  parked_usage: {
    id: string | null
    event: unknown
    usage_id: string | null
    account_id: string | null
    hold_id: string | null
    code: string | null
    created_at: string | null
    tried_at: string | null
    resolved_at: string | null
    resolution: string | null
    reason: string | null
    actor: string | null
  }
  /** Which book prices an account's usage, from when on; assign_price_book writes it. */
  price_book_assignments: {
    account_id: string | null
    price_book_id: string | null
    effective_from: string | null
    actor: string | null
    created_at: string | null
  }
  /** Dated factors of price books: 1.2 is the list + 20 %, 0 is free. From 0 to 1000, 6 decimals. */
  price_book_factors: {
    id: number | null
    price_book_id: string | null
    factor: number | null
    effective_from: string | null
    created_at: string | null
  }
  /** Price books: a customer's own prices (kind price), or our own costs (kind cost, one per currency). */
  price_books: {
    id: string | null
    name: string | null
    currency: string | null
    kind: string | null
    created_at: string | null
  }
  /** Dated rates: unit_price per unit_size of a meter, in force from effective_from until the next list. */
  prices: {
    id: number | null
    config_node_id: string | null
    meter: string | null
    unit_price: number | null
    unit_size: number | null
    currency: string | null
    effective_from: string | null
    created_at: string | null
    price_book_id: string | null
    variant: string | null
    context_over: number | null
    hours: string | null
  }
  /** Changes of the status of tenants, users, virtual keys and config nodes: actor, time and reason. */
  status_changes: {
    id: number | null
    entity: string | null
    entity_id: string | null
    old_status: string | null
    new_status: string | null
    actor: string | null
    reason: string | null
    created_at: string | null
  }
  /** Paying organisations. */
  tenants: {
    id: string | null
    name: string | null
    external_id: string | null
    currency: string | null
    status: string | null
    created_at: string | null
  }
  /** Our own cost of each charged event: by the cost book, or as the provider's answer gave it (is_upstream). */
  usage_costs: {
    account_id: string | null
    usage_id: string | null
    cost: number | null
    currency: string | null
    is_upstream: boolean | null
  }
  /** Each charged event: its user, its meters, its cost, and the ledger entry (transaction_seq) that charged it. */
  usage_logs: {
    used_at: string | null
    account_id: string | null
    id: string | null
    transaction_seq: number | null
    virtual_key_id: string | null
    user_id: string | null
    config_node_id: string | null
    hold_id: string | null
    final: boolean | null
    meters: unknown
    price_ids: number[] | null
    cost: number | null
    request_id: string | null
    metadata: unknown
    recorded_at: string | null
    variant: string | null
    minimum: number | null
    estimated: boolean | null
    price_book_id: string | null
    factor: number | null
  }
  /** Users. A tenant pays for its users; a user without a tenant pays alone. `account_id` is the payer. */
  user_profiles: {
    id: string | null
    tenant_id: string | null
    tenant_role: string | null
    external_id: string | null
    display_name: string | null
    currency: string | null
    status: string | null
    account_id: string | null
    created_at: string | null
  }
  /** Mounts: the nodes a key may hold funds for. */
  virtual_key_config_nodes: {
    virtual_key_id: string | null
    config_node_id: string | null
    created_at: string | null
  }
  /** Virtual keys by their display prefix; neither the key nor its hash is shown. */
  virtual_keys: {
    id: string | null
    key_prefix: string | null
    user_id: string | null
    tenant_id: string | null
    name: string | null
    status: string | null
    expires_at: string | null
    config_node_ids: string[] | null
    created_at: string | null
    revoked_at: string | null
    last_used_at: string | null
    previous_valid_until: string | null
  }
}

/**
 * Arguments by name; an argument with a default is optional. `result` is the answer when no
 * columns are selected.
 */
export interface Functions {
  /** Answers the news of accounts since a cursor, and the next cursor. */
  account_news: {
    args: {
      cursor?: unknown
    }
    result: AccountNews
  }
  /** Corrects an account by a signed amount, with a reason. */
  adjust_balance: {
    args: {
      account_id: string
      amount: string
      reason: string
      reference?: string | null
      expected_version?: number | null
      metadata?: unknown
    }
    result: Views['billing_transactions']
  }
  /** Prices an account's usage by a price book, from effective_from on (default: now). */
  assign_price_book: {
    args: {
      account_id: string
      price_book_id: string
      effective_from?: string | null
    }
    result: Views['price_book_assignments'][]
  }
  /** An account's figures as of a moment: all entries before it, less the free credit that had expired. */
  balance_at: {
    args: {
      account_id: string
      at: string
    }
    result: {
      account_id: string | null
      at: string | null
      seq: number | null
      balance: number | null
      free_credit: number | null
      outstanding_amount: number | null
      credit_limit: number | null
    }
  }
  /** The cache keys changed since a cursor, and the next cursor. */
  cache_changes: {
    args: {
      cursor?: unknown
    }
    result: unknown
  }
  /** Says whether a user could pay an amount now: advice, a hold is the guarantee. */
  check_budget: {
    args: {
      user_id: string
      amount: string
      virtual_key_id?: string | null
    }
    result: {
      allowed: boolean | null
      code: string | null
      account_id: string | null
      currency: string | null
      available: number | null
      remaining: number | null
    }
  }
  /** Seals a statement for each account: its entries since its last statement, until period_end. */
  close_period: {
    args: {
      period_end: string
      after?: string | null
      limit?: number | null
    }
    result: Views['accounting_snapshots'][]
  }
  /** Creates a virtual key and shows it, once: only its sha-256 is kept. */
  create_virtual_key: {
    args: {
      user_id: string
      name?: string | null
      expires_at?: string | null
      config_node_ids?: string[] | null
    }
    result: {
      id: string | null
      virtual_key: string | null
      key_prefix: string | null
      created_at: string | null
    }
  }
  /** Gives up parked events for good, frees the money of their holds, and keeps the actor and the `reason`. */
  dismiss_parked_usage: {
    args: {
      ids: string[]
      reason: string
    }
    result: Views['parked_usage'][]
  }
  /** Drops the months of usage_log that ended by older_than (UTC), once statements cover all their usage: call it twice. */
  drop_usage_partitions: {
    args: {
      older_than: string
    }
    result: unknown
  }
  /** Explains the cost of an event: its meters, prices, rounding, ledger entry and refunds. */
  explain_charge: {
    args: {
      account_id: string
      usage_id: string
    }
    result: unknown
  }
  /** Keeps open holds open for longer. */
  extend_holds: {
    args: {
      requests: ExtendRequest[]
    }
    result: (ExtendAnswer | BusyAnswer)[]
  }
  /** Freezes part of an account's money until unfreeze_funds: a hold without expiry that no event draws on. */
  freeze_funds: {
    args: {
      account_id: string
      amount: string
      reason: string
      reference?: string | null
    }
    result: Views['holds']
  }
  /** Gives promotional credit, spent before paid money; debt is paid first. */
  grant_credit: {
    args: {
      account_id: string
      amount: string
      expires_at?: string | null
      priority?: number | null
      reference?: string | null
      reason?: string | null
    }
    result: Views['billing_transactions']
  }
  /** The lowest id of a `moment`: usage and holds of then and later have that id or a higher one. */
  id_at: {
    args: {
      moment: string
    }
    result: string
  }
  /** Keeps the lines of a provider's bill, to compare them with the usage recorded (provider_differences). */
  import_provider_bill: {
    args: {
      lines: unknown
    }
    result: unknown
  }
  /** Takes over keys that are in use elsewhere; their callers notice nothing. */
  import_virtual_keys: {
    args: {
      keys: KeyImport[]
    }
    result: KeyImportAnswer[]
  }
  /** Warns of settings that the migrations may not choose for a cluster: no row when all are chosen. */
  installation_warnings: {
    args: Record<string, never>
    result: {
      code: string | null
      detail: string | null
      hint: string | null
    }[]
  }
  /** Makes the coming months of usage_log, and purges rows that are no longer needed. */
  maintain: {
    args: Record<string, never>
    result: unknown
  }
  /** Charges of a period beside our own costs: by node, model, account, user or day (UTC). */
  margins: {
    args: {
      by: string
      since: string
      before: string
    }
    result: {
      key: string | null
      name: string | null
      currency: string | null
      events: number | null
      charged: number | null
      cost_currency: string | null
      cost: number | null
      margin: number | null
    }[]
  }
  /** Makes an id for an event or a hold: a UUIDv7 of now. */
  new_id: {
    args: Record<string, never>
    result: string
  }
  /** Sets money aside for requests to come: never past `available`, nor on free credit that expires first. */
  place_holds: {
    args: {
      requests: PlaceHoldRequest[]
    }
    result: HoldAnswer[]
  }
  /** Compares the bills of providers with the usage recorded: per node, day (UTC) and meter, on days that have lines. */
  provider_differences: {
    args: {
      since?: string | null
      before?: string | null
    }
    result: {
      config_node_id: string | null
      node: string | null
      day: string | null
      meter: string | null
      currency: string | null
      billed_quantity: number | null
      recorded_quantity: number | null
      quantity_difference: number | null
      billed_amount: number | null
      recorded_cost: number | null
      amount_difference: number | null
    }[]
  }
  /** Opens accounts with the balances they had elsewhere: each account's first entry. */
  record_openings: {
    args: {
      openings: Opening[]
    }
    result: OpeningAnswer[]
  }
  /** Charges usage, exactly once per id. */
  record_usage: {
    args: {
      events: RecordedEvent[]
    }
    result: (UsageAnswer | BusyAnswer)[]
  }
  /** Gives back a charge, whole or in part: of a usage entry by `seq`, or of one event by `usage_id`. */
  refund_charge: {
    args: {
      account_id: string
      seq?: number | null
      amount?: string | null
      reference?: string | null
      usage_id?: string | null
      reason?: string | null
    }
    result: Views['billing_transactions']
  }
  /** Gives back the money that open holds still set aside. */
  release_holds: {
    args: {
      requests: ReleaseRequest[]
    }
    result: (ReleaseAnswer | BusyAnswer)[]
  }
  /** Removes a budget and its counts. */
  remove_budget: {
    args: {
      id: string
    }
    result: Views['budgets']
  }
  /** Charges parked events again, after a price or an account was fixed. */
  replay_parked_usage: {
    args: {
      ids?: string[] | null
      max_events?: number | null
    }
    result: (UsageAnswer & { parked_id: string })[]
  }
  /** Resolves a virtual key to its payer, with the payer's figures. */
  resolve_billing_account: {
    args: {
      vk?: string | null
      key_hash?: string | null
    }
    result: {
      virtual_key_id: string | null
      user_id: string | null
      tenant_id: string | null
      account_id: string | null
      owner: string | null
      name: string | null
      key_prefix: string | null
      virtual_key_status: string | null
      user_status: string | null
      tenant_status: string | null
      code: string | null
      valid_until: string | null
      config_node_ids: string[] | null
      currency: string | null
      balance: number | null
      free_credit: number | null
      credit_limit: number | null
      frozen_balance: number | null
      outstanding_amount: number | null
      overdue_amount: number | null
      available: number | null
      balance_version: number | null
    }
  }
  /** Resolves the sha-256 of a virtual key to its user and payer. */
  resolve_virtual_key: {
    args: {
      key_hash: string
    }
    result: {
      virtual_key_id: string | null
      user_id: string | null
      tenant_id: string | null
      account_id: string | null
      name: string | null
      key_prefix: string | null
      virtual_key_status: string | null
      user_status: string | null
      tenant_status: string | null
      code: string | null
      valid_until: string | null
      valid_for_ms: number | null
      config_node_ids: string[] | null
      currency: string | null
    }
  }
  /** Resolves many virtual keys at once, by their sha-256. */
  resolve_virtual_keys: {
    args: {
      key_hashes: string[]
    }
    result: (KeyContext | UnknownKey)[]
  }
  /** Takes back a top-up that the bank took back (a chargeback): by `seq`, or by its `top_up_reference`. */
  reverse_top_up: {
    args: {
      account_id: string
      seq?: number | null
      amount?: string | null
      reference?: string | null
      top_up_reference?: string | null
      reason?: string | null
    }
    result: Views['billing_transactions']
  }
  /** Ends a key for good, with its texts from before a rotation; ending it again changes nothing. */
  revoke_virtual_key: {
    args: {
      id: string
    }
    result: Views['virtual_keys']
  }
  /** Gives a virtual key a new text, and shows it, once; its id, mounts, budgets, spend and history stay. */
  rotate_virtual_key: {
    args: {
      id: string
      grace?: string | null
    }
    result: {
      id: string | null
      virtual_key: string | null
      key_prefix: string | null
      created_at: string | null
      previous_valid_until: string | null
    }
  }
  /** Sets the budget of a key, a user or a tenant on an account: the most to spend in each day, week, month, or in total. */
  set_budget: {
    args: {
      account_id: string
      scope: string
      scope_id: string
      amount: string
      period: string
    }
    result: Views['budgets']
  }
  /** Sets how far below zero the balance may go. */
  set_credit_limit: {
    args: {
      account_id: string
      credit_limit: string
      reason?: string | null
    }
    result: Views['billing_accounts']
  }
  /** Sets the funds at which an account's balance is low; null for none. */
  set_low_balance_threshold: {
    args: {
      account_id: string
      amount: string | null
    }
    result: Views['billing_accounts']
  }
  /** Replaces the rates of a node: of each meter and variant that `rates` name, from effective_from on. */
  set_rates: {
    args: {
      config_node_id: string
      rates: unknown
      price_book_id?: string | null
      currency?: string | null
      effective_from?: string | null
    }
    result: Views['prices'][]
  }
  /** Sets the status of a tenant, user, config node or virtual key, and keeps the reason. */
  set_status: {
    args: {
      entity: string
      id: string
      status: string
      reason?: string | null
    }
    result: Views['status_changes']
  }
  /** Sets the time zone in which an account's days, weeks and months begin (UTC at first). */
  set_time_zone: {
    args: {
      account_id: string
      time_zone: string
    }
    result: Views['billing_accounts']
  }
  /** Sums up the charges of a period: by virtual_key, user, config_node, meter or metadata.<tag>, most expensive first. */
  spend: {
    args: {
      by: string
      since: string
      before: string
      account_id?: string | null
    }
    result: {
      key: string | null
      name: string | null
      currency: string | null
      events: number | null
      quantity: number | null
      cost: number | null
    }[]
  }
  /** One sealed statement as a document. */
  statement: {
    args: {
      account_id: string
      period_start: string
    }
    result: unknown
  }
  /** Adds paid money to an account; debt is paid first. */
  top_up: {
    args: {
      account_id: string
      amount: string
      reference?: string | null
      reason?: string | null
      metadata?: unknown
    }
    result: Views['billing_transactions']
  }
  /** Ends a freeze: its money is available again. */
  unfreeze_funds: {
    args: {
      account_id: string
      id: string
      reason?: string | null
    }
    result: Views['holds']
  }
  /** Verifies every figure: answers a row for each problem, none when all are right. */
  verify_balances: {
    args: {
      account_id?: string | null
    }
    result: {
      account_id: string | null
      problem: string | null
      seq: number | null
      usage_id: string | null
      expected: string | null
      actual: string | null
    }[]
  }
  /** Proves that an account's history is the one that was recorded: no row when it is. */
  verify_ledger: {
    args: {
      account_id: string
      expected_head?: string | null
    }
    result: {
      account_id: string | null
      problem: string | null
      seq: number | null
      usage_id: string | null
      expected: string | null
      actual: string | null
    }[]
  }
}
