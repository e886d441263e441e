-- migrate:up
-- Virtual keys: the two ways to resolve one, their making and their end.

set local role keyledger_owner;

-- what a key resolves to; `code` is why it may not be used now, `valid_until` when the clock alone changes the answer
create or replace view data.key_context as
select
  k.key_hash,
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
    join data.config_node n on n.id = m.config_node_id and n.status = 'active'
    where m.virtual_key_id = k.id
    order by m.config_node_id
  ) as config_node_ids,
  coalesce(t.currency, u.currency) as currency
from data.virtual_key k
join data.user_profile u on u.id = k.user_id
left join data.tenant t on t.id = u.tenant_id;

comment on view data.key_context is 'Key, user, payer, and whether the key may be used.';

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
  out config_node_ids uuid[],
  out currency text
)
returns record
language plpgsql
stable
security definer
set search_path = ''
as $$
begin
  if key_hash ~ '^[0-9a-f]{64}$' then
    select c.virtual_key_id, c.user_id, c.tenant_id, c.account_id, c.name, c.key_prefix, c.virtual_key_status,
      c.user_status, c.tenant_status, c.code, c.valid_until, c.config_node_ids, c.currency
    into virtual_key_id, user_id, tenant_id, account_id, name, key_prefix, virtual_key_status,
      user_status, tenant_status, code, valid_until, config_node_ids, currency
    from data.key_context c
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
Answers every known key, whatever its status: `code` is null when it may be used now, else the reason. `valid_until` is the moment the
answer changes by the clock alone. No money in it, so it may be cached. Unknown: 404 virtual_key_unknown.';
grant execute on function api.resolve_virtual_key(text) to keyledger_gateway;

create or replace function api.resolve_billing_account(
  vk text,
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
set search_path = ''
as $$
begin
  select c.virtual_key_id, c.user_id, c.tenant_id, c.account_id, c.name, c.key_prefix, c.virtual_key_status,
    c.user_status, c.tenant_status, c.code, c.valid_until, c.config_node_ids
  into virtual_key_id, user_id, tenant_id, account_id, name, key_prefix, virtual_key_status,
    user_status, tenant_status, code, valid_until, config_node_ids
  from data.key_context c
  where c.key_hash = sha256(convert_to(vk, 'UTF8'));
  if virtual_key_id is null then
    perform data.refuse(404, 'virtual_key_unknown', 'no such virtual key', 'send the key itself, not its hash');
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
comment on function api.resolve_billing_account(text) is
'Resolves a virtual key to who pays, and what they have.
Answers every known key, whatever its status (`code` says why it may not be used). Unknown: 404 virtual_key_unknown.';
grant execute on function api.resolve_billing_account(text) to keyledger_gateway;

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
set search_path = ''
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

  -- 256 bits out of two random uuids of 122 bits each
  virtual_key := 'vk_' || translate(
    encode(sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'base64'), '+/=', '-_');
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
`config_node_ids` are mounted on it. 404 user_not_found, config_node_not_found; 422 invalid_expires_at.';
grant execute on function api.create_virtual_key(uuid, text, timestamptz, uuid[]) to keyledger_operator;

create or replace function api.revoke_virtual_key(id uuid)
returns api.virtual_keys
language plpgsql
volatile
security definer
set search_path = ''
as $$
declare
  v_shown api.virtual_keys;
begin
  update data.virtual_key k
  set status = 'revoked', revoked_at = clock_timestamp()
  where k.id = revoke_virtual_key.id and k.status <> 'revoked';
  select * into v_shown from api.virtual_keys k where k.id = revoke_virtual_key.id;
  if not found then
    perform data.refuse(404, 'virtual_key_unknown', 'virtual key ' || coalesce(id::text, 'null'), 'send the id, not the key');
  end if;
  return v_shown;
end
$$;
comment on function api.revoke_virtual_key(uuid) is
'Ends a key for good; ending it again changes nothing.
Answers the key''s row. 404 virtual_key_unknown.';
grant execute on function api.revoke_virtual_key(uuid) to keyledger_operator;

reset role;

-- migrate:down
-- none: a ledger is not rolled back
