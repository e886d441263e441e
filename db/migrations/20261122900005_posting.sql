-- migrate:up
-- The ledger's one writer. An account's row is locked first, dues are settled under that lock, then one entry is posted.

set local role keyledger_owner;

create or replace trigger append_only before update or delete on data.billing_transaction
  for each row execute function data.forbid_change();
create or replace trigger append_only_truncate before truncate on data.billing_transaction
  for each statement execute function data.forbid_change();
create or replace trigger append_only before update or delete on data.usage_log
  for each row execute function data.forbid_change();
create or replace trigger append_only_truncate before truncate on data.usage_log
  for each statement execute function data.forbid_change();

-- accounts stay, and stay whose they are
create or replace function data.keep_account()
returns trigger
language plpgsql
as $$
begin
  if tg_op = 'UPDATE' and (new.account_id, new.owner_user_id, new.owner_tenant_id, new.currency)
    is not distinct from (old.account_id, old.owner_user_id, old.owner_tenant_id, old.currency)
  then
    return new;
  end if;
  perform data.refuse(409, 'account_is_fixed', lower(tg_op) || ' on ' || tg_table_name, 'close its owner instead');
  return null;
end
$$;
create or replace trigger keep_account before delete or update of account_id, owner_user_id, owner_tenant_id, currency
  on data.account_balance for each row execute function data.keep_account();
create or replace trigger keep_account_truncate before truncate on data.account_balance
  for each statement execute function data.keep_account();

-- the facts of an entry that span columns
create or replace function data.check_entry()
returns trigger
language plpgsql
as $$
declare
  v_broken text;
begin
  v_broken := case
    when new.seq < 1 or (new.seq = 1) <> (new.prev_hash = '') then 'only_the_first_entry_has_no_previous'
    when new.amount <> new.balance_delta + new.free_credit_delta - new.outstanding_delta then 'amount_is_the_net_of_the_deltas'
    when case
        when new.kind in ('usage') then new.amount > 0
        when new.kind in ('top_up', 'refund', 'credit_grant') then new.amount <= 0
        when new.kind in ('top_up_reversal', 'credit_expiry') then new.amount >= 0
        when new.kind = 'limit_change' then new.amount <> 0
        when new.kind = 'adjustment' then new.amount = 0
      end then 'amount_has_the_sign_of_its_kind'
    when new.balance_after < -new.credit_limit_after
      or (new.outstanding_after <> 0 and (new.free_credit_after <> 0 or new.balance_after <> -new.credit_limit_after))
      then 'buckets_after_are_in_normal_form'
    when (new.kind = 'usage') <> (new.usage_count > 0 and new.usage_digest is not null) then 'only_usage_counts_usage'
    when (new.kind = 'refund') <> (coalesce(new.refund_of_seq, new.seq) < new.seq) then 'only_a_refund_refunds_what_came_before'
  end;
  if v_broken is not null then
    raise check_violation using
      message = 'new row for relation "billing_transaction" violates check "' || v_broken || '"',
      table = 'billing_transaction', constraint = v_broken;
  end if;
  return new;
end
$$;
create or replace trigger check_entry before insert on data.billing_transaction
  for each row execute function data.check_entry();

-- the canonical text of a usage row and of an entry: what the hash chain covers
create or replace function data.usage_line(usage data.usage_log)
returns text
language sql
stable
as $$
  select jsonb_build_array(
    usage.account_id, usage.id, usage.transaction_seq, usage.virtual_key_id, usage.user_id, usage.config_node_id,
    usage.hold_id, usage.final, usage.meters, usage.price_ids, usage.cost, usage.request_id, usage.metadata,
    (extract(epoch from usage.recorded_at) * 1000000)::bigint)::text
$$;

create or replace function data.entry_hash(entry data.billing_transaction)
returns bytea
language sql
stable
as $$
  select sha256(entry.prev_hash || convert_to(jsonb_build_array(
    entry.account_id, entry.seq, entry.kind, entry.amount, entry.balance_delta, entry.free_credit_delta,
    entry.outstanding_delta, entry.balance_after, entry.free_credit_after, entry.outstanding_after,
    entry.credit_limit_after, entry.reference, entry.actor, entry.reason, entry.usage_count,
    entry.refund_of_seq, entry.metadata, (extract(epoch from entry.created_at) * 1000000)::bigint)::text, 'UTF8')
    || coalesce(entry.usage_digest, ''))
$$;

