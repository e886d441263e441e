-- migrate:up
-- The caller of a statement, and the rows that caller may see.

set local role keyledger_owner;

-- The role is the one that `set role` chose (PostgREST sets it), else the login.
-- A security definer call doesn't hide it.
-- jsonb can't hold a NUL: a token with one in its claims must not fail at every call.
create or replace view data.caller as
select
  case when current_setting('role') = 'none' then session_user::text else current_setting('role') end as role,
  (case
    when position('\u0000' in c.claims) > 0 then regexp_replace(c.claims, '(?<!\\)((\\\\)*)\\u0000', '\1\\ufffd', 'g')
    else c.claims
  end)::jsonb as claims
from (select nullif(current_setting('request.jwt.claims', true), '') as claims) c;
comment on view data.caller is 'The caller of the statement: role and JWT claims.';

-- the actor that the ledger names (plpgsql keeps its plan, sql would plan at each call)
create or replace function data.actor()
returns text
language plpgsql
stable
as $$
begin
  return (
    select coalesce(nullif(c.claims ->> 'user_id', ''), nullif(c.claims ->> 'sub', ''), c.role)
    from data.caller c);
end
$$;

-- whether a transaction is of another cluster
-- A dump carries an outbox and its horizon along, with ids of transactions still to come here.
-- No reader of this cluster would ever see such a transaction.
create or replace function data.is_foreign(xid xid8)
returns boolean
language sql
stable
as $$
  select xid >= pg_snapshot_xmax(pg_current_snapshot()) and xid is distinct from pg_current_xact_id_if_assigned()
$$;

-- The reader: gateway and operator see every row.
-- A member is the user of claim `user_id`, else of `sub`: by keyledger's id, or by the host's.
-- A member who is not active reads their own rows, and no more of the tenant that pays.
create or replace view data.viewer as
select
  c.sees_all,
  u.id as user_id,
  u.account_id,
  case when u.tenant_role = 'admin' and u.status = 'active' then u.tenant_id end as managed_tenant_id,
  u.status = 'active' as is_active
from (
  select
    pg_has_role(role, 'keyledger_gateway', 'usage') or pg_has_role(role, 'keyledger_operator', 'usage') as sees_all,
    nullif(claims ->> 'user_id', '') is not null as by_user_id,
    coalesce(nullif(claims ->> 'user_id', ''), claims ->> 'sub') as id
  from data.caller
) c
left join lateral (
  -- each by key; where both ids match, `user_id` means keyledger's id, and `sub` the host's
  select m.*, case when c.by_user_id then 3 else 1 end as rank
  from data.user_profile m
  where not c.sees_all and m.external_id = c.id
  union all
  select m.*, 2 from data.user_profile m
  where not c.sees_all
    and m.id = case when c.id ~* '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' then c.id::uuid end
  order by rank
  limit 1
) u on true;
comment on view data.viewer is 'The reader, as one row.';

-- Each view has two branches: one for a reader who sees every row, one for a member.
-- A member may see few rows: with one branch for both, a member's read would scan the whole table.

-- users that a member sees: the member; for an admin of a tenant, all users of the tenant
create or replace view data.visible_user as
select u.*
from data.viewer v
join data.user_profile u on u.id = v.user_id or u.tenant_id = v.managed_tenant_id
where not v.sees_all;
comment on view data.visible_user is 'Users the reader may see.';

-- accounts of which a member sees rows: the member's own, and the one that pays
-- `whole`: every row of the account is visible; `figures`: the account's figures are.
create or replace view data.visible_account as
select v.user_id as account_id, true as whole, true as figures
from data.viewer v
where not v.sees_all and v.user_id is not null
union all
select v.account_id, v.managed_tenant_id is not null, v.is_active
from data.viewer v
where not v.sees_all and v.account_id <> v.user_id;
comment on view data.visible_account is 'Accounts the reader may see: all rows of them, or the figures.';

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
