-- migrate:up
-- Refuses a clash of names before it makes anything; then makes the roles and the two schemas.

do $$
declare
  v_clashes text;
  v_schema text;
begin
  select string_agg(format('%I.%I', n.nspname, o.name), ', ' order by n.nspname, o.name)
  into v_clashes
  from (
    select c.relnamespace as namespace, c.relname as name from pg_class c
    union
    select p.pronamespace, p.proname from pg_proc p
    union
    select t.typnamespace, t.typname from pg_type t where t.typrelid = 0 and t.typelem = 0
  ) o
  join pg_namespace n on n.oid = o.namespace
  where n.nspname = 'data' and (o.name like 'usage\_log\_%' or o.name = any (array[
      'accepted_ids', 'accepted_ids_now', 'account_balance', 'account_news', 'account_now', 'accounting_snapshot',
      'actor', 'add_costs', 'add_grant', 'admit', 'after', 'amount', 'answer_duplicates', 'answer_first_try',
      'answer_hold', 'answer_key_imports', 'answer_request', 'answer_unfit', 'await_postings', 'await_window_readers',
      'backed', 'backing', 'backing_after', 'backing_between', 'backing_extended', 'backing_of_requests',
      'backing_past_grants', 'billing_transaction', 'book_of', 'broken_fact', 'budget', 'budget_applies',
      'budget_code', 'budget_exceeded', 'budget_left', 'budget_shown', 'budget_spend', 'budgets_after',
      'budgets_left', 'budgets_of_requests', 'cache_invalidation', 'caller', 'chain_links', 'charge', 'charge_meters',
      'charge_to_refund', 'charged_before', 'check_entry', 'check_list', 'check_rate', 'check_terms', 'check_written',
      'config_node', 'context_of', 'cost_of', 'cost_steps', 'count_sealed_month', 'count_spend', 'count_usage',
      'credit_grant', 'crosses', 'currency', 'draw_grants', 'draw_holds', 'end_due_grants', 'end_due_holds',
      'end_parked_holds', 'entry_hash', 'entry_kind', 'entry_shown', 'epoch_time', 'event_code', 'event_facts',
      'exact_cost', 'expiries_due', 'extend_for_account', 'first_fault', 'first_places', 'first_tries', 'first_try',
      'forbid_change', 'forbid_truncate', 'freeze_reference_is_used_once', 'funds_of', 'grant_draw',
      'has_absurd_numbers', 'hash_context', 'hold', 'hold_code', 'hold_id', 'hold_open', 'hold_parked',
      'hold_request', 'hold_shown', 'insert_account', 'insert_key_imports', 'invalidate', 'is_account', 'is_amount',
      'is_foreign', 'is_input_meter', 'is_metadata', 'is_one', 'is_request_id', 'keep_account', 'keep_key_identity',
      'keep_node_identity', 'keep_owner_identity', 'keep_price_book', 'kept_event', 'key_context', 'key_hash',
      'key_shown', 'left_out_note', 'local_moment', 'lock_account', 'lock_key_parents', 'lock_mount_parents',
      'lock_user_parent', 'log_usage', 'make_usage_partitions', 'mark_used', 'minimum_charge', 'minimum_of',
      'minimum_of_book', 'minimum_of_node', 'moment', 'money', 'mount_deleted', 'mount_inserted', 'mount_updated',
      'moved_or_altered', 'movements_of', 'new_virtual_key', 'note_status', 'note_terms',
      'one_cost_book_per_currency', 'open_account', 'open_balance', 'open_virtual_key_use', 'outbox_horizon',
      'own_cost', 'park', 'parked_usage', 'parked_usage_sets_aside', 'parked_usage_unresolved', 'place_for_account',
      'post', 'post_one', 'previous_key_hash', 'price', 'price_book', 'price_book_assignment', 'price_book_factor',
      'price_inserted', 'price_meters', 'price_of_book', 'price_of_list', 'price_variants', 'price_with_contexts',
      'provider_bill_line', 'purge_ended', 'purge_outboxes', 'rate_fits', 'rate_meters', 'read_cursor',
      'read_event_ids', 'read_hold_ids', 'read_hold_requests', 'read_key_imports', 'read_keys_again', 'read_openings',
      'read_rates', 'read_usage_events', 'record_for_account', 'recount_budgets', 'reference_is_used_once',
      'refusal_of', 'refuse', 'refuse_dropped_usage', 'refuse_parked_usage', 'refuse_previous_hash',
      'release_for_account', 'replay_ahead', 'replay_parked', 'require_array', 'require_budget_scope',
      'require_positive_amount', 'require_reason', 'require_reference', 'resolve_parked', 'return_to_grants',
      'run_end', 'seal', 'seq_before', 'settle', 'settle_all', 'sha256', 'shown', 'shown_hold', 'shrink_parked',
      'spend_by_meter', 'spend_time', 'statement_entries', 'statement_of', 'status_change', 'tell_crossings',
      'tell_exhausted_budgets', 'tenant', 'tenant_role_kept', 'tenant_role_named', 'tenant_updated', 'terms_in_use',
      'text_of', 'to_amount', 'to_cost', 'to_expires_in', 'to_moment', 'to_quantity', 'to_uuid', 'to_uuidv7',
      'to_variant', 'to_variants', 'try_parked', 'try_parked_apart', 'upstream_cost', 'usage_differs', 'usage_event',
      'usage_faults', 'usage_line', 'usage_lists', 'usage_log', 'usage_of', 'usage_of_entries', 'usage_period',
      'usage_seal', 'usage_steps', 'usage_terms', 'user_profile', 'user_profile_updated', 'uuid_floor', 'uuid_time',
      'uuidv7', 'verify_budgets', 'verify_chain', 'verify_costs', 'verify_entries', 'verify_figures', 'verify_grants',
      'verify_heads', 'verify_refunds', 'verify_statements', 'verify_usage', 'viewer', 'virtual_key',
      'virtual_key_config_node', 'virtual_key_deleted', 'virtual_key_inserted', 'virtual_key_updated',
      'virtual_key_use', 'visible_account', 'visible_usage', 'visible_user', 'wake_for_news', 'week_minute',
      'window_start', 'windows_are_disjoint', 'without_keys'
    ]))
    or n.nspname = 'api' and o.name = any (array[
      'account_balances', 'account_news', 'accounting_snapshots', 'adjust_balance', 'assign_price_book', 'balance_at',
      'billing_accounts', 'billing_transactions', 'budgets', 'cache_changes', 'check_budget', 'close_period',
      'config_nodes', 'create_virtual_key', 'dismiss_parked_usage', 'drop_usage_partitions', 'explain_charge',
      'extend_holds', 'freeze_funds', 'grant_credit', 'holds', 'id_at', 'import_provider_bill', 'import_virtual_keys',
      'installation_warnings', 'ledger_problem', 'maintain', 'margins', 'minimum_charges', 'my_prices', 'new_id',
      'parked_usage', 'place_holds', 'price_book_assignments', 'price_book_factors', 'price_books', 'prices',
      'provider_differences', 'record_openings', 'record_usage', 'refund_charge', 'release_holds', 'remove_budget',
      'replay_parked_usage', 'resolve_billing_account', 'resolve_virtual_key', 'resolve_virtual_keys',
      'reverse_top_up', 'revoke_virtual_key', 'rotate_virtual_key', 'set_budget', 'set_credit_limit',
      'set_low_balance_threshold', 'set_rates', 'set_status', 'set_time_zone', 'spend', 'statement', 'status_changes',
      'tenants', 'top_up', 'unfreeze_funds', 'usage_costs', 'usage_logs', 'user_profiles', 'verify_balances',
      'verify_ledger', 'virtual_key_config_nodes', 'virtual_keys'
    ]);
  if v_clashes is not null then
    raise exception 'keyledger can''t be installed here: this database already has %', v_clashes
      using hint = 'rename these, or install keyledger in a database of its own; nothing was changed';
  end if;

  select n.nspname into v_schema
  from pg_namespace n
  where n.nspname in ('data', 'api') and n.nspowner is distinct from to_regrole('keyledger_owner')
    and not (
      has_schema_privilege(n.oid, 'create with grant option')
      and has_schema_privilege(n.oid, 'usage with grant option'))
  order by n.nspname
  limit 1;
  if found then
    -- dbmate shows the message alone
    raise exception
      'keyledger can''t be installed by % yet: as the owner of schema %, '
      'grant create, usage on schema % to % with grant option',
      current_user, v_schema, v_schema, quote_ident(current_user);
  end if;
