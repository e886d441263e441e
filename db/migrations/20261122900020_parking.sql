-- migrate:up
-- Parking: events that can't be charged yet are kept, and the money of their holds stays set aside.

set local role keyledger_owner;

-- An event as it is kept: its known fields, without unfit labels. Of a field past its size, or with
-- absurd numbers, only that is kept.
create or replace function data.kept_event(event jsonb)
returns jsonb
language sql
immutable
as $$
  select case
    when jsonb_typeof(event) <> 'object' then
      case
        when pg_column_size(event) <= 65536 and not data.has_absurd_numbers(event) then data.without_keys(event)
        else '"too large"'
      end
    else (
      select coalesce(jsonb_object_agg(f.key, case
        when data.has_absurd_numbers(f.value) then '"absurd number"'
        when pg_column_size(f.value) > case f.key when 'meters' then 16384 when 'metadata' then 131072 else 4096 end
          then '"too large"'
        else data.without_keys(f.value)
      end), '{}')
      from jsonb_each(event) f
      where case f.key
        when 'request_id' then data.is_request_id(f.value)
        when 'metadata' then data.is_metadata(f.value)
        else f.key in (
          'id', 'account_id', 'virtual_key_id', 'config_node_id', 'meters', 'hold_id', 'final', 'variant', 'estimated',
          'upstream_cost')
      end
    )
  end
$$;

-- Keeps events of one account that can't be charged. An event's digest is its id, so a retry adds
-- nothing; they are written in its order, so that two calls don't wait for each other. An event's
-- hold is parked as well. The caller has settled the account if an event names a hold.
create or replace function data.park(
  events jsonb[],
  codes text[],
  account_id uuid,
  hold_ids uuid[]
)
returns void
language plpgsql
as $$
declare
  v_now timestamptz := clock_timestamp();
begin
  insert into data.parked_usage (id, event, usage_id, account_id, hold_id, code)
  select
    encode(substr(sha256(convert_to(r.event::text, 'UTF8')), 1, 16), 'hex')::uuid as digest,
    r.event,
    data.to_uuid(data.text_of(r.event, 'id')),
    data.to_uuid(data.text_of(r.event, 'account_id')),
    (
      select h.id from data.hold h
      where h.account_id = park.account_id and h.id = p.hold_id
        and (h.status = 'parked' or h.status = 'open' and h.expires_at > v_now)
    ),
    p.code
  from unnest(park.events, park.codes, park.hold_ids) as p (event, code, hold_id)
  cross join lateral (select data.kept_event(p.event) as event) r
  order by digest
  on conflict do nothing;

  update data.hold h
  set status = 'parked'
  where h.account_id = park.account_id and h.id = any (park.hold_ids) and h.status = 'open' and h.expires_at > v_now
    -- an event that was dismissed before sets nothing aside
    and exists (
      select from data.parked_usage r
      where r.account_id = h.account_id and r.hold_id = h.id and r.resolved_at is null);
end
$$;

-- Ends an account's parked holds whose last parked event is charged or dismissed. A hold that is
-- still in time is open again, if none of its events was final. The caller has settled the account.
create or replace function data.end_parked_holds(
  account_id uuid,
  hold_ids uuid[],
  ended_by text default null,
  reason text default null
)
returns void
language plpgsql
as $$
declare
  v_hold data.hold;
  v_now timestamptz := clock_timestamp();
  v_are_resolved boolean;
  v_goes_on boolean;
  v_freed numeric := 0;
begin
  for v_hold in
    select h.* from data.hold h
    where h.account_id = end_parked_holds.account_id and h.id = any (end_parked_holds.hold_ids) and h.status = 'parked'
  loop
    select bool_and(r.resolved_at is not null), bool_and(r.event -> 'final' is not distinct from 'false')
    into v_are_resolved, v_goes_on
    from data.parked_usage r
    where r.account_id = v_hold.account_id and r.hold_id = v_hold.id;
    continue when v_are_resolved is not true;
    v_goes_on := v_goes_on and v_hold.expires_at > v_now;
    update data.hold h
    set status = case when v_goes_on then 'open' else 'released' end,
      ended_at = case when not v_goes_on then v_now end,
      ended_by = case when not v_goes_on then end_parked_holds.ended_by end,
      end_reason = case when not v_goes_on then end_parked_holds.reason end
    where h.account_id = v_hold.account_id and h.id = v_hold.id;
    if not v_goes_on then
      v_freed := v_freed + v_hold.amount - v_hold.captured;
    end if;
  end loop;
  update data.account_balance a
  set frozen_balance = a.frozen_balance - v_freed
  where a.account_id = end_parked_holds.account_id and v_freed > 0;
end
$$;

-- Resolves an account's parked events whose ids are being charged, in another text. Answers the
-- holds they set money aside by. The caller has settled the account.
create or replace function data.resolve_parked(
  account_id uuid,
  usage_ids uuid[]
)
returns uuid[]
language plpgsql
as $$
declare
  v_hold_id uuid;
  v_hold_ids uuid[];
begin
  for v_hold_id in
    update data.parked_usage r
    set resolution = 'duplicate', resolved_at = clock_timestamp(), tried_at = clock_timestamp()
    where r.usage_id = any (resolve_parked.usage_ids) and r.account_id = resolve_parked.account_id
      and r.resolved_at is null
    returning r.hold_id
  loop
    v_hold_ids := v_hold_ids || v_hold_id;
  end loop;
  return array_remove(v_hold_ids, null);
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
