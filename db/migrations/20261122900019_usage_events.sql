-- migrate:up
-- Reading usage events: labels, ids, key, price and cost of each, before any account is locked.

set local role keyledger_owner;

-- Labels: fields that an event may carry for its reader. An unfit label is left out, and the event
-- is charged. Sizes and numbers are looked at before any text is made. Null is none. Stable, since
-- sizes are: else these would not be inlined.
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

-- The ids of each event. Cast at once (`strict`), and one by one only if that fails: to catch each
-- is a fifth of the work.
create or replace function data.read_event_ids(
  events jsonb,
  strict boolean
)
returns table (
  ord bigint,
  event jsonb,
  id uuid,
  account_id uuid,
  virtual_key_id uuid,
  config_node_id uuid,
  hold_id uuid
)
language sql
stable
as $$
  select
    e.ord,
    e.event,
    case when strict then data.text_of(e.event, 'id')::data.uuidv7 else data.to_uuidv7(data.text_of(e.event, 'id')) end,
    case when strict then data.text_of(e.event, 'account_id')::uuid
      else data.to_uuid(data.text_of(e.event, 'account_id')) end,
    case when strict then data.text_of(e.event, 'virtual_key_id')::uuid
      else data.to_uuid(data.text_of(e.event, 'virtual_key_id')) end,
    case when strict then data.text_of(e.event, 'config_node_id')::uuid
      else data.to_uuid(data.text_of(e.event, 'config_node_id')) end,
    case when strict then data.text_of(e.event, 'hold_id')::uuid
      else data.to_uuid(data.text_of(e.event, 'hold_id')) end
  from jsonb_array_elements(events) with ordinality as e (event, ord)
$$;

-- The parts of an event that are left out of its charge: unfit labels, and a hold that its account
-- doesn't have (lost with a failover, or another account's). Null if there are none.
create or replace function data.left_out_note(
  request_id_fits boolean,
  metadata_fits boolean,
  estimated_fits boolean,
  upstream_cost_fits boolean,
  hold_is_unknown boolean
)
returns jsonb
language sql
stable
as $$
  select case when hold_is_unknown or not (request_id_fits and metadata_fits and estimated_fits and upstream_cost_fits)
  then
    jsonb_strip_nulls(jsonb_build_object(
      'left_out', nullif(array_remove(array[
        case when not request_id_fits then 'request_id' end,
        case when not metadata_fits then 'metadata' end,
        case when not estimated_fits then 'estimated' end,
        case when not upstream_cost_fits then 'upstream_cost' end], null), '{}'),
      'hold', case when hold_is_unknown then 'unknown' end))
  end
$$;

-- Says why an event's own content can't be charged: null if it can. The ids are null where they are
-- malformed.
create or replace function data.event_code(
  event jsonb,
  id uuid,
  account_id uuid,
  virtual_key_id uuid,
  config_node_id uuid,
  hold_id uuid,
  first_id uuid,
  beyond_id uuid,
  ahead_id uuid
)
returns text
language sql
immutable
as $$
  select case
    when jsonb_typeof(event) <> 'object' then 'invalid_event'
    when id is null then 'invalid_id'
    when id < first_id or id >= beyond_id then 'id_outside_window'
    -- its time decides its price and its budgets' window
    when id >= ahead_id then 'id_not_of_now'
    when account_id is null then 'invalid_account_id'
    when virtual_key_id is null then 'invalid_virtual_key_id'
    when config_node_id is null then 'invalid_config_node_id'
    when hold_id is null and coalesce(event -> 'hold_id', 'null') <> 'null' then 'invalid_hold'
    when event ? 'variant' and data.to_variant(event -> 'variant') is null then 'invalid_variant'
    when jsonb_typeof(event -> 'final') not in ('boolean', 'null') then 'invalid_final'
  end
$$;

