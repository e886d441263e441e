-- migrate:up
-- Usage that could not be charged is parked: charged later, or dismissed.

set local role keyledger_owner;

create or replace view api.parked_usage as
select r.id, r.event, r.usage_id, r.account_id, r.hold_id, r.code, r.created_at, r.tried_at, r.resolved_at,
  r.resolution, r.reason, r.actor
from data.parked_usage r;
comment on view api.parked_usage is
'Events that could not be charged, with the code that says why; kept until resolved.
Fix the cause, then call replay_parked_usage; or dismiss_parked_usage, if it is never to be charged.
`hold_id`: the hold whose money stays set aside until then.';
grant select on api.parked_usage to keyledger_operator;

-- Tries parked events again and answers each, in order. The caller has settled their accounts and
-- locked the rows.
create or replace function data.try_parked(parked data.parked_usage[])
returns jsonb[]
language plpgsql
as $$
declare
  v_sent jsonb;
  v_events data.usage_event[];
  v_event data.usage_event;
  v_recorded jsonb;
  v_next integer := 0;
  v_answers jsonb[];
begin
  -- a malformed hold, or a freeze, may mean a wrong account: such an event is charged, without the
  -- hold, only by name
  select jsonb_agg(case when p.code = 'invalid_hold' then p.event - 'hold_id' else p.event end order by p.ordinality)
  into v_sent
  from unnest(parked) with ordinality p;
  -- an event that still can't be charged stays the row it is: record_usage might keep it as another
  select data.read_usage_events(v_sent, w) into v_events from data.accepted_ids w;
  v_events := array(select e from unnest(v_events) e order by e.ord);
  v_recorded := api.record_usage((
    select coalesce(jsonb_agg(v_sent -> (e.ord - 1)::integer order by e.ord), '[]')
    from unnest(v_events) e
    where e.code is null));
  foreach v_event in array v_events loop
    if v_event.code is null then
      v_answers := v_answers || (v_recorded -> v_next);
      v_next := v_next + 1;
    else
      v_answers := v_answers || (coalesce(data.charged_before(v_event.usage), jsonb_build_object(
        'id', v_sent -> (v_event.ord - 1)::integer -> 'id', 'status', 'parked', 'code', v_event.code))
        || coalesce(v_event.note, '{}'));
    end if;
  end loop;
  return v_answers;
end
$$;

-- Tries parked events again, all together. If that fails, each by itself, so that a bad one keeps
-- no other waiting.
create or replace function data.try_parked_apart(parked data.parked_usage[])
returns jsonb[]
language plpgsql
as $$
declare
  v_answers jsonb[];
begin
  return data.try_parked(parked);
exception when data_exception or integrity_constraint_violation or program_limit_exceeded or internal_error then
  for i in 1 .. cardinality(parked) loop
    begin
      v_answers := v_answers || data.try_parked(parked[i:i]);
    exception when data_exception or integrity_constraint_violation or program_limit_exceeded or internal_error then
      v_answers := v_answers
        || jsonb_build_object('id', parked[i].usage_id, 'status', 'parked', 'code', parked[i].code);
    end;
  end loop;
  return v_answers;
end
$$;

-- Replays these parked events. Accounts are locked first, rows then, as record_usage does it.
create or replace function data.replay_parked(ids uuid[])
returns jsonb
language plpgsql
set plan_cache_mode = force_custom_plan
as $$
declare
  v_busy uuid[];
  v_parked data.parked_usage[];
  v_answers jsonb[];
  v_account_id uuid;
  v_hold_ids uuid[];
begin
  v_busy := data.settle_all(array(select r.account_id from data.parked_usage r where r.id = any (ids)));
  select array_agg(r::data.parked_usage order by r.tried_at, r.id) into v_parked
  from (
    select * from data.parked_usage r
    where r.id = any (ids) and (r.resolved_at is null or r.resolution = 'dismissed')
      and (r.account_id = any (v_busy)) is not true
    order by r.id
    for update skip locked
  ) r;
  if v_parked is not null then
    v_answers := data.try_parked_apart(v_parked);
    update data.parked_usage r
    -- a wrong hold stays one, whatever else is wrong: to be charged, the event must be named
    set code = case
        when r.code = 'invalid_hold' or a.answer ->> 'status' = 'busy' then r.code
        else coalesce(a.answer ->> 'code', r.code)
      end,
      tried_at = clock_timestamp(),
      -- a dismissed event stays so, if it can't be charged now either
      resolution = case when a.is_charged then a.answer ->> 'status' else r.resolution end,
      resolved_at = case when a.is_charged then clock_timestamp() else r.resolved_at end,
      reason = case when not a.is_charged then r.reason end,
      actor = case when not a.is_charged then r.actor end
    from unnest(v_parked) with ordinality p
    join (
      select u.answer, u.ord, u.answer ->> 'status' in ('charged', 'duplicate') as is_charged
      from unnest(v_answers) with ordinality as u (answer, ord)
    ) a on a.ord = p.ordinality
    where r.id = p.id;
    for v_account_id, v_hold_ids in
      select p.account_id, array_agg(p.hold_id)
      from unnest(v_parked) p
      where p.hold_id is not null
      group by p.account_id
    loop
      perform data.end_parked_holds(v_account_id, v_hold_ids);
    end loop;
  end if;
  return coalesce((
    select jsonb_agg(a.answer || jsonb_build_object('parked_id', p.id) order by p.ordinality)
    from unnest(v_parked) with ordinality p
    join unnest(v_answers) with ordinality as a (answer, ord) on a.ord = p.ordinality
  ), '[]') || coalesce((
    select jsonb_agg(jsonb_build_object(
      'id', r.usage_id, 'status', 'busy', 'code', 'account_busy', 'parked_id', r.id) order by r.tried_at)
    from data.parked_usage r
    where r.id = any (ids) and r.account_id = any (v_busy)
  ), '[]');
