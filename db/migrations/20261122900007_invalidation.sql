-- migrate:up
-- Triggers write each change that caches must know to the outbox, and wake the listeners.

set local role keyledger_owner;

-- write changed cache keys to the outbox, and wake the listeners once
-- More than 5000 keys become one row that means every key of the entity.
-- A list of millions would keep every reader busy, while later revokes wait.
-- A caller passes at most 5001 keys, so no trigger builds such a list either.
create or replace function data.invalidate(
  entity text,
  keys text[]
)
returns void
language plpgsql
as $$
begin
  -- an older snapshot could miss a key that another transaction has just created
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform data.refuse(409, 'isolation_too_strict', current_setting('transaction_isolation'),
      'change identities at read committed: a frozen snapshot would miss keys to evict');
  end if;
  if cardinality(keys) is null or cardinality(keys) = 0 then
    return;
  end if;
  if cardinality(keys) > 5000 then
    insert into data.cache_invalidation (entity, keys) values (invalidate.entity, null);
  else
    insert into data.cache_invalidation (entity, keys)
    select invalidate.entity, array_agg(k.key)
    from (select d.key, row_number() over () as n from (select distinct u.key from unnest(keys) as u (key)) d) k
    group by (k.n - 1) / 1000;
  end if;
  -- the outbox holds the truth, this only wakes: a full queue must never abort a revoke
  if pg_notification_queue_usage() < 0.5 then
    perform pg_notify('keyledger_cache', '');
  end if;
end
$$;

-- a new key evicts its own hash, which a cache may hold as unknown
create or replace function data.virtual_key_inserted()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform data.invalidate('vk', array(select encode(k.key_hash, 'hex') from new_rows k limit 5001));
  return null;
end
$$;
create or replace trigger invalidate_inserted after insert on data.virtual_key
  referencing new table as new_rows for each statement execute function data.virtual_key_inserted();

-- a changed key evicts every hash that it has and had
create or replace function data.virtual_key_updated()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform data.invalidate('vk', array(
    select encode(h.key_hash, 'hex')
    from old_rows o
    join new_rows n using (id)
    cross join lateral (
      select o.key_hash union select k.key_hash from data.key_hash k where k.virtual_key_id = n.id
    ) h
    where (o.key_hash, o.key_prefix, o.name, o.status, o.expires_at)
      is distinct from (n.key_hash, n.key_prefix, n.name, n.status, n.expires_at)
    limit 5001));
  return null;
end
$$;
create or replace trigger invalidate_updated after update on data.virtual_key
  referencing old table as old_rows new table as new_rows
  for each statement execute function data.virtual_key_updated();

-- a deleted row evicts its hash
create or replace function data.virtual_key_deleted()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform data.invalidate('vk', array(select encode(k.key_hash, 'hex') from old_rows k limit 5001));
  return null;
end
$$;
create or replace trigger invalidate_deleted after delete on data.virtual_key
  referencing old table as old_rows for each statement execute function data.virtual_key_deleted();

-- deleting a key deletes its previous hashes by cascade
create or replace trigger invalidate_deleted after delete on data.previous_key_hash
  referencing old table as old_rows for each statement execute function data.virtual_key_deleted();

-- a user whose tenant or status changes evicts the user's keys
create or replace function data.user_profile_updated()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  perform data.invalidate('vk', array(
    select encode(h.key_hash, 'hex')
    from old_rows o
    join new_rows n using (id)
    cross join lateral (select * from data.virtual_key b where b.user_id = n.id offset 0) k
    cross join lateral (select * from data.key_hash a where a.virtual_key_id = k.id offset 0) h
    where (o.tenant_id, o.status) is distinct from (n.tenant_id, n.status)
    limit 5001));
  return null;
end
$$;
create or replace trigger invalidate_updated after update on data.user_profile
  referencing old table as old_rows new table as new_rows
  for each statement execute function data.user_profile_updated();

-- a tenant whose status changes evicts the keys of all its users
create or replace function data.tenant_updated()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  perform data.invalidate('vk', array(
    select encode(h.key_hash, 'hex')
    from old_rows o
    join new_rows n using (id)
    cross join lateral (select * from data.user_profile c where c.tenant_id = n.id offset 0) u
    cross join lateral (select * from data.virtual_key b where b.user_id = u.id offset 0) k
    cross join lateral (select * from data.key_hash a where a.virtual_key_id = k.id offset 0) h
    where o.status is distinct from n.status
    limit 5001));
  return null;
end
$$;
create or replace trigger invalidate_updated after update on data.tenant
  referencing old table as old_rows new table as new_rows for each statement execute function data.tenant_updated();

-- a new mount evicts its key
create or replace function data.mount_inserted()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  perform data.invalidate('vk', array(
    select encode(h.key_hash, 'hex')
    from new_rows m
    cross join lateral (select * from data.key_hash a where a.virtual_key_id = m.virtual_key_id offset 0) h
    limit 5001));
  return null;
end
$$;
create or replace trigger invalidate_inserted after insert on data.virtual_key_config_node
  referencing new table as new_rows for each statement execute function data.mount_inserted();

-- a changed mount evicts its key of before and its key of now
create or replace function data.mount_updated()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  perform data.invalidate('vk', array(
    select encode(h.key_hash, 'hex')
    from (select o.virtual_key_id from old_rows o union all select n.virtual_key_id from new_rows n) m
    cross join lateral (select * from data.key_hash a where a.virtual_key_id = m.virtual_key_id offset 0) h
    limit 5001));
  return null;
end
$$;
create or replace trigger invalidate_updated after update on data.virtual_key_config_node
  referencing old table as old_rows new table as new_rows for each statement execute function data.mount_updated();

-- a deleted mount evicts its key
create or replace function data.mount_deleted()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  perform data.invalidate('vk', array(
    select encode(h.key_hash, 'hex')
    from old_rows m
    cross join lateral (select * from data.key_hash a where a.virtual_key_id = m.virtual_key_id offset 0) h
    limit 5001));
  return null;
end
$$;
create or replace trigger invalidate_deleted after delete on data.virtual_key_config_node
  referencing old table as old_rows for each statement execute function data.mount_deleted();

-- a new price evicts the prices of its node
create or replace function data.price_inserted()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform data.invalidate('price', array(select p.config_node_id::text from new_rows p limit 5001));
  return null;
end
$$;
create or replace trigger invalidate_inserted after insert on data.price
  referencing new table as new_rows for each statement execute function data.price_inserted();

-- truncate fires no trigger above
create or replace trigger forbid_truncate before truncate on data.virtual_key
  for each statement execute function data.forbid_truncate();
create or replace trigger forbid_truncate before truncate on data.previous_key_hash
  for each statement execute function data.forbid_truncate();
create or replace trigger forbid_truncate before truncate on data.virtual_key_config_node
  for each statement execute function data.forbid_truncate();

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
