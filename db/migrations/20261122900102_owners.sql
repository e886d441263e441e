-- migrate:up
-- Tenants and users.

set local role keyledger_owner;

-- The operator writes these views; no grant covers a column that follows from others.
-- The views repeat the tables' defaults, since PostgREST knows only the defaults of a view.
-- An upsert repeats a fixed column, so the grant covers it; a trigger refuses to change it.

create or replace view api.tenants with (security_barrier) as
select t.id, t.name, t.external_id, t.currency, t.status, t.created_at
from data.tenant t
where (select v.sees_all from data.viewer v)
  or t.id = (select u.tenant_id from data.viewer v join data.user_profile u on u.id = v.user_id);
comment on view api.tenants is
'Paying organisations.
Inserting a tenant opens its account and fixes `currency`. Suspend by status; `closed` is final.';
grant select on api.tenants to keyledger_operator, keyledger_member;
grant insert (id, name, external_id, currency, status), update (id, name, external_id, currency, status)
  on api.tenants to keyledger_operator;
alter view api.tenants alter column id set default gen_random_uuid();
alter view api.tenants alter column currency set default 'USD';
alter view api.tenants alter column status set default 'active';

create or replace view api.user_profiles with (security_barrier) as
select u.id, u.tenant_id, u.tenant_role, u.external_id, u.display_name, u.currency, u.status, u.account_id, u.created_at
from data.user_profile u
where (select v.sees_all from data.viewer v)
  or u.id = (select v.user_id from data.viewer v)
  or u.tenant_id = (select v.managed_tenant_id from data.viewer v);
comment on view api.user_profiles is
'Users. A tenant pays for its users; a user without a tenant pays alone. `account_id` is the payer.
Inserting a user opens the user''s own account, which stays unused while the user has a tenant.
Suspend by status; `closed` is final. A changed `tenant_id` makes `tenant_role` member, unless the
same update names `tenant_role`. A user who is not active still reads their own rows, but neither
the tenant''s figures nor rows as its admin.';
grant select on api.user_profiles to keyledger_operator, keyledger_member;
grant insert (id, tenant_id, tenant_role, external_id, display_name, currency, status),
  update (id, tenant_id, tenant_role, external_id, display_name, currency, status)
  on api.user_profiles to keyledger_operator;
alter view api.user_profiles alter column id set default gen_random_uuid();
alter view api.user_profiles alter column tenant_role set default 'member';
alter view api.user_profiles alter column currency set default 'USD';
alter view api.user_profiles alter column status set default 'active';

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
