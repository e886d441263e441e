-- migrate:up
-- Verification of one account's chain of hashes: the first entry or usage row that is not as
-- recorded.

set local role keyledger_owner;

-- The entries of an account in the order of seq, each beside its neighbours. `place` is the seq it
-- should have.
-- An entry is whole if its hash is that of its content: so it vouches for the hash of the one
-- before.
create or replace function data.chain_links(account_id uuid)
returns table (
  seq bigint,
  place bigint,
  prev_hash bytea,
  hash bytea,
  content_hash bytea,
  usage_list bytea,
  previous_hash bytea,
  next_seq bigint,
  next_prev_hash bytea,
  next_is_whole boolean
)
language plpgsql
stable
as $$
begin
  return query
  select c.seq, row_number() over w, c.prev_hash, c.hash, c.content_hash, c.usage_list, lag(c.hash, 1, '') over w,
    lead(c.seq) over w, lead(c.prev_hash) over w, lead(c.content_hash = c.hash) over w
  from (
    select t.seq, t.prev_hash, t.hash::bytea as hash, t.usage_list,
      data.entry_hash(row(t.*)::data.billing_transaction) as content_hash
    from data.billing_transaction t
    where t.account_id = chain_links.account_id
    offset 0 -- or each use would hash again
  ) c
  window w as (order by c.seq);
end
$$;

-- the usage rows found for each entry of an account, as the entry should list them
create or replace function data.usage_lists(account_id uuid)
returns table (
  seq bigint,
  list bytea
)
language plpgsql
stable
as $$
begin
  return query
  select s.seq, string_agg(s.seal, '' order by s.id)
  from (
    select l.transaction_seq as seq, l.id, data.usage_seal(row(l.*)::data.usage_log) as seal
    from data.usage_log l
    where l.account_id = usage_lists.account_id
  ) s
  group by s.seq;
end
$$;

-- whether an entry's list of usage rows differs from the rows found, not counting rows that
-- retention dropped
create or replace function data.usage_differs(
  listed bytea,
  present bytea,
  first_kept uuid
)
returns boolean
language plpgsql
immutable parallel safe
as $$
begin
  -- all rows were dropped if the last one was
  return listed is distinct from present
    and (present is not null or substr(listed, octet_length(listed) - 31, 16) >= uuid_send(first_kept))
    and exists (select from data.usage_faults(listed, present, first_kept));
end
$$;

-- The first place where an account's entries or their usage rows are not as recorded; `problem` is
-- null if there is none.
-- `head_seq` is the seq of the entry whose hash is the account's head, 0 if none has it. `last_seq`
-- is the seq of the last entry.
-- `expected` is the hash that the next entry or the account kept.
create or replace function data.first_fault(
  account_id uuid,
  version bigint,
  head_seq bigint,
  last_seq bigint,
  first_kept uuid,
  out problem text,
  out seq bigint,
  out listed bytea,
  out present bytea,
  out expected bytea,
  out actual bytea
)
returns record
language plpgsql
stable
as $$
#variable_conflict use_column
begin
  -- one pass over the entries in their order, and over the usage rows by entry; sorts beyond
  -- work_mem go to disk
  select w.problem, w.seq, w.listed, w.present, w.expected, w.actual
  into problem, seq, listed, present, expected, actual
  from (
    select
      case
        when e.seq is null and u.seq between 1 and version then 'entry_missing'
        when e.seq is null then 'usage_inserted'
        when e.seq < 1 then 'entry_inserted'
        when e.seq <> e.place then 'entry_missing'
        when head_seq > 0 and e.seq > head_seq then 'entry_inserted'
        when e.content_hash <> e.hash then 'entry_altered'
        when e.next_seq = e.seq + 1 and e.next_prev_hash = e.previous_hash then 'entry_inserted'
        when e.prev_hash <> e.previous_hash then 'entry_altered'
        when e.next_seq = e.seq + 1 and e.next_is_whole and e.next_prev_hash <> e.hash then 'entry_altered'
        else 'usage_differs'
      end as problem,
      case
        when e.place <> e.seq and e.seq > 0 then e.place
        when e.seq is null and u.seq <= version then least(u.seq, last_seq + 1)
        else coalesce(e.seq, u.seq)
      end as seq, e.usage_list as listed, u.list as present,
      case
        when e.seq <> e.place then case when e.seq = e.place + 1 then e.prev_hash end
        when e.next_seq = e.seq + 1 then e.next_prev_hash
        else e.hash
      end as expected,
      case when e.seq = e.place then e.content_hash end as actual
    from data.chain_links(first_fault.account_id) e
    full join data.usage_lists(first_fault.account_id) u on u.seq = e.seq
    where e.seq is null
      or e.seq <> e.place
      or (head_seq > 0 and e.seq > head_seq)
      or e.content_hash <> e.hash
      or e.prev_hash <> e.previous_hash
      or (e.next_seq = e.seq + 1 and e.next_is_whole and e.next_prev_hash <> e.hash)
      or data.usage_differs(e.usage_list, u.list, first_kept)
  ) w
  order by w.seq, w.problem in ('usage_inserted', 'usage_differs'), w.expected nulls last
  limit 1;
