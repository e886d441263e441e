-- migrate:up
-- Budgets: shown, set, removed, checked.

set local role keyledger_owner;

create or replace view data.budget_shown as
select b.id, b.account_id, b.scope, b.scope_id, b.amount, b.period, w.window_start, w.window_end,
  coalesce(s.spent, 0)::numeric(28, 10) as spent, h.held::numeric(28, 10) as held,
  (b.amount - coalesce(s.spent, 0) - h.held)::numeric(28, 10) as remaining, b.created_at
from data.budget b
cross join lateral (select a.time_zone from data.account_balance a where a.account_id = b.account_id) a
-- as data.window_start and data.budget_applies say, which a reader may not call; a total has
-- neither beginning nor end
cross join lateral (
  select date_trunc(nullif(b.period, 'total'), statement_timestamp() at time zone a.time_zone) as starts
) l
cross join lateral (select l.starts + ('1 ' || nullif(b.period, 'total'))::interval as ends) e
cross join lateral (
  select
    case when (l.starts at time zone a.time_zone - interval '1 hour') at time zone a.time_zone = l.starts
      then l.starts at time zone a.time_zone - interval '1 hour'
        else l.starts at time zone a.time_zone end as window_start,
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
    select * from data.hold n where n.account_id = b.account_id and n.status = 'open'
      and n.expires_at > statement_timestamp()
    union all
    select * from data.hold p where p.account_id = b.account_id and p.status = 'parked'
  ) o
  cross join lateral (select * from data.virtual_key v where v.id = o.virtual_key_id offset 0) k
  where b.scope_id = case b.scope when 'virtual_key' then k.id when 'user' then k.user_id else b.scope_id end
) h;
comment on view data.budget_shown is 'Budgets as api.budgets shows them, of every account.';

create or replace view api.budgets with (security_barrier) as
select b.id, b.account_id, b.scope, b.scope_id, b.amount, b.period, b.window_start, b.window_end, b.spent, b.held,
  b.remaining, b.created_at
from data.budget_shown b
where (select v.sees_all from data.viewer v)
union all
select b.id, b.account_id, b.scope, b.scope_id, b.amount, b.period, b.window_start, b.window_end, b.spent, b.held,
  b.remaining, b.created_at
from data.budget_shown b
where b.account_id = any (array(select v.account_id from data.visible_account v))
  and (b.account_id = any (array(select v.account_id from data.visible_account v where v.whole))
    or (b.scope = 'user' and b.scope_id = (select v.user_id from data.viewer v))
    or (b.scope = 'virtual_key' and b.scope_id = any (array(
      select k.id from data.virtual_key k where k.user_id = (select v.user_id from data.viewer v)))));
comment on view api.budgets is
'Budgets of keys, users and tenants on an account, each with the amount left in its present window.
remaining = amount - spent - held; it is negative where more was used than held. A total has no
window.';
grant select on api.budgets to keyledger_gateway, keyledger_operator, keyledger_member;

create or replace function api.set_budget(
  account_id uuid,
  scope text,
  scope_id uuid,
  amount numeric,
  period text
)
returns api.budgets
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
set plan_cache_mode = force_custom_plan
set enable_seqscan = off
as $$
declare
  v_account data.account_balance;
  v_time_zone text;
  v_budget data.budget;
  v_shown api.budgets;
begin
  if scope is null or scope not in ('virtual_key', 'user', 'tenant') then
    perform data.refuse(422, 'invalid_scope', 'scope must be virtual_key, user or tenant', 'say whose budget it is');
  elsif period is null or period not in ('day', 'week', 'month', 'total') then
    perform data.refuse(422, 'invalid_period', 'period must be day, week, month or total', 'say how long a window is');
  elsif amount is null or not data.is_amount(amount) or amount < 0 then
    perform data.refuse(422, 'invalid_amount', 'amount must be 0 or more, below 1e12, with at most 10 decimals',
      'send a plain decimal as a string, for example "100"');
  end if;
  perform data.require_budget_scope(account_id, scope, scope_id);
  -- another call may set the same one, or another time zone, while this one counts
  loop
    select * into v_budget from data.budget b
    where (b.account_id, b.scope, b.scope_id, b.period)
      = (set_budget.account_id, set_budget.scope, set_budget.scope_id, set_budget.period);
    if found then
      perform data.lock_account(account_id);
      update data.budget b set amount = set_budget.amount where b.account_id = v_budget.account_id
        and b.id = v_budget.id;
      continue when not found;
      exit;
    end if;
    select a.time_zone into v_time_zone from data.account_balance a where a.account_id = set_budget.account_id;
    v_budget := row(set_budget.account_id, gen_random_uuid(), set_budget.scope, set_budget.scope_id, set_budget.amount,
      set_budget.period, 'infinity', 'infinity', clock_timestamp());
    begin
      v_account := data.recount_budgets(array[v_budget], v_time_zone, are_new => true);
      if v_account.time_zone <> v_time_zone then
        raise sqlstate 'KL002';
      end if;
      update data.account_balance a set has_budgets = true where a.account_id = v_account.account_id
        and not a.has_budgets;
      exit;
    exception when unique_violation or sqlstate 'KL002' then
      -- this lets the lock go, too; a frozen snapshot would never see the other call's budget
      if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        raise serialization_failure using message = 'another call has set this budget';
      end if;
    end;
  end loop;
  select * into v_shown from data.budget_shown b where b.account_id = v_budget.account_id and b.id = v_budget.id;
  return v_shown;
