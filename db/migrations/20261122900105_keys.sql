-- migrate:up
-- Virtual keys: a gateway resolves them, the operator creates, rotates and revokes them.

set local role keyledger_owner;

-- keys as api.virtual_keys shows them, for every reader
-- A granted function answers from views like this one, named `…_shown`.
-- Its caller may be a host's security definer function: the session's rows don't tell its right.
-- tests/roles/answers.test.ts proves that each such view equals its api view.
-- The two views stand apart so that a query computes only the columns it names.
create or replace view data.key_shown as
select
  k.id, k.key_prefix, k.user_id, u.tenant_id, k.name, k.status, k.expires_at,
  array(
    select m.config_node_id from data.virtual_key_config_node m where m.virtual_key_id = k.id order by 1
  ) as config_node_ids,
  k.created_at, k.revoked_at,
  (select x.last_used_at from data.virtual_key_use x where x.virtual_key_id = k.id) as last_used_at,
  (select max(p.valid_until) from data.previous_key_hash p where p.virtual_key_id = k.id) as previous_valid_until
from data.virtual_key k
join data.user_profile u on u.id = k.user_id;
comment on view data.key_shown is 'Keys as api.virtual_keys shows them, of every user.';

create or replace view api.virtual_keys with (security_barrier) as
select
  k.id, k.key_prefix, k.user_id, k.tenant_id, k.name, k.status, k.expires_at,
  array(
    select m.config_node_id from data.virtual_key_config_node m where m.virtual_key_id = k.id order by 1
  ) as config_node_ids,
  k.created_at, k.revoked_at,
  (select u.last_used_at from data.virtual_key_use u where u.virtual_key_id = k.id) as last_used_at,
  (select max(p.valid_until) from data.previous_key_hash p where p.virtual_key_id = k.id) as previous_valid_until
from (
  select k.id, k.key_prefix, k.user_id, u.tenant_id, k.name, k.status, k.expires_at, k.created_at, k.revoked_at
  from data.virtual_key k
  join data.user_profile u on u.id = k.user_id
  where (select v.sees_all from data.viewer v)
  union all
  select k.id, k.key_prefix, k.user_id, u.tenant_id, k.name, k.status, k.expires_at, k.created_at, k.revoked_at
  from data.visible_user u
  join data.virtual_key k on k.user_id = u.id
) k;
comment on view api.virtual_keys is
'Virtual keys by their display prefix; neither the key nor its hash is shown.
`last_used_at` is the last recorded use, to the minute. `previous_valid_until` is the end of grace
for texts from before a rotation: the latest of them.';
grant select on api.virtual_keys to keyledger_operator, keyledger_member;

-- resolve one hash, as a gateway does before each request
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
`key_hash` is the sha-256 of the key, as 64 lower-case hex digits. Answers every known key, whatever
its status: `code` is null when the key may be used now, else the reason. At `valid_until` the clock
alone changes the answer: the key expires, or the grace of a rotated text ends. `valid_for_ms` is
the time until then, a day at most. `config_node_ids` are the nodes mounted on the key, disabled
nodes too. The answer has no money in it, so a cache may keep it. 404 virtual_key_unknown.';
grant execute on function api.resolve_virtual_key(text) to keyledger_gateway;

