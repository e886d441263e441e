-- migrate:up
-- Before the request: advice, and holds: money set aside, so that what is admitted can be paid. Strictness lives here.

set local role keyledger_owner;

create or replace function api.check_budget(
  user_id uuid,
  amount numeric,
  virtual_key_id uuid default null,
  out allowed boolean,
  out code text,
  out account_id uuid,
  out currency text,
  out available numeric
)
returns record
language plpgsql
volatile
security definer
set search_path = ''
as $$
declare
  v_key_user_id uuid;
begin
  perform data.require_positive_amount(amount);
  select u.account_id,
    case
      when u.status <> 'active' then 'user_suspended'
      when t.status <> 'active' then 'tenant_suspended'
    end
  into account_id, code
  from data.user_profile u
  left join data.tenant t on t.id = u.tenant_id
  where u.id = check_budget.user_id;
  if account_id is null then
    perform data.refuse(404, 'user_not_found', 'user ' || coalesce(user_id::text, 'null'), 'create the user first');
  end if;

  if virtual_key_id is not null then
    select c.user_id, c.code into v_key_user_id, code
    from data.key_context c
    where c.virtual_key_id = check_budget.virtual_key_id;
    if v_key_user_id is distinct from check_budget.user_id then
      perform data.refuse(404, 'virtual_key_unknown', 'virtual key ' || virtual_key_id || ' is not a key of this user',
        'send the virtual_key_id that resolving gave');
    end if;
  end if;

  select a.currency, a.available into currency, available
  from data.account_now a
  where a.account_id = check_budget.account_id;
  if currency is null then
    perform data.refuse(404, 'account_not_found', 'account ' || account_id, 'accounts open with their tenant or user');
  end if;
  if code is null and amount > available then
    code := 'insufficient_funds';
  end if;
  allowed := code is null;
end
$$;
comment on function api.check_budget(uuid, numeric, uuid) is
'Says whether a user could pay an amount now: advice, a hold is the guarantee.
`code` is why not: insufficient_funds, user_suspended, tenant_suspended, virtual_key_disabled, virtual_key_expired. 404 user_not_found,
virtual_key_unknown; 422 invalid_amount.';
grant execute on function api.check_budget(uuid, numeric, uuid) to keyledger_gateway, keyledger_operator;

create or replace function data.require_array(
  name text,
  elements jsonb
)
returns void
language plpgsql
as $$
begin
  if jsonb_typeof(elements) is distinct from 'array' then
    perform data.refuse(422, 'invalid_' || name, name || ' must be a JSON array', 'send an array, of one element for a single request');
  end if;
end
$$;

-- is this moment inside the stored window of ids?
create or replace function data.in_usage_window(id uuid)
returns boolean
language sql
stable
as $$
  select exists (
    select from data.usage_window w where data.uuid_time(id) >= w.floor and data.uuid_time(id) < w.ceiling
  )
$$;

-- seconds a hold stays open: 900 when absent, 1 to 2592000 (30 days), null when it is anything else
create or replace function data.to_expires_in(value jsonb)
returns integer
language sql
immutable parallel safe
as $$
  select case
    when value is null or value = 'null' then 900
    when value #>> '{}' ~ '^[0-9]{1,7}$' and (value #>> '{}')::integer between 1 and 2592000 then (value #>> '{}')::integer
  end
$$;

