-- migrate:up
-- Holds: money set aside for a request, so that what is admitted can be paid.

set local role keyledger_owner;

create or replace view data.hold_shown as
select h.account_id, h.id, h.amount, h.captured,
  case when h.status = 'open' and h.expires_at <= statement_timestamp() then 'expired' else h.status end as status,
  h.expires_at, h.virtual_key_id, h.config_node_id, h.meters, h.created_at, h.ended_at,
  h.reference, h.reason, h.actor, h.ended_by, h.end_reason
from data.hold h;
comment on view data.hold_shown is 'Holds as api.holds shows them, of every account.';

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

-- a hold as the views show it
create or replace function data.shown_hold(
  account_id uuid,
  id uuid
)
returns api.holds
language plpgsql
stable
as $$
declare
  v_shown api.holds;
begin
  select * into v_shown from data.hold_shown h where h.account_id = shown_hold.account_id and h.id = shown_hold.id;
  return v_shown;
end
$$;

-- Reads hold requests: what identity and prices say of each, before any account is locked. `code` is why it is refused.
create or replace function data.read_hold_requests(requests jsonb)
returns table (
  ord bigint,
  id text,
  hold data.hold,
  code text,
  user_id uuid
)
language plpgsql
stable
as $$
#variable_conflict use_column
declare
  v_oldest uuid := data.uuid_floor(clock_timestamp() - interval '1 hour');
  v_newest uuid := data.uuid_floor(clock_timestamp() + interval '2 minutes');
begin
  return query
  select
    r.ord,
    data.text_of(r.request, 'id'),
    row(
      r.account_id, r.id, coalesce(p.cost, greatest(r.amount, 0)), 0, 'open', statement_timestamp() + make_interval(secs => r.expires_in),
      r.virtual_key_id, r.config_node_id, p.quantities, statement_timestamp(), null, null, null, null, null, null
    )::data.hold,
    case
      when jsonb_typeof(r.request) <> 'object' then 'invalid_request'
      when r.id is null then 'invalid_id'
      when r.id < w.first or r.id >= w.beyond then 'id_outside_window'
      -- its time decides its price and its budgets' window
      when r.id < v_oldest or r.id >= v_newest then 'id_not_of_now'
      when r.account_id is null then 'invalid_account_id'
      when r.virtual_key_id is null then 'invalid_virtual_key_id'
      when r.config_node_id is null and coalesce(r.request -> 'config_node_id', 'null') <> 'null' then 'invalid_config_node_id'
      when r.expires_in is null then 'invalid_expires_in'
      when r.is_priced and r.config_node_id is null then 'invalid_config_node_id'
      when r.is_priced = (coalesce(r.request -> 'amount', 'null') <> 'null') then 'invalid_amount'
      when not r.is_priced and coalesce(r.amount, 0) <= 0 then 'invalid_amount'
      when k.virtual_key_id is null then 'virtual_key_unknown'
      when k.code is not null then k.code
      when k.account_id <> r.account_id then 'invalid_account'
      when r.config_node_id is not null and r.config_node_id <> all (k.config_node_ids) then 'node_not_mounted'
      when r.is_priced then p.code
    end,
    k.user_id
  from (
    select
      e.ord,
      e.request,
      data.to_uuidv7(data.text_of(e.request, 'id')) as id,
      data.to_uuid(data.text_of(e.request, 'account_id')) as account_id,
      data.to_uuid(data.text_of(e.request, 'virtual_key_id')) as virtual_key_id,
      data.to_uuid(data.text_of(e.request, 'config_node_id')) as config_node_id,
      e.request -> 'meters' as meters,
      coalesce(e.request -> 'meters', 'null') <> 'null' as is_priced,
      data.to_quantity(e.request -> 'amount') as amount,
      data.to_expires_in(e.request -> 'expires_in') as expires_in
    from jsonb_array_elements(requests) with ordinality as e (request, ord)
    offset 0 -- or each use would parse again
  ) r
  cross join (
    select data.uuid_floor(u.floor) as first, data.uuid_floor(u.ceiling) as beyond from data.usage_window u offset 0
  ) w
  left join lateral (select * from data.key_context c where c.virtual_key_id = r.virtual_key_id offset 0) k on true
  -- once, not with each price that is looked at
  cross join lateral (select data.uuid_time(r.id) as at offset 0) t
  left join lateral (
    select * from data.price_meters(r.config_node_id, r.meters, k.currency, t.at) where r.is_priced offset 0
  ) p on true;
