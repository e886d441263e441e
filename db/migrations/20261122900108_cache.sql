-- migrate:up
-- Cache changes: the keys that a cache must drop.

set local role keyledger_owner;

create or replace function api.cache_changes(cursor jsonb default null)
returns jsonb
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_since pg_snapshot;
  v_next jsonb;
  v_keys jsonb;
begin
  select c.since, c.next into v_since, v_next from data.read_cursor('cache', cursor) c;
  -- each row has a key at least: 10001 rows are too many, however few keys each has
  with changed as materialized (
    select c.entity, c.keys, c.key_count
    from data.cache_invalidation c
    where c.xid >= pg_snapshot_xmin(v_since)
      and not pg_visible_in_snapshot(c.xid, v_since)
      and not data.is_foreign(c.xid)
    limit 10001
  )
  select case when coalesce(sum(coalesce(c.key_count, 10001)), 0) <= 10000 then coalesce((
    select jsonb_agg(distinct d.entity || ':' || k.key) from changed d cross join lateral unnest(d.keys) as k (key)
  ), '[]'::jsonb) end
  into v_keys
  from changed c;
  return jsonb_build_object(
    'cursor', v_next,
    'reset', v_since is null or v_keys is null,
    'keys', coalesce(v_keys, '[]'::jsonb),
    'now', floor(extract(epoch from clock_timestamp()) * 1000)::bigint
  );
end
$$;
comment on function api.cache_changes(jsonb) is
'The cache keys changed since a cursor, and the next cursor.
`keys` were changed by transactions the cursor had not seen. `reset` true: drop everything. The
cursor is missing, of another cluster or database, ahead of this one or too old, or more than 10000
keys have changed, or one change was of more than 5000. Keep the cursor only after evicting. `now`
is the server''s clock, in ms since 1970.';
grant execute on function api.cache_changes(jsonb) to keyledger_gateway;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