-- Locks the account and settles what the clock has ended: holds past their expiry, grants past theirs. Null when there is none.
create or replace function data.lock_account(account_id uuid)
returns data.account_balance
language plpgsql
as $$
declare
  v_account data.account_balance;
  v_now timestamptz;
  v_unfrozen numeric;
  v_grant data.credit_grant;
begin
  select * into v_account from data.account_balance a where a.account_id = lock_account.account_id for update;
  if not found then
    return null;
  end if;
  v_now := clock_timestamp();

  if v_account.frozen_balance > 0 and exists (
    select from data.hold h where h.account_id = lock_account.account_id and h.status = 'open' and h.expires_at <= v_now)
  then
    with ended as (
      update data.hold h
      set status = 'expired', ended_at = v_now
      where h.account_id = lock_account.account_id and h.status = 'open' and h.expires_at <= v_now
      returning h.amount - h.captured as unspent
    )
    select sum(unspent) into v_unfrozen from ended;
    update data.account_balance a
    set frozen_balance = a.frozen_balance - v_unfrozen
    where a.account_id = lock_account.account_id
    returning * into v_account;
  end if;

  if v_account.free_credit > 0 then
    for v_grant in
      select * from data.credit_grant g
      where g.account_id = lock_account.account_id and g.remaining > 0 and g.expires_at <= v_now
      order by g.expires_at, g.seq
    loop
      update data.credit_grant g set remaining = 0 where g.account_id = v_grant.account_id and g.seq = v_grant.seq;
      select (p.account).* into v_account
      from data.post(
        account_id => v_grant.account_id,
        kind => 'credit_expiry',
        free_credit_delta => -v_grant.remaining,
        metadata => jsonb_build_object('grant_seq', v_grant.seq)
      ) p;
    end loop;
  end if;
  return v_account;
end
$$;

-- Posts one entry to one account: what was used, or money in or out of a bucket, or a new credit limit.
-- Restores the normal form (debt only when free credit and balance are spent to the limit), draws holds and grants, extends
-- the chain. Answers the entry, the account after it, and the usage rows that were new; entry null when none was.
-- A reference seen before answers its entry, or 409 when the content differs.
create or replace function data.post(
  account_id uuid,
  kind text,
  balance_delta numeric default 0,
  free_credit_delta numeric default 0,
  credit_limit numeric default null,
  usage data.usage_log[] default null,
  reference text default null,
  reason text default null,
  metadata jsonb default null,
  expected_version bigint default null,
  grant_priority integer default null,
  grant_expires_at timestamptz default null,
  out entry data.billing_transaction,
  out account data.account_balance,
  out charged data.usage_log[]
)
returns record
language plpgsql
as $$
declare
  v_old data.account_balance := data.lock_account(post.account_id);
  v_now timestamptz := greatest(clock_timestamp(), v_old.head_at);
  v_seq bigint := v_old.balance_version + 1;
  v_cost numeric := 0;
  v_draws_holds boolean := false;
  v_unfrozen numeric := 0;
  v_limit numeric := coalesce(post.credit_limit, v_old.credit_limit);
  v_balance numeric := v_old.balance + post.balance_delta;
  v_free numeric := v_old.free_credit + post.free_credit_delta;
  v_owed numeric;
  v_paid numeric;
  v_count integer := 0;
  v_digest bytea;
  v_drawn numeric;
