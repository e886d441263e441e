-- migrate:up
-- Virtual keys: the two ways to resolve one, their making, rotation and end.

set local role keyledger_owner;

-- what a key resolves to; `code` is why it may not be used now, `valid_until` when the clock alone changes the answer
create or replace view data.key_context as
select
  k.id as virtual_key_id,
  k.user_id,
  u.tenant_id,
  u.account_id,
  k.name,
  k.key_prefix,
  k.status as virtual_key_status,
  u.status as user_status,
  t.status as tenant_status,
  case
    when k.status <> 'active' then 'virtual_key_disabled'
    when k.expires_at <= statement_timestamp() then 'virtual_key_expired'
    when u.status <> 'active' then 'user_suspended'
    when t.status <> 'active' then 'tenant_suspended'
  end as code,
  case when k.expires_at > statement_timestamp() then k.expires_at end as valid_until,
  array(
    select m.config_node_id
    from data.virtual_key_config_node m
    cross join lateral (select from data.config_node n where n.id = m.config_node_id and n.status = 'active' offset 0) n
    where m.virtual_key_id = k.id
    order by m.config_node_id
  ) as config_node_ids,
  coalesce(t.currency, u.currency) as currency
from data.virtual_key k
-- by key, each: a join planned on small tables may read all of them
cross join lateral (select * from data.user_profile p where p.id = k.user_id offset 0) u
left join lateral (select * from data.tenant o where o.id = u.tenant_id offset 0) t on true;

-- what a hash resolves to: its key's context; one from before a rotation expires with its grace
create or replace view data.hash_context as
select
  h.key_hash,
  c.virtual_key_id,
  c.user_id,
  c.tenant_id,
  c.account_id,
  c.name,
  c.key_prefix,
  c.virtual_key_status,
  c.user_status,
  c.tenant_status,
  case
    when h.valid_until <= statement_timestamp() and c.virtual_key_status = 'active' then 'virtual_key_expired'
    else c.code
  end as code,
  v.valid_until,
  -- a duration, so that the reader's clock doesn't matter; nobody keeps an answer for longer than a day
  case
    when v.valid_until is not null
    then floor(extract(epoch from least(v.valid_until - clock_timestamp(), interval '1 day')) * 1000)::bigint
  end as valid_for_ms,
  -- whatever their status: it is read when a node is used, so that a change of a node evicts no key
  array(
    select m.config_node_id
    from data.virtual_key_config_node m
    where m.virtual_key_id = h.virtual_key_id
    order by m.config_node_id
  ) as config_node_ids,
  c.currency
from data.key_hash h
cross join lateral (select * from data.key_context k where k.virtual_key_id = h.virtual_key_id offset 0) c
cross join lateral (
  select least(c.valid_until, case when h.valid_until > statement_timestamp() then h.valid_until end) as valid_until
) v;

comment on view data.key_context is 'Key, user, payer, whether the key may be used, and the active nodes it may be used for.';
comment on view data.hash_context is 'The same by each hash of a key, with all its nodes: what may be cached.';

create or replace function api.resolve_virtual_key(
  key_hash text,
  out virtual_key_id uuid,
  out user_id uuid,
  out tenant_id uuid,
  out account_id uuid,
  out name text,
  out key_prefix text,
  out virtual_key_status text,
  out user_status text,
  out tenant_status text,
  out code text,
  out valid_until timestamptz,
  out valid_for_ms bigint,
  out config_node_ids uuid[],
  out currency text
)
returns record
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '500ms'
set enable_seqscan = off
as $$
begin
  if key_hash ~ '^[0-9a-f]{64}$' then
    select c.virtual_key_id, c.user_id, c.tenant_id, c.account_id, c.name, c.key_prefix, c.virtual_key_status,
      c.user_status, c.tenant_status, c.code, c.valid_until, c.valid_for_ms, c.config_node_ids,
      c.currency
    into virtual_key_id, user_id, tenant_id, account_id, name, key_prefix, virtual_key_status,
      user_status, tenant_status, code, valid_until, valid_for_ms, config_node_ids, currency
    from data.hash_context c
    where c.key_hash = decode(resolve_virtual_key.key_hash, 'hex');
  end if;
  if virtual_key_id is null then
    perform data.refuse(404, 'virtual_key_unknown', 'no virtual key has this hash',
      'send the sha-256 of the key as 64 lower-case hex digits');
  end if;
