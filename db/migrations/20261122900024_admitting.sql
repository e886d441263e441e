-- migrate:up
-- Admitting: the holds of one account that its money, its grants and its budgets allow.

set local role keyledger_owner;

-- The answer to a hold that was placed before: a retry meets its first try, whatever has changed
-- since.
create or replace function data.answer_first_try(
  first_try data.hold,
  hold data.hold
)
returns jsonb
language sql
volatile
as $$
  select jsonb_build_object('status', 'duplicate', 'hold_status',
      case when first_try.status = 'open' and first_try.expires_at <= clock_timestamp() then 'expired'
        else first_try.status end)
    || case
      when (first_try.virtual_key_id, first_try.config_node_id, first_try.meters)
          is distinct from (hold.virtual_key_id, hold.config_node_id, hold.meters)
        or first_try.amount is distinct from hold.amount
      then '{"mismatch": true}' else '{}'::jsonb
    end
$$;

-- The answer to a request, of its hold or its first try; `available` is null if the account was not
-- locked.
create or replace function data.answer_request(
  id text,
  answer jsonb,
  hold data.hold,
  available numeric
)
returns jsonb
language sql
stable
as $$
  select answer || jsonb_strip_nulls(jsonb_build_object(
    'id', id,
    'amount', hold.amount::text,
    'available', available::text,
    'expires_at', case when answer ->> 'status' not in ('refused', 'busy') then hold.expires_at end))
$$;

-- The first budget that a hold doesn't fit: of its key, its user, or its tenant. Null if it fits
-- all.
create or replace function data.budget_exceeded(
  budgets data.budget_left[],
  hold data.hold,
  user_id uuid
)
returns data.budget_left
language plpgsql
immutable
as $$
declare
  v_budget data.budget_left;
begin
  foreach v_budget in array budgets loop
    if hold.amount > v_budget.remaining
      and data.budget_applies(v_budget.scope, v_budget.scope_id, hold.virtual_key_id, budget_exceeded.user_id)
    then
      return v_budget;
    end if;
  end loop;
  return null;
end
$$;

-- The rests of budgets after a hold.
create or replace function data.budgets_after(
  budgets data.budget_left[],
  hold data.hold,
  user_id uuid
)
returns data.budget_left[]
language plpgsql
immutable
as $$
begin
  return array(
    select row(b.scope, b.scope_id, b.remaining - case
      when data.budget_applies(b.scope, b.scope_id, hold.virtual_key_id, budgets_after.user_id) then hold.amount
      else 0 end)::data.budget_left
    from unnest(budgets) with ordinality as b (scope, scope_id, remaining, place)
    order by b.place);
end
$$;

-- The first tries of these requests, each in its place: holds that were placed before by their ids.
-- Null if there are none.
create or replace function data.first_tries(
  account_id uuid,
  requests data.hold_request[]
)
returns data.hold[]
language plpgsql
stable
as $$
declare
  v_ids uuid[] := '{}';
  v_request data.hold_request;
begin
  foreach v_request in array first_tries.requests loop
    v_ids := v_ids || (v_request.hold).id;
  end loop;
  if not exists (
    select from data.hold h where h.account_id = first_tries.account_id and h.id = any (v_ids))
  then
    return null;
  end if;
  -- by key, each: a join may read all the holds there are
  return array(
    select (select h from data.hold h where h.account_id = first_tries.account_id and h.id = i.id)
    from unnest(v_ids) with ordinality as i (id, place)
    order by i.place);
end
$$;

-- For each request, the place of the first of this call with its id.
create or replace function data.first_places(requests data.hold_request[])
returns integer[]
language plpgsql
immutable
as $$
begin
  return array(
    select c.first
    from (
      select r.place, min(r.place) over (partition by (r.hold).id)::integer as first
      from unnest(requests) with ordinality as r (ord, id, hold, code, user_id, place)
    ) c
    order by c.place);
end
$$;

-- The backing that these requests may stand on, for the shortest of them and the longest.
create or replace function data.backing_of_requests(
  account data.account_balance,
  requests data.hold_request[],
  at timestamptz
)
returns data.backing[]
language plpgsql
stable
as $$
declare
  v_shortest interval;
  v_longest interval;
begin
  if account.free_credit = 0 then
    return null;
  end if;
  select min((r.hold).expires_at - (r.hold).created_at), max((r.hold).expires_at - (r.hold).created_at)
  into v_shortest, v_longest
  from unnest(requests) r;
  return data.backing_between(account, data.after(at, v_shortest), data.after(at, v_longest));
