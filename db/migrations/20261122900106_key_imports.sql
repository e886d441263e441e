-- migrate:up
-- Virtual keys brought from elsewhere, by their hashes.

set local role keyledger_owner;

-- read keys to import: the same array, with ids looked up, keys hashed, and a code for each fault
create or replace function data.read_key_imports(keys jsonb)
returns jsonb
language sql
stable
as $$
  select coalesce(jsonb_agg(jsonb_build_object(
    'ord', r.ord,
    'user_id', u.id,
    'key_hash', r.key_hash,
    -- a short key shows less, so that enough stays secret; a hashed key shows its hash's start
    'key_prefix', coalesce(
      r.key ->> 'key_prefix',
      left(r.virtual_key, least(10, length(r.virtual_key) / 4)),
      'sha256:' || left(r.key_hash, 5)),
    'name', r.key ->> 'name',
    'expires_at', r.expires_at,
    'config_node_ids', n.ids,
    'code', case
      when r.virtual_key is not null and r.key ->> 'key_hash' is not null or jsonb_typeof(r.key) <> 'object'
        then 'invalid_key'
      when r.virtual_key !~ '^[!-~]+$' or length(r.virtual_key) not between 16 and 512
        or jsonb_typeof(r.key -> 'virtual_key') not in ('string', 'null') then 'invalid_virtual_key'
      when r.key_hash is null or r.key_hash !~ '^[0-9a-f]{64}$' then 'invalid_key_hash'
      when num_nonnulls(r.key ->> 'user_id', r.key ->> 'user_external_id') <> 1
        or (r.user_id is null and r.key ->> 'user_id' is not null) then 'invalid_user_id'
      when u.id is null then 'user_not_found'
      when jsonb_typeof(r.key -> 'name') not in ('string', 'null') or position(r.virtual_key in r.key ->> 'name') > 0
        then 'invalid_name'
      when jsonb_typeof(r.key -> 'key_prefix') not in ('string', 'null') or length(r.key ->> 'key_prefix') > 12
        or encode(sha256(convert_to(r.key ->> 'key_prefix', 'UTF8')), 'hex') = r.key_hash then 'invalid_key_prefix'
      when r.expires_at is null and r.key ->> 'expires_at' is not null then 'invalid_expires_at'
      when n.ids is null and r.key ->> 'config_node_ids' is not null then 'invalid_config_node_ids'
      when n.misses_one then 'config_node_not_found'
    end
  ) order by r.ord), '[]')
  from (
    select
      e.ord,
      e.key,
      e.key ->> 'virtual_key' as virtual_key,
      coalesce(encode(sha256(convert_to(e.key ->> 'virtual_key', 'UTF8')), 'hex'), lower(e.key ->> 'key_hash'))
        as key_hash,
      data.to_uuid(e.key ->> 'user_id') as user_id,
      data.to_moment(e.key ->> 'expires_at') as expires_at
    from jsonb_array_elements(keys) with ordinality as e (key, ord)
    offset 0 -- else each use would parse again
  ) r
  left join lateral (
    select p.id
    from data.user_profile p
    where p.id = r.user_id or (r.user_id is null and p.external_id = r.key ->> 'user_external_id')
    offset 0
  ) u on true
  left join lateral (
    select bool_or(c.id is null) as misses_one,
      coalesce(array_agg(distinct c.id) filter (where c.id is not null), '{}') as ids
    from jsonb_array_elements_text(
      case when jsonb_typeof(r.key -> 'config_node_ids') = 'array' then r.key -> 'config_node_ids' end) as g (id)
    left join lateral (select d.id from data.config_node d where d.id = data.to_uuid(g.id) offset 0) c on true
    having jsonb_typeof(r.key -> 'config_node_ids') = 'array'
  ) n on true
$$;

-- insert the keys that read well, with their mounts; answers the new ids by hash
create or replace function data.insert_key_imports(imports jsonb)
returns jsonb
language plpgsql
as $$
declare
  v_new_ids jsonb;
