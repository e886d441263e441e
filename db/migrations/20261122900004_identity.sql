-- migrate:up
-- The operator writes identity through views: triggers lock parents, and keep ids and owners fixed.

set local role keyledger_owner;

-- A trigger function runs as the role that writes, through a view too.
-- That role has no right on schema data, so each trigger function is security definer.

-- Every write of a child locks its parents `for share`: from the child up, nodes last.
-- A plain `update` locks its row before any trigger runs: every statement can keep no other order.
-- So a parent's change waits for its newest child, and its trigger evicts that child's keys too.

-- a key locks its user and tenant; a rotated key also locks its nodes
create or replace function data.lock_key_parents()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_tenant_id uuid;
begin
  select u.tenant_id into v_tenant_id from data.user_profile u where u.id = new.user_id for share;
  perform from data.tenant t where t.id = v_tenant_id for share;
  if tg_op = 'UPDATE' then
    -- a new hash acts like a new key with mounts: the statement that unmounts a node must see it
    perform
    from data.virtual_key_config_node m
    join data.config_node n on n.id = m.config_node_id
    where m.virtual_key_id = new.id
    order by n.id
    for share;
  end if;
  return new;
end
$$;
create or replace trigger lock_parents before insert or update of key_hash on data.virtual_key
  for each row execute function data.lock_key_parents();

-- a user locks its tenant
create or replace function data.lock_user_parent()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform from data.tenant t where t.id = new.tenant_id for share;
  return new;
end
$$;
create or replace trigger lock_parents before insert or update of tenant_id on data.user_profile
  for each row execute function data.lock_user_parent();

-- a mount locks its key and its node
create or replace function data.lock_mount_parents()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform from data.virtual_key k where k.id = new.virtual_key_id for share;
  perform from data.config_node n where n.id = new.config_node_id for share;
  return new;
end
$$;
create or replace trigger lock_parents before insert or update on data.virtual_key_config_node
  for each row execute function data.lock_mount_parents();

-- refuse an operator's mistake in words, before a constraint names a table that no role sees
-- The trigger's arguments are the columns that must not be null.
create or replace function data.check_written()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_row jsonb := to_jsonb(new);
  v_missing text := (select min(a.name) from unnest(tg_argv) as a (name) where v_row ->> a.name is null);
  v_currency text := v_row ->> 'currency';
begin
  if v_missing is not null then
    perform data.refuse(422, 'value_required', format('%s: %s is null', tg_table_name, v_missing),
      'give it in each row, or in none; for a default where a row has none, send "Prefer: missing=default" '
      '(postgrest-js: defaultToNull: false)');
  end if;
  perform data.refuse(422, 'invalid_currency', tg_table_name || ': a currency is three capital letters of ISO 4217',
    format('write "%s"', case when v_currency ~* '^[a-z]{3}$' then upper(v_currency) else 'USD' end));
  return null;
end
$$;
create or replace trigger check_written before insert or update on data.tenant
  for each row when (num_nulls(new.id, new.name, new.currency, new.status) > 0 or new.currency !~ '^[A-Z]{3}$')
  execute function data.check_written('id', 'name', 'currency', 'status');
create or replace trigger check_written before insert or update on data.user_profile
  for each row
  when (num_nulls(new.id, new.tenant_role, new.currency, new.status) > 0 or new.currency !~ '^[A-Z]{3}$')
  execute function data.check_written('id', 'tenant_role', 'currency', 'status');
create or replace trigger check_written before insert or update on data.config_node
  for each row when (num_nulls(new.id, new.name, new.status) > 0)
  execute function data.check_written('id', 'name', 'status');
create or replace trigger check_written before insert or update on data.virtual_key_config_node
  for each row when (num_nulls(new.virtual_key_id, new.config_node_id) > 0)
  execute function data.check_written('virtual_key_id', 'config_node_id');

-- an owner keeps its id and its currency, and a closed owner stays closed
create or replace function data.keep_owner_identity()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if new.id <> old.id then
    perform data.refuse(409, 'id_is_fixed', tg_table_name || ' ' || old.id, 'make a new row instead');
  end if;
  if new.currency <> old.currency then
    perform data.refuse(409, 'currency_is_fixed', tg_table_name || ' ' || old.id,
      'an account keeps the currency it was opened in');
  end if;
  if old.status = 'closed' and new.status <> 'closed' then
    perform data.refuse(409, 'closed_is_final', tg_table_name || ' ' || old.id, 'suspend an owner that may come back');
  end if;
  return new;
