-- migrate:up
-- Who asks, and what they may see.

set local role keyledger_owner;

-- the role asking: what `set role` chose (PostgREST does), else the login; a security definer call doesn't hide it. A NUL that a token
-- has somewhere in its claims can't be jsonb: it must not fail every call of that token
create or replace view data.caller as
select
  case when current_setting('role') = 'none' then session_user::text else current_setting('role') end as role,
  (case
    when position('\u0000' in c.claims) > 0 then regexp_replace(c.claims, '(?<!\\)((\\\\)*)\\u0000', '\1\\ufffd', 'g')
    else c.claims
  end)::jsonb as claims
from (select nullif(current_setting('request.jwt.claims', true), '') as claims) c;
comment on view data.caller is 'Who is asking: role and JWT claims.';

-- who acted, for the ledger (plpgsql keeps its plan, sql would plan at each call)
create or replace function data.actor()
returns text
language plpgsql
stable
as $$
begin
  return (select coalesce(nullif(c.claims ->> 'user_id', ''), nullif(c.claims ->> 'sub', ''), c.role) from data.caller c);
end
$$;

-- Was this transaction one of another cluster? Rows of an outbox, and its horizon, come with a dump, and here such a transaction is
-- still to come: no reader would ever have seen it.
create or replace function data.is_foreign(xid xid8)
returns boolean
language sql
stable
as $$
  select xid >= pg_snapshot_xmax(pg_current_snapshot()) and xid is distinct from pg_current_xact_id_if_assigned()
$$;

-- The reader: gateway and operator see all; a member is the user of claim `user_id`, else `sub` (our id, or the host's). One who is not
-- active reads what is their own, and nothing more of the tenant that pays.
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
  -- by key each; should one look like the other, `user_id` is ours first, and `sub` the host's
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

-- Each view has a branch for those who see all and one for members, who are few rows: joined into one, a member's read would scan it all.

-- users a member sees: oneself, and a tenant admin the whole tenant
create or replace view data.visible_user as
select u.*
from data.viewer v
join data.user_profile u on u.id = v.user_id or u.tenant_id = v.managed_tenant_id
where not v.sees_all;
comment on view data.visible_user is 'Users the reader may see.';

-- accounts a member sees rows of: one's own and the one that pays; `whole` where every row of it may be seen, `figures` where
-- what it has may be
create or replace view data.visible_account as
select v.user_id as account_id, true as whole, true as figures from data.viewer v where not v.sees_all and v.user_id is not null
union all
select v.account_id, v.managed_tenant_id is not null, v.is_active from data.viewer v where not v.sees_all and v.account_id <> v.user_id;
comment on view data.visible_account is 'Accounts the reader may see, and whether wholly.';

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