begin
  with new_key as (
    insert into data.virtual_key as k (key_hash, key_prefix, user_id, name, expires_at)
    select distinct on (r.key_hash) decode(r.key_hash, 'hex'), r.key_prefix, r.user_id, r.name, r.expires_at
    from jsonb_to_recordset(imports) as r (
      ord bigint, key_hash text, key_prefix text, user_id uuid, name text, expires_at timestamptz, code text)
    where r.code is null and (r.expires_at is null or r.expires_at > statement_timestamp() and isfinite(r.expires_at))
      and not exists (select from data.previous_key_hash p where p.key_hash = decode(r.key_hash, 'hex') offset 0)
    order by r.key_hash, r.ord
    on conflict (key_hash) do nothing
    returning k.id, k.key_hash
  )
  select coalesce(jsonb_object_agg(encode(n.key_hash, 'hex'), n.id), '{}') into v_new_ids from new_key n;
  insert into data.virtual_key_config_node (virtual_key_id, config_node_id)
  select f.id, n.id::uuid
  from (
    select distinct on (r.key_hash) (v_new_ids ->> r.key_hash)::uuid as id, r.config_node_ids
    from jsonb_to_recordset(imports) as r (ord bigint, key_hash text, config_node_ids jsonb, code text)
    where r.code is null and v_new_ids ? r.key_hash
    order by r.key_hash, r.ord
  ) f
  cross join lateral jsonb_array_elements_text(nullif(f.config_node_ids, 'null')) as n (id)
  order by 1, 2;
  return v_new_ids;
end
$$;

-- the answer to an import: for each key its status, and the key that now has its hash
create or replace function data.answer_key_imports(
  imports jsonb,
  new_ids jsonb
)
returns jsonb
language sql
stable
as $$
  select coalesce(jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
    'status', a.status,
    'code', a.code,
    'id', case when a.is_theirs then a.id end,
    'key_prefix', case when a.is_theirs then a.key_prefix end,
    'mismatch', case when a.status = 'duplicate' and a.differs then true end)) order by a.ord), '[]')
  from (
    select
      c.*,
      case
        when c.code is not null then 'refused'
        when new_ids ? c.key_hash and c.copy = 1 then 'imported'
        else 'duplicate'
      end as status
    from (
      select
        r.ord,
        r.key_hash,
        k.id,
        k.key_prefix,
        r.code is null and k.user_id = r.user_id as is_theirs,
        (k.name, k.expires_at, to_jsonb(array(
          select m.config_node_id from data.virtual_key_config_node m where m.virtual_key_id = k.id order by 1)))
        is distinct from (r.name, r.expires_at, coalesce(nullif(r.config_node_ids, 'null'), '[]')) as differs,
        row_number() over (partition by r.key_hash, r.code order by r.ord) as copy,
        case
          when r.code is not null then r.code
          -- nothing else keeps a key from being inserted
          when k.id is null then 'invalid_expires_at'
          when k.user_id <> r.user_id then 'key_taken'
          when k.status <> 'active' then 'virtual_key_disabled'
          -- a text from before a rotation, whose grace has ended
          when h.valid_until <= statement_timestamp() then 'virtual_key_expired'
        end as code
      from jsonb_to_recordset(imports) as r (
        ord bigint, key_hash text, user_id uuid, name text, expires_at timestamptz, config_node_ids jsonb, code text)
      -- each by key: a join may read all the keys there are
      left join lateral (
        select a.virtual_key_id, a.valid_until
        from data.key_hash a
        where a.key_hash = case when r.code is null then decode(r.key_hash, 'hex') end
        offset 0
      ) h on true
      left join lateral (select * from data.virtual_key b where b.id = h.virtual_key_id offset 0) k on true
    ) c
  ) a
$$;

-- import keys: read them, insert the new ones, answer for each
create or replace function api.import_virtual_keys(keys jsonb)
returns jsonb
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
set plan_cache_mode = force_custom_plan
set enable_seqscan = off
as $$
declare
  v_imports jsonb;
  v_new_ids jsonb;
begin
  perform data.require_array('keys', keys);
  v_imports := data.read_key_imports(keys);
  -- in the order of ids, whatever the order of the keys: two imports never wait for each other
  perform from data.user_profile u
  where u.id = any (array(
    select r.user_id from jsonb_to_recordset(v_imports) as r (user_id uuid, code text) where r.code is null))
  order by u.id
  for share;
  v_new_ids := data.insert_key_imports(v_imports);
  return data.answer_key_imports(v_imports, v_new_ids);
end
$$;
comment on function api.import_virtual_keys(jsonb) is
'Takes over keys that are in use elsewhere; their callers notice nothing.
Takes `keys`, [{user_id | user_external_id, key_hash | virtual_key, name?, key_prefix?, expires_at?,
config_node_ids?}], and answers in the same order [{status: imported | duplicate | refused, code?,
id, key_prefix}]. `key_hash` is the sha-256 of the exact text that callers present, as 64 hex
digits. A `virtual_key` (16 to 512 visible ASCII characters) is hashed on the way in, and never
stored. A key that was imported before is a duplicate and stays as it is; `mismatch` says that it
differs. key_taken: the key is, or was, another key''s. virtual_key_disabled: it was revoked here.
virtual_key_expired: it was rotated here, and its grace is over. Others: user_not_found,
config_node_not_found, invalid_….';
grant execute on function api.import_virtual_keys(jsonb) to keyledger_operator;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
