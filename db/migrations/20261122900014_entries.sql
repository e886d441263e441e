-- migrate:up
-- Entries and usage rows: append-only, each checked as it is written, each hashed.

set local role keyledger_owner;

-- accounts stay, and stay whose they are
create or replace function data.keep_account()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if tg_op = 'UPDATE' and (new.account_id, new.owner_user_id, new.owner_tenant_id, new.currency)
    is not distinct from (old.account_id, old.owner_user_id, old.owner_tenant_id, old.currency)
  then
    return new;
  end if;
  perform data.refuse(409, 'account_is_fixed', lower(tg_op) || ' on ' || tg_table_name, 'close its owner instead');
  return null;
end
$$;
create or replace trigger keep_account before delete or update of account_id, owner_user_id, owner_tenant_id, currency
  on data.account_balance for each row execute function data.keep_account();
create or replace trigger keep_account_truncate before truncate on data.account_balance
  for each statement execute function data.keep_account();
create or replace trigger append_only before update or delete on data.billing_transaction
  for each row execute function data.forbid_change();
create or replace trigger append_only_truncate before truncate on data.billing_transaction
  for each statement execute function data.forbid_change();
create or replace trigger append_only before update or delete on data.usage_log
  for each row execute function data.forbid_change();
create or replace trigger append_only_truncate before truncate on data.usage_log
  for each statement execute function data.forbid_change();

-- The facts of an entry that span columns: the name of the first one it breaks, null when it keeps
-- them all. Plain columns, not the row: so it is inlined where it is called.
create or replace function data.broken_fact(
  seq bigint,
  kind text,
  amount numeric,
  balance_delta numeric,
  free_credit_delta numeric,
  outstanding_delta numeric,
  balance_after numeric,
  free_credit_after numeric,
  outstanding_after numeric,
  credit_limit_after numeric,
  usage_count integer,
  usage_bytes integer,
  refund_of_seq bigint,
  refund_of_usage_id uuid,
  is_first boolean
)
returns text
language sql
immutable parallel safe
as $$
  select case
    when seq < 1 or (seq = 1) <> is_first then 'only_the_first_entry_has_no_previous'
    when amount <> balance_delta + free_credit_delta - outstanding_delta then 'amount_is_the_net_of_the_deltas'
    when case
        when kind in ('usage') then amount > 0
        when kind in ('top_up', 'refund', 'credit_grant') then amount <= 0
        when kind in ('top_up_reversal', 'credit_expiry') then amount >= 0
        when kind = 'limit_change' then amount <> 0
        when kind = 'adjustment' then amount = 0
      end then 'amount_has_the_sign_of_its_kind'
    when balance_after < -credit_limit_after
      or (outstanding_after <> 0 and (free_credit_after <> 0 or balance_after <> -credit_limit_after))
      then 'buckets_after_are_in_normal_form'
    when (kind = 'usage') <> (usage_count > 0) or coalesce(usage_bytes, 0) <> 32 * usage_count
      then 'only_usage_counts_usage'
    when (kind in ('refund', 'top_up_reversal')) <> (coalesce(refund_of_seq, seq) < seq)
      or (refund_of_usage_id is not null and kind <> 'refund')
      then 'only_a_refund_refunds_what_came_before'
  end
$$;

create or replace function data.check_entry()
returns trigger
language plpgsql
as $$
declare
  v_broken text;
begin
  v_broken := data.broken_fact(
    new.seq, new.kind, new.amount, new.balance_delta, new.free_credit_delta, new.outstanding_delta,
    new.balance_after, new.free_credit_after, new.outstanding_after, new.credit_limit_after,
    new.usage_count, octet_length(new.usage_list), new.refund_of_seq, new.refund_of_usage_id, new.prev_hash = '');
  if v_broken is not null then
    raise check_violation using
      message = 'new row for relation "billing_transaction" violates check "' || v_broken || '"',
      table = 'billing_transaction', constraint = v_broken;
  end if;
  return new;
end
$$;
create or replace trigger check_entry before insert on data.billing_transaction
  for each row execute function data.check_entry();

-- The canonical text of a usage row and of an entry, as json_build_array writes it. The hash
-- chain covers it.
-- The terms of a price follow where the row has some.
create or replace function data.usage_line(usage data.usage_log)
returns text
language sql
stable parallel safe
as $$
  select json_build_array(
    usage.account_id, usage.id, usage.transaction_seq, usage.virtual_key_id, usage.user_id, usage.config_node_id,
    usage.hold_id, usage.final, usage.meters, usage.price_ids, usage.cost, usage.request_id, usage.metadata,
    (extract(epoch from usage.recorded_at) * 1000000)::bigint)::text
    || case when num_nonnulls(usage.terms) > 0 then json_strip_nulls(to_json(usage.terms))::text else '' end
$$;

-- a usage row in its entry's list: its id, and 128 bits that only this content gives
create or replace function data.usage_seal(usage data.usage_log)
returns bytea
language sql
stable parallel safe
as $$
  select uuid_send(usage.id) || substr(sha256(convert_to(data.usage_line(usage), 'UTF8')), 1, 16)
$$;

create or replace function data.entry_hash(entry data.billing_transaction)
returns bytea
language sql
stable parallel safe
as $$
  select sha256(entry.prev_hash || convert_to(json_build_array(
    entry.account_id, entry.seq, entry.kind, entry.amount, entry.balance_delta, entry.free_credit_delta,
    entry.outstanding_delta, entry.balance_after, entry.free_credit_after, entry.outstanding_after,
    entry.credit_limit_after, entry.reference, entry.actor, entry.reason, entry.usage_count,
    entry.refund_of_seq, entry.refund_of_usage_id, entry.metadata,
      (extract(epoch from entry.created_at) * 1000000)::bigint)::text, 'UTF8')
    || coalesce(sha256(entry.usage_list), ''))
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
