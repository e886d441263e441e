-- migrate:up
-- Small tools used by every other file: refusals, reading input, UUIDv7, who is asking.

set local role keyledger_owner;

-- raise a coded refusal: PostgREST answers with the status, pg shows the same fields
create or replace function data.refuse(
  status integer,
  code text,
  detail text default '',
  hint text default ''
)
returns void
language plpgsql
as $$
begin
  raise exception using errcode = 'PT' || status, message = code, detail = detail, hint = hint;
end
$$;

-- history is append-only: the trigger that refuses all else
create or replace function data.forbid_change()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform data.refuse(409, 'append_only', lower(tg_op) || ' on ' || tg_table_name, 'add a new row that corrects the old one');
  return null;
end
$$;

-- the text as a uuid, null when it isn't one (a caught cast is four times faster than a pattern)
create or replace function data.to_uuid(value text)
returns uuid
language plpgsql
immutable parallel safe
as $$
begin
  return value::uuid;
exception when invalid_text_representation then
  return null;
end
$$;

-- the text as a UUIDv7, null when it isn't one
create or replace function data.to_uuidv7(value text)
returns uuid
language plpgsql
immutable parallel safe
as $$
begin
  return value::data.uuidv7;
exception when invalid_text_representation or check_violation then
  return null;
end
$$;

-- the text as a moment, null when it isn't one
create or replace function data.to_moment(value text)
returns timestamptz
language plpgsql
stable
as $$
begin
  -- words (now, tomorrow, infinity) are no way to write one
  if value ~ '^[0-9]{4}-' then
    return value::timestamptz;
  end if;
  return null;
exception when data_exception then
  return null;
end
$$;

-- the moment a UUIDv7 carries, to the millisecond
create or replace function data.uuid_time(id uuid)
returns timestamptz
language sql
immutable parallel safe
as $$
  -- byte by byte: a third of what it takes by way of its text
  select to_timestamp((
    (get_byte(uuid_send(id), 0)::bigint << 40) + (get_byte(uuid_send(id), 1)::bigint << 32) + (get_byte(uuid_send(id), 2)::bigint << 24)
    + (get_byte(uuid_send(id), 3) << 16) + (get_byte(uuid_send(id), 4) << 8) + get_byte(uuid_send(id), 5)) / 1000.0::double precision)
$$;

-- the smallest uuid a UUIDv7 of that moment can be: a partition bound
create or replace function data.uuid_floor(at timestamptz)
returns uuid
language sql
stable parallel safe
as $$
  select (lpad(to_hex(floor(extract(epoch from at) * 1000)::bigint), 12, '0') || '70008000000000000000')::uuid
$$;

-- money that can be stored without rounding: finite, at most 10 decimals, below a trillion
create or replace function data.is_amount(value numeric)
returns boolean
language sql
immutable parallel safe
as $$
  select coalesce(value > -1e12 and value < 1e12 and scale(trim_scale(value)) <= 10, false)
$$;

-- the text as such money, null when it isn't a plain decimal
create or replace function data.to_amount(value text)
returns numeric
language plpgsql
immutable parallel safe
as $$
begin
  -- what numeric reads differs by version (1_000, 0x1f), and 1e9 or NaN is no way to write money
  if length(value) <= 100 and value !~ '[^0-9.-]' and data.is_amount(value::numeric) then
    return value::numeric;
  end if;
  return null;
exception when invalid_text_representation or numeric_value_out_of_range then
  return null;
end
$$;

-- A field of an element as text, null where it is no string: a number may be short, and its text 131,072 digits long.
create or replace function data.text_of(
  element jsonb,
  field text
)
returns text
language sql
immutable parallel safe
as $$
  select case when jsonb_typeof(element -> field) = 'string' then element ->> field end
$$;

-- Has it a number whose text is much longer than the number is? 1e131071 takes ten bytes, and a zero may have thousands of decimals,
-- which its scale alone tells. No text is made to find out.
create or replace function data.has_absurd_numbers(value jsonb)
returns boolean
language plpgsql
immutable parallel safe
as $$
begin
  return coalesce((
    select bool_or(n::numeric >= 1e40 or n::numeric <= -1e40 or scale(n::numeric) > 40)
    from jsonb_path_query(value, '$.** ? (@.type() == "number")') n), false);
end
$$;

-- refuse what is no array, or too long a one
create or replace function data.require_array(
  name text,
  elements jsonb
)
returns void
language plpgsql
stable
as $$
begin
  if jsonb_typeof(elements) is distinct from 'array' then
    perform data.refuse(422, 'invalid_' || name, name || ' must be a JSON array', 'send an array, of one element for a single request');
  elsif jsonb_array_length(elements) > 10000 then
    perform data.refuse(422, 'too_many_elements', name || ' has ' || jsonb_array_length(elements) || ' elements, of 10000 allowed',
      'send them in several calls');
  end if;
end
$$;

-- what a caller gave to be kept, without the keys it may have put there by mistake
create or replace function data.without_keys(value jsonb)
returns jsonb
language sql
immutable parallel safe
as $$
  select case
    when value::text ~ 'vk_[0-9A-Za-z_-]{43}' then regexp_replace(value::text, 'vk_[0-9A-Za-z_-]{43}', 'vk_…', 'g')::jsonb
    else value
  end
