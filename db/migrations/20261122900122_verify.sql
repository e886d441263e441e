-- migrate:up
-- Verification: every figure against the rows it comes from, and the chain of hashes.

set local role keyledger_owner;

-- Every figure of an account, or of all, against the rows it comes from.
create or replace function api.verify_balances(
  account_id uuid default null
)
returns setof api.ledger_problem
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
-- planned for the account given, or for all
set plan_cache_mode = force_custom_plan
as $$
begin
  -- stable: all of it reads the snapshot of the one statement that calls it, so that it is true
  -- under traffic too
  return query
  select p.account_id, p.problem, p.seq, p.usage_id, p.expected, p.actual
  from (
    select * from data.verify_figures(verify_balances.account_id) f
    union all select * from data.verify_heads(verify_balances.account_id) h
    union all select * from data.verify_entries(verify_balances.account_id) e
    union all select * from data.verify_refunds(verify_balances.account_id) r
    union all select * from data.verify_grants(verify_balances.account_id) g
    union all select * from data.verify_usage(verify_balances.account_id) u
    union all select * from data.verify_costs(verify_balances.account_id) c
    union all select * from data.verify_statements(verify_balances.account_id) s
    union all select * from data.verify_budgets(verify_balances.account_id) b
  ) p
  order by p.account_id, p.seq nulls first, p.problem, p.usage_id, p.expected;
end
$$;
comment on function api.verify_balances(uuid) is
'Verifies every figure: answers a row for each problem, none when all are right.
Of one account (`account_id`), or of all: figures against the sums of their deltas, frozen against
open holds, free credit against grants, grants against draws and expiries, seq gapless, normal form,
the sign of each amount, refunds against the entry they refund, each entry against the one before,
its hash, charges against their usage rows, each cost through the rates, factor, book and minimum
that its row names, statements against the entries they seal, and budgets against the usage of their
windows. Usage that retention dropped is no problem. Answers
[{account_id, problem, seq, usage_id, expected, actual}]; `problem` is a code, listed in
docs/api.md.';
grant execute on function api.verify_balances(uuid) to keyledger_operator;

-- The chain of one account, and whether a head kept elsewhere is in it.
create or replace function api.verify_ledger(
  account_id uuid,
  expected_head text default null
)
returns setof api.ledger_problem
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_custom_plan
as $$
declare
  v_head text := lower(regexp_replace(expected_head, '^\\x', ''));
  v_account data.account_balance;
  v_last data.billing_transaction;
begin
  if v_head !~ '^([0-9a-f]{64})?$' then
    perform data.refuse(422, 'invalid_expected_head', 'expected_head must be a sha-256 in hex',
      'send the head of an account or of a statement as it was shown');
  end if;
  select * into v_account from data.account_balance a where a.account_id = verify_ledger.account_id;
  select * into v_last
  from data.billing_transaction t where t.account_id = verify_ledger.account_id order by t.seq desc limit 1;
  if v_account.account_id is null and v_last.account_id is null then
    perform data.refuse(404, 'account_not_found', 'account ' || coalesce(account_id::text, 'null'),
      'account_id is the id of the tenant or user that pays');
  end if;
  if v_head = '' and v_last.account_id is not null then
    perform data.refuse(422, 'invalid_expected_head', 'an empty head is in every ledger, and proves nothing',
      'send the head as it was shown; leave it out if the account had no entries then');
  end if;
  return query select p.* from data.verify_chain(v_account, account_id, v_last) p;
  if v_head <> '' and not exists (
    select from data.billing_transaction t
    where t.account_id = verify_ledger.account_id and t.hash = decode(v_head, 'hex'))
  then
    return query
    select verify_ledger.account_id, 'head_not_found', null::bigint, null::uuid, v_head, encode(v_account.head_hash,
      'hex');
  end if;
end
$$;
comment on function api.verify_ledger(uuid, text) is
'Proves that an account''s history is the one that was recorded: no row when it is.
Walks the chain of `account_id`. Computes each entry''s hash again from the entry before, its
content and its list of usage rows, and each usage row''s place in that list. Answers the first
difference: `problem` (entry_altered, entry_missing, entry_inserted, usage_altered, usage_missing,
usage_inserted, account_missing), `seq`, `usage_id` if it is a usage row, and the hashes expected
and found. Later entries are not proven. Usage that retention dropped is not missing: the entries
keep its list. `expected_head` is a head kept elsewhere, of billing_accounts or of a statement, in
hex. If entries and all hashes after them were rewritten, a kept head shows it: `head_not_found`.
The rewritten part begins between the last head that is found and the first that isn''t;
billing_transactions has the seq of a head, by its hash. Reads one snapshot. 404 account_not_found;
422 invalid_expected_head.';
grant execute on function api.verify_ledger(uuid, text) to keyledger_operator;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