end
$$;
comment on function api.resolve_virtual_key(text) is
'Resolves the sha-256 of a virtual key to its user and payer.
`key_hash` is the sha-256 of the key, as 64 lower-case hex digits. Answers every known key, whatever its status: `code` is null when it may
be used now, else the reason. `valid_until` is the moment the answer changes by the clock alone: the key''s expiry, or the end of the grace
of one that was rotated; `valid_for_ms` is how far off that is, a day at most. `config_node_ids` are the nodes mounted on it, also those that
are disabled now. No money in it, so it may be cached. Unknown: 404 virtual_key_unknown.';
grant execute on function api.resolve_virtual_key(text) to keyledger_gateway;

create or replace function api.resolve_virtual_keys(key_hashes text[])
returns jsonb
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '500ms'
set enable_seqscan = off
as $$
begin
  if cardinality(key_hashes) > 10000 then
    perform data.refuse(422, 'too_many_elements', cardinality(key_hashes) || ' hashes, of 10000 allowed', 'send them in several calls');
  end if;
  return (
    select coalesce(jsonb_agg(coalesce(c.context, '{"code": "virtual_key_unknown", "virtual_key_id": null}') order by h.n), '[]')
    from unnest(key_hashes) with ordinality as h (hash, n)
    left join lateral (
      select to_jsonb(x) - 'key_hash' as context
      from data.hash_context x
      where x.key_hash = case when h.hash ~ '^[0-9a-f]{64}$' then decode(h.hash, 'hex') end
      offset 0
    ) c on true
  );
end
$$;
comment on function api.resolve_virtual_keys(text[]) is
'Resolves many virtual keys at once, by their sha-256.
Takes `key_hashes`, 10000 at most, and answers an array in the same order: for each what resolve_virtual_key answers, or {code:
virtual_key_unknown, virtual_key_id: null}. 422 too_many_elements.';
grant execute on function api.resolve_virtual_keys(text[]) to keyledger_gateway;

create or replace function api.resolve_billing_account(
  vk text default null,
  key_hash text default null,
  out virtual_key_id uuid,
  out user_id uuid,
  out tenant_id uuid,
  out account_id uuid,
  out owner text,
  out name text,
  out key_prefix text,
  out virtual_key_status text,
  out user_status text,
  out tenant_status text,
  out code text,
  out valid_until timestamptz,
  out config_node_ids uuid[],
  out currency text,
  out balance numeric,
  out free_credit numeric,
  out credit_limit numeric,
  out frozen_balance numeric,
  out outstanding_amount numeric,
  out overdue_amount numeric,
  out available numeric,
  out balance_version bigint
)
returns record
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '500ms'
set enable_seqscan = off
as $$
begin
  select c.virtual_key_id, c.user_id, c.tenant_id, c.account_id, c.name, c.key_prefix, c.virtual_key_status,
    c.user_status, c.tenant_status, c.code, c.valid_until, c.config_node_ids
  into virtual_key_id, user_id, tenant_id, account_id, name, key_prefix, virtual_key_status,
    user_status, tenant_status, code, valid_until, config_node_ids
  from data.hash_context c
  where c.key_hash = coalesce(sha256(convert_to(vk, 'UTF8')),
    case when resolve_billing_account.key_hash ~ '^[0-9a-f]{64}$' then decode(resolve_billing_account.key_hash, 'hex') end);
  if virtual_key_id is null then
    perform data.refuse(404, 'virtual_key_unknown', 'no such virtual key',
      'send the key as vk, or its sha-256 as key_hash: 64 lower-case hex digits');
  end if;

  select a.owner, a.currency, a.balance, a.free_credit, a.credit_limit, a.frozen_balance, a.outstanding_amount,
    a.overdue_amount, a.available, a.balance_version
  into owner, currency, balance, free_credit, credit_limit, frozen_balance, outstanding_amount,
    overdue_amount, available, balance_version
  from data.account_now a
  where a.account_id = resolve_billing_account.account_id;
  if owner is null then
    perform data.refuse(404, 'account_not_found', 'account ' || account_id, 'accounts open with their tenant or user');
  end if;
