-- migrate:up
-- The ledger's one writer: it posts one entry to one account. settle locks the account first.
--
-- Callers fix their plans (plan_cache_mode, enable_seqscan): by index for any number of rows, and
-- made once. Else a plan made on an empty table scans it until the next analyze, and planning anew
-- is a fifth of a call (measured). A statement that joins may use nested loops only: a hash join
-- reads all the holds there are. tests/ledger/plans.test.ts counts the rows each reads.

set local role keyledger_owner;

-- Pays part of a debt from grants: lowest priority number first, then soonest expiry, then oldest.
create or replace function data.draw_grants(
  account_id uuid,
  seq bigint,
  amount numeric
)
returns void
language plpgsql
as $$
declare
  v_left numeric := draw_grants.amount;
  v_grant data.credit_grant;
  v_part numeric;
begin
  for v_grant in
    select g.* from data.credit_grant g
    where g.account_id = draw_grants.account_id and g.remaining > 0
    order by g.priority, g.expires_at nulls last, g.seq
  loop
    v_part := least(v_left, v_grant.remaining);
    update data.credit_grant g
    set remaining = g.remaining - v_part
    where g.account_id = draw_grants.account_id and g.seq = v_grant.seq;
    insert into data.grant_draw (account_id, seq, grant_seq, amount)
    values (draw_grants.account_id, draw_grants.seq, v_grant.seq, v_part);
    v_left := v_left - v_part;
    exit when v_left = 0;
  end loop;
end
$$;

-- The money an account has, of which holds set a part aside.
create or replace function data.funds_of(account data.account_balance)
returns numeric
language sql
immutable parallel safe
as $$
  select account.free_credit + account.balance + account.credit_limit - account.outstanding_amount
$$;

-- Says whether an account that had these funds has crossed 0, or fallen to its threshold.
create or replace function data.crosses(
  before numeric,
  account data.account_balance
)
returns boolean
language sql
immutable parallel safe
as $$
  select (before > 0) <> (data.funds_of(account) > 0)
    or (before > account.low_balance_threshold and data.funds_of(account) <= account.low_balance_threshold)
$$;

-- Opens the grant of a credit_grant entry; its metadata hold the priority and the end.
create or replace function data.add_grant(
  account_id uuid,
  seq bigint,
  amount numeric,
  metadata jsonb
)
returns void
language plpgsql
as $$
begin
  insert into data.credit_grant (account_id, seq, amount, remaining, priority, expires_at)
  values (add_grant.account_id, add_grant.seq, add_grant.amount, add_grant.amount,
    (metadata ->> 'priority')::integer, data.epoch_time((metadata ->> 'expires_at')::numeric));
end
$$;

-- Posts one entry to an account that settle has locked, and answers the account as it is then.
-- Restores the normal form: debt only where free credit and balance are spent to the limit. Draws
-- grants, extends the chain, and tells a crossing of the account's funds. `credit_limit` null
-- leaves it; `frozen_delta` is the sum that holds set aside (above 0) or give back (below).
create or replace function data.post(
  account data.account_balance,
  kind text,
  actor text default data.actor(),
  balance_delta numeric default 0,
  free_credit_delta numeric default 0,
  outstanding_delta numeric default 0,
  frozen_delta numeric default 0,
  credit_limit numeric default null,
  reference text default null,
  reason text default null,
  metadata jsonb default null,
  refund_of_seq bigint default null,
  refund_of_usage_id uuid default null,
  usage_count integer default 0,
  usage_list bytea default null
)
returns data.account_balance
language plpgsql
as $$
declare
  v_at timestamptz := greatest(clock_timestamp(), account.head_at);
  v_funds numeric := data.funds_of(account);
  v_limit numeric := coalesce(post.credit_limit, account.credit_limit);
  v_balance numeric := account.balance + post.balance_delta;
  v_free_credit numeric := account.free_credit + post.free_credit_delta;
  v_debt numeric := account.outstanding_amount + post.outstanding_delta;
  v_from_grants numeric;
  v_from_balance numeric;
  v_entry data.billing_transaction;
begin
  -- all that exceeds the limit is debt; free credit pays it, then the balance down to the limit
  v_debt := v_debt + greatest(-v_limit - v_balance, 0);
  v_balance := greatest(v_balance, -v_limit);
  v_from_grants := least(v_debt, v_free_credit);
  v_from_balance := least(v_debt - v_from_grants, v_balance + v_limit);
  v_free_credit := v_free_credit - v_from_grants;
  v_balance := v_balance - v_from_balance;
  v_debt := v_debt - v_from_grants - v_from_balance;
  -- the columns of billing_transaction in their order; the hash comes next
  v_entry := (
    account.account_id, account.balance_version + 1, post.kind,
    v_balance - account.balance + v_free_credit - account.free_credit - (v_debt - account.outstanding_amount),
    v_balance - account.balance, v_free_credit - account.free_credit, v_debt - account.outstanding_amount,
    v_balance, v_free_credit, v_debt, v_limit,
    post.reference, post.actor, post.reason, post.usage_count, post.usage_list,
    post.refund_of_seq, post.refund_of_usage_id, post.metadata, account.head_hash, null, v_at
  );
  v_entry.hash := data.entry_hash(v_entry);
  insert into data.billing_transaction values (v_entry.*);
  update data.account_balance a
  set (balance, free_credit, outstanding_amount, credit_limit) = (v_balance, v_free_credit, v_debt, v_limit),
    (balance_version, head_hash, head_at) = (v_entry.seq, v_entry.hash, v_at),
    frozen_balance = a.frozen_balance + post.frozen_delta,
    last_charged_at = case when post.kind = 'usage' then v_at else a.last_charged_at end
  where a.account_id = v_entry.account_id
  returning a.* into account;

  if post.kind = 'credit_grant' then
    perform data.add_grant(v_entry.account_id, v_entry.seq, post.free_credit_delta, post.metadata);
  end if;
  if v_from_grants > 0 then
    perform data.draw_grants(v_entry.account_id, v_entry.seq, v_from_grants);
  end if;
  if data.crosses(v_funds, account) then
    perform data.tell_crossings(array[v_entry.account_id], array[v_funds]);
  end if;
  return account;
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
