-- migrate:up
-- Openings: the balances that accounts had elsewhere are their first entries.

set local role keyledger_owner;

-- Reads openings: the account of each, its amounts in full, and a code for each that can't be read.
create or replace function data.read_openings(openings jsonb)
returns jsonb
language plpgsql
stable
as $$
begin
  return (
    select coalesce(jsonb_agg(jsonb_build_object(
      'ord', r.ord,
      'account_id', a.account_id,
      'balance', r.balance,
      'free_credit', r.free_credit,
      'credit_limit', r.credit_limit,
      'reference', r.opening ->> 'reference',
      -- kept with the entry, so that a retry can be told from another opening
      'asked', jsonb_build_object(
        'balance', r.balance::text, 'free_credit', r.free_credit::text, 'credit_limit', r.credit_limit::text),
      'code', case
        when jsonb_typeof(r.opening) <> 'object' then 'invalid_opening'
        when num_nonnulls(
            r.opening ->> 'account_id', r.opening ->> 'tenant_external_id', r.opening ->> 'user_external_id') <> 1
          or (r.account_id is null and r.opening ->> 'account_id' is not null) then 'invalid_account_id'
        when a.account_id is null then 'account_not_found'
        when r.balance is null then 'invalid_balance'
        when r.free_credit is null or r.free_credit < 0 then 'invalid_free_credit'
        when r.credit_limit is null or r.credit_limit < 0 then 'invalid_credit_limit'
        when jsonb_typeof(r.opening -> 'reference') not in ('string', 'null')
          or length(r.opening ->> 'reference') not between 1 and 512 then 'invalid_reference'
      end
    ) order by r.ord), '[]')
    from (
      select
        e.ord,
        e.opening,
        data.to_uuid(e.opening ->> 'account_id') as account_id,
        data.to_amount(e.opening ->> 'balance')::data.money as balance,
        data.to_amount(coalesce(e.opening ->> 'free_credit', '0'))::data.money as free_credit,
        data.to_amount(coalesce(e.opening ->> 'credit_limit', '0'))::data.money as credit_limit
      from jsonb_array_elements(openings) with ordinality as e (opening, ord)
      offset 0 -- or each use would parse again
    ) r
    left join lateral (
      select b.account_id from data.account_balance b where b.account_id = r.account_id
      union all
      select t.id from data.tenant t where t.external_id = r.opening ->> 'tenant_external_id'
      union all
      select u.id from data.user_profile u where u.external_id = r.opening ->> 'user_external_id'
      limit 1
    ) a on true);
end
$$;

-- Opens one account, or answers why not. Free credit is a grant like any other: it pays a debt
-- first.
create or replace function data.open_balance(
  opening jsonb,
  wait boolean
)
returns jsonb
language plpgsql
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
as $$
declare
  v_account_id uuid := (opening ->> 'account_id')::uuid;
  v_account data.account_balance := data.settle(v_account_id, wait);
  v_first data.billing_transaction;
  v_code text;
begin
  if v_account.account_id is null then
    return jsonb_build_object('account_id', v_account_id, 'status', 'busy', 'code', 'account_busy', 'available', (
      select a.available::text from data.account_balance a where a.account_id = v_account_id));
  end if;
  if v_account.balance_version = 0 then
    v_account := data.post(v_account, 'opening', balance_delta => (opening ->> 'balance')::data.money,
      credit_limit => (opening ->> 'credit_limit')::data.money, reference => opening ->> 'reference',
      metadata => opening -> 'asked');
    if (opening ->> 'free_credit')::numeric > 0 then
      v_account := data.post(v_account, 'credit_grant', free_credit_delta => (opening ->> 'free_credit')::data.money,
        reason => 'opening', metadata => '{"priority": 100, "expires_at": null}');
    end if;
    return jsonb_build_object(
      'account_id', v_account_id, 'status', 'opened', 'seq', 1, 'available', v_account.available::text);
  end if;
  select t.* into v_first from data.billing_transaction t where t.account_id = v_account_id and t.seq = 1;
  v_code := case
    when v_first.kind <> 'opening' then 'account_in_use'
    when (v_first.reference, v_first.metadata) is distinct from (opening ->> 'reference', opening -> 'asked')
      then 'opening_mismatch'
  end;
  return jsonb_strip_nulls(jsonb_build_object(
    'account_id', v_account_id, 'status', case when v_code is null then 'duplicate' else 'refused' end, 'code', v_code,
    'seq', case when v_code is null then 1 end, 'available', v_account.available::text));
end
$$;

create or replace function api.record_openings(openings jsonb)
returns jsonb
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
as $$
declare
  v_read jsonb;
  v_one_account boolean;
  v_opening jsonb;
  v_answers jsonb[];
begin
  perform data.require_array('openings', openings);
  v_answers := array_fill(null::jsonb, array[jsonb_array_length(openings)]);
  v_read := data.read_openings(openings);
  select count(distinct o ->> 'account_id') = 1 into v_one_account
  from jsonb_array_elements(v_read) o
  where o ->> 'code' is null;
  -- accounts in one order; several openings of one account in the order they came
  for v_opening in
    select o from jsonb_array_elements(v_read) o order by (o ->> 'account_id')::uuid, (o ->> 'ord')::bigint
  loop
    v_answers[(v_opening ->> 'ord')::integer] := case
      when v_opening ->> 'code' is null then data.open_balance(v_opening, v_one_account)
      else jsonb_strip_nulls(jsonb_build_object(
        'account_id', v_opening -> 'account_id', 'status', 'refused', 'code', v_opening -> 'code', 'available', (
          select a.available::text
          from data.account_balance a
          where a.account_id = (v_opening ->> 'account_id')::uuid)))
    end;
  end loop;
  return to_jsonb(v_answers);
end
$$;
comment on function api.record_openings(jsonb) is
'Opens accounts with the balances they had elsewhere: each account''s first entry.
Takes `openings`, [{account_id | tenant_external_id | user_external_id, balance, free_credit?,
credit_limit?, reference?}] and answers in the same order [{account_id, status: opened | duplicate |
refused | busy, code?, seq, available}], at most 10,000. A balance below 0 is owed: the part beyond
the credit limit becomes debt. Free credit is granted without an end, and pays debt first. An
account opens once: repeated with the same content it is a duplicate, with other content
opening_mismatch; account_in_use: it has other entries already. Others: account_not_found,
invalid_….';
grant execute on function api.record_openings(jsonb) to keyledger_operator;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