end
$$;
comment on function api.resolve_billing_account(text, text) is
'Resolves a virtual key to who pays, and what they have.
`vk` is the key itself; or `key_hash` its sha-256, which no log of the server can betray. Answers every known key, whatever its status (`code` says why it may not be used). Unknown: 404 virtual_key_unknown.';
grant execute on function api.resolve_billing_account(text, text) to keyledger_gateway;

-- a new key's text, of 256 bits out of two random uuids of 122 bits each
create or replace function data.new_virtual_key()
returns text
language sql
volatile
as $$
  select 'vk_' || translate(
    encode(sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'base64'), '+/=', '-_')
$$;

create or replace function api.create_virtual_key(
  user_id uuid,
  name text default null,
  expires_at timestamptz default null,
  config_node_ids uuid[] default null,
  out id uuid,
  out virtual_key text,
  out key_prefix text,
  out created_at timestamptz
)
returns record
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
set enable_seqscan = off
as $$
declare
  v_missing uuid;
begin
  perform from data.user_profile u where u.id = create_virtual_key.user_id;
  if not found then
    perform data.refuse(404, 'user_not_found', 'user ' || coalesce(user_id::text, 'null'), 'create the user first');
  end if;
  if expires_at <= statement_timestamp() or not isfinite(expires_at) then
    perform data.refuse(422, 'invalid_expires_at', 'expires_at must be a moment in the future', 'leave it out for a key that does not expire');
  end if;
  select n.id into v_missing
  from unnest(config_node_ids) as n (id)
  where not exists (select from data.config_node c where c.id = n.id)
  limit 1;
  if found then
    perform data.refuse(404, 'config_node_not_found', 'config node ' || coalesce(v_missing::text, 'null'), 'create the node first');
  end if;

  virtual_key := data.new_virtual_key();
  insert into data.virtual_key as k (key_hash, key_prefix, user_id, name, expires_at)
  values (sha256(convert_to(virtual_key, 'UTF8')), left(virtual_key, 10), create_virtual_key.user_id,
    create_virtual_key.name, create_virtual_key.expires_at)
  returning k.id, k.key_prefix, k.created_at into id, key_prefix, created_at;
  insert into data.virtual_key_config_node (virtual_key_id, config_node_id)
  select distinct create_virtual_key.id, n from unnest(config_node_ids) n;
end
$$;
comment on function api.create_virtual_key(uuid, text, timestamptz, uuid[]) is
'Creates a virtual key and shows it, once: only its sha-256 is kept.
The key is `user_id`''s, called `name`, and ends at `expires_at` (null: never). `config_node_ids` are mounted on it. 404 user_not_found,
config_node_not_found; 422 invalid_expires_at.';
grant execute on function api.create_virtual_key(uuid, text, timestamptz, uuid[]) to keyledger_operator;