end
$$;

-- The moments of a time at which grants of an account expire, and what is available past each of them: less those grants, plus what
-- the holds that have ended by then gave back or drew of those grants. A hold that outlives such a moment must find its money there.
-- `spare` is how much of those holds can draw of those grants only: less what lasts longer and by its priority is spent before.
-- All by running sums in order of time, since an account may have thousands of grants. A grant lasts in this sense from the moment
-- the first grant of a higher priority number expires, until it expires itself.
create or replace function data.available_past_grants(
  account_id uuid,
  since timestamptz,
  before timestamptz,
  out moments timestamptz[],
  out available numeric[],
  out spare numeric[]
)
returns record
language plpgsql
stable
as $$
begin
  with live as materialized (
    select g.expires_at, g.remaining,
      min(g.expires_at) over (order by g.priority desc groups between unbounded preceding and 1 preceding) as lasts_from
    from data.credit_grant g
    where g.account_id = available_past_grants.account_id and g.remaining > 0
  ), change as (
    select l.expires_at as at, true as is_grant, l.remaining as expired, 0 as ended, 0 as lasting
    from live l
    where l.expires_at < before
    union all
    select h.expires_at, false, 0, h.amount - h.captured, 0
    from data.hold h
    where h.account_id = available_past_grants.account_id and h.status = 'open'
      and h.expires_at <= (select max(l.expires_at) from live l where l.expires_at < before)
    union all
    select l.lasts_from, false, 0, 0, l.remaining
    from live l
    where l.lasts_from < before and (l.expires_at > l.lasts_from) is not false
    union all
    select l.expires_at, false, 0, 0, -l.remaining
    from live l
    where l.expires_at < before and l.expires_at > l.lasts_from
  ), past as (
    select c.at, c.is_grant, a.available - sum(c.expired) over w as available, sum(c.ended) over w - sum(c.lasting) over w as spare
    from data.account_balance a
    cross join change c
    where a.account_id = available_past_grants.account_id
    window w as (order by c.at)
  )
  select array_agg(p.at order by p.at), array_agg(p.available + greatest(p.spare, 0) order by p.at), array_agg(p.spare order by p.at)
  into moments, available, spare
  from (select distinct q.at, q.available, q.spare from past q where q.is_grant and q.at >= since) p;
end
$$;

-- The codes of requests whose call has waited for its account: their keys may have been revoked or moved meanwhile.
create or replace function data.codes_now(
  codes text[],
  holds data.hold[]
)
returns text[]
language sql
volatile
as $$
  select array_agg(case
    when r.code is not null then r.code
    when k.virtual_key_id is null then 'virtual_key_unknown'
    when k.code is not null then k.code
    when k.account_id <> r.account_id then 'invalid_account'
    when r.config_node_id <> all (k.config_node_ids) then 'node_not_mounted'
  end order by r.n)
  from (
    select c.code, h.account_id, h.virtual_key_id, h.config_node_id, h.ordinality as n
    from unnest(holds) with ordinality h
    join unnest(codes) with ordinality as c (code, n) on c.n = h.ordinality
  ) r
  left join lateral (select * from data.key_context c where c.virtual_key_id = r.virtual_key_id offset 0) k on true
$$;

create or replace function api.place_holds(requests jsonb)
returns jsonb
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '500ms'
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
declare
  v_ords bigint[];
  v_ids text[];
  v_holds data.hold[];
  v_codes text[];
  v_key_ids uuid[];
  v_user_ids uuid[];
  v_firsts bigint[];
  v_last integer;
  v_account_ids uuid[];
  v_busy uuid[];
  v_waited boolean;
  v_availables numeric[];
  v_have_budgets boolean[];
  v_shortest interval;
  v_longest interval;
  v_soonest timestamptz;
  v_latest timestamptz;
  v_outlive_grants boolean[];
  v_account_id uuid;
  v_next integer := 1;
  v_available numeric;
  v_moments timestamptz[];
  v_pasts numeric[];
  v_spares numeric[];
  v_end timestamptz;
  v_backing numeric;
  v_scopes text[];
  v_scope_ids uuid[];
  v_lefts numeric[];
  v_over integer;
  v_now timestamptz;
  v_hold data.hold;
  v_first_tries data.hold[];
  v_first_try data.hold;
  v_new data.hold[] := '{}';
  v_answer jsonb;
  v_answers jsonb[];