-- Reads hold requests: what identity and prices say of each, before any account is locked. `code` is why it is refused.
create or replace function data.read_hold_requests(requests jsonb)
returns table (
  ord bigint,
  id text,
  hold data.hold,
  code text
)
language sql
stable
as $$
  select
    r.ord,
    r.request ->> 'id',
    row(
      r.account_id, r.id, coalesce(p.cost, r.amount), 0, 'open', statement_timestamp() + make_interval(secs => r.expires_in),
      r.virtual_key_id, r.config_node_id, p.quantities, statement_timestamp(), null
    )::data.hold,
    case
      when jsonb_typeof(r.request) <> 'object' then 'invalid_request'
      when r.id is null then 'invalid_id'
      when not data.in_usage_window(r.id) then 'id_outside_window'
      when r.account_id is null then 'invalid_account_id'
      when r.virtual_key_id is null then 'invalid_virtual_key_id'
      when r.request ->> 'config_node_id' is not null and r.config_node_id is null then 'invalid_config_node_id'
      when r.expires_in is null then 'invalid_expires_in'
      when r.is_priced and r.config_node_id is null then 'invalid_config_node_id'
      when r.is_priced = (r.request ->> 'amount' is not null) then 'invalid_amount'
      when not r.is_priced and coalesce(r.amount, 0) <= 0 then 'invalid_amount'
      when k.virtual_key_id is null then 'virtual_key_unknown'
      when k.code is not null then k.code
      when k.account_id <> r.account_id then 'invalid_account'
      when r.config_node_id is not null and r.config_node_id <> all (k.config_node_ids) then 'node_not_mounted'
      when r.is_priced then p.code
    end
  from (
    select
      e.ord,
      e.request,
      data.to_uuidv7(e.request ->> 'id') as id,
      data.to_uuid(e.request ->> 'account_id') as account_id,
      data.to_uuid(e.request ->> 'virtual_key_id') as virtual_key_id,
      data.to_uuid(e.request ->> 'config_node_id') as config_node_id,
      e.request -> 'meters' as meters,
      coalesce(e.request -> 'meters', 'null') <> 'null' as is_priced,
      data.to_amount(e.request ->> 'amount') as amount,
      data.to_expires_in(e.request -> 'expires_in') as expires_in
    from jsonb_array_elements(requests) with ordinality as e (request, ord)
  ) r
  left join lateral (select * from data.key_context c where c.virtual_key_id = r.virtual_key_id) k on true
  left join lateral (
    select * from data.price_meters(r.config_node_id, r.meters, k.currency, statement_timestamp()) where r.is_priced
  ) p on true
$$;

create or replace function api.place_holds(requests jsonb)
returns jsonb
language plpgsql
volatile
security definer
set search_path = ''
as $$
declare
  v_answers jsonb[];
  v_group record;
  v_account data.account_balance;
  v_hold data.hold;
  v_placed data.hold;
  v_available numeric;
  v_frozen numeric;
  v_code text;
  v_answer jsonb;
begin
  perform data.require_array('requests', requests);
  v_answers := array_fill(null::jsonb, array[jsonb_array_length(requests)]);

  -- accounts are locked in account_id order
  for v_group in
    select
      (r.hold).account_id as account_id,
      array_agg(r.ord order by r.ord) as ords,
      array_agg(r.id order by r.ord) as ids,
      array_agg(r.hold order by r.ord) as holds,
      array_agg(r.code order by r.ord) as codes,
      bool_or(r.code is null) as locks
    from data.read_hold_requests(requests) r
    group by 1
    order by 1
  loop
    v_account := null;
    if v_group.locks then
      v_account := data.lock_account(v_group.account_id);
    end if;
    v_available := v_account.available;
    v_frozen := 0;

    for i in 1 .. cardinality(v_group.ords) loop
      v_hold := v_group.holds[i];
      v_code := v_group.codes[i];
      if v_code is null then
        if v_account.account_id is null then
          v_code := 'account_not_found';
        elsif v_hold.amount > v_available then
          v_code := 'insufficient_funds';
        else
          insert into data.hold values (v_hold.*) on conflict do nothing;
          if found then
            v_available := v_available - v_hold.amount;
            v_frozen := v_frozen + v_hold.amount;
            v_placed := v_hold;
            v_answer := jsonb_build_object('status', 'held');
          else
            v_answer := null;
          end if;
        end if;
      end if;

      -- a retry meets its first try, whatever has changed since
      if v_code is not null or v_answer is null then
        select * into v_placed from data.hold h where h.account_id = v_hold.account_id and h.id = v_hold.id;
        if found then
          v_answer := jsonb_build_object('status', 'duplicate', 'hold_status', v_placed.status);
          if (v_placed.virtual_key_id, v_placed.config_node_id, v_placed.meters)
              is distinct from (v_hold.virtual_key_id, v_hold.config_node_id, v_hold.meters)
            or (v_hold.meters is null and v_placed.amount is distinct from v_hold.amount)
          then
            v_answer := v_answer || '{"mismatch": true}';
          end if;
        else
          v_placed := v_hold;
          v_placed.expires_at := null;
          v_answer := jsonb_build_object('status', 'refused', 'code', v_code);
        end if;
      end if;

      v_answers[v_group.ords[i]] := jsonb_strip_nulls(jsonb_build_object(
        'id', v_group.ids[i],
        'amount', v_placed.amount::text,
        'available', v_available::text,
        'expires_at', v_placed.expires_at
      )) || v_answer;
      v_answer := null;
    end loop;

    if v_frozen > 0 then
      update data.account_balance a
      set frozen_balance = a.frozen_balance + v_frozen
      where a.account_id = v_group.account_id;
    end if;
  end loop;
  return to_jsonb(v_answers);
