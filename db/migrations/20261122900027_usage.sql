-- migrate:up
-- Usage is charged, exactly once per id.

set local role keyledger_owner;

create or replace view api.usage_logs with (security_barrier) as
select
  to_timestamp(('x' || substr(l.id::text, 1, 8) || substr(l.id::text, 10, 4))::bit(48)::bigint / 1000.0::double precision) as used_at,
  l.*
from (
  select l.* from data.usage_log l where (select v.sees_all from data.viewer v)
  union all
  select l.* from data.usage_log l
  where l.account_id = any (array(select v.account_id from data.visible_account v))
    and (l.account_id = any (array(select v.account_id from data.visible_account v where v.whole))
      or l.user_id = (select v.user_id from data.viewer v))
) l;
comment on view api.usage_logs is 'Each charged event: who used what, what it cost, and the ledger entry (transaction_seq) that charged it.';
grant select on api.usage_logs to keyledger_operator, keyledger_member;

-- Labels: what an event may carry for its reader. One that is unfit is left out, and the event is charged. Sizes and numbers are looked
-- at before any text is made. Null is none. Stable, since sizes are: else these would not be inlined.
create or replace function data.is_request_id(value jsonb)
returns boolean
language sql
stable parallel safe
as $$
  select case
    when value is null or value = 'null' then true
    when pg_column_size(value) > 4096 then false
    when jsonb_typeof(value) = 'number' then abs(value::numeric) < 1e40 and scale(value::numeric) <= 40
    else jsonb_typeof(value) = 'string' and length(value #>> '{}') between 1 and 512
  end
$$;

create or replace function data.is_metadata(value jsonb)
returns boolean
language sql
stable parallel safe
as $$
  select case
    when value is null or value = 'null' then true
    when jsonb_typeof(value) <> 'object' or pg_column_size(value) > 131072 then false
    -- most numbers are none of these, and need no closer look
    when jsonb_path_exists(value, '$.** ? (@ >= 1e40 || @ <= 1e-40)') and data.has_absurd_numbers(value) then false
    else octet_length(value::text) <= 16384
  end
$$;

-- Reads events: key, price and cost of each, before any account is locked, in account_id order. `codes` say why one must be parked,
-- `notes` what is left out of one: labels that are unfit, and a hold that this account doesn't have (lost with a failover, or another
-- account's).
-- Ids are cast at once, and one by one only if that fails: catching each on its own is a fifth of the work.
-- `offset 0` in an exists: else it may be hashed, by a plan of when its table was small, and read all of it.
-- The caller's own statement reads the window: it then waits for a drop of months before it takes its snapshot, not after.
create or replace function data.read_usage_events(
  events jsonb,
  taken data.usage_window,
  ids_are_well_formed boolean default true,
  out ords bigint[],
  out usage data.usage_log[],
  out codes text[],
  out notes jsonb[],
  out idle_keys uuid[]
)
returns record
language plpgsql
stable
as $$
declare
  v_first uuid := data.uuid_floor(taken.floor);
  v_beyond uuid := data.uuid_floor(taken.ceiling);
  v_ahead uuid := data.uuid_floor(clock_timestamp() + interval '2 minutes');
begin
  with parsed as materialized (
    select
      e.ord,
      e.event,
      case when ids_are_well_formed then data.text_of(e.event, 'id')::data.uuidv7 else data.to_uuidv7(data.text_of(e.event, 'id')) end as id,
      case when ids_are_well_formed then data.text_of(e.event, 'account_id')::uuid else data.to_uuid(data.text_of(e.event, 'account_id')) end
        as account_id,
      case when ids_are_well_formed then data.text_of(e.event, 'virtual_key_id')::uuid else data.to_uuid(data.text_of(e.event, 'virtual_key_id')) end
        as virtual_key_id,
      case when ids_are_well_formed then data.text_of(e.event, 'config_node_id')::uuid else data.to_uuid(data.text_of(e.event, 'config_node_id')) end
        as config_node_id,
      case when ids_are_well_formed then data.text_of(e.event, 'hold_id')::uuid else data.to_uuid(data.text_of(e.event, 'hold_id')) end as hold_id
    from jsonb_array_elements(events) with ordinality as e (event, ord)
  ), account as materialized (
    -- each looked up once: of a busy one's row there may be many versions to look through
    select jsonb_object_agg(a.account_id, a.currency) as currencies
    from data.account_balance a
    where a.account_id = any (array(select distinct i.account_id from parsed i))
  )
  select array_agg(e.ord), array_agg(e.usage), array_agg(e.code), array_agg(e.note),
    array_agg(distinct (e.usage).virtual_key_id) filter (where e.is_idle)
  into ords, usage, codes, notes, idle_keys
  from (
    select
      r.ord,
      row(
        r.account_id, r.id, null, r.virtual_key_id, r.user_id, r.config_node_id,
        -- a hold from before the window has ended, and may be purged
        case when r.hold_is_freeze is not null or r.hold_id < v_first then r.hold_id end,
        coalesce(r.event -> 'final', 'true') <> 'false', p.quantities, p.price_ids, p.cost,
        case when r.request_id_fits then data.without_keys(r.event -> 'request_id') #>> '{}' end,
        case when r.metadata_fits then data.without_keys(nullif(r.event -> 'metadata', 'null')) end, null
      )::data.usage_log as usage,
      r.is_idle,
      case when not r.request_id_fits or not r.metadata_fits or (r.hold_is_freeze is null and r.hold_id >= v_first) then
        jsonb_strip_nulls(jsonb_build_object(
          'left_out', nullif(
            array_remove(array[case when not r.request_id_fits then 'request_id' end, case when not r.metadata_fits then 'metadata' end], null),
            '{}'),
          'hold', case when r.hold_is_freeze is null and r.hold_id >= v_first then 'unknown' end))
      end as note,
      case
        when jsonb_typeof(r.event) <> 'object' then 'invalid_event'
        when r.id is null then 'invalid_id'
        when r.id < v_first or r.id >= v_beyond then 'id_outside_window'
        -- its time decides its price and its budgets' window
        when r.id >= v_ahead then 'id_not_of_now'
        when r.account_id is null then 'invalid_account_id'
        when r.virtual_key_id is null then 'invalid_virtual_key_id'
        when r.config_node_id is null then 'invalid_config_node_id'
        when r.hold_id is null and coalesce(r.event -> 'hold_id', 'null') <> 'null' then 'invalid_hold'
        when jsonb_typeof(r.event -> 'final') not in ('boolean', 'null') then 'invalid_final'
        when r.currency is null then 'account_not_found'
        when r.user_id is null then 'virtual_key_unknown'
        when p.code is not null and not exists (select from data.config_node n where n.id = r.config_node_id offset 0)
          then 'config_node_not_found'
        when r.hold_is_freeze then 'invalid_hold'
        else p.code
      end as code
    from (
      select
        i.*,
        a.currencies ->> i.account_id::text as currency,
        data.uuid_time(i.id) as at,
        (select k.user_id from data.virtual_key k where k.id = i.virtual_key_id) as user_id,
        -- null: there is no such hold in this account
        case when i.hold_id is not null then (
          select h.expires_at is null from data.hold h where h.account_id = i.account_id and h.id = i.hold_id) end as hold_is_freeze,
        data.is_request_id(i.event -> 'request_id') as request_id_fits,
        data.is_metadata(i.event -> 'metadata') as metadata_fits,
        exists (
          select from data.virtual_key_use u
          where u.virtual_key_id = i.virtual_key_id
            and (u.last_used_at is null or u.last_used_at < statement_timestamp() - interval '1 minute')
          offset 0) as is_idle
      from parsed i
      cross join account a
      offset 0
    ) r
    cross join lateral (
      select * from data.price_meters(r.config_node_id, r.event -> 'meters', r.currency, r.at) offset 0
    ) p
    order by r.account_id, r.ord
  ) e;
exception when invalid_text_representation or check_violation then
  if not ids_are_well_formed then
    raise;
  end if;
  select r.ords, r.usage, r.codes, r.notes, r.idle_keys into ords, usage, codes, notes, idle_keys
  from data.read_usage_events(events, taken, false) r;
end
$$;

-- Says when keys were last used: at most once a minute each. Skips a row that another call is at: nobody waits here, whatever they hold.
create or replace function data.mark_used(
  keys uuid[],
  usage data.usage_log[]
)
returns void
language plpgsql
as $$
begin
  update data.virtual_key_use k
  set last_used_at = d.at
  from (
    select v.virtual_key_id, e.at
    from (
      select u.virtual_key_id, least(max(data.uuid_time(u.id)), clock_timestamp()) as at
      from unnest(mark_used.usage) u
      where u.virtual_key_id = any (keys)
      group by u.virtual_key_id
    ) e
    join data.virtual_key_use v on v.virtual_key_id = e.virtual_key_id
    where v.last_used_at is null or v.last_used_at < e.at - interval '1 minute'
    for update of v skip locked
  ) d
  where k.virtual_key_id = d.virtual_key_id;
end
$$;

-- An event as it is kept: the fields an event has, without unfit labels. A field past its size, or with absurd numbers, is only said to
-- have been so.
create or replace function data.kept_event(event jsonb)
returns jsonb
language sql
immutable
as $$
  select case
    when jsonb_typeof(event) <> 'object' then
      case when pg_column_size(event) <= 65536 and not data.has_absurd_numbers(event) then data.without_keys(event) else '"too large"' end
    else (
      select coalesce(jsonb_object_agg(f.key, case
        when data.has_absurd_numbers(f.value) then '"absurd number"'
        when pg_column_size(f.value) > case f.key when 'meters' then 16384 when 'metadata' then 131072 else 4096 end then '"too large"'
        else data.without_keys(f.value)
      end), '{}')
      from jsonb_each(event) f
      where case f.key
        when 'request_id' then data.is_request_id(f.value)
        when 'metadata' then data.is_metadata(f.value)
        else f.key in ('id', 'account_id', 'virtual_key_id', 'config_node_id', 'meters', 'hold_id', 'final')
      end
    )
  end
$$;

-- Keep events that can't be charged. A digest of the event is its id, so a retry adds nothing; in its order, so that two batches don't
-- wait for each other. The money of an event's hold stays set aside: the hold is parked as well. The caller has locked the account of
-- each event that names a hold.
create or replace function data.park(
  events jsonb[],
  codes text[],
  usage data.usage_log[]
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
      where h.account_id = u.account_id and h.id = u.hold_id and (h.status = 'parked' or h.status = 'open' and h.expires_at > v_now)
    ),
    p.code
  from unnest(events, codes) with ordinality as p (event, code, n)
  join unnest(park.usage) with ordinality as u on u.ordinality = p.n
  cross join lateral (select data.kept_event(p.event) as event) r
  order by digest
  on conflict do nothing;

  update data.hold h
  set status = 'parked'
  from (select distinct u.account_id, u.hold_id from unnest(park.usage) u where u.hold_id is not null) u
  where h.account_id = u.account_id and h.id = u.hold_id and h.status = 'open' and h.expires_at > v_now
    -- one that was dismissed before sets nothing aside
    and exists (select from data.parked_usage r where r.account_id = h.account_id and r.hold_id = h.id and r.resolved_at is null);
end
$$;

-- Ends parked holds whose last parked event is charged or dismissed. One that is still in time, and whose events were none of them
-- final, is open again. The caller holds the accounts' locks.
create or replace function data.end_parked_holds(
  accounts uuid[],
  holds uuid[],
  ended_by text default null,
  reason text default null
)
returns void
language plpgsql
as $$
begin
  with ended as (
    update data.hold h
    set status = case when p.goes_on then 'open' else 'released' end,
      ended_at = case when not p.goes_on then clock_timestamp() end,
      ended_by = case when not p.goes_on then end_parked_holds.ended_by end,
      end_reason = case when not p.goes_on then end_parked_holds.reason end
    from (
      select k.account_id, k.id, k.expires_at > clock_timestamp() and e.all_open as goes_on
      from (select distinct u.account_id, u.id from unnest(accounts, holds) as u (account_id, id)) u
      cross join lateral (select * from data.hold b where b.account_id = u.account_id and b.id = u.id offset 0) k
      cross join lateral (
        select bool_and(r.resolved_at is not null) as are_resolved, bool_and(r.event -> 'final' is not distinct from 'false') as all_open
        from data.parked_usage r
        where r.account_id = u.account_id and r.hold_id = u.id
      ) e
      where k.status = 'parked' and e.are_resolved
    ) p
    where h.account_id = any (accounts) and h.account_id = p.account_id and h.id = p.id
    returning h.account_id, case when p.goes_on then 0 else h.amount - h.captured end as unspent
  )
  update data.account_balance a
  set frozen_balance = a.frozen_balance - e.unspent
  from (select n.account_id, sum(n.unspent) as unspent from ended n group by n.account_id) e
  where a.account_id = any (accounts) and a.account_id = e.account_id;
end
$$;

-- Resolves parked events whose ids are charged now, in another text. The caller holds the accounts' locks.
create or replace function data.resolve_parked(
  usage data.usage_log[],
  out accounts uuid[],
  out holds uuid[]
)
returns record
language plpgsql
as $$
begin
  with resolved as (
    update data.parked_usage r
    set resolution = 'duplicate', resolved_at = clock_timestamp(), tried_at = clock_timestamp()
    -- by key, each: a join may read all that was ever parked
    where r.id = any (array(
      select p.id
      from unnest(resolve_parked.usage) u
      cross join lateral (
        select b.id from data.parked_usage b
        where b.usage_id = u.id and b.account_id = u.account_id and b.resolved_at is null
        offset 0
      ) p))
    returning r.account_id, r.hold_id
  )
  select array_agg(r.account_id), array_agg(r.hold_id) into accounts, holds from resolved r where r.hold_id is not null;
end
$$;

-- The answer to an event that can't be charged, if its id has been: by a first try with other content. Null if not.
create or replace function data.charged_before(usage data.usage_log)
returns jsonb
language sql
stable
as $$
  select jsonb_build_object('id', l.id, 'status', 'duplicate', 'cost', l.cost::text, 'available', a.available::text,
    'seq', l.transaction_seq, 'mismatch', true)
  from data.usage_log l
  cross join lateral (select n.available from data.account_now n where n.account_id = l.account_id offset 0) a
  where l.account_id = usage.account_id and l.id = usage.id
$$;

create or replace function api.record_usage(events jsonb)
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
  v_ords bigint[];
  v_usage data.usage_log[];
  v_codes text[];
  v_notes jsonb[];
  v_idle_keys uuid[];
  v_are_good boolean;
  v_are_parked boolean;
  v_waited boolean;
  v_busy uuid[];
  v_chargeable data.usage_log[];
  v_freed_accounts uuid[];
  v_freed_holds uuid[];
  v_accounts data.account_balance[];
  v_charged bigint;
  v_event data.usage_log;
  v_account data.account_balance;
  v_next integer := 1;
  v_answers jsonb[];
  v_parked jsonb[] := '{}';
  v_parked_codes text[] := '{}';
  v_parked_usage data.usage_log[] := '{}';
  v_available jsonb;
  v_row record;
begin
  perform data.require_array('events', events);
  v_answers := array_fill(null::jsonb, array[jsonb_array_length(events)]);
  select r.ords, r.usage, r.codes, r.notes, r.idle_keys into v_ords, v_usage, v_codes, v_notes, v_idle_keys
  from data.usage_window w cross join lateral data.read_usage_events(events, w) r;
  v_chargeable := v_usage;
  v_are_good := num_nonnulls(variadic v_codes) = 0;
  -- one that is parked may keep a hold's money set aside, which needs the lock too
  select l.busy, l.waited, exists (select from data.parked_usage r where r.resolved_at is null)
  into v_busy, v_waited, v_are_parked
  from data.lock_accounts(case
    when v_are_good then array(select distinct u.account_id from unnest(v_usage) u)
    else array(
      select distinct u.account_id
      from unnest(v_usage) with ordinality u
      where v_codes[u.ordinality] is null or u.hold_id is not null)
  end) l;
  if not v_are_good or cardinality(v_busy) > 0 then
    v_chargeable := '{}';
    for i in 1 .. cardinality(v_codes) loop
      v_event := v_usage[i];
      if v_event.account_id = any (v_busy) and (v_codes[i] is null or v_event.hold_id is not null) then
        v_codes[i] := 'account_busy';
      elsif v_codes[i] is null then
        v_chargeable := v_chargeable || v_event;
      end if;
    end loop;
  end if;
  if cardinality(v_chargeable) > 0 then
    -- while it waited, another call may have parked one of these
    if v_are_parked or v_waited then
      select r.accounts, r.holds into v_freed_accounts, v_freed_holds from data.resolve_parked(v_chargeable) r;
    end if;
    select p.accounts, p.charged into v_accounts, v_charged from data.post(usage => v_chargeable) p;
    if v_freed_holds is not null then
      perform data.end_parked_holds(v_freed_accounts, v_freed_holds);
    end if;
    if v_idle_keys is not null then
      perform data.mark_used(v_idle_keys, v_chargeable);
    end if;
  end if;

  -- events and accounts are both in account_id order
  for i in 1 .. coalesce(cardinality(v_ords), 0) loop
    v_event := v_usage[i];
    if v_codes[i] is null then
      while v_next <= cardinality(v_accounts) and (v_accounts[v_next]).account_id <= v_event.account_id loop
        v_account := v_accounts[v_next];
        v_next := v_next + 1;
      end loop;
      v_answers[v_ords[i]] := jsonb_build_object(
        'id', v_event.id,
        'status', 'charged',
        'cost', v_event.cost::text,
        'available', v_account.available::text,
        'seq', v_account.balance_version
      );
    elsif v_codes[i] = 'account_busy' then
      v_answers[v_ords[i]] := jsonb_build_object('id', v_event.id, 'status', 'busy', 'code', 'account_busy');
      continue;
    else
      v_answers[v_ords[i]] := data.charged_before(v_event);
      if v_answers[v_ords[i]] is null then
        v_parked := v_parked || (events -> (v_ords[i] - 1)::integer);
        v_parked_codes := v_parked_codes || v_codes[i];
        v_parked_usage := v_parked_usage || v_event;
        v_answers[v_ords[i]] := jsonb_build_object(
          'id', data.text_of(events -> (v_ords[i] - 1)::integer, 'id'), 'status', 'parked', 'code', v_codes[i]);
      end if;
    end if;
    if v_notes[i] is not null then
      v_answers[v_ords[i]] := v_answers[v_ords[i]] || v_notes[i];
    end if;
  end loop;

  -- fewer new rows than events: the others met their first try
  if v_charged < cardinality(v_chargeable) then
    select jsonb_object_agg(a.account_id, a.available) into v_available
    from data.account_balance a
    where a.account_id = any (array(select distinct u.account_id from unnest(v_chargeable) u));
    for v_row in
      select u.i, u.account_id, l.cost, l.transaction_seq,
        (l.virtual_key_id, l.config_node_id, l.hold_id, l.final, l.meters, l.request_id, l.metadata)
          is distinct from
        (u.virtual_key_id, u.config_node_id, u.hold_id, u.final, u.meters, u.request_id, u.metadata) as mismatch
      from (
        select n.*, n.ordinality as i, row_number() over (partition by n.account_id, n.id order by n.ordinality) as copy
        from unnest(v_usage) with ordinality n
        where v_codes[n.ordinality] is null
      ) u
      -- by key, each: a join here read all that the account ever used
      cross join lateral (select * from data.usage_log b where b.account_id = u.account_id and b.id = u.id offset 0) l
      -- all but the first copy of what this very call charged
      where not (u.copy = 1 and exists (
        select from unnest(v_accounts) p where p.account_id = u.account_id and p.balance_version = l.transaction_seq))
    loop
      v_answers[v_ords[v_row.i]] := v_answers[v_ords[v_row.i]]
        || jsonb_build_object('status', 'duplicate', 'cost', v_row.cost::text, 'available', v_available ->> v_row.account_id::text,
          'seq', v_row.transaction_seq)
        || case when v_row.mismatch then '{"mismatch": true}' else '{}'::jsonb end;
    end loop;
  end if;

  if v_parked <> '{}' then
    perform data.park(v_parked, v_parked_codes, v_parked_usage);
  end if;
  return to_jsonb(v_answers);
end
$$;
comment on function api.record_usage(jsonb) is
'Charges what was used, exactly once per id.
Takes `events`, [{id, account_id, virtual_key_id, config_node_id, meters, hold_id?, final? (true), request_id?, metadata?}] and answers in
the same order [{id, status: charged | duplicate | parked | busy, code?, cost, available, seq, left_out?, hold?}], at most 10,000. ids are
UUIDv7 made by the caller: a repeated id charges nothing (`mismatch` says its content differs). What can''t be charged is parked and kept
with its code, and the money of its hold stays set aside; its neighbours are charged. `left_out` names labels that were unfit (request_id:
1 to 512 characters; metadata: an object of up to 16384 bytes); `hold` is unknown where the account has no such hold: the event is charged
without it. An id more than 2 minutes ahead of the server''s clock is parked as id_not_of_now. `busy`: as place_holds answers it.';
grant execute on function api.record_usage(jsonb) to keyledger_gateway;

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