begin
  perform data.require_array('requests', requests);
  v_answers := array_fill(null::jsonb, array[jsonb_array_length(requests)]);
  select array_agg(r.ord), array_agg(r.id), array_agg(r.hold), array_agg(r.code),
    array_agg(distinct (r.hold).account_id) filter (where r.code is null),
    min((r.hold).expires_at - (r.hold).created_at), max((r.hold).expires_at - (r.hold).created_at),
    array_agg((r.hold).virtual_key_id), array_agg(r.user_id)
  into v_ords, v_ids, v_holds, v_codes, v_account_ids, v_shortest, v_longest, v_key_ids, v_user_ids
  from (select * from data.read_hold_requests(requests) h order by (h.hold).account_id, h.ord) r;
  if cardinality(v_ords) > 1 then
    -- of each, the place of the first with the same id
    select array_agg(c.first order by c.place) into v_firsts
    from (
      select u.ordinality as place, min(u.ordinality) over (partition by u.account_id, u.id) as first
      from unnest(v_holds) with ordinality u
    ) c;
  end if;

  select l.locked, l.busy, l.waited into v_account_ids, v_busy, v_waited from data.lock_accounts(v_account_ids) l;
  v_now := clock_timestamp();
  v_soonest := data.after(v_now, v_shortest);
  v_latest := data.after(v_now, v_longest);
  if v_waited then
    v_codes := data.codes_now(v_codes, v_holds);
  end if;
  select array_agg(a.account_id order by a.account_id), array_agg(a.available order by a.account_id),
    array_agg(a.free_credit > 0 and coalesce((
      select min(g.expires_at) < v_latest
        -- what lasts longer may be spent before it, so that a hold that ends sooner counts too
        or (min(g.priority) < max(g.priority) and min(g.expires_at) is not null)
      from data.credit_grant g
      where g.account_id = a.account_id and g.remaining > 0), false) order by a.account_id),
    array_agg(b.has_budgets order by a.account_id)
  into v_account_ids, v_availables, v_outlive_grants, v_have_budgets
  from data.account_now a
  cross join lateral (select x.has_budgets from data.account_balance x where x.account_id = a.account_id offset 0) b
  where a.account_id = any (v_account_ids);
  -- by key, each: a join may read all the holds there are
  select array_agg((select h from data.hold h where h.account_id = u.account_id and h.id = u.id) order by u.ordinality)
  into v_first_tries
  from unnest(v_holds) with ordinality u;

  -- requests and accounts are both in account_id order; an account's requests are admitted in the order they came
  for i in 1 .. coalesce(cardinality(v_ords), 0) loop
    v_hold := v_holds[i];
    while v_next <= cardinality(v_account_ids) and v_account_ids[v_next] <= v_hold.account_id loop
      v_account_id := v_account_ids[v_next];
      v_available := v_availables[v_next];
      v_moments := null;
      if v_outlive_grants[v_next] then
        -- Before all these holds end only the least counts, and after them only moments that some hold still draws on: so that what
        -- each request looks at is short.
        select array_agg(m.at), array_agg(m.available), array_agg(m.spare)
        into v_moments, v_pasts, v_spares
        from data.available_past_grants(v_account_id, '-infinity', 'infinity') p
        cross join lateral (
          select '-infinity'::timestamptz as at, min(u.available) as available, 0 as spare
          from unnest(p.moments, p.available) as u (at, available)
          where u.at < v_soonest
          having count(*) > 0
          union all
          select u.at, u.available, u.spare
          from unnest(p.moments, p.available, p.spare) as u (at, available, spare)
          where u.at >= v_soonest and (u.at < v_latest or u.spare < 0)
        ) m;
      end if;
      v_scopes := null;
      if v_have_budgets[v_next] then
        -- only this account's keys and users, or many accounts would look at those of the whole call each
        v_last := i;
        while v_last < cardinality(v_holds) and (v_holds[v_last + 1]).account_id = v_account_id loop
          v_last := v_last + 1;
        end loop;
        select array_agg(b.scope), array_agg(b.scope_id), array_agg(b.remaining)
        into v_scopes, v_scope_ids, v_lefts
        from data.budgets_left(v_account_id, v_key_ids[i:v_last], v_user_ids[i:v_last], v_now) b;
      end if;
      v_next := v_next + 1;
    end loop;

    v_first_try := coalesce(v_first_tries[i], v_first_tries[v_firsts[i]]);
    if v_first_try.id is not null then
      -- a retry meets its first try, whatever has changed since
      v_answer := jsonb_build_object('status', 'duplicate', 'hold_status',
        case when v_first_try.status = 'open' and v_first_try.expires_at <= v_now then 'expired' else v_first_try.status end);
      if (v_first_try.virtual_key_id, v_first_try.config_node_id, v_first_try.meters)
          is distinct from (v_hold.virtual_key_id, v_hold.config_node_id, v_hold.meters)
        or (v_hold.meters is null and v_first_try.amount is distinct from v_hold.amount)
      then
        v_answer := v_answer || '{"mismatch": true}';
      end if;
      v_hold := v_first_try;
    elsif v_codes[i] is not null then
      v_answer := jsonb_build_object('status', 'refused', 'code', v_codes[i]);
    elsif v_hold.account_id = any (v_busy) then
      v_answer := '{"status": "busy", "code": "account_busy"}';
    elsif v_account_id is distinct from v_hold.account_id then
      v_answer := jsonb_build_object('status', 'refused', 'code', 'account_not_found');
    else
      -- its time begins now, not before the wait for the lock
      v_end := data.after(v_now, v_hold.expires_at - v_hold.created_at);
      v_backing := v_available;
      if v_moments is not null then
        v_backing := least(v_available, (
          select min(m.available) from unnest(v_moments, v_pasts, v_spares) as m (at, available, spare)
          where m.at < v_end or -m.spare > greatest(m.available, 0)));
      end if;
      v_over := null;
      if v_scopes is not null then
        -- its key's, its user's and its tenant's; the first it doesn't fit refuses it
        select min(b.n) into v_over
        from unnest(v_scopes, v_scope_ids, v_lefts) with ordinality as b (scope, scope_id, remaining, n)
        where v_hold.amount > b.remaining
          and case b.scope when 'virtual_key' then b.scope_id = v_hold.virtual_key_id when 'user' then b.scope_id = v_user_ids[i] else true end;
      end if;
      if v_hold.amount > v_backing then
        v_answer := jsonb_build_object('status', 'refused', 'code', 'insufficient_funds');
      elsif v_over is not null then
        v_answer := jsonb_build_object('status', 'refused', 'code', data.budget_code(v_scopes[v_over]), 'remaining', v_lefts[v_over]::text);
      else
        v_answer := jsonb_build_object('status', 'held');
        v_hold.expires_at := v_end;
        v_hold.created_at := v_now;
        v_available := v_available - v_hold.amount;
        if v_moments is not null then
          v_pasts := array(
            select m.available - case when m.at < v_end then v_hold.amount else least(v_hold.amount, greatest(-m.spare, 0)) end
            from unnest(v_moments, v_pasts, v_spares) with ordinality as m (at, available, spare, n) order by m.n);
          v_spares := array(
            select case when m.at < v_end then m.spare else m.spare + v_hold.amount end
            from unnest(v_moments, v_spares) with ordinality as m (at, spare, n) order by m.n);
        end if;
        if v_scopes is not null then
          v_lefts := array(
            select b.remaining - case when case b.scope
                when 'virtual_key' then b.scope_id = v_hold.virtual_key_id when 'user' then b.scope_id = v_user_ids[i] else true end
              then v_hold.amount else 0 end
            from unnest(v_scopes, v_scope_ids, v_lefts) with ordinality as b (scope, scope_id, remaining, n) order by b.n);
        end if;
        v_new := v_new || v_hold;
        v_first_tries[i] := v_hold;
      end if;
    end if;

    v_answers[v_ords[i]] := v_answer || jsonb_strip_nulls(jsonb_build_object(
      'id', v_ids[i],
      'amount', v_hold.amount::text,
      'available', case when v_account_id = v_hold.account_id then v_available::text end,
      'expires_at', case when v_answer ->> 'status' not in ('refused', 'busy') then v_hold.expires_at end
    ));
  end loop;

  if v_new <> '{}' then
    insert into data.hold select * from unnest(v_new);
    update data.account_balance a
    set frozen_balance = a.frozen_balance + n.amount
    from (select h.account_id, sum(h.amount) as amount from unnest(v_new) h group by h.account_id) n
    where a.account_id = any (v_account_ids) and a.account_id = n.account_id;
  end if;
  return to_jsonb(v_answers);