begin
  account := v_old;
  if v_old.account_id is null then
    return;
  end if;

  if post.reference is not null then
    select * into entry from data.billing_transaction t
    where t.account_id = post.account_id and t.reference = post.reference;
    if found then
      if (entry.kind, entry.amount, entry.metadata)
        is distinct from (post.kind, (post.balance_delta + post.free_credit_delta)::numeric(28, 10), post.metadata)
      then
        perform data.refuse(409, 'reference_mismatch', 'reference is used by entry ' || entry.seq || ' with other content',
          'use a new reference, or repeat the first call exactly');
      end if;
      return;
    end if;
    entry := null;
  end if;
  if post.expected_version <> v_old.balance_version then
    perform data.refuse(409, 'version_conflict', 'balance_version is ' || v_old.balance_version, 'read the account again');
  end if;

  if post.usage is not null then
    -- a conflict is a retry: its first try was charged
    with new_row as (
      insert into data.usage_log (
        account_id, id, transaction_seq, virtual_key_id, user_id, config_node_id, hold_id, final, meters, price_ids,
        cost, request_id, metadata, recorded_at)
      select post.account_id, u.id, v_seq, u.virtual_key_id, u.user_id, u.config_node_id, u.hold_id, u.final, u.meters,
        u.price_ids, u.cost, u.request_id, u.metadata, v_now
      from unnest(post.usage) u
      on conflict do nothing
      returning *
    )
    select count(*), coalesce(sum(n.cost), 0), coalesce(bool_or(n.hold_id is not null), false),
      sha256(convert_to(string_agg(data.usage_line(n), E'\n' order by n.id), 'UTF8')), array_agg(n)
    into v_count, v_cost, v_draws_holds, v_digest, charged
    from new_row n;
    if v_count = 0 then
      return;
    end if;

    if v_draws_holds then
      with wanted as (
        select u.hold_id, sum(u.cost) as cost, bool_or(u.final) as final from unnest(charged) u group by u.hold_id
      ), drawn as (
        select h.id, least(w.cost, h.amount - h.captured) as draw, h.amount - h.captured as unspent, w.final
        from wanted w
        join data.hold h on h.account_id = post.account_id and h.id = w.hold_id and h.status = 'open'
        where h.expires_at is null or h.expires_at > v_now
      ), ended as (
        update data.hold h
        set captured = h.captured + d.draw,
          status = case when d.final then 'captured' else h.status end,
          ended_at = case when d.final then v_now end
        from drawn d
        where h.account_id = post.account_id and h.id = d.id
      )
      select coalesce(sum(case when d.final then d.unspent else d.draw end), 0) into v_unfrozen from drawn d;
    end if;
  end if;

  -- the normal form: what exceeds the limit is debt, and debt is paid by free credit, then by balance down to the limit
  v_owed := v_old.outstanding_amount + v_cost + greatest(-v_limit - v_balance, 0);
  v_balance := greatest(v_balance, -v_limit);
  v_paid := least(v_owed, v_free);
  v_owed := v_owed - v_paid;
  v_free := v_free - v_paid;
  v_drawn := v_paid;
  v_paid := least(v_owed, v_balance + v_limit);
  v_owed := v_owed - v_paid;
  v_balance := v_balance - v_paid;

  entry.account_id := post.account_id;
  entry.seq := v_seq;
  entry.kind := post.kind;
  entry.balance_delta := v_balance - v_old.balance;
  entry.free_credit_delta := v_free - v_old.free_credit;
  entry.outstanding_delta := v_owed - v_old.outstanding_amount;
  entry.amount := entry.balance_delta + entry.free_credit_delta - entry.outstanding_delta;
  entry.balance_after := v_balance;
  entry.free_credit_after := v_free;
  entry.outstanding_after := v_owed;
  entry.credit_limit_after := v_limit;
  entry.reference := post.reference;
  entry.actor := data.actor();
  entry.reason := post.reason;
  entry.usage_count := v_count;
  entry.usage_digest := v_digest;
  entry.metadata := post.metadata;
  entry.prev_hash := v_old.head_hash;
  entry.created_at := v_now;
  entry.hash := data.entry_hash(entry);

  with posted as (
    insert into data.billing_transaction values (entry.*)
  )
  update data.account_balance a
  set balance = v_balance,
    free_credit = v_free,
    outstanding_amount = v_owed,
    credit_limit = v_limit,
    frozen_balance = a.frozen_balance - v_unfrozen,
    balance_version = v_seq,
    head_hash = entry.hash,
    head_at = v_now,
    last_charged_at = case when post.kind = 'usage' then v_now else a.last_charged_at end
  where a.account_id = post.account_id
  returning * into account;

  if post.kind = 'credit_grant' then
    insert into data.credit_grant (account_id, seq, amount, remaining, priority, expires_at)
    values (post.account_id, v_seq, post.free_credit_delta, post.free_credit_delta, post.grant_priority, post.grant_expires_at);
  end if;
  if v_drawn > 0 then
    -- lowest priority number first, then soonest expiry, then oldest
    update data.credit_grant g
    set remaining = g.remaining - d.draw
    from (
      select r.seq, least(r.remaining, v_drawn - (r.running - r.remaining)) as draw
      from (
        select c.seq, c.remaining, sum(c.remaining) over (order by c.priority, c.expires_at nulls last, c.seq) as running
        from data.credit_grant c
        where c.account_id = post.account_id and c.remaining > 0
      ) r
      where r.running - r.remaining < v_drawn
    ) d
    where g.account_id = post.account_id and g.seq = d.seq;
  end if;
end
$$;

reset role;

-- migrate:down
-- none: a ledger is not rolled back
