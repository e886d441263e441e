-- migrate:up
-- Retention: months of usage are dropped once statements cover them.

set local role keyledger_owner;

-- Waits until each reader of accepted_ids is done. The next reader finds the row as committed.
-- Keeps no lock.
create or replace function data.await_window_readers()
returns void
language plpgsql
as $$
begin
  -- every charge waits behind this: rather give up
  perform set_config('lock_timeout', '500ms', true);
  lock table only data.accepted_ids in access exclusive mode;
  -- undone at once, and the lock with it
  raise sqlstate 'KL001';
exception when sqlstate 'KL001' then
  null;
end
$$;

-- Counts a month's events, and refuses it while statements don't cover all of them.
create or replace function data.count_sealed_month(month text)
returns bigint
language plpgsql
as $$
declare
  v_events bigint;
  v_not_sealed uuid;
begin
  execute format(
    'select coalesce(sum(u.events), 0), (array_agg(u.account_id) filter (where u.last_seq > coalesce((
        select max(s.last_seq) from data.accounting_snapshot s where s.account_id = u.account_id), 0)))[1]
      from (select l.account_id, count(*) as events,
        max(l.transaction_seq) as last_seq from data.%I l group by l.account_id) u', month)
  into v_events, v_not_sealed;
  if v_not_sealed is not null then
    perform data.refuse(409, 'usage_not_sealed',
      month || ' has usage of account ' || v_not_sealed || ' that no statement covers',
      'close_period first, for every account; usage of a month may be charged after it');
  end if;
  return v_events;
end
$$;

-- Refuses a new floor above parked events: below it they could never be charged.
create or replace function data.refuse_parked_usage(
  since timestamptz,
  until timestamptz
)
returns void
language plpgsql
as $$
declare
  v_parked uuid;
begin
  select r.id into v_parked
  from data.parked_usage r
  where r.resolved_at is null and r.usage_id >= data.uuid_floor(since) and r.usage_id < data.uuid_floor(until)
    -- came too late already
    and r.code <> 'id_outside_window'
  limit 1;
  if found then
    perform data.refuse(409, 'usage_is_parked', 'parked_usage ' || v_parked || ' is of before ' || until,
      'mend what parked them and call replay_parked_usage, or dismiss_parked_usage for those never to be charged');
  end if;
end
$$;

create or replace function api.drop_usage_partitions(older_than timestamptz)
returns jsonb
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set lock_timeout = '4s'
as $$
declare
  v_floor timestamptz := date_trunc('month', older_than);
  v_window data.accepted_ids;
  v_months text[];
  v_closed text[] := '{}';
  v_dropped text[] := '{}';
  v_month text;
  v_events bigint := 0;
begin
  if older_than is null or not isfinite(older_than) or older_than > now() then
    perform data.refuse(422, 'invalid_older_than', 'older_than must be a moment that has passed',
      'months that ended by then are dropped');
  end if;
  -- one at a time, and nobody makes months again
  select * into v_window from data.accepted_ids w for update;
  v_months := array(
    select c.relname
    from pg_catalog.pg_inherits i
    join pg_catalog.pg_class c on c.oid = i.inhrelid
    where i.inhparent = 'data.usage_log'::regclass
      -- a plan may look at other names first
      and case when c.relname ~ '^usage_log_[0-9]{4}_[0-9]{2}$'
        then to_date(right(c.relname, 7), 'YYYY_MM') end < v_floor
    order by c.relname);
  perform data.refuse_parked_usage(
    least(v_window.floor, to_date(right(v_months[1], 7), 'YYYY_MM')), v_floor);

  -- A month is read, however long that takes, while nobody can write into it: below a floor that
  -- was committed before.
  if v_window.floor < v_floor or v_window.floor_xid = pg_current_xact_id_if_assigned() then
    foreach v_month in array v_months loop
      perform data.count_sealed_month(v_month);
    end loop;
    update data.accepted_ids w set floor = v_floor, floor_xid = pg_current_xact_id() where w.floor < v_floor;
    v_closed := v_months;
  elsif v_months <> '{}' then
    perform data.await_window_readers();
    foreach v_month in array v_months loop
      v_events := v_events + data.count_sealed_month(v_month);
    end loop;
    update data.accepted_ids w set dropped_before = greatest(w.dropped_before, v_floor);
    perform set_config('lock_timeout', '500ms', true);
    -- each earlier reader of accepted_ids is done, so no reader loses these months; the next one
    -- finds them dropped
    lock table only data.accepted_ids in access exclusive mode;
    lock table only data.usage_log in access exclusive mode;
    foreach v_month in array v_months loop
      execute format('drop table data.%I', v_month);
    end loop;
    v_dropped := v_months;
  end if;
  return jsonb_build_object(
    'floor', (select w.floor from data.accepted_ids w), 'closed', v_closed, 'dropped', v_dropped, 'events', v_events);
end
$$;
comment on function api.drop_usage_partitions(timestamptz) is
'Drops the months of usage_log that ended by older_than (UTC), once statements cover all their usage: call it twice.
The first call closes the months: no event or hold of before can come in any more. The second drops
them; nobody waits while it reads them. Ledger and statements stay whole, and prove as before;
events of a dropped month can''t be explained, refunded one by one or summed up again (410
usage_dropped). Answers {floor, closed, dropped, events}: `closed` are the months for the next call.
409 usage_is_parked (replay or dismiss the parked events of before), usage_not_sealed; 422
invalid_older_than; 503 lock_timeout (SQLSTATE 55P03) if usage_log is in use for long: call again.';
grant execute on function api.drop_usage_partitions(timestamptz) to keyledger_operator;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
