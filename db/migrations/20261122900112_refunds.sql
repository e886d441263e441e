-- migrate:up
-- Money back.

set local role keyledger_owner;

-- The usage entry that a refund names, by its seq or by an event in it; refused if there is none.
create or replace function data.charge_to_refund(
  account_id uuid,
  seq bigint,
  usage_id uuid
)
returns data.billing_transaction
language plpgsql
set enable_seqscan = off
as $$
declare
  v_seq bigint := charge_to_refund.seq;
  v_charge data.billing_transaction;
begin
  if usage_id is not null then
    select l.transaction_seq into v_seq
    from data.usage_log l
    where l.account_id = charge_to_refund.account_id and l.id = charge_to_refund.usage_id;
    if not found then
      perform data.refuse_dropped_usage(usage_id);
    end if;
    if v_seq is null or v_seq <> charge_to_refund.seq then
      perform data.refuse(404, 'charge_not_found', 'usage ' || usage_id,
        'send the id of an event charged to this account, with its seq or none');
    end if;
  end if;
  select t.* into v_charge from data.billing_transaction t
  where t.account_id = charge_to_refund.account_id and t.seq = v_seq and t.kind = 'usage';
  if not found then
    perform data.refuse(404, 'charge_not_found', 'entry ' || coalesce(charge_to_refund.seq::text, 'null'),
      'send the seq of a usage entry, or a usage_id');
  end if;
  return v_charge;
end
$$;

-- Gives part of a charge back to the grants it was drawn from, the last drawn first, as far as they
-- have not expired. Answers how much they took.
create or replace function data.return_to_grants(
  account_id uuid,
  seq bigint,
  amount numeric
)
returns numeric
language plpgsql
as $$
declare
  v_returned numeric := 0;
  v_draw data.grant_draw;
  v_part numeric;
begin
  for v_draw in
    select d.*
    from data.grant_draw d
    join data.credit_grant g on g.account_id = d.account_id and g.seq = d.grant_seq
    where d.account_id = return_to_grants.account_id and d.seq = return_to_grants.seq and d.returned < d.amount
      and (g.expires_at is null or g.expires_at > clock_timestamp())
    order by g.priority desc, g.expires_at desc nulls first, g.seq desc
  loop
    v_part := least(return_to_grants.amount - v_returned, v_draw.amount - v_draw.returned);
    exit when v_part <= 0;
    update data.grant_draw d
    set returned = d.returned + v_part
    where d.account_id = v_draw.account_id and d.seq = v_draw.seq and d.grant_seq = v_draw.grant_seq;
    update data.credit_grant g
    set remaining = g.remaining + v_part
    where g.account_id = v_draw.account_id and g.seq = v_draw.grant_seq;
    v_returned := v_returned + v_part;
  end loop;
  return v_returned;
end
$$;

create or replace function api.refund_charge(
  account_id uuid,
  seq bigint default null,
  amount numeric default null,
  reference text default null,
  usage_id uuid default null,
  reason text default null
)
returns api.billing_transactions
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
set enable_seqscan = off
as $$
declare
  v_account data.account_balance;
  v_charge data.billing_transaction;
  v_first_seq bigint;
  v_refunded numeric;
  v_left numeric;
  v_debt numeric;
  v_money numeric;
  v_to_grants numeric;
begin
  if amount is not null then
    perform data.require_positive_amount(amount);
  end if;
  v_account := data.lock_account(account_id);
  v_charge := data.charge_to_refund(account_id, seq, usage_id);
  v_first_seq := data.first_try(account_id, 'refund', amount, reference, null, v_charge.seq, usage_id);
  if v_first_seq is not null then
    return data.shown(account_id, v_first_seq);
  end if;

  -- over all refunds of the entry, and of the event, whatever their references
  select coalesce(sum(t.amount), 0), least(-v_charge.amount - coalesce(sum(t.amount), 0),
    (select l.cost from data.usage_log l
      where l.account_id = refund_charge.account_id and l.id = refund_charge.usage_id)
      - coalesce(sum(t.amount) filter (where t.refund_of_usage_id = refund_charge.usage_id), 0))
  into v_refunded, v_left
  from data.billing_transaction t
  where t.account_id = refund_charge.account_id and t.refund_of_seq = v_charge.seq and t.kind = 'refund';
  amount := coalesce(amount, v_left);
  if amount > v_left or v_left <= 0 then
    perform data.refuse(409, 'refund_exceeds_charge', 'left to refund: ' || v_left::text,
      'refund at most what is left');
  end if;

  -- debt is paid first; then money comes back before free credit, and the rest of a grant that
  -- expired goes to the balance
  v_debt := least(amount, v_account.outstanding_amount);
  v_money := -v_charge.amount + v_charge.free_credit_delta;
  v_to_grants := data.return_to_grants(account_id, v_charge.seq, least(
    greatest(v_refunded + amount - v_money, 0) - greatest(v_refunded - v_money, 0), amount - v_debt));
  v_account := data.post(v_account, 'refund', balance_delta => amount - v_debt - v_to_grants,
    free_credit_delta => v_to_grants, outstanding_delta => -v_debt, reference => reference, reason => reason,
    refund_of_seq => v_charge.seq, refund_of_usage_id => usage_id);
  return data.shown(account_id, v_account.balance_version);
