-- migrate:up
-- What time asks for: months of usage ahead, and the outboxes kept short.

set local role keyledger_owner;

-- makes the months from the window's floor to two months ahead, then lets the window reach them
create or replace function data.make_usage_partitions()
returns text[]
language plpgsql
set timezone = 'UTC'
as $$
declare
  v_month timestamptz;
  v_end timestamptz;
  v_name text;
  v_made text[] := '{}';
begin
  -- one at a time
  perform pg_advisory_xact_lock(hashtextextended('keyledger.make_usage_partitions', 0));
  select w.floor into v_month from data.usage_window w;
  v_month := date_trunc('month', v_month);
  v_end := date_trunc('month', now()) + interval '3 months';
  while v_month < v_end loop
    v_name := 'usage_log_' || to_char(v_month, 'YYYY_MM');
    if to_regclass(format('data.%I', v_name)) is null then
      -- attached, not created as a partition: that would lock every writer out
      execute format('create table data.%I (like data.usage_log including all)', v_name);
      execute format('alter table data.%I enable row level security', v_name);
      execute format(
        'alter table data.usage_log attach partition data.%I for values from (%L) to (%L)',
        v_name, data.uuid_floor(v_month), data.uuid_floor(v_month + interval '1 month'));
      execute format(
        'create trigger append_only_truncate before truncate on data.%I for each statement execute function data.forbid_change()',
        v_name);
      v_made := v_made || v_name;
    end if;
    v_month := v_month + interval '1 month';
  end loop;
  update data.usage_window w set ceiling = v_end where w.ceiling < v_end;
  return v_made;
end
$$;

create or replace function api.maintain()
returns jsonb
language plpgsql
volatile
security definer
set search_path = ''
as $$
declare
  v_made text[];
  v_invalidations bigint;
  v_events bigint;
begin
  v_made := data.make_usage_partitions();
  with invalidation as (
    delete from data.cache_invalidation c where c.created_at < now() - interval '48 hours' returning c.xid
  ), event as (
    delete from data.account_event e where e.created_at < now() - interval '48 hours' returning e.xid
  ), gone as (
    select 'cache' as outbox, i.xid from invalidation i
    union all
    select 'account', e.xid from event e
  ), horizon as (
    update data.outbox_horizon h
    set purged_xid = greatest(h.purged_xid, m.xid)
    from (select g.outbox, max(g.xid) as xid from gone g group by g.outbox) m
    where h.outbox = m.outbox
  )
  select count(*) filter (where g.outbox = 'cache'), count(*) filter (where g.outbox = 'account')
  into v_invalidations, v_events
  from gone g;
  return jsonb_build_object(
    'usage_partitions_made', v_made, 'cache_invalidations_purged', v_invalidations, 'account_events_purged', v_events);
end
$$;
comment on function api.maintain() is
'Makes the coming months of usage_log and purges the outboxes of cache_changes and account_news (48 hours).
Call it daily at least, by a scheduler; the client does so hourly. Without it, after two months events are parked as id_outside_window.';
grant execute on function api.maintain() to keyledger_gateway, keyledger_operator;

select data.make_usage_partitions();

reset role;

-- migrate:down
-- none: a ledger is not rolled back
