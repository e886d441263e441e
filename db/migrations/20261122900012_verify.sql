-- migrate:up
-- Proof: what the figures say equals what the ledger, the holds, the grants and the usage log say, in one consistent read.

set local role keyledger_owner;

create or replace function api.verify_balances(
  for_account_id uuid default null
)
returns table (
  account_id uuid,
  problem text,
  seq bigint,
  expected text,
  actual text
)
language plpgsql
stable
security definer
set search_path = ''
as $$
begin
  -- one statement, one snapshot: true under traffic too
  return query
  with account as (
    select * from data.account_balance a where for_account_id is null or a.account_id = for_account_id
  ), entry as (
    select t as entry, lag(t) over (partition by t.account_id order by t.seq) as previous
    from data.billing_transaction t
    where for_account_id is null or t.account_id = for_account_id
  ), total as (
    select (e.entry).account_id, count(*) as entries, max((e.entry).seq) as last_seq,
      sum((e.entry).balance_delta) as balance, sum((e.entry).free_credit_delta) as free_credit,
      sum((e.entry).outstanding_delta) as outstanding
    from entry e
    group by 1
  ), frozen as (
    select h.account_id, sum(h.amount - h.captured) as amount
    from data.hold h
    where h.status = 'open' and (for_account_id is null or h.account_id = for_account_id)
    group by 1
  ), granted as (
    select g.account_id, sum(g.remaining) as amount
    from data.credit_grant g
    where for_account_id is null or g.account_id = for_account_id
    group by 1
  ), used as (
    select l.account_id, l.transaction_seq as seq, count(*) as events, sum(l.cost) as cost,
      sha256(convert_to(string_agg(data.usage_line(l), E'\n' order by l.id), 'UTF8')) as digest
    from data.usage_log l
    where for_account_id is null or l.account_id = for_account_id
    group by 1, 2
  ), charge as (
    select e.entry from entry e where (e.entry).kind = 'usage'
  )
  select a.account_id, c.problem, null::bigint, c.expected, c.actual
  from account a
  left join total t on t.account_id = a.account_id
  left join frozen f on f.account_id = a.account_id
  left join granted g on g.account_id = a.account_id
  left join entry l on (l.entry).account_id = a.account_id and (l.entry).seq = a.balance_version
  cross join lateral (
    values
      ('balance is not the sum of its deltas', coalesce(t.balance, 0)::data.money::text, a.balance::text),
      ('free_credit is not the sum of its deltas', coalesce(t.free_credit, 0)::data.money::text, a.free_credit::text),
      ('outstanding_amount is not the sum of its deltas', coalesce(t.outstanding, 0)::data.money::text, a.outstanding_amount::text),
      ('frozen_balance is not the sum of open holds', coalesce(f.amount, 0)::data.money::text, a.frozen_balance::text),
      ('free_credit is not the sum of live grants', coalesce(g.amount, 0)::data.money::text, a.free_credit::text),
      ('balance_version is not the last seq', coalesce(t.last_seq, 0)::text, a.balance_version::text),
      ('seq has gaps', coalesce(t.last_seq, 0)::text, coalesce(t.entries, 0)::text),
      ('credit_limit is not the last entry''s', coalesce((l.entry).credit_limit_after, 0)::data.money::text, a.credit_limit::text),
      ('head is not the last entry''s hash', encode(coalesce((l.entry).hash, ''), 'hex'), encode(a.head_hash, 'hex'))
  ) as c (problem, expected, actual)
  where c.expected <> c.actual

  union all
  select a.account_id, 'figures are not in normal form', null, 'debt only when free credit and balance are spent', null
  from account a
  where a.outstanding_amount > 0 and (a.free_credit <> 0 or a.balance <> -a.credit_limit)

  union all
  select (e.entry).account_id, c.problem, (e.entry).seq, c.expected, c.actual
  from entry e
  cross join lateral (
    values
      ('entry does not follow from the one before: balance',
        (coalesce((e.previous).balance_after, 0) + (e.entry).balance_delta)::text, (e.entry).balance_after::text),
      ('entry does not follow from the one before: free_credit',
        (coalesce((e.previous).free_credit_after, 0) + (e.entry).free_credit_delta)::text, (e.entry).free_credit_after::text),
      ('entry does not follow from the one before: outstanding',
        (coalesce((e.previous).outstanding_after, 0) + (e.entry).outstanding_delta)::text, (e.entry).outstanding_after::text),
      ('chain is broken', encode(coalesce((e.previous).hash, ''), 'hex'), encode((e.entry).prev_hash, 'hex')),
      ('entry was altered', encode(data.entry_hash(e.entry), 'hex'), encode((e.entry).hash, 'hex')),
      ('entry is older than the one before', 'false', ((e.entry).created_at < (e.previous).created_at)::text)
  ) as c (problem, expected, actual)
  where c.expected <> c.actual

  union all
  select coalesce(g.account_id, (e.entry).account_id), 'grant is not as its entry says', coalesce(g.seq, (e.entry).seq),
    concat_ws(', ', (e.entry).amount, (e.entry).metadata ->> 'priority', (e.entry).metadata ->> 'expires_at'),
    concat_ws(', ', g.amount, g.priority, extract(epoch from g.expires_at))
  from (select * from entry x where (x.entry).kind = 'credit_grant') e
  full join (
    select * from data.credit_grant g where for_account_id is null or g.account_id = for_account_id
  ) g on g.account_id = (e.entry).account_id and g.seq = (e.entry).seq
  where (g.amount, g.priority, extract(epoch from g.expires_at)) is distinct from
    ((e.entry).amount, ((e.entry).metadata ->> 'priority')::integer, ((e.entry).metadata ->> 'expires_at')::numeric)

  union all
  select (r.entry).account_id, 'more came back than was charged or topped up', (r.entry).refund_of_seq,
    'at most ' || abs((o.entry).amount)::text, sum(abs((r.entry).amount))::text
  from entry r
  left join entry o on (o.entry).account_id = (r.entry).account_id and (o.entry).seq = (r.entry).refund_of_seq
  where (r.entry).refund_of_seq is not null
  group by (r.entry).account_id, (r.entry).refund_of_seq, o.entry
  having coalesce(sum(abs((r.entry).amount)) > abs((o.entry).amount), true)

  union all
  select l.account_id, 'more came back than the event cost', l.transaction_seq, 'at most ' || l.cost::text, r.amount::text
  from (
    select (e.entry).account_id, (e.entry).refund_of_usage_id as usage_id, sum((e.entry).amount) as amount
    from entry e
    where (e.entry).refund_of_usage_id is not null
    group by 1, 2
  ) r
  join data.usage_log l on l.account_id = r.account_id and l.id = r.usage_id
  where r.amount > l.cost

  union all
  select g.account_id, 'grant is not what is left of its draws', g.seq,
    (g.amount - coalesce(d.amount, 0) + coalesce(x.amount, 0))::text, g.remaining::text
  from data.credit_grant g
  left join (
    select w.account_id, w.grant_seq, sum(w.amount - w.returned) as amount
    from data.grant_draw w
    where for_account_id is null or w.account_id = for_account_id
    group by 1, 2
  ) d on d.account_id = g.account_id and d.grant_seq = g.seq
  left join (
    select (e.entry).account_id, (e.entry).metadata ->> 'grant_seq' as grant_seq, sum((e.entry).amount) as amount
    from entry e
    where (e.entry).kind = 'credit_expiry'
    group by 1, 2
  ) x on x.account_id = g.account_id and x.grant_seq = g.seq::text
  where (for_account_id is null or g.account_id = for_account_id)
    and g.remaining <> g.amount - coalesce(d.amount, 0) + coalesce(x.amount, 0)

  union all
  select coalesce(u.account_id, (h.entry).account_id), c.problem, coalesce(u.seq, (h.entry).seq), c.expected, c.actual
  from charge h
  full join used u on u.account_id = (h.entry).account_id and u.seq = (h.entry).seq
  cross join lateral (
    values
      ('charge is not the cost of its usage', coalesce(u.cost, 0)::numeric(28, 10)::text, (-coalesce((h.entry).amount, 0))::numeric(28, 10)::text),
      ('usage rows are missing or added', coalesce(u.events, 0)::text, coalesce((h.entry).usage_count, 0)::text),
      ('usage row was altered', encode(u.digest, 'hex'), encode((h.entry).usage_digest, 'hex'))
  ) as c (problem, expected, actual)
  where c.expected is distinct from c.actual;
end
$$;
comment on function api.verify_balances(uuid) is
'Proves the ledger: answers one row per problem, none when every figure is proved.
Of one account (`for_account_id`), or of all: figures against the sums of their deltas, frozen against open holds, free credit against
grants, grants against draws and expiries, seq gapless, normal form, refunds against what they refund, each entry against the one before,
its hash, and charges against their usage rows.';
grant execute on function api.verify_balances(uuid) to keyledger_operator;

reset role;

-- migrate:down
-- none: a ledger is not rolled back
