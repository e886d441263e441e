-- migrate:up
-- Account news: events that the owners of accounts are told.

set local role keyledger_owner;

create or replace function api.set_low_balance_threshold(
  account_id uuid,
  amount numeric
)
returns api.billing_accounts
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
set enable_seqscan = off
as $$
declare
  v_shown api.billing_accounts;
begin
  if amount is not null then
    perform data.require_positive_amount(amount);
  end if;
  perform data.lock_account(account_id);
  update data.account_balance a set low_balance_threshold = amount
  where a.account_id = set_low_balance_threshold.account_id;
  select * into v_shown from data.account_now b where b.account_id = set_low_balance_threshold.account_id;
  return v_shown;
end
$$;
comment on function api.set_low_balance_threshold(uuid, numeric) is
'Sets the funds at which an account''s balance is low; null for none.
`amount` is the threshold of `account_id`, above 0, or null. account_news tells `low_balance` when a
posting takes the funds (balance + free_credit + credit_limit - outstanding_amount) from above the
threshold to it or below. Setting it tells nothing, whatever the funds are. Answers the account. 404
account_not_found; 422 invalid_amount.';
grant execute on function api.set_low_balance_threshold(uuid, numeric) to keyledger_operator;

create or replace function api.account_news(cursor jsonb default null)
returns jsonb
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_since pg_snapshot;
  v_next jsonb;
begin
  select c.since, c.next into v_since, v_next from data.read_cursor('account', cursor) c;
  return jsonb_build_object(
    'cursor', v_next,
    'reset', nullif(cursor, 'null') is not null and v_since is null,
    'events', coalesce((
      select jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
        'id', e.id,
        'kind', e.kind,
        'account_id', e.account_id,
        'seq', e.seq,
        'funds', e.funds::text,
        'threshold', e.threshold::text,
        'budget', e.budget,
        'created_at', e.created_at
      )) order by e.id)
      from (
        select n.id, n.kind, n.account_id, n.seq, n.funds, n.threshold, n.budget, n.created_at
        from data.account_news n
        where n.xid >= pg_snapshot_xmin(v_since)
          and not pg_visible_in_snapshot(n.xid, v_since)
          and not data.is_foreign(n.xid)
        offset 0 -- by xid, not in the order of id
      ) e
    ), '[]'::jsonb)
  );
end
$$;
comment on function api.account_news(jsonb) is
'Answers the news of accounts since a cursor, and the next cursor.
Without a cursor it starts from now, without events. Answers {cursor, reset, events: [{id, kind,
account_id, seq, funds, threshold?, budget?, created_at}]}, oldest first. `low_balance`: funds fell
to the account''s threshold or below; `exhausted`: to 0 or below; `back_in_funds`: they rose above
0; `budget_exhausted`: the use of a budget in its present window has reached its amount, with
`budget` {id, scope, scope_id, period, amount, spent}. Funds are balance + free_credit +
credit_limit - outstanding_amount, holds not counted, and `seq` is the entry that changed them.
`reset` true: the cursor is of another cluster or database, ahead of this one or older than the news
that is kept (48 h); events may be missing, so read the accounts. Keep the cursor after handling the
events: a repeated cursor gets the same ids again.';
grant execute on function api.account_news(jsonb) to keyledger_gateway, keyledger_operator;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