end
$$;
comment on function api.refund_charge(uuid, bigint, numeric, text, uuid, text) is
'Gives back a charge, whole or in part: of a usage entry by `seq`, or of one event by `usage_id`.
Gives `amount` back to `account_id`; `reason` is kept with the entry. At most the charge, over
all refunds of the entry and of the event together; `amount` null: all that is left. Pays debt
first; money comes back before free credit, which returns to grants not yet expired, else to the
balance. Repeated with the same `reference` it answers the first entry. 404 account_not_found,
charge_not_found; 409 refund_exceeds_charge, reference_mismatch; 410 usage_dropped; 422
invalid_amount.';
grant execute on function api.refund_charge(uuid, bigint, numeric, text, uuid, text) to keyledger_operator;

create or replace function api.reverse_top_up(
  account_id uuid,
  seq bigint default null,
  amount numeric default null,
  reference text default null,
  top_up_reference text default null,
  reason text default null
)
returns api.billing_transactions
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
set plan_cache_mode = force_custom_plan
set enable_seqscan = off
as $$
declare
  v_account data.account_balance;
  v_top_up data.billing_transaction;
  v_first_seq bigint;
  v_left numeric;
begin
  if amount is not null then
    perform data.require_positive_amount(amount);
  end if;
  v_account := data.lock_account(account_id);
  select * into v_top_up from data.billing_transaction t
  where t.account_id = reverse_top_up.account_id and t.kind = 'top_up'
    and (t.seq = reverse_top_up.seq or reverse_top_up.seq is null)
    and (t.reference = top_up_reference or top_up_reference is null)
    and num_nonnulls(reverse_top_up.seq, top_up_reference) > 0;
  if not found then
    perform data.refuse(404, 'top_up_not_found', concat_ws(', ', 'entry ' || seq, 'reference ' || top_up_reference),
      'send the seq of a top_up entry, or its reference as top_up_reference');
  end if;

  v_first_seq := data.first_try(account_id, 'top_up_reversal', -amount, reference, null, v_top_up.seq);
  if v_first_seq is not null then
    return data.shown(account_id, v_first_seq);
  end if;

  select v_top_up.amount + coalesce(sum(t.amount), 0) into v_left
  from data.billing_transaction t
  where t.account_id = reverse_top_up.account_id and t.refund_of_seq = v_top_up.seq;
  amount := coalesce(amount, v_left);
  if amount > v_left or v_left <= 0 then
    perform data.refuse(409, 'reversal_exceeds_top_up', 'left to reverse: ' || v_left::text,
      'reverse at most what is left');
  end if;
  v_account := data.post(v_account, 'top_up_reversal', balance_delta => -amount,
    reference => reference, reason => reason, refund_of_seq => v_top_up.seq);
  return data.shown(account_id, v_account.balance_version);
end
$$;
comment on function api.reverse_top_up(uuid, bigint, numeric, text, text, text) is
'Takes back a top-up that the bank took back (a chargeback): by `seq`, or by its `top_up_reference`.
Takes `amount` from `account_id`; `reason` is kept with the entry. At most the top-up, over
all reversals together; `amount` null: all that is left. Money that is spent already becomes debt.
Repeated with the same `reference` it answers the first entry. 404 account_not_found,
top_up_not_found; 409 reversal_exceeds_top_up, reference_mismatch; 422 invalid_amount.';
grant execute on function api.reverse_top_up(uuid, bigint, numeric, text, text, text) to keyledger_operator;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
