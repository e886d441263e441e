-- migrate:up
-- Ending and extending holds of one account.

set local role keyledger_owner;

-- Says why a hold can't be ended or extended: null if it can.
create or replace function data.hold_code(
  request data.hold_id,
  is_busy boolean,
  account_id uuid,
  hold data.hold
)
returns text
language sql
volatile
as $$
  select case
    when is_busy then 'account_busy'
    when request.code is not null then request.code
    when account_id is null then 'account_not_found'
    when hold.id is null then 'hold_not_found'
    when hold.status <> 'open' then 'hold_' || hold.status
    when hold.expires_at <= clock_timestamp() then 'hold_expired'
    -- an operator's freeze stays open, as it was
    when hold.expires_at is null then 'hold_frozen'
  end
$$;

-- The answer to one request to end or extend a hold; `code` null: done.
create or replace function data.answer_hold(
  request data.hold_id,
  done text,
  code text,
  available numeric,
  expires_at timestamptz default null
)
returns jsonb
language sql
stable
as $$
  select jsonb_strip_nulls(jsonb_build_object(
    'id', request.id_text,
    'status', case
      when code is null then done
      when code = 'account_busy' then 'busy'
      when code in ('hold_frozen', 'insufficient_funds') then 'refused'
      else 'closed'
    end,
    'code', code,
    'expires_at', expires_at,
    'available', available::text))
$$;

-- Releases holds of one account, and answers each, in order. `wait`: as data.settle.
create or replace function data.release_for_account(
  requests data.hold_id[],
  wait boolean,
  actor text
)
returns jsonb[]
language plpgsql
as $$
declare
  v_account data.account_balance := data.settle((requests[1]).account_id, wait, actor);
  v_is_busy boolean := v_account.account_id is null and data.is_account((requests[1]).account_id);
  v_request data.hold_id;
  v_hold data.hold;
  v_now timestamptz := clock_timestamp();
  v_code text;
  v_freed numeric := 0;
  v_answers jsonb[];
begin
  foreach v_request in array release_for_account.requests loop
    select h.* into v_hold from data.hold h where h.account_id = v_account.account_id and h.id = v_request.id;
    v_code := data.hold_code(v_request, v_is_busy, v_account.account_id, v_hold);
    if v_code is null then
      update data.hold h
      set status = 'released', ended_at = v_now
      where h.account_id = v_hold.account_id and h.id = v_hold.id;
      v_freed := v_freed + v_hold.amount - v_hold.captured;
    end if;
    v_answers := v_answers || data.answer_hold(v_request, 'released', v_code, v_account.available + v_freed);
  end loop;
  update data.account_balance a
  set frozen_balance = a.frozen_balance - v_freed
  where a.account_id = v_account.account_id and v_freed > 0;
  return v_answers;
end
$$;

-- Extends holds of one account, and answers each, in order. `wait`: as data.settle. Past each
-- moment at which credit expires that a hold comes to outlive, its money must still be there.
create or replace function data.extend_for_account(
  requests data.hold_id[],
  wait boolean,
  actor text
)
returns jsonb[]
language plpgsql
as $$
declare
  v_account data.account_balance := data.settle((requests[1]).account_id, wait, actor);
  v_is_busy boolean := v_account.account_id is null and data.is_account((requests[1]).account_id);
  v_backing data.backing[] := case
    when v_account.free_credit > 0 then data.backing_past_grants(v_account.account_id) end;
  v_extended data.backing[];
  v_request data.hold_id;
  v_hold data.hold;
  v_end timestamptz;
  v_code text;
  v_answers jsonb[];
begin
  foreach v_request in array extend_for_account.requests loop
    if v_request.code is null and v_request.expires_in is null then
      v_request.code := 'invalid_expires_in';
    end if;
    select h.* into v_hold from data.hold h where h.account_id = v_account.account_id and h.id = v_request.id;
    v_code := data.hold_code(v_request, v_is_busy, v_account.account_id, v_hold);
    v_end := greatest(v_hold.expires_at, clock_timestamp() + make_interval(secs => v_request.expires_in));
    if v_code is null and v_backing <> '{}' then
      v_extended := data.backing_extended(v_backing, v_hold.expires_at, v_end, v_hold.amount - v_hold.captured);
      if exists (
        select from unnest(v_extended) b where b.at >= v_hold.expires_at and b.at < v_end and b.available < 0)
      then
        v_code := 'insufficient_funds';
      else
        v_backing := v_extended;
      end if;
    end if;
    if v_code is null then
      update data.hold h
      set expires_at = v_end
      where h.account_id = v_hold.account_id and h.id = v_hold.id
      returning h.* into v_hold;
    end if;
    v_answers := v_answers || data.answer_hold(v_request, 'extended', v_code, v_account.available,
      case when v_code is null or v_code = 'insufficient_funds' then v_hold.expires_at end);
  end loop;
  return v_answers;
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