end
$$;

do $$
declare
  v_role text;
  v_setting text;
  v_value text;
begin
  foreach v_role in array array['keyledger_owner', 'keyledger_gateway', 'keyledger_operator', 'keyledger_member'] loop
    if not exists (select from pg_roles where rolname = v_role) then
      begin
        execute format('create role %I nologin', v_role);
      exception
        -- another database of this cluster was migrated at the same moment
        when duplicate_object or unique_violation then null;
      end;
    end if;
  end loop;

  -- Bounds how long a role's statement may take or wait.
  -- PostgREST applies a role's settings to the requests of its tokens.
  -- Roles belong to the cluster: a setting that a role has already stays.
  -- A role that this user may not alter stays as it is.
  for v_role, v_setting, v_value in
    values ('keyledger_member', 'statement_timeout', '5s'), ('keyledger_gateway', 'statement_timeout', '10s'),
      ('keyledger_operator', 'lock_timeout', '4s')
  loop
    if not exists (
      select from pg_db_role_setting s cross join unnest(s.setconfig) as c (setting)
      where s.setrole = v_role::regrole and s.setdatabase = 0 and starts_with(c.setting, v_setting || '='))
    then
      begin
        execute format('alter role %I set %I = %L', v_role, v_setting, v_value);
      exception
        when insufficient_privilege then null;
        -- another database of this cluster was migrated at the same moment
        when internal_error or unique_violation then null;
      end;
    end if;
  end loop;

  -- the migrating user acts as the owner: a role that can't log in then owns every object
  begin
    set local role keyledger_owner;
    reset role;
  exception when insufficient_privilege then
    begin
      execute format('grant keyledger_owner to %I', current_user);
    exception when insufficient_privilege then
      raise exception
        'keyledger can''t be installed by % yet: as the role that made keyledger_owner, grant keyledger_owner to %',
        current_user, quote_ident(current_user);
    end;
  end;