-- Reads keys to import: the same array, with ids looked up, each key hashed, and the code of what can't be read.
create or replace function data.read_key_imports(keys jsonb)
returns jsonb
language sql
stable
as $$
  select coalesce(jsonb_agg(jsonb_build_object(
    'ord', r.ord,
    'user_id', u.id,
    'key_hash', r.key_hash,
    -- of a short key less is shown, or too little of it stays secret; of one that came hashed, the beginning of its hash
    'key_prefix', coalesce(r.key ->> 'key_prefix', left(r.virtual_key, least(10, length(r.virtual_key) / 4)), 'sha256:' || left(r.key_hash, 5)),
    'name', r.key ->> 'name',
    'expires_at', r.expires_at,
    'config_node_ids', n.ids,
    'code', case
      when r.virtual_key is not null and r.key ->> 'key_hash' is not null or jsonb_typeof(r.key) <> 'object' then 'invalid_key'
      when r.virtual_key !~ '^[!-~]+$' or length(r.virtual_key) not between 16 and 512
        or jsonb_typeof(r.key -> 'virtual_key') not in ('string', 'null') then 'invalid_virtual_key'
      when r.key_hash is null or r.key_hash !~ '^[0-9a-f]{64}$' then 'invalid_key_hash'
      when num_nonnulls(r.key ->> 'user_id', r.key ->> 'user_external_id') <> 1
        or (r.user_id is null and r.key ->> 'user_id' is not null) then 'invalid_user_id'
      when u.id is null then 'user_not_found'
      when jsonb_typeof(r.key -> 'name') not in ('string', 'null') or position(r.virtual_key in r.key ->> 'name') > 0 then 'invalid_name'
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
      coalesce(encode(sha256(convert_to(e.key ->> 'virtual_key', 'UTF8')), 'hex'), lower(e.key ->> 'key_hash')) as key_hash,
      data.to_uuid(e.key ->> 'user_id') as user_id,
      data.to_moment(e.key ->> 'expires_at') as expires_at
    from jsonb_array_elements(keys) with ordinality as e (key, ord)
    offset 0 -- or each use would parse again
  ) r
  left join lateral (
    select p.id
    from data.user_profile p
    where p.id = r.user_id or (r.user_id is null and p.external_id = r.key ->> 'user_external_id')
    offset 0
  ) u on true
  left join lateral (
    select bool_or(c.id is null) as misses_one, coalesce(array_agg(distinct c.id) filter (where c.id is not null), '{}') as ids
    from jsonb_array_elements_text(
      case when jsonb_typeof(r.key -> 'config_node_ids') = 'array' then r.key -> 'config_node_ids' end) as g (id)
    left join lateral (select d.id from data.config_node d where d.id = data.to_uuid(g.id) offset 0) c on true
    having jsonb_typeof(r.key -> 'config_node_ids') = 'array'
  ) n on true
$$;

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
  v_read jsonb;
  v_new jsonb;
begin
  perform data.require_array('keys', keys);
  v_read := data.read_key_imports(keys);

  -- in order, whatever the order of the keys: two imports don't wait for each other in a circle
  perform from data.user_profile u
  where u.id = any (array(select r.user_id from jsonb_to_recordset(v_read) as r (user_id uuid, code text) where r.code is null))
  order by u.id
  for share;
  with new_key as (
    insert into data.virtual_key as k (key_hash, key_prefix, user_id, name, expires_at)
    select distinct on (r.key_hash) decode(r.key_hash, 'hex'), r.key_prefix, r.user_id, r.name, r.expires_at
    from jsonb_to_recordset(v_read) as r (
      ord bigint, key_hash text, key_prefix text, user_id uuid, name text, expires_at timestamptz, code text)
    where r.code is null and (r.expires_at is null or r.expires_at > statement_timestamp() and isfinite(r.expires_at))
      and not exists (select from data.previous_key_hash p where p.key_hash = decode(r.key_hash, 'hex') offset 0)
    order by r.key_hash, r.ord
    on conflict (key_hash) do nothing
    returning k.id, k.key_hash
  )
  select coalesce(jsonb_object_agg(encode(n.key_hash, 'hex'), n.id), '{}') into v_new from new_key n;
  insert into data.virtual_key_config_node (virtual_key_id, config_node_id)
  select f.id, n.id::uuid
  from (
    select distinct on (r.key_hash) (v_new ->> r.key_hash)::uuid as id, r.config_node_ids
    from jsonb_to_recordset(v_read) as r (ord bigint, key_hash text, config_node_ids jsonb, code text)
    where r.code is null and v_new ? r.key_hash
    order by r.key_hash, r.ord
  ) f
  cross join lateral jsonb_array_elements_text(nullif(f.config_node_ids, 'null')) as n (id)
  order by 1, 2;

  return (
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
          when v_new ? c.key_hash and c.copy = 1 then 'imported'
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
            -- what it was before a rotation
            when h.valid_until <= statement_timestamp() then 'virtual_key_expired'
          end as code
        from jsonb_to_recordset(v_read) as r (
          ord bigint, key_hash text, user_id uuid, name text, expires_at timestamptz, config_node_ids jsonb, code text)
        -- by key, each: a join may read all the keys there are
        left join lateral (
          select * from data.key_hash a where a.key_hash = case when r.code is null then decode(r.key_hash, 'hex') end offset 0) h on true
        left join lateral (select * from data.virtual_key b where b.id = h.virtual_key_id offset 0) k on true
      ) c
    ) a
  );