end
$$;

-- Names an altered entry anew if it was moved: its hash is right at the seq after, or the next
-- one's at the seq before.
create or replace function data.moved_or_altered(
  account_id uuid,
  seq bigint
)
returns text
language plpgsql
stable
as $$
declare
  v_entry data.billing_transaction;
  v_next data.billing_transaction;
  v_entry_moved boolean;
  v_next_moved boolean;
begin
  select * into v_entry
  from data.billing_transaction t
  where t.account_id = moved_or_altered.account_id and t.seq = moved_or_altered.seq;
  select * into v_next
  from data.billing_transaction t
  where t.account_id = moved_or_altered.account_id and t.seq = moved_or_altered.seq + 1;
  v_entry.seq := v_entry.seq + 1;
  v_next.seq := v_next.seq - 1;
  v_entry_moved := data.entry_hash(v_entry) = v_entry.hash;
  v_next_moved := coalesce(data.entry_hash(v_next) = v_next.hash, false);
  return case
    when v_entry_moved and not v_next_moved then 'entry_missing'
    when v_next_moved and not v_entry_moved then 'entry_inserted'
    else 'entry_altered'
  end;
end
$$;

-- The first problem of an account's entries and usage rows, if there is one.
create or replace function data.verify_chain(
  account data.account_balance,
  account_id uuid,
  last data.billing_transaction
)
returns setof api.ledger_problem
language plpgsql
stable
as $$
declare
  v_first_kept uuid := data.uuid_floor((data.accepted_ids_now()).floor);
  v_head_seq bigint;
  v_found record;
  v_is_short boolean := account.balance_version > coalesce(last.seq, 0);
begin
  select coalesce(max(t.seq), 0) into v_head_seq
  from data.billing_transaction t
  where t.account_id = verify_chain.account_id and t.hash = account.head_hash;
  select f.* into v_found
  from data.first_fault(account_id, account.balance_version, v_head_seq, coalesce(last.seq, 0), v_first_kept) f;

  if v_found.problem in ('usage_inserted', 'usage_differs') then
    -- the entry is right, so its list of usage rows is
    return query
    select verify_chain.account_id, f.problem, v_found.seq, f.usage_id, f.expected, f.actual
    from data.usage_faults(v_found.listed, v_found.present, v_first_kept) f
    limit 1;
  elsif v_found.problem is not null then
    if v_found.problem = 'entry_altered' then
      v_found.problem := data.moved_or_altered(account_id, v_found.seq);
      if v_found.problem <> 'entry_altered' then
        v_found.expected := (
          select t.prev_hash from data.billing_transaction t
          where t.account_id = verify_chain.account_id and t.seq = v_found.seq);
      end if;
    end if;
    return query
    select verify_chain.account_id, v_found.problem, v_found.seq, null::uuid,
      case when v_found.problem <> 'entry_inserted' then encode(v_found.expected, 'hex') end,
      case when v_found.problem <> 'entry_missing' then encode(v_found.actual, 'hex') end;
  elsif account.account_id is null then
    return query
    select verify_chain.account_id, 'account_missing', null::bigint, null::uuid, null, encode(last.hash, 'hex');
  elsif account.head_hash <> coalesce(last.hash, '') then
    -- the chain ends elsewhere than the account says
    return query
    select verify_chain.account_id, case when v_is_short then 'entry_missing' else 'entry_altered' end,
      coalesce(last.seq, 0) + v_is_short::integer, null::uuid, encode(account.head_hash, 'hex'),
      case when not v_is_short then encode(last.hash, 'hex') end;
  end if;
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