end
$$;
comment on function api.place_holds(jsonb) is
'Sets money aside for requests about to be made; never past `available`, and never on free credit that expires before the hold.
Takes `requests`, [{id, account_id, virtual_key_id, amount | config_node_id + meters, expires_in?}] and answers in the same order [{id,
status: held | duplicate | refused | busy, code?, amount, available, expires_at}], at most 10,000. ids are UUIDv7 made by the caller, of
now (id_not_of_now: over 2 minutes ahead or 1 hour behind); meters are priced at the id''s time. A repeated id is `duplicate`
(`hold_status` says if it is still open, `mismatch` that its content differs). `available` is the account''s, free credit that expires
before the hold included: insufficient_funds may come with more available than was asked. key_budget_exceeded, user_budget_exceeded and
tenant_budget_exceeded come with what the budget has left (`remaining`); the holds of one call share it. `busy` (account_busy): another
call has the account, and this one has others; nothing was held, so send that account''s alone. A call for one account waits half a second
for it, then fails with SQLSTATE 55P03 (lock_timeout).';
grant execute on function api.place_holds(jsonb) to keyledger_gateway;

-- what release_holds and extend_holds share
create or replace function data.end_or_extend_holds(
  requests jsonb,
  extend boolean
)
returns jsonb
language plpgsql
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
declare
  v_answers jsonb[];
  v_request record;
  v_account data.account_balance;
  v_hold data.hold;
  v_code text;
  v_refused boolean;
  v_end timestamptz;
  v_released data.hold[] := '{}';
  v_busy uuid[];
  v_moments_of uuid;
  v_moments timestamptz[];
  v_pasts numeric[];
  v_spares numeric[];