end
$$;
comment on function api.import_virtual_keys(jsonb) is
'Takes over keys that are in use elsewhere; their callers notice nothing.
Takes `keys`, [{user_id | user_external_id, key_hash | virtual_key, name?, key_prefix?, expires_at?, config_node_ids?}] and answers in the
same order [{status: imported | duplicate | refused, code?, id, key_prefix}]. `key_hash` is the sha-256 of exactly what callers present, as
64 hex digits; a `virtual_key` (16 to 512 visible ASCII characters) is hashed on the way in, and never stored. A key imported before is a
duplicate, and stays as it is (`mismatch` says that it differs). key_taken: it is, or was, another key''s. virtual_key_disabled: it was
revoked here; virtual_key_expired: it was rotated here, and its grace is over. Others: user_not_found, config_node_not_found, invalid_….';
grant execute on function api.import_virtual_keys(jsonb) to keyledger_operator;

create or replace function api.rotate_virtual_key(
  inout id uuid,
  grace interval default '1 day',
  out virtual_key text,
  out key_prefix text,
  out created_at timestamptz,
  out previous_valid_until timestamptz
)
returns record
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
set enable_seqscan = off
as $$
declare
  -- months and days as so many seconds, whatever the time zone makes of them
  v_seconds numeric := extract(epoch from grace);
  v_now timestamptz;
  v_key data.virtual_key;
begin
  if v_seconds is null or v_seconds not between 0 and 90 * 86400 then
    perform data.refuse(422, 'invalid_grace', 'grace must be an interval from 0 to 90 days', 'for example "1 day"; "0" ends the old key at once');
  end if;
  select * into v_key from data.virtual_key k where k.id = rotate_virtual_key.id for update;
  if not found then
    perform data.refuse(404, 'virtual_key_unknown', 'virtual key ' || coalesce(id::text, 'null'), 'send the id, not the key');
  end if;
  v_now := clock_timestamp();
  if v_key.status <> 'active' then
    perform data.refuse(409, 'virtual_key_disabled', 'virtual key ' || id || ' is revoked', 'create a new key');
  elsif v_key.expires_at <= v_now then
    perform data.refuse(409, 'virtual_key_expired', 'virtual key ' || id || ' expired at ' || v_key.expires_at, 'create a new key');
  end if;

  virtual_key := data.new_virtual_key();
  previous_valid_until := least(v_now + make_interval(secs => v_seconds), v_key.expires_at);
  insert into data.previous_key_hash (key_hash, virtual_key_id, valid_until)
  values (v_key.key_hash, id, previous_valid_until);
  if v_seconds = 0 then
    update data.previous_key_hash p set valid_until = v_now
    where p.virtual_key_id = rotate_virtual_key.id and p.valid_until > v_now;
  end if;
  -- last: its trigger evicts every hash the key has and had
  update data.virtual_key k
  set key_hash = sha256(convert_to(virtual_key, 'UTF8')), key_prefix = left(virtual_key, 10)
  where k.id = rotate_virtual_key.id
  returning k.key_prefix, k.created_at into key_prefix, created_at;
