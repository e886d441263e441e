-- migrate:up
-- Freezes: money that an operator sets aside.

set local role keyledger_owner;

create or replace function api.freeze_funds(
  account_id uuid,
  amount numeric,
  reason text,
  reference text default null
)
returns api.holds
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
set enable_seqscan = off
as $$
declare
  v_account data.account_balance;
  v_hold data.hold;
  v_available numeric;
begin
  perform data.require_positive_amount(amount);
  perform data.require_reason('a freeze', reason);
  perform data.require_reference(reference);
  v_account := data.lock_account(account_id);
  select * into v_hold from data.hold h
  where h.account_id = freeze_funds.account_id and h.reference = freeze_funds.reference;
  if found and v_hold.amount <> freeze_funds.amount then
    perform data.refuse(409, 'reference_mismatch',
      'reference is used by freeze ' || v_hold.id || ' of ' || v_hold.amount,
      'use a new reference, or repeat the first call exactly');
  end if;
  if v_hold.id is not null then
    return data.shown_hold(account_id, v_hold.id);
  end if;

  v_available := least(v_account.available, (
    select min(b.available) from unnest(data.backing_past_grants(account_id)) b));
  if amount > v_available then
    perform data.refuse(402, 'insufficient_funds', 'available without credit that expires: ' || v_available,
      'freeze at most what is there');
  end if;
  v_hold.id := api.new_id();
  insert into data.hold (account_id, id, amount, created_at, reference, reason, actor)
  values (freeze_funds.account_id, v_hold.id, freeze_funds.amount, clock_timestamp(), freeze_funds.reference,
    freeze_funds.reason, data.actor());
  update data.account_balance a
  set frozen_balance = a.frozen_balance + freeze_funds.amount
  where a.account_id = freeze_funds.account_id;
  return data.shown_hold(account_id, v_hold.id);
end
$$;
comment on function api.freeze_funds(uuid, numeric, text, text) is
'Freezes part of an account''s money until unfreeze_funds: a hold without expiry that no event draws on.
Sets `amount` of `account_id` aside; `reason` is kept with it. At most the money available without
credit that expires. `reference` repeated with the same amount answers the first freeze, as it is
now, with another amount 409 reference_mismatch. Answers its row of holds. 402 insufficient_funds;
404 account_not_found; 422 invalid_amount, invalid_reason, invalid_reference.';
grant execute on function api.freeze_funds(uuid, numeric, text, text) to keyledger_operator;

create or replace function api.unfreeze_funds(
  account_id uuid,
  id uuid,
  reason text default null
)
returns api.holds
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
as $$
declare
  v_now timestamptz := clock_timestamp();
  v_actor text := data.actor();
  v_hold data.hold;
begin
  perform data.lock_account(account_id);
  select * into v_hold from data.hold h
  where h.account_id = unfreeze_funds.account_id and h.id = unfreeze_funds.id and h.expires_at is null;
  if not found then
    perform data.refuse(404, 'freeze_not_found', 'freeze ' || coalesce(id::text, 'null'),
      'send the id that freeze_funds answered');
  end if;
  if v_hold.status = 'open' then
    update data.hold h
    set status = 'released', ended_at = v_now, ended_by = v_actor, end_reason = unfreeze_funds.reason
    where h.account_id = v_hold.account_id and h.id = v_hold.id;
    update data.account_balance a
    set frozen_balance = a.frozen_balance - v_hold.amount
    where a.account_id = v_hold.account_id;
  end if;
  return data.shown_hold(account_id, id);
end
$$;
comment on function api.unfreeze_funds(uuid, uuid, text) is
'Ends a freeze: its money is available again.
`id` is that of the freeze on `account_id`; `reason` is kept with it. Repeated it changes nothing.
Answers its row of holds. 404 account_not_found, freeze_not_found.';
grant execute on function api.unfreeze_funds(uuid, uuid, text) to keyledger_operator;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
