-- migrate:up
-- Usage: what was used is charged, exactly once; what can't be charged is parked and kept.

set local role keyledger_owner;

-- What an event may be labelled with. Null for none.
create or replace function data.is_request_id(value jsonb)
returns boolean
language sql
immutable
as $$
  select length(value #>> '{}') <= 512
$$;

create or replace function data.is_metadata(value jsonb)
returns boolean
language sql
immutable
as $$
  select jsonb_typeof(value) in ('object', 'null') and octet_length(value #>> '{}') <= 16384
$$;

-- Reads events: key, price and cost of each, before any account is locked, in account_id order. `codes` say why one must be parked.
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
  out idle_keys uuid[]
)
returns record
language plpgsql
stable
as $$
declare
  v_first uuid := data.uuid_floor(taken.floor);
  v_beyond uuid := data.uuid_floor(taken.ceiling);
begin
  with parsed as materialized (
    select
      e.ord,
      e.event,
      case when ids_are_well_formed then (e.event ->> 'id')::data.uuidv7 else data.to_uuidv7(e.event ->> 'id') end as id,
      case when ids_are_well_formed then (e.event ->> 'account_id')::uuid else data.to_uuid(e.event ->> 'account_id') end
        as account_id,
      case when ids_are_well_formed then (e.event ->> 'virtual_key_id')::uuid else data.to_uuid(e.event ->> 'virtual_key_id') end
        as virtual_key_id,
      case when ids_are_well_formed then (e.event ->> 'config_node_id')::uuid else data.to_uuid(e.event ->> 'config_node_id') end
        as config_node_id,
      case when ids_are_well_formed then (e.event ->> 'hold_id')::uuid else data.to_uuid(e.event ->> 'hold_id') end as hold_id
    from jsonb_array_elements(events) with ordinality as e (event, ord)
  ), account as materialized (
    -- each looked up once: of a busy one's row there may be many versions to look through
    select jsonb_object_agg(a.account_id, a.currency) as currencies
    from data.account_balance a
    where a.account_id = any (array(select distinct i.account_id from parsed i))
  )
  select array_agg(e.ord), array_agg(e.usage), array_agg(e.code), array_agg(distinct (e.usage).virtual_key_id) filter (where e.is_idle)
  into ords, usage, codes, idle_keys
  from (
    select
      r.ord,
      row(
        r.account_id, r.id, null, r.virtual_key_id, r.user_id, r.config_node_id, r.hold_id,
        coalesce(r.event -> 'final', 'true') <> 'false', p.quantities, p.price_ids, p.cost, data.without_keys(r.event -> 'request_id') #>> '{}',
        data.without_keys(nullif(r.event -> 'metadata', 'null')), null
      )::data.usage_log as usage,
      r.is_idle,
      case
        when jsonb_typeof(r.event) <> 'object' then 'invalid_event'
        when r.id is null then 'invalid_id'
        when r.id < v_first or r.id >= v_beyond then 'id_outside_window'
        when r.account_id is null then 'invalid_account_id'
        when r.virtual_key_id is null then 'invalid_virtual_key_id'
        when r.config_node_id is null then 'invalid_config_node_id'
        when r.hold_id is null and r.event ->> 'hold_id' is not null then 'invalid_hold'
        when jsonb_typeof(r.event -> 'final') not in ('boolean', 'null') then 'invalid_final'
        when not data.is_request_id(r.event -> 'request_id') then 'invalid_request_id'
        when not data.is_metadata(r.event -> 'metadata') then 'invalid_metadata'
        when r.currency is null then 'account_not_found'
        when r.user_id is null then 'virtual_key_unknown'
        when p.code is not null and not exists (select from data.config_node n where n.id = r.config_node_id offset 0)
          then 'config_node_not_found'
        -- a hold of another account is no hold of this one, and a freeze is not to be drawn; one of before the window ended and is purged
        when r.hold_id is not null and not exists (
          select from data.hold h where h.account_id = r.account_id and h.id = r.hold_id and h.expires_at is not null offset 0)
          and (r.hold_id >= v_first
            or exists (select from data.hold h where h.account_id = r.account_id and h.id = r.hold_id offset 0))
          then 'invalid_hold'
        else p.code
      end as code
    from (
      select
        i.*,
        a.currencies ->> i.account_id::text as currency,
        (select k.user_id from data.virtual_key k where k.id = i.virtual_key_id) as user_id,
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
      select * from data.price_meters(r.config_node_id, r.event -> 'meters', r.currency, data.uuid_time(r.id)) offset 0
    ) p
    order by r.account_id, r.ord
  ) e;
exception when invalid_text_representation or check_violation then
  if not ids_are_well_formed then
    raise;
  end if;
  select r.ords, r.usage, r.codes, r.idle_keys into ords, usage, codes, idle_keys from data.read_usage_events(events, taken, false) r;
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

-- Keep events that can't be charged. A digest of the event is its id, so a retry adds nothing; in its order, so that two batches don't
-- wait for each other.
create or replace function data.park(
  events jsonb[],
  codes text[]
)
returns void
language sql
volatile
as $$
  insert into data.rejected_usage (id, event, usage_id, account_id, code)
  select
    encode(substr(sha256(convert_to(r.event::text, 'UTF8')), 1, 16), 'hex')::uuid as digest,
    r.event,
    data.to_uuid(r.event ->> 'id'),
    data.to_uuid(r.event ->> 'account_id'),
    p.code
  from unnest(events, codes) as p (event, code)
  cross join lateral (select data.without_keys(p.event) as event) r
  order by digest
  on conflict do nothing
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
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
declare
  v_ords bigint[];
  v_usage data.usage_log[];
  v_codes text[];
  v_idle_keys uuid[];
  v_chargeable data.usage_log[];
  v_accounts data.account_balance[];
  v_charged bigint;
  v_event data.usage_log;
  v_account data.account_balance;
  v_next integer := 1;
  v_answers jsonb[];
  v_parked jsonb[] := '{}';
  v_parked_codes text[] := '{}';
  v_available jsonb;
  v_row record;
begin
  perform data.require_array('events', events);
  v_answers := array_fill(null::jsonb, array[jsonb_array_length(events)]);
  select r.ords, r.usage, r.codes, r.idle_keys into v_ords, v_usage, v_codes, v_idle_keys
  from data.usage_window w cross join lateral data.read_usage_events(events, w) r;
  v_chargeable := v_usage;
  if num_nonnulls(variadic v_codes) > 0 then
    v_chargeable := '{}';
    for i in 1 .. cardinality(v_codes) loop
      if v_codes[i] is null then
        v_chargeable := v_chargeable || v_usage[i];
      end if;
    end loop;
  end if;
  if cardinality(v_chargeable) > 0 then
    perform data.lock_accounts(array(select distinct u.account_id from unnest(v_chargeable) u));
    select p.accounts, p.charged into v_accounts, v_charged from data.post(usage => v_chargeable) p;
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
    else
      v_answers[v_ords[i]] := data.charged_before(v_event);
      if v_answers[v_ords[i]] is null then
        v_parked := v_parked || (events -> (v_ords[i] - 1)::integer);
        v_parked_codes := v_parked_codes || v_codes[i];
        v_answers[v_ords[i]] := jsonb_build_object(
          'id', events -> (v_ords[i] - 1)::integer -> 'id', 'status', 'parked', 'code', v_codes[i]);
      end if;
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
    perform data.park(v_parked, v_parked_codes);
  end if;
  return to_jsonb(v_answers);
end
$$;
comment on function api.record_usage(jsonb) is
'Charges what was used, exactly once per id.
Takes `events`, [{id, account_id, virtual_key_id, config_node_id, meters, hold_id?, final? (true), request_id?, metadata?}] and answers in
the same order [{id, status: charged | duplicate | parked, code?, cost, available, seq}]. ids are UUIDv7 made by the caller: a repeated id
charges nothing (`mismatch` says its content differs). What can''t be charged is parked and kept with its code; its neighbours are charged.';
grant execute on function api.record_usage(jsonb) to keyledger_gateway;

create or replace function api.replay_rejected_usage(
  ids uuid[] default null,
  max_events integer default 1000
)
returns jsonb
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids uuid[];
  v_events jsonb;
  v_codes text[];
  v_usage data.usage_log[];
  v_recorded jsonb;
  v_next integer := 0;
  v_answers jsonb[];
begin
  -- A wrong hold may mean a wrong account: such events are charged, without the hold, only when named. What only labels an event keeps
  -- no charge waiting: it is left out where it is unfit.
  select array_agg(r.id order by r.tried_at, r.id),
    jsonb_agg(case when jsonb_typeof(r.event) <> 'object' then r.event else r.event - array(
      select f.field
      from (values
        ('hold_id', r.code <> 'invalid_hold'),
        ('request_id', data.is_request_id(r.event -> 'request_id')),
        ('metadata', data.is_metadata(r.event -> 'metadata'))
      ) as f (field, is_fit)
      where not f.is_fit
    ) end order by r.tried_at, r.id)
  into v_ids, v_events
  from (
    select * from data.rejected_usage r
    where case
        when ids is null then r.resolved_at is null and r.code <> 'invalid_hold'
        else (r.resolved_at is null or r.resolution = 'dismissed') and r.id = any (ids)
      end
    order by r.tried_at, r.id
    limit max_events
    for update skip locked
  ) r;
  if v_ids is null then
    return '[]';
  end if;

  -- what still can't be charged stays the one row it is: record_usage would keep an event that is without its hold here as another
  select array_agg(c.code order by c.ord), array_agg(c.usage order by c.ord) into v_codes, v_usage
  from data.usage_window w
  cross join lateral data.read_usage_events(v_events, w) e
  cross join lateral (
    select c.ord, c.code, e.usage[c.n] as usage from unnest(e.ords, e.codes) with ordinality as c (ord, code, n)
  ) c;
  v_recorded := api.record_usage((
    select coalesce(jsonb_agg(e.event order by e.ord), '[]')
    from jsonb_array_elements(v_events) with ordinality as e (event, ord)
    where v_codes[e.ord] is null
  ));
  for i in 1 .. cardinality(v_ids) loop
    if v_codes[i] is null then
      v_answers[i] := v_recorded -> v_next;
      v_next := v_next + 1;
    else
      v_answers[i] := coalesce(data.charged_before(v_usage[i]),
        jsonb_build_object('id', v_events -> (i - 1) -> 'id', 'status', 'parked', 'code', v_codes[i]));
    end if;
  end loop;

  update data.rejected_usage r
  -- a wrong hold stays one, whatever else is wrong: to be charged, the event must be named
  set code = case when r.code = 'invalid_hold' then r.code else coalesce(a.answer ->> 'code', r.code) end,
    tried_at = clock_timestamp(),
    -- one that was dismissed stays so, if it can't be charged now either
    resolution = case a.answer ->> 'status' when 'parked' then r.resolution else a.answer ->> 'status' end,
    resolved_at = case a.answer ->> 'status' when 'parked' then r.resolved_at else clock_timestamp() end,
    reason = case a.answer ->> 'status' when 'parked' then r.reason end,
    actor = case a.answer ->> 'status' when 'parked' then r.actor end
  from unnest(v_ids) with ordinality as i (id, ord)
  join unnest(v_answers) with ordinality as a (answer, ord) using (ord)
  where r.id = i.id;
  return (
    select jsonb_agg(a.answer || jsonb_build_object('rejected_id', i.id) order by ord)
    from unnest(v_ids) with ordinality as i (id, ord)
    join unnest(v_answers) with ordinality as a (answer, ord) using (ord)
  );
end
$$;
comment on function api.replay_rejected_usage(uuid[], integer) is
'Charges parked events again, after a price or an account was fixed.
Each is charged once, at the price in force at the event''s own time; a request_id or metadata that was refused is left out. One that the
gateway has sent again, mended, with the same id is a `duplicate`. Without `ids` (ids of rejected_usage) it takes the `max_events` tried
longest ago, except those parked as invalid_hold: a wrong hold may mean a wrong account. Name such an event in `ids` to charge it without
its hold, and a dismissed one to try it again. Answers as record_usage does, with `rejected_id`.';
grant execute on function api.replay_rejected_usage(uuid[], integer) to keyledger_operator;

create or replace function api.dismiss_rejected_usage(
  ids uuid[],
  reason text
)
returns setof api.rejected_usage
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_unknown uuid;
begin
  perform data.require_reason('a dismissal', reason);
  select i.id into v_unknown
  from unnest(ids) as i (id)
  where not exists (select from data.rejected_usage r where r.id = i.id)
  limit 1;
  if found or ids is null then
    perform data.refuse(404, 'rejected_usage_not_found', 'parked event ' || coalesce(v_unknown::text, 'null'),
      'send ids of rejected_usage, not of usage');
  end if;
  -- in one order: two dismissals don't wait for each other in a circle
  perform from data.rejected_usage r where r.id = any (ids) order by r.id for update;
  update data.rejected_usage r
  set resolution = 'dismissed', resolved_at = clock_timestamp(), reason = dismiss_rejected_usage.reason, actor = data.actor()
  where r.id = any (ids) and r.resolved_at is null;
  return query select r.* from api.rejected_usage r where r.id = any (ids) order by r.id;
end
$$;
comment on function api.dismiss_rejected_usage(uuid[], text) is
'Gives up parked events that will never be charged, and keeps who did it and why (`reason`).
`ids` are ids of rejected_usage. Answers their rows; what is resolved already stays as it is. The same event sent again stays dismissed,
unless it can be charged by then. Name one in replay_rejected_usage to try it again. 404 rejected_usage_not_found; 422 invalid_reason.';
grant execute on function api.dismiss_rejected_usage(uuid[], text) to keyledger_operator;

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
