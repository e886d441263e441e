-- migrate:up
-- Ids: a new one, and the lowest one of a moment.

set local role keyledger_owner;

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

-- the lowest id of a moment, to ask views for a range of time
create or replace function api.id_at(moment timestamptz)
returns uuid
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if (moment >= 'epoch' and moment < '9999-01-01T00:00Z') is not true then
    perform data.refuse(422, 'invalid_moment', 'moment must be a time from 1970 to 9998',
      'for example 2026-11-01T00:00Z');
  end if;
  return data.uuid_floor(moment);
end
$$;
comment on function api.id_at(timestamptz) is
'The lowest id of a `moment`: usage and holds of then and later have that id or a higher one.
Ask the views of usage and holds for a range of ids (id=gte.…&id=lt.…): an index serves it. No index
serves a filter on a time. 422 invalid_moment.';
grant execute on function api.id_at(timestamptz) to keyledger_gateway, keyledger_operator, keyledger_member;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