begin
  perform data.require_array('requests', requests);
  v_answers := array_fill(null::jsonb, array[jsonb_array_length(requests)]);
  select l.busy into v_busy
  from data.lock_accounts(array(
    select distinct a.account_id
    from jsonb_array_elements(requests) as e (request)
    cross join lateral (select data.to_uuid(data.text_of(e.request, 'account_id')) as account_id) a
    where a.account_id is not null)) l;

  for v_request in
    select
      e.ord,
      e.request,
      data.to_uuid(data.text_of(e.request, 'account_id')) as account_id,
      data.to_uuid(data.text_of(e.request, 'id')) as id,
      data.to_expires_in(e.request -> 'expires_in') as expires_in
    from jsonb_array_elements(requests) with ordinality as e (request, ord)
    order by account_id, e.ord
  loop
    if v_request.account_id = any (v_busy) then
      v_answers[v_request.ord] := jsonb_strip_nulls(
        jsonb_build_object('id', data.text_of(v_request.request, 'id'), 'status', 'busy', 'code', 'account_busy'));
      continue;
    end if;
    -- an account is read once, and written once below: of a busy one's row there may be many versions to look through
    if v_request.account_id is distinct from v_account.account_id then
      select * into v_account from data.account_balance a where a.account_id = v_request.account_id;
    end if;
    select * into v_hold from data.hold h where h.account_id = v_request.account_id and h.id = v_request.id;
    v_code := case
      when jsonb_typeof(v_request.request) <> 'object' then 'invalid_request'
      when v_request.id is null then 'invalid_id'
      when v_request.account_id is null then 'invalid_account_id'
      when extend and v_request.expires_in is null then 'invalid_expires_in'
      when v_account.account_id is null then 'account_not_found'
      when v_hold.id is null then 'hold_not_found'
      when v_hold.status <> 'open' then 'hold_' || v_hold.status
      when v_hold.expires_at <= clock_timestamp() then 'hold_expired'
    end;
    -- it stays open, as it was
    v_refused := v_code is null and v_hold.expires_at is null;
    if v_refused then
      v_code := 'hold_frozen';
    elsif v_code is null and extend then
      v_end := greatest(v_hold.expires_at, clock_timestamp() + make_interval(secs => v_request.expires_in));
      -- past each moment at which credit expires that the hold now outlives, its money must still be there
      if v_account.free_credit > 0 and v_moments_of is distinct from v_account.account_id then
        v_moments_of := v_account.account_id;
        select p.moments, p.available, p.spare into v_moments, v_pasts, v_spares
        from data.available_past_grants(v_account.account_id, clock_timestamp(), clock_timestamp() + interval '31 days') p;
      end if;
      v_refused := v_account.free_credit > 0 and coalesce((
        select min(m.available - least(v_hold.amount - v_hold.captured, greatest(m.spare, 0)))
        from unnest(v_moments, v_pasts, v_spares) as m (at, available, spare)
        where m.at >= v_hold.expires_at and m.at < v_end) < 0, false);
      if v_refused then
        v_code := 'insufficient_funds';
      end if;
    end if;
    if v_code is null and extend then
      if v_moments is not null and v_moments_of = v_hold.account_id then
        select array_agg(case when m.at >= v_hold.expires_at and m.at < v_end
            then m.available - least(v_hold.amount - v_hold.captured, greatest(m.spare, 0)) else m.available end order by m.n),
          array_agg(case when m.at >= v_hold.expires_at and m.at < v_end
            then m.spare - (v_hold.amount - v_hold.captured) else m.spare end order by m.n)
        into v_pasts, v_spares
        from unnest(v_moments, v_pasts, v_spares) with ordinality as m (at, available, spare, n);
      end if;
      update data.hold h
      set expires_at = v_end
      where h.account_id = v_hold.account_id and h.id = v_hold.id
      returning * into v_hold;
    elsif v_code is null then
      update data.hold h
      set status = 'released', ended_at = clock_timestamp()
      where h.account_id = v_hold.account_id and h.id = v_hold.id;
      v_released := v_released || v_hold;
      v_account.available := v_account.available + (v_hold.amount - v_hold.captured);
    end if;
    v_answers[v_request.ord] := jsonb_strip_nulls(jsonb_build_object(
      'id', data.text_of(v_request.request, 'id'),
      'status', case when v_refused then 'refused' when v_code is not null then 'closed' when extend then 'extended' else 'released' end,
      'code', v_code,
      'expires_at', case when extend and (v_code is null or v_refused) then v_hold.expires_at end,
      'available', v_account.available::text
    ));
  end loop;

  if v_released <> '{}' then
    update data.account_balance a
    set frozen_balance = a.frozen_balance - r.unspent
    from (select h.account_id, sum(h.amount - h.captured) as unspent from unnest(v_released) h group by h.account_id) r
    where a.account_id = any (array(select h.account_id from unnest(v_released) h)) and a.account_id = r.account_id;
  end if;
  return to_jsonb(v_answers);
