-- migrate:up
-- Key contexts: a key's hash resolves to its user, payer, status and nodes.

set local role keyledger_owner;

-- every hash that means a key: its own, and those from before it was rotated
create or replace view data.key_hash as
select k.key_hash, k.id as virtual_key_id, null::timestamptz as valid_until from data.virtual_key k
union all
select p.key_hash, p.virtual_key_id, p.valid_until from data.previous_key_hash p;
comment on view data.key_hash is 'Each known hash and its key; valid_until is the end of a grace.';

-- the context of a key: `code` says why the key may not be used now
-- `valid_until` is the moment at which the clock alone changes the answer.
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
-- each by key: a join planned on small tables may read all rows of them
cross join lateral (
  select p.tenant_id, p.account_id, p.status, p.currency
  from data.user_profile p
  where p.id = k.user_id
  offset 0
) u
left join lateral (select o.status, o.currency from data.tenant o where o.id = u.tenant_id offset 0) t on true;
comment on view data.key_context is
'Each key with its user and payer: whether it may be used, and the active nodes mounted on it.';

-- the context of each hash: a hash from before a rotation expires with its grace
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
  -- a duration, since the reader's clock may be wrong; no cache keeps an answer longer than a day
  case
    when v.valid_until is not null
    then floor(extract(epoch from least(v.valid_until - clock_timestamp(), interval '1 day')) * 1000)::bigint
  end as valid_for_ms,
  -- disabled nodes too: a caller reads the status when it uses the node
  -- So a changed node evicts no key.
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
comment on view data.hash_context is
'The context of each hash of a key, with all its nodes: a cache may keep this.';

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