end
$$;
create or replace trigger keep_identity before update on data.tenant
  for each row execute function data.keep_owner_identity();
create or replace trigger keep_identity before update on data.user_profile
  for each row execute function data.keep_owner_identity();

-- a node keeps its id, and its context meters once it has prices
create or replace function data.keep_node_identity()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if new.id <> old.id then
    perform data.refuse(409, 'id_is_fixed', tg_table_name || ' ' || old.id, 'make a new row instead');
  elsif exists (select from data.price p where p.config_node_id = old.id) then
    perform data.refuse(409, 'context_meters_are_fixed', 'node ' || old.name || ' has prices',
      'make a new node instead; old prices keep their meaning');
  end if;
  return new;
end
$$;
create or replace trigger keep_identity before update on data.config_node
  for each row when (new.id <> old.id or new.context_meters is distinct from old.context_meters)
  execute function data.keep_node_identity();

-- An admin of one tenant is no admin of the next: a user who moves becomes a member.
-- The user keeps the role that the same update names.
-- A trigger can't read which columns an update names: a trigger on tenant_role alone sets a flag.
-- The next trigger reads the flag and clears it.

-- set the flag: this update names tenant_role
create or replace function data.tenant_role_named()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform set_config('keyledger.tenant_role_named', 'true', true);
  return new;
end
$$;

-- triggers fire in the order of their names
create or replace trigger tenant_role_1_named before update of tenant_role on data.user_profile
  for each row execute function data.tenant_role_named();

-- make a user who moves a member, unless the flag is set; clear the flag
create or replace function data.tenant_role_kept()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if new.tenant_id is distinct from old.tenant_id
    and coalesce(current_setting('keyledger.tenant_role_named', true), '') <> 'true'
  then
    new.tenant_role := 'member';
  end if;
  perform set_config('keyledger.tenant_role_named', '', true);
  return new;
end
$$;
create or replace trigger tenant_role_2_kept before update of tenant_id, tenant_role on data.user_profile
  for each row execute function data.tenant_role_kept();

-- a key keeps its id and its user, and a revoked key stays revoked
create or replace function data.keep_key_identity()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if (new.id, new.user_id) is distinct from (old.id, old.user_id) then
    perform data.refuse(409, 'id_is_fixed', 'virtual_key ' || old.id, 'create a key for the other user');
  end if;
  if old.status = 'revoked' and new.status <> 'revoked' then
    perform data.refuse(409, 'revoked_is_final', 'virtual_key ' || old.id, 'create a new key');
  end if;
  return new;
end
$$;
create or replace trigger keep_identity before update on data.virtual_key
  for each row execute function data.keep_key_identity();

-- a new key must not take a hash that a key had before a rotation
-- The query sees rows that committed while the insert waited for the unique index.
create or replace function data.refuse_previous_hash()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (select from data.previous_key_hash p where p.key_hash = new.key_hash) then
    raise unique_violation using
      message = 'new row for relation "virtual_key" violates check "hash_was_never_used"',
      table = 'virtual_key', constraint = 'hash_was_never_used';
  end if;
  return null;
end
$$;
create or replace trigger refuse_previous_hash after insert or update of key_hash on data.virtual_key
  for each row execute function data.refuse_previous_hash();

-- each key has a row of use from the start, so that using a key only updates
create or replace function data.open_virtual_key_use()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into data.virtual_key_use (virtual_key_id) values (new.id);
  return null;
end
$$;
create or replace trigger open_virtual_key_use after insert on data.virtual_key
  for each row execute function data.open_virtual_key_use();

-- insert an owner's account; `owner_table` is tenant or user_profile
create or replace function data.insert_account(
  owner_table text,
  owner_id uuid,
  currency text
)
returns void
language plpgsql
as $$
begin
  insert into data.account_balance (account_id, owner_tenant_id, owner_user_id, currency)
  values (
    owner_id,
    case when owner_table = 'tenant' then owner_id end,
    case when owner_table = 'user_profile' then owner_id end,
    insert_account.currency
  );
end
$$;

-- an owner's account opens with the owner; a clash of ids fails on the primary key
create or replace function data.open_account()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  -- in a query of its own: on a cluster the account then commits with its owner or not at all
  perform data.insert_account(tg_table_name, new.id, new.currency) from (values (1)) one;
  return null;
end
$$;
create or replace trigger open_account after insert on data.tenant
  for each row execute function data.open_account();
create or replace trigger open_account after insert on data.user_profile
  for each row execute function data.open_account();

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