end
$$;

create schema if not exists data authorization keyledger_owner;
create schema if not exists api authorization keyledger_owner;

do $$
declare
  v_schema text;
begin
  foreach v_schema in array array['data', 'api'] loop
    if (select nspowner from pg_namespace where nspname = v_schema) = 'keyledger_owner'::regrole then
      execute format('comment on schema %I is %L', v_schema, case v_schema
        when 'api' then 'keyledger: virtual keys, balances and exact charges
Callers branch on codes: the message of an error, and the `code` of each answer of a function on many.'
        else 'keyledger''s tables and internal functions: only the owner may use them.' end);
    else
      -- the owner of an earlier schema stays its owner
      execute format('grant create, usage on schema %I to keyledger_owner with grant option', v_schema);
    end if;
  end loop;
end
$$;

set local role keyledger_owner;

grant usage on schema api to keyledger_gateway, keyledger_operator, keyledger_member;
-- each function has its own grant, and only the owner may use the types
alter default privileges for role keyledger_owner revoke execute on functions from public;
alter default privileges for role keyledger_owner revoke usage on types from public;

-- A rule about one column is a domain, which Postgres checks once per value.
-- Every statement plans a table's check constraint anew (5 to 10 microseconds each, measured).
-- So the hot tables have check constraints only for rules that span columns.
create domain data.money as numeric(28, 10) constraint money_is_a_number check (value <> 'NaN');
create domain data.amount as numeric(28, 10) constraint amount_is_not_negative check (value >= 0 and value <> 'NaN');
create domain data.currency as text constraint currency_is_iso_4217 check (value ~ '^[A-Z]{3}$');
create domain data.moment as timestamptz constraint moment_is_finite check (isfinite(value));
create domain data.sha256 as bytea constraint sha256_has_32_bytes check (octet_length(value) = 32);
create domain data.uuidv7 as uuid
  constraint id_is_a_uuidv7 check (get_byte(uuid_send(value), 6) >> 4 = 7 and get_byte(uuid_send(value), 8) >> 6 = 2);
create domain data.entry_kind as text constraint kind_is_known check (value in (
  'opening', 'top_up', 'top_up_reversal', 'usage', 'refund', 'adjustment', 'credit_grant', 'credit_expiry',
  'limit_change'));

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