end
$$;

-- The budgets of these requests' keys and users: only theirs, of this account; null if there are
-- none.
create or replace function data.budgets_of_requests(
  account data.account_balance,
  requests data.hold_request[],
  at timestamptz
)
returns data.budget_left[]
language plpgsql
stable
as $$
begin
  if not account.has_budgets then
    return null;
  end if;
  return nullif(array(
    select row(b.scope, b.scope_id, b.remaining)::data.budget_left
    from data.budgets_left(
      account.account_id,
      array(select (r.hold).virtual_key_id from unnest(requests) r),
      array(select r.user_id from unnest(requests) r),
      at) with ordinality as b (scope, scope_id, remaining, place)
    order by b.place), '{}');
end
$$;

-- Says why a hold can't be admitted: a refusal, or null if it can.
create or replace function data.refusal_of(
  hold data.hold,
  user_id uuid,
  available numeric,
  backing data.backing[],
  budgets data.budget_left[]
)
returns jsonb
language plpgsql
stable
as $$
declare
  v_over data.budget_left;
begin
  if hold.amount > available or backing is not null and hold.amount > data.backed(backing, hold.expires_at) then
    return '{"status": "refused", "code": "insufficient_funds"}';
  end if;
  if budgets is not null then
    v_over := data.budget_exceeded(budgets, hold, user_id);
  end if;
  if v_over.scope is not null then
    return jsonb_build_object(
      'status', 'refused', 'code', data.budget_code(v_over.scope), 'remaining', v_over.remaining::text);
  end if;
  return null;
end
$$;

-- Places the holds of an account that settle has locked, as far as its money goes, in the order
-- they came; answers each. `account` is a row of nulls if no request may be admitted, or if it
-- could not be locked: `refusal` says why.
create or replace function data.admit(
  account data.account_balance,
  requests data.hold_request[],
  refusal jsonb
)
returns jsonb[]
language plpgsql
as $$
declare
  v_now timestamptz := clock_timestamp();
  v_available numeric := account.available;
  v_backing data.backing[];
  v_budgets data.budget_left[];
  v_first_tries data.hold[];
  v_places integer[];
  v_request data.hold_request;
  v_first_try data.hold;
  v_hold data.hold;
  v_new data.hold[] := '{}';
  v_answer jsonb;
  v_answers jsonb[];
begin
  v_first_tries := data.first_tries(((admit.requests[1]).hold).account_id, admit.requests);
  if cardinality(admit.requests) > 1 then
    v_places := data.first_places(admit.requests);
  end if;
  if account.account_id is not null then
    v_backing := data.backing_of_requests(account, admit.requests, v_now);
    v_budgets := data.budgets_of_requests(account, admit.requests, v_now);
  end if;
  for i in 1 .. cardinality(admit.requests) loop
    v_request := admit.requests[i];
    v_hold := v_request.hold;
    v_first_try := coalesce(v_first_tries[i], v_first_tries[v_places[i]]);
    -- its time begins now, not before the wait for the lock
    v_hold.expires_at := data.after(v_now, v_hold.expires_at - v_hold.created_at);
    v_hold.created_at := v_now;
    v_answer := case
      when v_first_try.id is not null then data.answer_first_try(v_first_try, v_hold)
      when v_request.code is not null then jsonb_build_object('status', 'refused', 'code', v_request.code)
      when account.account_id is null then refusal
      else data.refusal_of(v_hold, v_request.user_id, v_available, v_backing, v_budgets)
    end;
    if v_first_try.id is not null then
      v_hold := v_first_try;
    elsif v_answer is null then
      v_answer := '{"status": "held"}';
      v_available := v_available - v_hold.amount;
      if v_backing is not null then
        v_backing := data.backing_after(v_backing, v_hold.expires_at, v_hold.amount);
      end if;
      if v_budgets is not null then
        v_budgets := data.budgets_after(v_budgets, v_hold, v_request.user_id);
      end if;
      v_new := v_new || v_hold;
      v_first_tries[i] := v_hold;
    end if;
    v_answers := v_answers || data.answer_request(v_request.id, v_answer, v_hold, v_available);
  end loop;
  if v_new <> '{}' then
    insert into data.hold select n.* from unnest(v_new) n;
    update data.account_balance a
    set frozen_balance = a.frozen_balance + (account.available - v_available)
    where a.account_id = account.account_id;
  end if;
  return v_answers;
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
