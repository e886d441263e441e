-- migrate:up
-- What each role may see, decided here once, and the views PostgREST shows.
-- Views call no function of ours: those would need a right of the reader's.

set local role keyledger_owner;

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

-- Each view has a branch for those who see all and one for members, who are few rows: joined into one, a member's read would scan it all.

-- users a member sees: oneself, and a tenant admin the whole tenant
create or replace view data.visible_user as
select u.*
from data.viewer v
join data.user_profile u on u.id = v.user_id or u.tenant_id = v.managed_tenant_id
where not v.sees_all;

-- accounts a member sees rows of: one's own and the one that pays; `whole` where every row of it may be seen, `figures` where
-- what it has may be
create or replace view data.visible_account as
select v.user_id as account_id, true as whole, true as figures from data.viewer v where not v.sees_all and v.user_id is not null
union all
select v.account_id, v.managed_tenant_id is not null, v.is_active from data.viewer v where not v.sees_all and v.account_id <> v.user_id;

-- an account's figures now: what the clock has ended, and no posting has settled yet, is subtracted
create or replace view data.account_now as
select
  a.account_id,
  case when a.owner_tenant_id is null then 'user' else 'tenant' end as owner,
  a.owner_user_id,
  a.owner_tenant_id,
  a.currency,
  a.balance,
  a.free_credit - g.due as free_credit,
  a.credit_limit,
  a.frozen_balance - h.due - p.shrunk as frozen_balance,
  a.outstanding_amount,
  -- what the last statement left unpaid, less what was paid since: the oldest debt is paid first
  case when a.outstanding_amount > 0 then coalesce((
    select case when s.outstanding_closing > 0 then greatest(s.outstanding_closing + coalesce((
      select sum(t.outstanding_delta)
      from data.billing_transaction t
      where t.account_id = s.account_id and t.seq > s.last_seq and t.outstanding_delta < 0
    ), 0), 0) end
    from data.accounting_snapshot s
    where s.account_id = a.account_id
    order by s.period_start desc
    limit 1
  ), 0) else 0 end::numeric(28, 10) as overdue_amount,
  a.available + h.due - g.due + p.shrunk as available,
  a.low_balance_threshold,
  a.time_zone,
  a.balance_version,
  a.last_charged_at,
  a.created_at,
  encode(a.head_hash, 'hex') as head
from data.account_balance a
cross join lateral (
  select coalesce(sum(d.amount - d.captured), 0) as due
  from (
    select * from data.hold h
    where h.account_id = a.account_id and h.status = 'open' and h.expires_at <= statement_timestamp()
    order by h.expires_at -- so by the index of open holds, whatever the table was like when the plan was made
  ) d
) h
cross join lateral (
  select coalesce(sum(g.remaining), 0) as due
  from data.credit_grant g
  where g.account_id = a.account_id and g.remaining > 0 and g.expires_at <= statement_timestamp()
) g
-- as data.shrink_parked does it
cross join lateral (
  select case when g.due > 0 and a.available + h.due - g.due < 0 then least(g.due - h.due - a.available, g.due, coalesce((
    select sum(k.amount - k.captured) from data.hold k where k.account_id = a.account_id and k.status = 'parked'), 0)) else 0 end as shrunk
) p;

comment on view data.viewer is 'The reader, as one row.';
comment on view data.visible_user is 'Users the reader may see.';
comment on view data.visible_account is 'Accounts the reader may see, and whether wholly.';
comment on view data.account_now is 'Account figures with what is due subtracted.';

