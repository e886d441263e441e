-- migrate:up
-- Reading what callers send: ids, moments, amounts and texts, of JSON or of an id.

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

-- a meter's quantity: a number or a decimal string, not negative, at most 10 decimals; null when it isn't
create or replace function data.to_quantity(value jsonb)
returns numeric
language sql
immutable parallel safe
as $$
  select case jsonb_typeof(value)
    -- a zero of thousands of decimals would be written out wherever it is kept
    when 'number' then case when value::numeric >= 0 and scale(value::numeric) <= 40 and data.is_amount(value::numeric) then value::numeric end
    when 'string' then case when data.to_amount(value #>> '{}') >= 0 then data.to_amount(value #>> '{}') end
  end
$$;

-- The hot functions below and in the next files fix their plans: by index for any number of rows, made once. Else a plan made on an
-- empty table scans it until the next analyze, and planning anew is a fifth of a call (measured). Those whose updates join do so by
-- nested loops only: a hash join reads all holds there are, which is cheap as long as there are few. Rarer functions that look things up
-- by key go without sequential scans for the same reason; tests/ledger/plans.test.ts counts what each reads.

-- The moment of so many seconds since 1970, to the microsecond: as one double, a moment of year 9999 drifts by 8 microseconds.
create or replace function data.epoch_time(seconds numeric)
returns timestamptz
language sql
immutable parallel safe
as $$
  select to_timestamp(trunc(seconds)::double precision)
    + make_interval(secs => (seconds - trunc(seconds))::double precision)
$$;

-- So long after a moment, whatever the session's time zone makes of days: there a clock may change.
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

-- seconds a hold stays open: 900 when absent, 1 to 2592000 (30 days), null when it is anything else
create or replace function data.to_expires_in(value jsonb)
returns integer
language sql
immutable parallel safe
as $$
  select case
    when value is null or value = 'null' then 900
    when jsonb_typeof(value) = 'number' then
      case when value::numeric between 1 and 2592000 and value::numeric = trunc(value::numeric) then value::integer end
    when jsonb_typeof(value) = 'string' and value #>> '{}' ~ '^[0-9]{1,7}$' and (value #>> '{}')::integer between 1 and 2592000
      then (value #>> '{}')::integer
  end
$$;

-- The last place of the run of equal ids that begins at `first`.
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

-- Says whether all ids are the first; nulls don't count.
create or replace function data.is_one(ids uuid[])
returns boolean
language sql
immutable parallel safe
as $$
  select array_remove(array_remove(ids, null), ids[1]) = '{}'
$$;

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
