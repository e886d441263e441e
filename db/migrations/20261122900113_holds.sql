-- migrate:up
-- Holds: money set aside for a request, so that each admitted request can be paid.

set local role keyledger_owner;

create or replace view data.hold_shown as
select h.account_id, h.id, h.amount, h.captured,
  case when h.status = 'open' and h.expires_at <= statement_timestamp() then 'expired' else h.status end as status,
  h.expires_at, h.virtual_key_id, h.config_node_id, h.meters, h.created_at, h.ended_at,
  h.reference, h.reason, h.actor, h.ended_by, h.end_reason
from data.hold h;
comment on view data.hold_shown is 'Holds as api.holds shows them, of every account.';

create or replace view api.holds with (security_barrier) as
select h.account_id, h.id, h.amount, h.captured,
  case when h.status = 'open' and h.expires_at <= statement_timestamp() then 'expired' else h.status end as status,
  h.expires_at, h.virtual_key_id, h.config_node_id, h.meters, h.created_at, h.ended_at,
  h.reference, h.reason, h.actor, h.ended_by, h.end_reason
from (
  select h.* from data.hold h where (select v.sees_all from data.viewer v)
  union all
  select h.* from data.hold h
  where h.account_id = any (array(select v.account_id from data.visible_account v))
    and (h.account_id = any (array(select v.account_id from data.visible_account v where v.whole))
      or h.virtual_key_id = any (array(
        select k.id from data.virtual_key k where k.user_id = (select v.user_id from data.viewer v))))
) h;
comment on view api.holds is
'Money set aside for requests: open, parked, captured, released or expired.
A parked one waits for an event that could not be charged yet: it doesn''t expire, and ends when the
event is charged or dismissed. A hold without expires_at is an operator''s freeze: `reference`,
`reason` and `actor` say why and by whom, `ended_by` and `end_reason` its end.';
grant select on api.holds to keyledger_gateway, keyledger_operator, keyledger_member;

-- a hold as api.holds shows it
create or replace function data.shown_hold(
  account_id uuid,
  id uuid
)
returns api.holds
language plpgsql
stable
as $$
declare
  v_shown api.holds;
begin
  select * into v_shown from data.hold_shown h where h.account_id = shown_hold.account_id and h.id = shown_hold.id;
  return v_shown;
end
$$;

-- Places holds of one account, or answers why not. `wait`: as data.settle. Only a request that may
-- be admitted needs the lock.
create or replace function data.place_for_account(
  requests data.hold_request[],
  wait boolean,
  actor text
)
returns jsonb[]
language plpgsql
as $$
declare
  v_requests data.hold_request[] := place_for_account.requests;
  v_account_id uuid := ((v_requests[1]).hold).account_id;
  v_request data.hold_request;
  v_needs_lock boolean := false;
  v_account data.account_balance;
  v_refusal jsonb;
begin
  foreach v_request in array v_requests loop
    v_needs_lock := v_needs_lock or v_request.code is null;
  end loop;
  if v_needs_lock then
    v_account := data.settle(v_account_id, false, actor);
    if v_account.account_id is null and place_for_account.wait then
      v_account := data.settle(v_account_id, true, actor);
      v_requests := data.read_keys_again(v_requests);
    end if;
    if v_account.account_id is null then
      v_refusal := case
        when data.is_account(v_account_id)
        then '{"status": "busy", "code": "account_busy"}'::jsonb
        else '{"status": "refused", "code": "account_not_found"}' end;
    end if;
  end if;
  return data.admit(v_account, v_requests, v_refusal);
end
$$;

create or replace function api.place_holds(requests jsonb)
returns jsonb
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '500ms'
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
declare
  v_actor text := data.actor();
  v_requests data.hold_request[];
  v_account_ids uuid[];
  v_wait boolean;
  v_first integer := 1;
  v_last integer;
  v_of_account jsonb[];
  v_answers jsonb[];
begin
  perform data.require_array('requests', requests);
  v_answers := array_fill(null::jsonb, array[jsonb_array_length(requests)]);
  v_requests := data.read_hold_requests(requests);
  v_account_ids := array(select (r.hold).account_id from unnest(v_requests) r);
  v_wait := data.is_one(v_account_ids);
  while v_first <= cardinality(v_requests) loop
    v_last := data.run_end(v_account_ids, v_first);
    v_of_account := data.place_for_account(v_requests[v_first:v_last], v_wait, v_actor);
    for i in v_first .. v_last loop
      v_answers[(v_requests[i]).ord] := v_of_account[i - v_first + 1];
    end loop;
    v_first := v_last + 1;
  end loop;
  return to_jsonb(v_answers);