-- Rows as the views show them, whoever reads: a function that was granted answers from these, since what its caller's session may
-- see says nothing of the right it was called by (a host's own security definer function). tests/answers.test.ts holds each equal to
-- its view, which stands apart so that columns nobody asks for are not computed.

create or replace view data.entry_shown as
select
  t.account_id, t.seq, t.kind, t.amount, t.balance_delta, t.free_credit_delta, t.outstanding_delta,
  t.balance_after, t.free_credit_after, t.outstanding_after, t.credit_limit_after,
  t.reference, t.actor, t.reason, t.usage_count, sha256(t.usage_list) as usage_digest,
  t.refund_of_seq, t.refund_of_usage_id, t.metadata, t.prev_hash, t.hash, t.created_at,
  case
    when t.kind in ('top_up', 'top_up_reversal') then 'cash'
    when t.kind in ('usage', 'refund') then 'revenue'
    when t.kind in ('credit_grant', 'credit_expiry') then 'promotion'
    when t.kind in ('adjustment', 'opening') then t.kind
  end as counter_account
from data.billing_transaction t;

create or replace view data.key_shown as
select k.id, k.key_prefix, k.user_id, u.tenant_id, k.name, k.status, k.expires_at,
  array(select m.config_node_id from data.virtual_key_config_node m where m.virtual_key_id = k.id order by 1) as config_node_ids,
  k.created_at, k.revoked_at,
  (select x.last_used_at from data.virtual_key_use x where x.virtual_key_id = k.id) as last_used_at,
  (select max(p.valid_until) from data.previous_key_hash p where p.virtual_key_id = k.id) as previous_valid_until
from data.virtual_key k
join data.user_profile u on u.id = k.user_id;

create or replace view data.hold_shown as
select h.account_id, h.id, h.amount, h.captured,
  case when h.status = 'open' and h.expires_at <= statement_timestamp() then 'expired' else h.status end as status,
  h.expires_at, h.virtual_key_id, h.config_node_id, h.meters, h.created_at, h.ended_at,
  h.reference, h.reason, h.actor, h.ended_by, h.end_reason
from data.hold h;

comment on view data.entry_shown is 'Ledger entries as api.billing_transactions shows them, of every account.';
comment on view data.key_shown is 'Keys as api.virtual_keys shows them, of every user.';
comment on view data.hold_shown is 'Holds as api.holds shows them, of every account.';

create or replace view api.account_balances with (security_barrier) as
select
  u.id as user_id,
  u.external_id,
  u.tenant_id,
  a.account_id,
  a.owner,
  a.currency,
  a.balance,
  a.free_credit,
  a.credit_limit,
  a.frozen_balance,
  a.outstanding_amount,
  a.overdue_amount,
  a.available,
  a.balance_version,
  a.last_charged_at
from (
  select u.id, u.external_id, u.tenant_id, u.account_id from data.user_profile u where (select v.sees_all from data.viewer v)
  union all
  select u.id, u.external_id, u.tenant_id, u.account_id
  from data.visible_user u
  where u.account_id = any (array(select v.account_id from data.visible_account v where v.figures))
) u
cross join lateral (select * from data.account_now n where n.account_id = u.account_id) a;
comment on view api.account_balances is
'Who pays for a user, and what they have: one row per user.
Filter by `user_id`, or by `external_id`, the user''s id in your own system. A tenant''s figures repeat for each of its users: never sum
this view. Select amounts as text: ?select=available::text.';
grant select on api.account_balances to keyledger_gateway, keyledger_operator, keyledger_member;

create or replace view api.billing_accounts with (security_barrier) as
select a.* from data.account_now a where (select v.sees_all from data.viewer v)
union all
select a.* from data.account_now a where a.account_id = any (array(select v.account_id from data.visible_account v where v.figures));
comment on view api.billing_accounts is
'An account''s figures: one row per payer.
available = free_credit + balance + credit_limit - frozen_balance - outstanding_amount. `head` is the last entry''s hash, in hex: kept
elsewhere, it lets verify_ledger prove that no entry up to it was changed since.';
grant select on api.billing_accounts to keyledger_gateway, keyledger_operator, keyledger_member;

create or replace view api.virtual_keys with (security_barrier) as
select
  k.id,
  k.key_prefix,
  k.user_id,
  k.tenant_id,
  k.name,
  k.status,
  k.expires_at,
  array(select m.config_node_id from data.virtual_key_config_node m where m.virtual_key_id = k.id order by 1) as config_node_ids,
  k.created_at,
  k.revoked_at,
  (select u.last_used_at from data.virtual_key_use u where u.virtual_key_id = k.id) as last_used_at,
  (select max(p.valid_until) from data.previous_key_hash p where p.virtual_key_id = k.id) as previous_valid_until
from (
  select k.*, u.tenant_id
  from data.virtual_key k
  join data.user_profile u on u.id = k.user_id
  where (select v.sees_all from data.viewer v)
  union all
  select k.*, u.tenant_id
  from data.visible_user u
  join data.virtual_key k on k.user_id = u.id
) k;
comment on view api.virtual_keys is
'Virtual keys by their display prefix; neither the key nor its hash is shown.
`last_used_at`: the last use recorded, to the minute. `previous_valid_until`: when the last one it was before a rotation stops, or stopped.';
grant select on api.virtual_keys to keyledger_operator, keyledger_member;

create or replace view api.billing_transactions with (security_barrier) as
select
  t.account_id, t.seq, t.kind, t.amount, t.balance_delta, t.free_credit_delta, t.outstanding_delta,
  t.balance_after, t.free_credit_after, t.outstanding_after, t.credit_limit_after,
  t.reference, t.actor, t.reason, t.usage_count, sha256(t.usage_list) as usage_digest,
  t.refund_of_seq, t.refund_of_usage_id, t.metadata, t.prev_hash, t.hash, t.created_at,
  case
    when t.kind in ('top_up', 'top_up_reversal') then 'cash'
    when t.kind in ('usage', 'refund') then 'revenue'
    when t.kind in ('credit_grant', 'credit_expiry') then 'promotion'
    when t.kind in ('adjustment', 'opening') then t.kind
  end as counter_account
from (
  select t.* from data.billing_transaction t where (select v.sees_all from data.viewer v)
  union all
  select t.* from data.billing_transaction t
  where t.account_id = any (array(select v.account_id from data.visible_account v where v.whole))
) t;
comment on view api.billing_transactions is
'The ledger: every entry of an account, in order of seq, chained by hash.
`amount` is what the entry did to the account: balance_delta + free_credit_delta - outstanding_delta.';
grant select on api.billing_transactions to keyledger_operator, keyledger_member;

create or replace view api.usage_logs with (security_barrier) as
select
  to_timestamp(('x' || substr(l.id::text, 1, 8) || substr(l.id::text, 10, 4))::bit(48)::bigint / 1000.0::double precision) as used_at,
  l.*
from (
  select l.* from data.usage_log l where (select v.sees_all from data.viewer v)
  union all
  select l.* from data.usage_log l
  where l.account_id = any (array(select v.account_id from data.visible_account v))
    and (l.account_id = any (array(select v.account_id from data.visible_account v where v.whole))
      or l.user_id = (select v.user_id from data.viewer v))
) l;
comment on view api.usage_logs is 'Each charged event: who used what, what it cost, and the ledger entry (transaction_seq) that charged it.';
grant select on api.usage_logs to keyledger_operator, keyledger_member;

create or replace view api.holds with (security_barrier) as
select h.account_id, h.id, h.amount, h.captured,
  case when h.status = 'open' and h.expires_at <= statement_timestamp() then 'expired' else h.status end as status,
  h.expires_at, h.virtual_key_id, h.config_node_id, h.meters, h.created_at, h.ended_at,
  h.reference, h.reason, h.actor, h.ended_by, h.end_reason
from (
  select h.* from data.hold h where (select v.sees_all from data.viewer v)
  union all
  select h.* from data.hold h
  where h.account_id = any (array(select v.account_id from data.visible_account v))
    and (h.account_id = any (array(select v.account_id from data.visible_account v where v.whole))
      or h.virtual_key_id = any (array(
        select k.id from data.virtual_key k where k.user_id = (select v.user_id from data.viewer v))))
) h;
comment on view api.holds is
'Money set aside for requests: open, parked, captured, released or expired.
A parked one waits for an event that could not be charged yet: it doesn''t expire, and ends when the event is charged or dismissed.
One without expires_at is an operator''s freeze: `reference`, `reason` and `actor` say why and by whom, `ended_by` and `end_reason` its end.';
grant select on api.holds to keyledger_gateway, keyledger_operator, keyledger_member;

create or replace view data.budget_shown as
select b.id, b.account_id, b.scope, b.scope_id, b.amount, b.period, w.window_start, w.window_end,
  coalesce(s.spent, 0)::numeric(28, 10) as spent, h.held::numeric(28, 10) as held,
  (b.amount - coalesce(s.spent, 0) - h.held)::numeric(28, 10) as remaining, b.created_at
from data.budget b
cross join lateral (select a.time_zone from data.account_balance a where a.account_id = b.account_id) a
-- as data.window_start has it; a total has neither beginning nor end
cross join lateral (
  select date_trunc(nullif(b.period, 'total'), statement_timestamp() at time zone a.time_zone) as starts
) l
cross join lateral (select l.starts + ('1 ' || nullif(b.period, 'total'))::interval as ends) e
cross join lateral (
  select
    case when (l.starts at time zone a.time_zone - interval '1 hour') at time zone a.time_zone = l.starts
      then l.starts at time zone a.time_zone - interval '1 hour' else l.starts at time zone a.time_zone end as window_start,
    case when (e.ends at time zone a.time_zone - interval '1 hour') at time zone a.time_zone = e.ends
      then e.ends at time zone a.time_zone - interval '1 hour' else e.ends at time zone a.time_zone end as window_end
) w
left join lateral (
  select * from data.budget_spend c
  where c.account_id = b.account_id and c.budget_id = b.id and c.window_start = coalesce(w.window_start, '-infinity')
  offset 0
) s on true
cross join lateral (
  select coalesce(sum(o.amount - o.captured), 0) as held
  from (
    select * from data.hold n where n.account_id = b.account_id and n.status = 'open' and n.expires_at > statement_timestamp()
    union all
    select * from data.hold p where p.account_id = b.account_id and p.status = 'parked'
  ) o
  cross join lateral (select * from data.virtual_key v where v.id = o.virtual_key_id offset 0) k
  where b.scope_id = case b.scope when 'virtual_key' then k.id when 'user' then k.user_id else b.scope_id end
) h;

comment on view data.budget_shown is 'Budgets as api.budgets shows them, of every account.';

create or replace view api.budgets with (security_barrier) as
select b.* from data.budget_shown b where (select v.sees_all from data.viewer v)
union all
select b.* from data.budget_shown b
where b.account_id = any (array(select v.account_id from data.visible_account v))
  and (b.account_id = any (array(select v.account_id from data.visible_account v where v.whole))
    or (b.scope = 'user' and b.scope_id = (select v.user_id from data.viewer v))
    or (b.scope = 'virtual_key' and b.scope_id = any (array(
      select k.id from data.virtual_key k where k.user_id = (select v.user_id from data.viewer v)))));
comment on view api.budgets is
'What keys, users and tenants may spend of an account, and what they have left in the window they are in now.
remaining = amount - spent - held; it is negative where more was used than held. A total has no window.';
grant select on api.budgets to keyledger_gateway, keyledger_operator, keyledger_member;

create or replace view api.accounting_snapshots with (security_barrier) as
select s.* from data.accounting_snapshot s where (select v.sees_all from data.viewer v)
union all
select s.* from data.accounting_snapshot s
where s.account_id = any (array(select v.account_id from data.visible_account v where v.whole));
comment on view api.accounting_snapshots is 'Sealed statements.';
grant select on api.accounting_snapshots to keyledger_operator, keyledger_member;

create or replace view api.rejected_usage as
select r.id, r.event, r.usage_id, r.account_id, r.hold_id, r.code, r.created_at, r.tried_at, r.resolved_at, r.resolution, r.reason, r.actor
from data.rejected_usage r;
comment on view api.rejected_usage is
'Events that could not be charged, with the code that says why; kept until resolved.
Fix the cause, then call replay_rejected_usage; or dismiss_rejected_usage, if it is never to be charged. `hold_id`: the hold whose money
stays set aside until then.';
grant select on api.rejected_usage to keyledger_operator;

-- Writable by the operator; columns that follow from others are read-only by grant.
-- Their defaults are the tables', named again: PostgREST knows those of a view only.
-- A fixed column may be written as it is, since an upsert repeats it; a trigger refuses its change.

create or replace view api.tenants with (security_barrier) as
select t.id, t.name, t.external_id, t.currency, t.status, t.created_at
from data.tenant t
where (select v.sees_all from data.viewer v)
  or t.id = (select u.tenant_id from data.viewer v join data.user_profile u on u.id = v.user_id);
comment on view api.tenants is
'Paying organisations.
Inserting one opens its account; `currency` is fixed then. Suspend by status; `closed` is final.';
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
'Users. A user with a tenant is paid for by the tenant, any other pays alone (`account_id`).
Inserting one opens its own account, unused while it has a tenant. Suspend by status; `closed` is final. A changed `tenant_id` makes
`tenant_role` member, unless the same update names it. One who is not active still reads what is their own; of the tenant that pays, not
what it has, nor as its admin.';
grant select on api.user_profiles to keyledger_operator, keyledger_member;
grant insert (id, tenant_id, tenant_role, external_id, display_name, currency, status),
  update (id, tenant_id, tenant_role, external_id, display_name, currency, status)
  on api.user_profiles to keyledger_operator;
alter view api.user_profiles alter column id set default gen_random_uuid();
alter view api.user_profiles alter column tenant_role set default 'member';
alter view api.user_profiles alter column currency set default 'USD';
alter view api.user_profiles alter column status set default 'active';

create or replace view api.status_changes with (security_barrier) as
select c.id, c.entity, c.entity_id, c.old_status, c.new_status, c.actor, c.reason, c.created_at
from (
  select c.* from data.status_change c where (select v.sees_all from data.viewer v)
  union all
  select c.* from data.status_change c
  where c.entity_id = any (array(
    select u.id from data.visible_user u
    union all
    select k.id from data.visible_user u join data.virtual_key k on k.user_id = u.id
    union all
    select v.managed_tenant_id from data.viewer v))
) c;
comment on view api.status_changes is
'Who changed the status of a tenant, user_profile, virtual_key or config_node, when and why; old_status is null for one that began so.
What has no row here has been active from its beginning. `actor` is the claim `user_id`, else `sub`, of the token that PostgREST checked, else
the role: a login that may run SQL as the operator can set the claims.';
grant select on api.status_changes to keyledger_operator, keyledger_member;

create or replace view api.config_nodes as
select n.id, n.name, n.provider, n.model, n.endpoint, n.status, n.created_at from data.config_node n;
comment on view api.config_nodes is 'Upstream instances (deployments, channels); prices belong to them.';
grant select on api.config_nodes to keyledger_gateway, keyledger_operator;
grant insert (id, name, provider, model, endpoint, status), update (id, name, provider, model, endpoint, status)
  on api.config_nodes to keyledger_operator;
alter view api.config_nodes alter column id set default gen_random_uuid();
alter view api.config_nodes alter column status set default 'active';

create or replace view api.virtual_key_config_nodes as
select m.virtual_key_id, m.config_node_id, m.created_at from data.virtual_key_config_node m;
comment on view api.virtual_key_config_nodes is 'Mounts: the nodes a key may hold funds for.';
grant select on api.virtual_key_config_nodes to keyledger_gateway, keyledger_operator;
grant insert (virtual_key_id, config_node_id), update (virtual_key_id, config_node_id), delete
  on api.virtual_key_config_nodes to keyledger_operator;

create or replace view api.prices as
select p.id, p.config_node_id, p.meter, p.unit_price, p.unit_size, p.currency, p.effective_from, p.created_at from data.price p;
comment on view api.prices is
'Dated prices: unit_price per unit_size of a meter, in force from effective_from until the next one.
Append-only: a new price is a new row. Usual meters: input_tokens, cached_input_tokens, output_tokens, requests.';
grant select on api.prices to keyledger_gateway, keyledger_operator, keyledger_member;
grant insert (config_node_id, meter, unit_price, unit_size, currency, effective_from) on api.prices to keyledger_operator;
alter view api.prices alter column unit_size set default 1;
alter view api.prices alter column currency set default 'USD';
alter view api.prices alter column effective_from set default now();

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