end
$$;
comment on function api.set_budget(uuid, text, uuid, numeric, text) is
'Sets the budget of a key, a user or a tenant on an account: the most to spend in each day, week, month, or in total.
Set again it changes the amount. `period` is day, week, month or total. `scope` is virtual_key, user
or tenant; `scope_id` is its id; `account_id` is its payer. Windows follow the account''s time zone;
weeks begin on Monday. Usage of the current window counts already; for a total, all usage that is
kept. A hold over the budget is refused: key_budget_exceeded, user_budget_exceeded,
tenant_budget_exceeded. An event counts even past the budget, on the account it was charged to. It
counts in the window of its own time or of its hold''s time, the later one. A refund gives back
money, not budget. Answers the budget. 404 account_not_found, virtual_key_unknown, user_not_found,
tenant_not_found; 422 invalid_scope, invalid_period, invalid_amount, invalid_account.';
grant execute on function api.set_budget(uuid, text, uuid, numeric, text) to keyledger_operator;

create or replace function api.remove_budget(id uuid)
returns api.budgets
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
as $$
declare
  v_account_id uuid;
  v_shown api.budgets;
begin
  select b.account_id into v_account_id from data.budget b where b.id = remove_budget.id;
  if found then
    perform data.lock_account(v_account_id);
  end if;
  -- under the lock: another call may have removed it meanwhile
  select * into v_shown from data.budget_shown b where b.id = remove_budget.id;
  if not found then
    perform data.refuse(404, 'budget_not_found', 'budget ' || coalesce(id::text, 'null'),
      'send the id that set_budget answered');
  end if;
  delete from data.budget b where b.account_id = v_shown.account_id and b.id = v_shown.id;
  update data.account_balance a set has_budgets = false
  where a.account_id = v_shown.account_id
    and not exists (select from data.budget b where b.account_id = v_shown.account_id);
  return v_shown;
end
$$;
comment on function api.remove_budget(uuid) is
'Removes a budget and its counts.
`id` is the budget''s. Answers the budget as it was. 404 budget_not_found.';
grant execute on function api.remove_budget(uuid) to keyledger_operator;

create or replace function api.check_budget(
  user_id uuid,
  amount numeric,
  virtual_key_id uuid default null,
  out allowed boolean,
  out code text,
  out account_id uuid,
  out currency text,
  out available numeric,
  out remaining numeric
)
returns record
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '500ms'
set enable_seqscan = off
as $$
declare
  v_key_user_id uuid;
  v_has_budgets boolean;
  v_over text;
begin
  perform data.require_positive_amount(amount);
  select u.account_id,
    case
      when u.status <> 'active' then 'user_suspended'
      when t.status <> 'active' then 'tenant_suspended'
    end
  into account_id, code
  from data.user_profile u
  left join lateral (select * from data.tenant o where o.id = u.tenant_id offset 0) t on true
  where u.id = check_budget.user_id;
  if account_id is null then
    perform data.refuse(404, 'user_not_found', 'user ' || coalesce(user_id::text, 'null'), 'create the user first');
  end if;

  if virtual_key_id is not null then
    select c.user_id, c.code into v_key_user_id, code
    from data.key_context c
    where c.virtual_key_id = check_budget.virtual_key_id;
    if v_key_user_id is distinct from check_budget.user_id then
      perform data.refuse(404, 'virtual_key_unknown', 'virtual key ' || virtual_key_id || ' is not a key of this user',
        'send the virtual_key_id that resolving gave');
    end if;
  end if;

  select a.currency, a.available, b.has_budgets into currency, available, v_has_budgets
  from data.account_now a
  join data.account_balance b on b.account_id = a.account_id
  where a.account_id = check_budget.account_id;
  if currency is null then
    perform data.refuse(404, 'account_not_found', 'account ' || account_id, 'accounts open with their tenant or user');
  end if;
  if v_has_budgets then
    select min(b.remaining), (array_agg(b.scope order by b.n) filter (where check_budget.amount > b.remaining))[1]
    into remaining, v_over
    from data.budgets_left(account_id, array[virtual_key_id], array[user_id], clock_timestamp())
      with ordinality as b (scope, scope_id, remaining, n);
  end if;
  code := coalesce(code, case when amount > available then 'insufficient_funds' end, data.budget_code(v_over));
  allowed := code is null;
end
$$;
comment on function api.check_budget(uuid, numeric, uuid) is
'Says whether a user could pay an amount now: advice, a hold is the guarantee.
Asks whether `user_id` could pay `amount`, by the key `virtual_key_id` if one is given. `code` is
why not: insufficient_funds, key_budget_exceeded, user_budget_exceeded, tenant_budget_exceeded,
user_suspended, tenant_suspended, virtual_key_disabled, virtual_key_expired. `available` counts free
credit that may expire before a hold would. `remaining` is the rest of the tightest budget of key,
user and tenant, null without any. 404 user_not_found, virtual_key_unknown; 422
invalid_amount.';
grant execute on function api.check_budget(uuid, numeric, uuid) to keyledger_gateway, keyledger_operator;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