$$;

-- refuse an amount that is not positive money
create or replace function data.require_positive_amount(amount numeric)
returns void
language plpgsql
as $$
begin
  if amount is null or not data.is_amount(amount) or amount <= 0 then
    perform data.refuse(422, 'invalid_amount', 'amount must be above 0, below 1e12, with at most 10 decimals',
      'send a plain decimal as a string, for example "12.50"');
  end if;
end
$$;

-- refuse what is done for no reason; `deed` as in "a freeze"
create or replace function data.require_reason(deed text, reason text)
returns void
language plpgsql
as $$
begin
  if reason is null or reason !~ '\S' then
    perform data.refuse(422, 'invalid_reason', deed || ' needs a reason', 'say why in reason');
  end if;
end
$$;

-- the role asking: what `set role` chose (PostgREST does), else the login; a security definer call doesn't hide it. A NUL that a token
-- has somewhere in its claims can't be jsonb: it must not fail every call of that token
create or replace view data.caller as
select
  case when current_setting('role') = 'none' then session_user::text else current_setting('role') end as role,
  (case
    when position('\u0000' in c.claims) > 0 then regexp_replace(c.claims, '(?<!\\)((\\\\)*)\\u0000', '\1\\ufffd', 'g')
    else c.claims
  end)::jsonb as claims
from (select nullif(current_setting('request.jwt.claims', true), '') as claims) c;

comment on view data.caller is 'Who is asking: role and JWT claims.';

-- who acted, for the ledger (plpgsql keeps its plan, sql would plan at each call)
create or replace function data.actor()
returns text
language plpgsql
stable
as $$
begin
  return (select coalesce(nullif(c.claims ->> 'user_id', ''), nullif(c.claims ->> 'sub', ''), c.role) from data.caller c);
end
$$;

-- Was this transaction one of another cluster? Rows of an outbox, and its horizon, come with a dump, and here such a transaction is
-- still to come: no reader would ever have seen it.
create or replace function data.is_foreign(xid xid8)
returns boolean
language sql
stable
as $$
  select xid >= pg_snapshot_xmax(pg_current_snapshot()) and xid is distinct from pg_current_xact_id_if_assigned()
$$;

-- The snapshot a reader of an outbox has seen up to, null when its cursor is missing, of another database, ahead of this one, or may
-- have missed what was purged; and the cursor for what its caller is about to read. Both read one snapshot, that of the caller's statement.
create or replace function data.read_cursor(
  outbox text,
  cursor jsonb,
  out since pg_snapshot,
  out next jsonb
)
returns record
language plpgsql
stable
as $$
declare
  v_cluster text;
begin
  -- the timeline changes when a standby takes over, the oids when a dump is restored in the same cluster
  select concat_ws(':', s.system_identifier, left(pg_walfile_name(pg_current_wal_lsn()), 8), d.oid, 'data.outbox_horizon'::regclass::oid)
  into v_cluster
  from pg_control_system() s, pg_database d
  where d.datname = current_database();
  next := jsonb_build_object('cluster', v_cluster, 'snapshot', pg_current_snapshot()::text);

  begin
    since := (cursor ->> 'snapshot')::pg_snapshot;
  exception when others then
    since := null;
  end;
  if cursor ->> 'cluster' is distinct from v_cluster or pg_snapshot_xmax(since) > pg_snapshot_xmax(pg_current_snapshot())
    or exists (
      select from data.outbox_horizon h
      where h.outbox = read_cursor.outbox and h.purged_xid >= pg_snapshot_xmin(since) and not data.is_foreign(h.purged_xid))
  then
    since := null;
  end if;
end
$$;

-- a UUIDv7 for callers that can't make one
create or replace function api.new_id()
returns uuid
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    lpad(to_hex(floor(extract(epoch from clock_timestamp()) * 1000)::bigint), 12, '0')
    || '7' || substr(replace(gen_random_uuid()::text, '-', ''), 14, 3)
    || substr(replace(gen_random_uuid()::text, '-', ''), 17, 16)
  )::uuid;
end
$$;
comment on function api.new_id() is 'Makes an id for an event or a hold: a UUIDv7 of now.';
grant execute on function api.new_id() to keyledger_gateway, keyledger_operator;

create or replace function api.id_at(moment timestamptz)
returns uuid
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if (moment >= 'epoch' and moment < '9999-01-01T00:00Z') is not true then
    perform data.refuse(422, 'invalid_moment', 'moment must be a time from 1970 to 9998', 'for example 2026-11-01T00:00Z');
  end if;
  return data.uuid_floor(moment);
end
$$;
comment on function api.id_at(timestamptz) is
'The lowest id of a `moment`: usage and holds of then and later have that id or a higher one.
Ask views of usage and holds for a range of ids (id=gte.…&id=lt.…): that is read by index, a filter on a time is not. 422 invalid_moment.';
grant execute on function api.id_at(timestamptz) to keyledger_gateway, keyledger_operator, keyledger_member;

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