end
$$;
comment on function api.place_holds(jsonb) is
'Sets money aside for requests about to be made; never past `available`.
Takes [{id, account_id, virtual_key_id, amount | config_node_id + meters, expires_in?}] and answers in the same order
[{id, status: held | duplicate | refused, code?, amount, available, expires_at}]. ids are UUIDv7 made by the caller; a repeated id is
`duplicate` (`hold_status` says if it is still open, `mismatch` that its content differs).';
grant execute on function api.place_holds(jsonb) to keyledger_gateway;

-- the open hold a request names, under its account's lock; null when it is not open
create or replace function data.end_or_extend_holds(
  requests jsonb,
  extend boolean
)
returns jsonb
language plpgsql
as $$
declare
  v_answers jsonb[];
  v_group record;
  v_account data.account_balance;
  v_hold data.hold;
  v_code text;
  v_expires_in integer;
begin
  perform data.require_array('requests', requests);
  v_answers := array_fill(null::jsonb, array[jsonb_array_length(requests)]);

  for v_group in
    select
      data.to_uuid(e.request ->> 'account_id') as account_id,
      array_agg(e.ord order by e.ord) as ords,
      array_agg(e.request order by e.ord) as requests
    from jsonb_array_elements(requests) with ordinality as e (request, ord)
    group by 1
    order by 1
  loop
    v_account := data.lock_account(v_group.account_id);
    for i in 1 .. cardinality(v_group.ords) loop
      v_hold := null;
      v_expires_in := data.to_expires_in(v_group.requests[i] -> 'expires_in');
      v_code := case
        when jsonb_typeof(v_group.requests[i]) <> 'object' then 'invalid_request'
        when v_group.account_id is null then 'invalid_account_id'
        when data.to_uuid(v_group.requests[i] ->> 'id') is null then 'invalid_id'
        when extend and v_expires_in is null then 'invalid_expires_in'
        when v_account.account_id is null then 'account_not_found'
      end;
      if v_code is null then
        select * into v_hold from data.hold h
        where h.account_id = v_group.account_id and h.id = (v_group.requests[i] ->> 'id')::uuid;
        if v_hold.id is null then
          v_code := 'hold_not_found';
        elsif v_hold.status <> 'open' then
          v_code := 'hold_' || v_hold.status;
        elsif extend then
          update data.hold h
          set expires_at = greatest(h.expires_at, clock_timestamp() + make_interval(secs => v_expires_in))
          where h.account_id = v_hold.account_id and h.id = v_hold.id
          returning * into v_hold;
        else
          update data.hold h
          set status = 'released', ended_at = clock_timestamp()
          where h.account_id = v_hold.account_id and h.id = v_hold.id;
          update data.account_balance a
          set frozen_balance = a.frozen_balance - (v_hold.amount - v_hold.captured)
          where a.account_id = v_hold.account_id
          returning * into v_account;
        end if;
      end if;
      v_answers[v_group.ords[i]] := jsonb_strip_nulls(jsonb_build_object(
        'id', v_group.requests[i] ->> 'id',
        'status', case when v_code is not null then 'closed' when extend then 'extended' else 'released' end,
        'code', v_code,
        'expires_at', case when extend then v_hold.expires_at end,
        'available', v_account.available::text
      ));
    end loop;
  end loop;
  return to_jsonb(v_answers);
end
$$;

create or replace function api.release_holds(requests jsonb)
returns jsonb
language sql
volatile
security definer
set search_path = ''
as $$
  select data.end_or_extend_holds(requests, extend => false)
$$;
comment on function api.release_holds(jsonb) is
'Gives back what open holds still set aside.
Takes [{id, account_id}] and answers [{id, status: released | closed, code?, available}]; `closed` means there was nothing open to give back,
`code` says why: hold_released, hold_captured, hold_expired, hold_not_found, invalid_….';
grant execute on function api.release_holds(jsonb) to keyledger_gateway;

create or replace function api.extend_holds(requests jsonb)
returns jsonb
language sql
volatile
security definer
set search_path = ''
as $$
  select data.end_or_extend_holds(requests, extend => true)
$$;
comment on function api.extend_holds(jsonb) is
'Keeps open holds open for longer.
Takes [{id, account_id, expires_in?}] and answers [{id, status: extended | closed, code?, expires_at, available}]; `expires_in` counts seconds
from now (900), and never shortens a hold.';
grant execute on function api.extend_holds(jsonb) to keyledger_gateway;

reset role;

-- migrate:down
-- none: a ledger is not rolled back