end
$$;

create or replace function api.release_holds(requests jsonb)
returns jsonb
language sql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '500ms'
as $$
  select data.end_or_extend_holds(requests, extend => false)
$$;
comment on function api.release_holds(jsonb) is
'Gives back what open holds still set aside.
Takes `requests`, [{id, account_id}] and answers [{id, status: released | closed | refused | busy, code?, available}]; `closed` means there
was nothing open to give back, `code` says why: hold_released, hold_captured, hold_expired, hold_parked (an event that could not be charged
yet needs it), hold_not_found, invalid_…. `refused` as hold_frozen: an operator''s freeze is the operator''s to end. `busy`: as place_holds
answers it.';
grant execute on function api.release_holds(jsonb) to keyledger_gateway;

create or replace function api.extend_holds(requests jsonb)
returns jsonb
language sql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '500ms'
as $$
  select data.end_or_extend_holds(requests, extend => true)
$$;
comment on function api.extend_holds(jsonb) is
'Keeps open holds open for longer.
Takes `requests`, [{id, account_id, expires_in?}] and answers [{id, status: extended | closed | refused | busy, code?, expires_at, available}];
`expires_in` counts seconds from now (900), and never shortens a hold. `refused` leaves the hold open as it was: insufficient_funds where
free credit it stands on expires first, hold_frozen for an operator''s freeze.';
grant execute on function api.extend_holds(jsonb) to keyledger_gateway;

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
