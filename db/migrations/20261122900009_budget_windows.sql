-- migrate:up
-- The windows of budgets: days, weeks and months in an account's time zone.

set local role keyledger_owner;

-- The moment a local time begins. A time that the clock repeats begins at the first; a skipped time
-- begins at the skip.
create or replace function data.local_moment(
  local timestamp,
  time_zone text
)
returns timestamptz
language plpgsql
immutable parallel safe
as $$
declare
  v_moment timestamptz := local at time zone time_zone;
begin
  if (v_moment - interval '1 hour') at time zone time_zone = local then
    return v_moment - interval '1 hour';
  end if;
  return v_moment;
end
$$;

-- The start of the window that a moment is in; api.budgets says the same of now. Weeks begin on
-- Monday.
create or replace function data.window_start(
  period text,
  time_zone text,
  at timestamptz
)
returns timestamptz
language plpgsql
immutable parallel safe
as $$
begin
  if period = 'total' then
    return '-infinity';
  end if;
  return data.local_moment(date_trunc(period, at at time zone time_zone), time_zone);
end
$$;

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