-- The facts of each event: who, in which currency, and which of its parts are fit.
-- `offset 0` in an exists keeps a plan from hashing, and so reading, the whole table.
create or replace function data.event_facts(
  events jsonb,
  strict boolean,
  first_id uuid,
  beyond_id uuid,
  ahead_id uuid
)
returns table (
  ord bigint,
  event jsonb,
  id uuid,
  account_id uuid,
  virtual_key_id uuid,
  config_node_id uuid,
  hold_id uuid,
  code text,
  currency text,
  user_id uuid,
  hold_is_freeze boolean,
  request_id_fits boolean,
  metadata_fits boolean,
  key_is_idle boolean
)
language sql
stable
as $$
  with parsed as materialized (
    select * from data.read_event_ids(events, strict)
  ), account as materialized (
    -- each looked up once: of a busy one's row there may be many versions to look through
    select jsonb_object_agg(a.account_id, a.currency) as currencies
    from data.account_balance a
    where a.account_id = any (array(select distinct i.account_id from parsed i))
  )
  select
    i.*,
    data.event_code(
      i.event, i.id, i.account_id, i.virtual_key_id, i.config_node_id, i.hold_id, first_id, beyond_id, ahead_id),
    a.currencies ->> i.account_id::text,
    (select k.user_id from data.virtual_key k where k.id = i.virtual_key_id),
    -- null: there is no such hold in this account
    case when i.hold_id is not null then (
      select h.expires_at is null from data.hold h where h.account_id = i.account_id and h.id = i.hold_id)
    end,
    data.is_request_id(i.event -> 'request_id'),
    data.is_metadata(i.event -> 'metadata'),
    exists (
      select from data.virtual_key_use u
      where u.virtual_key_id = i.virtual_key_id
        and (u.last_used_at is null or u.last_used_at < statement_timestamp() - interval '1 minute')
      offset 0)
  from parsed i
  cross join account a
  offset 0 -- or each use would read again
$$;

-- Reads events in the order of their accounts and ids: prices each, and says why one can't be
-- charged. The caller's own statement reads the window: it then waits for a drop of months before
-- it takes its snapshot, not after.
create or replace function data.read_usage_events(
  events jsonb,
  taken data.accepted_ids,
  strict boolean default true
)
returns data.usage_event[]
language plpgsql
stable
as $$
declare
  v_first uuid := data.uuid_floor(taken.floor);
  v_beyond uuid := data.uuid_floor(taken.ceiling);
  v_ahead uuid := data.uuid_floor(clock_timestamp() + interval '2 minutes');
  v_in_use data.terms_in_use := (select t from data.terms_in_use t);
  v_events data.usage_event[];
begin
  v_events := array(
    select row(
        r.ord,
        row(
          r.account_id, r.id, null, r.virtual_key_id, r.user_id, r.config_node_id,
          -- a hold from before the window has ended, and may be purged
          case when r.hold_is_freeze is not null or r.hold_id < v_first then r.hold_id end,
          coalesce(r.event -> 'final', 'true') <> 'false', p.quantities, p.price_ids, p.cost,
          case when r.request_id_fits then data.without_keys(r.event -> 'request_id') #>> '{}' end,
          case when r.metadata_fits then data.without_keys(nullif(r.event -> 'metadata', 'null')) end, null,
          case when t.variant <> '' or b.price_book_id is not null or p.minimum is not null or t.estimated then
            row(nullif(t.variant, ''), b.price_book_id, p.factor, p.minimum, t.estimated)::data.usage_terms
          end,
          t.own_cost
        )::data.usage_log,
        case
          when r.code is not null then r.code
          when r.currency is null then 'account_not_found'
          when r.user_id is null then 'virtual_key_unknown'
          when p.code is not null
            and not exists (select from data.config_node n where n.id = r.config_node_id offset 0)
            then 'config_node_not_found'
          when r.hold_is_freeze then 'invalid_hold'
          else p.code
        end,
        data.left_out_note(
          r.request_id_fits, r.metadata_fits,
          not r.event ? 'estimated' or jsonb_typeof(r.event -> 'estimated') in ('boolean', 'null'),
          not r.event ? 'upstream_cost' or r.event -> 'upstream_cost' = 'null'
            or (t.own_cost).amount is not null,
          coalesce(r.hold_is_freeze is null and r.hold_id >= v_first, false)),
        r.key_is_idle
      )::data.usage_event
    from data.event_facts(events, strict, v_first, v_beyond, v_ahead) r
    cross join lateral (
      select data.uuid_time(r.id) as at,
        case when r.event ? 'variant' then data.to_variant(r.event -> 'variant') else '' end as variant,
        case when r.event -> 'estimated' = 'true' then true end as estimated,
        case when r.event ? 'upstream_cost' then data.upstream_cost(r.event -> 'upstream_cost', r.currency) end
          as own_cost
      offset 0
    ) t
    cross join lateral (select * from data.book_of(r.account_id, t.at, v_in_use) offset 0) b
    cross join lateral (
      select * from data.price_meters(
        r.config_node_id, r.event -> 'meters', r.currency, t.at, t.variant, b.price_book_id, v_in_use) offset 0
    ) p
    order by r.account_id, r.id, r.ord);
  return case when v_in_use.costs then data.add_costs(v_events, v_in_use) else v_events end;
exception when invalid_text_representation or check_violation then
  if not strict then
    raise;
  end if;
  return data.read_usage_events(events, taken, strict => false);
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
