-- migrate:up
-- The ids that are accepted, and the months of usage that are kept.

set local role keyledger_owner;

-- The accepted ids as they are now, in any snapshot of the caller: a dropped month is gone for
-- every snapshot.
-- No further month is dropped until the caller's transaction ends.
create or replace function data.accepted_ids_now()
returns data.accepted_ids
language plpgsql
volatile
as $$
declare
  v_window data.accepted_ids;
begin
  select * into v_window from data.accepted_ids;
  return v_window;
end
$$;

-- refuse usage of a month that was dropped
create or replace function data.refuse_dropped_usage(id uuid)
returns void
language plpgsql
as $$
declare
  v_dropped_before timestamptz := (data.accepted_ids_now()).dropped_before;
begin
  if refuse_dropped_usage.id < data.uuid_floor(v_dropped_before) then
    perform data.refuse(410, 'usage_dropped', 'usage of before ' || v_dropped_before || ' is no longer kept',
      'its entry is in billing_transactions, and its sums in a statement');
  end if;
end
$$;

-- Makes the months from the floor to two months ahead, then accepts their ids. The row's lock lets
-- one call in at a time.
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
  select w.floor into v_month from data.accepted_ids w for update;
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
        'create trigger append_only_truncate before truncate on data.%I '
          'for each statement execute function data.forbid_change()',
        v_name);
      v_made := v_made || v_name;
    end if;
    v_month := v_month + interval '1 month';
  end loop;
  update data.accepted_ids w set ceiling = v_end where w.ceiling < v_end;
  return v_made;
end
$$;

select data.make_usage_partitions();

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