-- resolve many hashes at once
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
    perform data.refuse(422, 'too_many_elements', cardinality(key_hashes) || ' hashes, of 10000 allowed',
      'send them in several calls');
  end if;
  return (
    select coalesce(jsonb_agg(
      coalesce(c.context, '{"code": "virtual_key_unknown", "virtual_key_id": null}') order by h.n), '[]')
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
Takes `key_hashes`, 10000 at most, and answers an array in the same order. Each element is the
answer of resolve_virtual_key, or {code: virtual_key_unknown, virtual_key_id: null}. 422
too_many_elements.';
grant execute on function api.resolve_virtual_keys(text[]) to keyledger_gateway;

-- the text of a new key: 256 bits, out of two random uuids of 122 bits each
create or replace function data.new_virtual_key()
returns text
language sql
volatile
as $$
  select 'vk_' || translate(
    encode(sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'base64'), '+/=', '-_')
$$;

-- make a key and mount its nodes
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
    perform data.refuse(422, 'invalid_expires_at', 'expires_at must be a moment in the future',
      'leave it out for a key that does not expire');
  end if;
  select n.id into v_missing
  from unnest(config_node_ids) as n (id)
  where not exists (select from data.config_node c where c.id = n.id)
  limit 1;
  if found then
    perform data.refuse(404, 'config_node_not_found', 'config node ' || coalesce(v_missing::text, 'null'),
      'create the node first');
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
The key belongs to `user_id`, is called `name`, and ends at `expires_at` (null: never).
`config_node_ids` are mounted on it. 404 user_not_found, config_node_not_found; 422
invalid_expires_at.';
grant execute on function api.create_virtual_key(uuid, text, timestamptz, uuid[]) to keyledger_operator;

-- give a key a new text, and keep the old one valid for its grace
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
  -- months and days in seconds: in a time zone a day may be longer or shorter
  v_seconds numeric := extract(epoch from grace);
  v_now timestamptz;
  v_key data.virtual_key;
begin
  if v_seconds is null or v_seconds not between 0 and 90 * 86400 then
    perform data.refuse(422, 'invalid_grace', 'grace must be an interval from 0 to 90 days',
      'for example "1 day"; "0" ends the old key at once');
  end if;
  select * into v_key from data.virtual_key k where k.id = rotate_virtual_key.id for update;
  if not found then
    perform data.refuse(404, 'virtual_key_unknown', 'virtual key ' || coalesce(id::text, 'null'),
      'send the id, not the key');
  end if;
  v_now := clock_timestamp();
  if v_key.status <> 'active' then
    perform data.refuse(409, 'virtual_key_disabled', 'virtual key ' || id || ' is revoked', 'create a new key');
  elsif v_key.expires_at <= v_now then
    perform data.refuse(409, 'virtual_key_expired', 'virtual key ' || id || ' expired at ' || v_key.expires_at,
      'create a new key');
  end if;

  virtual_key := data.new_virtual_key();
  previous_valid_until := least(v_now + make_interval(secs => v_seconds), v_key.expires_at);
  insert into data.previous_key_hash (key_hash, virtual_key_id, valid_until)
  values (v_key.key_hash, id, previous_valid_until);
  if v_seconds = 0 then
    update data.previous_key_hash p set valid_until = v_now
    where p.virtual_key_id = rotate_virtual_key.id and p.valid_until > v_now;
  end if;
  -- last, since its trigger evicts every hash that the key has and had
  update data.virtual_key k
  set key_hash = sha256(convert_to(virtual_key, 'UTF8')), key_prefix = left(virtual_key, 10)
  where k.id = rotate_virtual_key.id
  returning k.key_prefix, k.created_at into key_prefix, created_at;
end
$$;
comment on function api.rotate_virtual_key(uuid, interval) is
'Gives a virtual key a new text, and shows it, once; its id, mounts, budgets, spend and history stay.
`id` is the key''s. The old text stays valid until `previous_valid_until`, which is `grace` from now
(1 day; at most 90), or until the key itself expires or is revoked. A later rotation doesn''t
shorten that, except with `grace` 0: it ends every older text of the key at once. 404
virtual_key_unknown; 409 virtual_key_disabled, virtual_key_expired; 422 invalid_grace.';
grant execute on function api.rotate_virtual_key(uuid, interval) to keyledger_operator;

-- end a key
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
    perform data.refuse(404, 'virtual_key_unknown', 'virtual key ' || coalesce(id::text, 'null'),
      'send the id, not the key');
  end if;
  return v_shown;
end
$$;
comment on function api.revoke_virtual_key(uuid) is
'Ends a key for good, with its texts from before a rotation; ending it again changes nothing.
`id` is the virtual_key_id. Answers the key''s row. 404 virtual_key_unknown.';
grant execute on function api.revoke_virtual_key(uuid) to keyledger_operator;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