end
$$;

-- Replays events whose ids were ahead of the clock, and are no longer.
create or replace function data.replay_ahead()
returns jsonb
language sql
volatile
as $$
  select data.replay_parked(array(
    select r.id
    from data.parked_usage r
    where r.resolved_at is null and r.code = 'id_not_of_now' and r.usage_id < data.uuid_floor(clock_timestamp())
    order by r.usage_id
    limit 1000
  ))
$$;

create or replace function api.replay_parked_usage(
  ids uuid[] default null,
  max_events integer default 1000
)
returns jsonb
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
as $$
begin
  return data.replay_parked(array(
    select r.id
    from data.parked_usage r
    where case
        when replay_parked_usage.ids is null then r.resolved_at is null and r.code <> 'invalid_hold'
        else (r.resolved_at is null or r.resolution = 'dismissed') and r.id = any (replay_parked_usage.ids)
      end
    order by r.tried_at, r.id
    limit least(max_events, 10000)
  ));
end
$$;
comment on function api.replay_parked_usage(uuid[], integer) is
'Charges parked events again, after a price or an account was fixed.
Each is charged once, at the price in force at the event''s own time, and its hold''s money is
drawn. An event that the gateway has sent again, mended, with the same id is resolved by that.
Without `ids` (ids of parked_usage) it takes the `max_events` tried longest ago, except those parked
as invalid_hold: a malformed hold, or a freeze, may mean a wrong account. Name such an event in
`ids` to charge it without its hold, and a dismissed one to try it again. Answers as record_usage
does, with `parked_id`.';
grant execute on function api.replay_parked_usage(uuid[], integer) to keyledger_operator;

create or replace function api.dismiss_parked_usage(
  ids uuid[],
  reason text
)
returns setof api.parked_usage
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
as $$
declare
  v_unknown uuid;
  v_account_id uuid;
  v_hold_ids uuid[];
begin
  perform data.require_reason('a dismissal', reason);
  select i.id into v_unknown
  from unnest(ids) as i (id)
  where not exists (select from data.parked_usage r where r.id = i.id)
  limit 1;
  if found or ids is null then
    perform data.refuse(404, 'parked_usage_not_found', 'parked event ' || coalesce(v_unknown::text, 'null'),
      'send ids of parked_usage, not of usage');
  end if;
  -- accounts in one order, then rows, as a replay does it
  for v_account_id in
    select distinct b.account_id
    from data.parked_usage r
    join data.account_balance b on b.account_id = r.account_id
    where r.id = any (ids) and r.resolved_at is null
    order by b.account_id
  loop
    perform data.lock_account(v_account_id);
  end loop;
  perform from data.parked_usage r where r.id = any (ids) order by r.id for update;
  for v_account_id, v_hold_ids in
    with dismissed as (
      update data.parked_usage r
      set resolution = 'dismissed', resolved_at = clock_timestamp(), reason = dismiss_parked_usage.reason,
        actor = data.actor()
      where r.id = any (ids) and r.resolved_at is null
      returning r.account_id, r.hold_id
    )
    select d.account_id, array_agg(d.hold_id) from dismissed d where d.hold_id is not null group by d.account_id
  loop
    perform data.end_parked_holds(v_account_id, v_hold_ids, data.actor(), reason);
  end loop;
  return query
  select r.id, r.event, r.usage_id, r.account_id, r.hold_id, r.code, r.created_at, r.tried_at, r.resolved_at,
    r.resolution, r.reason, r.actor
  from data.parked_usage r
  where r.id = any (ids)
  order by r.id;
end
$$;
comment on function api.dismiss_parked_usage(uuid[], text) is
'Gives up parked events for good, frees the money of their holds, and keeps the actor and the `reason`.
`ids` are ids of parked_usage. Answers their rows; a resolved event stays as it is. The same
event sent again stays dismissed, unless it can be charged by then. Name one in replay_parked_usage
to try it again. 404 parked_usage_not_found; 422 invalid_reason.';
grant execute on function api.dismiss_parked_usage(uuid[], text) to keyledger_operator;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
