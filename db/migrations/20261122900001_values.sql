-- migrate:up
-- Reads values that callers send: ids, moments, amounts and texts.

-- Hot functions in these files fix their plans: by index for any number of rows, and made once.
-- A plan made on an empty table would scan that table until the next analyze.
-- Planning anew takes a fifth of a call (measured).
-- Hot updates that join use nested loops only: a hash join would read every hold there is.
-- Rarer functions that look rows up by key forbid sequential scans for the same reason.
-- tests/ledger/plans.test.ts counts the rows that each function reads.

set local role keyledger_owner;

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
  -- numerals only: Postgres also reads words (now, tomorrow, infinity)
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
  -- byte by byte: this takes a third of the time that a cast to text takes
  select to_timestamp((
    (get_byte(uuid_send(id), 0)::bigint << 40) + (get_byte(uuid_send(id), 1)::bigint << 32)
    + (get_byte(uuid_send(id), 2)::bigint << 24)
    + (get_byte(uuid_send(id), 3) << 16) + (get_byte(uuid_send(id), 4) << 8) + get_byte(uuid_send(id), 5)
  ) / 1000.0::double precision)
$$;

-- the lowest UUIDv7 of the moment: a bound of partitions
create or replace function data.uuid_floor(at timestamptz)
returns uuid
language sql
stable parallel safe
as $$
  select (lpad(to_hex(floor(extract(epoch from at) * 1000)::bigint), 12, '0') || '70008000000000000000')::uuid
$$;

-- whether the ledger can store the number without rounding: at most 10 decimals, below a trillion
create or replace function data.is_amount(value numeric)
returns boolean
language sql
immutable parallel safe
as $$
  select coalesce(value > -1e12 and value < 1e12 and scale(trim_scale(value)) <= 10, false)
$$;

-- the text as an amount, null when it isn't a plain decimal
create or replace function data.to_amount(value text)
returns numeric
language plpgsql
immutable parallel safe
as $$
begin
  -- plain decimals only: numeric also reads 1e9 and NaN, and 1_000 and 0x1f in some versions
  if length(value) <= 100 and value !~ '[^0-9.-]' and data.is_amount(value::numeric) then
    return value::numeric;
  end if;
  return null;
exception when invalid_text_representation or numeric_value_out_of_range then
  return null;
end
$$;

-- a field of an element as text, null when it is no string: 1e131071 has a text of 131,072 digits
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

-- whether the JSON has a number whose text would be far longer than the number itself
-- 1e131071 takes ten bytes, and a zero may have thousands of decimals, which only its scale tells.
-- The function compares numbers and scales, and never makes the text.
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

-- a value that a caller sends to be kept, with each virtual key in it masked
create or replace function data.without_keys(value jsonb)
returns jsonb
language sql
immutable parallel safe
as $$
  select case
    when value::text ~ 'vk_[0-9A-Za-z_-]{43}'
    then regexp_replace(value::text, 'vk_[0-9A-Za-z_-]{43}', 'vk_…', 'g')::jsonb
    else value
  end
$$;

-- a meter's quantity: a number or decimal string, 0 or more, at most 10 decimals; else null
create or replace function data.to_quantity(value jsonb)
returns numeric
language sql
immutable parallel safe
as $$
  select case jsonb_typeof(value)
    -- a zero with thousands of decimals would be stored with all of them
    when 'number' then
      case
        when value::numeric >= 0 and scale(value::numeric) <= 40 and data.is_amount(value::numeric) then value::numeric
      end
    when 'string' then case when data.to_amount(value #>> '{}') >= 0 then data.to_amount(value #>> '{}') end
  end
$$;

-- the moment `seconds` after 1970, to the microsecond: one double would lose 8 of them in year 9999
create or replace function data.epoch_time(seconds numeric)
returns timestamptz
language sql
immutable parallel safe
as $$
  select to_timestamp(trunc(seconds)::double precision)
    + make_interval(secs => (seconds - trunc(seconds))::double precision)
$$;

-- the moment plus a duration, in UTC: in the session's time zone a day may have 23 or 25 hours
create or replace function data.after(
  moment timestamptz,
  duration interval
)
returns timestamptz
language sql
immutable parallel safe
as $$
  select ((moment at time zone 'UTC') + duration) at time zone 'UTC'
$$;

-- seconds that a hold stays open: 1 to 2592000 (30 days), 900 when absent, null when invalid
create or replace function data.to_expires_in(value jsonb)
returns integer
language sql
immutable parallel safe
as $$
  select case
    when value is null or value = 'null' then 900
    when jsonb_typeof(value) = 'number' then
      case when value::numeric between 1 and 2592000 and value::numeric = trunc(value::numeric) then value::integer end
    when jsonb_typeof(value) = 'string' and value #>> '{}' ~ '^[0-9]{1,7}$'
      and (value #>> '{}')::integer between 1 and 2592000
      then (value #>> '{}')::integer
  end
$$;

-- the last place of the run of equal ids that begins at `first`
create or replace function data.run_end(
  ids uuid[],
  first integer
)
returns integer
language plpgsql
immutable parallel safe
as $$
declare
  v_last integer := run_end.first;
begin
  while v_last < cardinality(ids) and ids[v_last + 1] is not distinct from ids[first] loop
    v_last := v_last + 1;
  end loop;
  return v_last;
end
$$;

-- whether all ids equal the first; nulls don't count
create or replace function data.is_one(ids uuid[])
returns boolean
language sql
immutable parallel safe
as $$
  select array_remove(array_remove(ids, null), ids[1]) = '{}'
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