end
$$;
comment on function api.rotate_virtual_key(uuid, interval) is
'Gives a virtual key a new text, and shows it, once; its id, mounts, budgets, spend and history stay.
The old text stays valid until `previous_valid_until`, `grace` from now (1 day; at most 90), or until the key itself expires or is revoked.
A later rotation doesn''t shorten that, but for `grace` 0: it ends every older text of the key at once. 404 virtual_key_unknown; 409
virtual_key_disabled, virtual_key_expired; 422 invalid_grace.';
grant execute on function api.rotate_virtual_key(uuid, interval) to keyledger_operator;

create or replace function api.revoke_virtual_key(id uuid)
returns api.virtual_keys
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
set plan_cache_mode = force_custom_plan
set enable_seqscan = off
as $$
declare
  v_shown api.virtual_keys;
begin
  update data.virtual_key k
  set status = 'revoked', revoked_at = clock_timestamp()
  where k.id = revoke_virtual_key.id and k.status <> 'revoked';
  select * into v_shown from data.key_shown k where k.id = revoke_virtual_key.id;
  if not found then
    perform data.refuse(404, 'virtual_key_unknown', 'virtual key ' || coalesce(id::text, 'null'), 'send the id, not the key');
  end if;
  return v_shown;
end
$$;
comment on function api.revoke_virtual_key(uuid) is
'Ends a key for good, and what it was before a rotation; ending it again changes nothing.
`id` is the virtual_key_id. Answers the key''s row. 404 virtual_key_unknown.';
grant execute on function api.revoke_virtual_key(uuid) to keyledger_operator;

create or replace function api.set_status(
  entity text,
  id uuid,
  status text,
  reason text default null
)
returns api.status_changes
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
set plan_cache_mode = force_custom_plan
as $$
declare
  v_shown api.status_changes;
begin
  perform set_config('keyledger.reason', coalesce(reason, ''), true);
  status := coalesce(status, 'none');
  case entity
    when 'tenant' then
      update data.tenant t set status = set_status.status where t.id = set_status.id;
    when 'user_profile' then
      update data.user_profile u set status = set_status.status where u.id = set_status.id;
    when 'config_node' then
      update data.config_node n set status = set_status.status where n.id = set_status.id;
    when 'virtual_key' then
      if status is distinct from 'revoked' then
        perform data.refuse(422, 'invalid_status', 'the status of a virtual_key', 'send revoked: a key can only be revoked');
      end if;
      perform api.revoke_virtual_key(id);
    else
      perform data.refuse(422, 'invalid_entity', 'entity names no kind of row that has a status',
        'send tenant, user_profile, virtual_key or config_node');
  end case;
  if not found then
    perform data.refuse(404, case entity when 'user_profile' then 'user' else entity end || '_not_found',
      entity || ' ' || coalesce(id::text, 'null'), 'send the id of a row that is there');
  end if;
  perform set_config('keyledger.reason', '', true);
  select * into v_shown from data.status_change c
  where c.entity_id = set_status.id
  order by c.id desc
  limit 1;
  return v_shown;
exception when check_violation or not_null_violation then
  perform data.refuse(422, 'invalid_status', 'no status of a ' || entity,
    'send active, suspended or closed; active or disabled for a config_node');
end
$$;
comment on function api.set_status(text, uuid, text, text) is
'Suspends, disables, closes, revokes or reactivates a tenant, user_profile, config_node or virtual_key, and keeps the reason.
`entity` is one of these names, `id` its row''s, `status` the new one, `reason` why. A change through the views is kept as well, without
one. Answers the last of its status_changes; setting what is set changes nothing. 404 tenant_not_found, user_not_found,
config_node_not_found, virtual_key_unknown; 409 closed_is_final; 422 invalid_entity, invalid_status.';
grant execute on function api.set_status(text, uuid, text, text) to keyledger_operator;

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
