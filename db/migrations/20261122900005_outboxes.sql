-- migrate:up
-- The two outboxes, of cache changes and of account news, are read by a cursor that loses nothing.

set local role keyledger_owner;

-- Reads a cursor: answers the snapshot that the reader has seen, and the cursor for the rows it is
-- about to read.
-- The snapshot is null if the cursor is missing, of another database or ahead of this one, or if
-- purged rows may be missing.
-- Both come from one snapshot, that of the caller's statement.
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
  -- the timeline changes when a standby takes over, the oids when a dump is restored in the same
  -- cluster
  select concat_ws(':', s.system_identifier, left(pg_walfile_name(pg_current_wal_lsn()), 8), d.oid,
    'data.outbox_horizon'::regclass::oid)
  into v_cluster
  from pg_control_system() s, pg_database d
  where d.datname = current_database();
  next := jsonb_build_object('cluster', v_cluster, 'snapshot', pg_current_snapshot()::text);

  begin
    since := (cursor ->> 'snapshot')::pg_snapshot;
  exception when others then
    since := null;
  end;
  if cursor ->> 'cluster' is distinct from v_cluster or pg_snapshot_xmax(since) >
    pg_snapshot_xmax(pg_current_snapshot())
    or exists (
      select from data.outbox_horizon h
      where h.outbox = read_cursor.outbox and h.purged_xid >= pg_snapshot_xmin(since)
        and not data.is_foreign(h.purged_xid))
  then
    since := null;
  end if;
end
$$;

-- only a wake-up: a full queue must never abort a charge
create or replace function data.wake_for_news()
returns void
language plpgsql
as $$
begin
  if pg_notification_queue_usage() < 0.5 then
    perform pg_notify('keyledger_account', '');
  end if;
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