end
$$;
comment on function api.place_holds(jsonb) is
'Sets money aside for requests to come: never past `available`, nor on free credit that expires first.
Takes `requests`, [{id, account_id, virtual_key_id, amount | config_node_id + meters, expires_in?}]
and answers in the same order [{id, status: held | duplicate | refused | busy, code?, amount,
available, expires_at}], at most 10,000. ids are UUIDv7 made by the caller, of now (id_not_of_now:
over 2 minutes ahead or 1 hour behind); meters are priced at the id''s time, for the service tier
`variant`, or for the dearest of `variants`. A repeated id is `duplicate` (`hold_status` says if it is
still open, `mismatch` that its content or its price differs). `available` is the account''s, free
credit that expires before the hold included: insufficient_funds may come with more available than
was asked. key_budget_exceeded, user_budget_exceeded and tenant_budget_exceeded come with the rest
of the budget (`remaining`); the holds of one call share
it. `busy` (account_busy): another call has the account, and this one has others; nothing was held,
so send that account''s alone. A call for one account waits half a second for it, then fails with
SQLSTATE 55P03 (lock_timeout).';
grant execute on function api.place_holds(jsonb) to keyledger_gateway;

create or replace function api.release_holds(requests jsonb)
returns jsonb
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '500ms'
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
declare
  v_actor text := data.actor();
  v_requests data.hold_id[];
  v_account_ids uuid[];
  v_wait boolean;
  v_first integer := 1;
  v_last integer;
  v_of_account jsonb[];
  v_answers jsonb[];
begin
  perform data.require_array('requests', requests);
  v_answers := array_fill(null::jsonb, array[jsonb_array_length(requests)]);
  v_requests := data.read_hold_ids(requests);
  v_account_ids := array(select r.account_id from unnest(v_requests) r);
  v_wait := data.is_one(v_account_ids);
  while v_first <= cardinality(v_requests) loop
    v_last := data.run_end(v_account_ids, v_first);
    v_of_account := data.release_for_account(v_requests[v_first:v_last], v_wait, v_actor);
    for i in v_first .. v_last loop
      v_answers[(v_requests[i]).ord] := v_of_account[i - v_first + 1];
    end loop;
    v_first := v_last + 1;
  end loop;
  return to_jsonb(v_answers);
end
$$;
comment on function api.release_holds(jsonb) is
'Gives back the money that open holds still set aside.
Takes `requests`, [{id, account_id}] and answers [{id, status: released | closed | refused | busy,
code?, available}]; `closed` means there was nothing open to give back, `code` says why:
hold_released, hold_captured, hold_expired, hold_parked (an event that could not be charged yet
needs it), hold_not_found, invalid_…. `refused` as hold_frozen: an operator''s freeze is the
operator''s to end. `busy`: as place_holds answers it.';
grant execute on function api.release_holds(jsonb) to keyledger_gateway;

create or replace function api.extend_holds(requests jsonb)
returns jsonb
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '500ms'
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
declare
  v_actor text := data.actor();
  v_requests data.hold_id[];
  v_account_ids uuid[];
  v_wait boolean;
  v_first integer := 1;
  v_last integer;
  v_of_account jsonb[];
  v_answers jsonb[];
begin
  perform data.require_array('requests', requests);
  v_answers := array_fill(null::jsonb, array[jsonb_array_length(requests)]);
  v_requests := data.read_hold_ids(requests);
  v_account_ids := array(select r.account_id from unnest(v_requests) r);
  v_wait := data.is_one(v_account_ids);
  while v_first <= cardinality(v_requests) loop
    v_last := data.run_end(v_account_ids, v_first);
    v_of_account := data.extend_for_account(v_requests[v_first:v_last], v_wait, v_actor);
    for i in v_first .. v_last loop
      v_answers[(v_requests[i]).ord] := v_of_account[i - v_first + 1];
    end loop;
    v_first := v_last + 1;
  end loop;
  return to_jsonb(v_answers);
end
$$;
comment on function api.extend_holds(jsonb) is
'Keeps open holds open for longer.
Takes `requests`, [{id, account_id, expires_in?}] and answers [{id, status: extended | closed |
refused | busy, code?, expires_at, available}]; `expires_in` counts seconds from now (900), and
never shortens a hold. `refused` leaves the hold open as it was: insufficient_funds where free
credit it stands on expires first, hold_frozen for an operator''s freeze.';
grant execute on function api.extend_holds(jsonb) to keyledger_gateway;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
