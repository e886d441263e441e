-- migrate:up
-- Price books: customers' own prices, minimum charges, and the prices that a member sees.

set local role keyledger_owner;

create or replace trigger append_only before update or delete on data.price_book_factor
  for each row execute function data.forbid_change();
create or replace trigger append_only_truncate before truncate on data.price_book_factor
  for each statement execute function data.forbid_change();
create or replace trigger append_only before update or delete on data.price_book_assignment
  for each row execute function data.forbid_change();
create or replace trigger append_only_truncate before truncate on data.price_book_assignment
  for each statement execute function data.forbid_change();
create or replace trigger append_only before update or delete on data.minimum_charge
  for each row execute function data.forbid_change();
create or replace trigger append_only_truncate before truncate on data.minimum_charge
  for each statement execute function data.forbid_change();

create or replace trigger check_written before insert or update on data.price_book
  for each row when (num_nulls(new.id, new.name, new.currency, new.kind) > 0 or new.currency !~ '^[A-Z]{3}$')
  execute function data.check_written('id', 'name', 'currency', 'kind');
create or replace trigger check_written before insert on data.price_book_factor
  for each row when (num_nulls(new.price_book_id, new.effective_from) > 0)
  execute function data.check_written('price_book_id', 'effective_from');
create or replace trigger check_written before insert on data.minimum_charge
  for each row when (num_nulls(new.currency, new.effective_from) > 0 or new.currency !~ '^[A-Z]{3}$')
  execute function data.check_written('currency', 'effective_from');

-- a book may be renamed; all else about it is history
create or replace function data.keep_price_book()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if tg_op = 'DELETE' or (new.id, new.currency, new.kind) is distinct from (old.id, old.currency, old.kind) then
    perform data.refuse(409, 'price_book_is_fixed', 'price book ' || old.name,
      'make a new book, and assign it; only a name can change');
  end if;
  return new;
end
$$;
create or replace trigger keep_price_book before update or delete on data.price_book
  for each row execute function data.keep_price_book();
create or replace trigger forbid_truncate before truncate on data.price_book
  for each statement execute function data.forbid_truncate();

create or replace view api.price_books as
select b.id, b.name, b.currency, b.kind, b.created_at
from data.price_book b;
comment on view api.price_books is
'Price books: a customer''s own prices (kind price), or our own costs (kind cost, one per currency).
A book prices a meter by its own rate (prices.price_book_id), else by the list times its factor,
else not at all.';
grant select on api.price_books to keyledger_operator;
grant insert (id, name, currency, kind), update (name) on api.price_books to keyledger_operator;
alter view api.price_books alter column id set default gen_random_uuid();
alter view api.price_books alter column currency set default 'USD';
alter view api.price_books alter column kind set default 'price';

create or replace view api.price_book_factors as
select f.id, f.price_book_id, f.factor, f.effective_from, f.created_at
from data.price_book_factor f;
comment on view api.price_book_factors is
'Dated factors of price books: 1.2 is the list + 20 %, 0 is free. From 0 to 1000, 6 decimals.
Append-only: a new factor is a new row.';
grant select on api.price_book_factors to keyledger_operator;
grant insert (price_book_id, factor, effective_from) on api.price_book_factors to keyledger_operator;
alter view api.price_book_factors alter column effective_from set default now();

create or replace view api.minimum_charges as
select m.id, m.price_book_id, m.config_node_id, m.minimum, m.currency, m.effective_from, m.created_at
from data.minimum_charge m;
comment on view api.minimum_charges is
'Dated minimum charges of an event: of a book, or of a node. The book''s counts before the node''s.
An event whose quantities are all 0 pays none. Append-only; 0 ends one.';
grant select on api.minimum_charges to keyledger_operator;
grant insert (price_book_id, config_node_id, minimum, currency, effective_from)
  on api.minimum_charges to keyledger_operator;
alter view api.minimum_charges alter column currency set default 'USD';
alter view api.minimum_charges alter column effective_from set default now();

-- says in words which value of a factor or a minimum is wrong
create or replace function data.check_terms()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_row jsonb := to_jsonb(new);
  v_factor numeric := v_row ->> 'factor';
  v_book data.price_book;
begin
  if tg_table_name = 'price_book_factor'
    and not coalesce(v_factor between 0 and 1000 and scale(trim_scale(v_factor)) <= 6, false)
  then
    perform data.refuse(422, 'invalid_factor', 'factor ' || coalesce(left(v_factor::text, 100), 'null'),
      'send 0 to 1000, with at most 6 decimals; 1.2 is the list + 20 %');
  elsif tg_table_name = 'minimum_charge' and not coalesce(data.to_quantity(v_row -> 'minimum') is not null
    and num_nonnulls(v_row ->> 'price_book_id', v_row ->> 'config_node_id') = 1, false)
  then
    perform data.refuse(422, 'invalid_minimum', 'a minimum is an amount of one book or one node',
      'send minimum (0 or more, at most 10 decimals), and either price_book_id or config_node_id');
  end if;
  if not isfinite(new.effective_from) then
    perform data.refuse(422, 'invalid_effective_from', 'effective_from must be a moment', 'leave it out for now');
  elsif v_row ->> 'config_node_id' is not null
    and not exists (select from data.config_node n where n.id = (v_row ->> 'config_node_id')::uuid)
  then
    perform data.refuse(404, 'config_node_not_found', 'config node ' || (v_row ->> 'config_node_id'),
      'send the id of a row of config_nodes');
  end if;
  if v_row ->> 'price_book_id' is not null then
    select * into v_book from data.price_book b where b.id = new.price_book_id for share;
    if not found then
      perform data.refuse(404, 'price_book_not_found', 'price book ' || new.price_book_id,
        'send the id of a row of price_books');
    elsif v_book.currency <> v_row ->> 'currency' then
      perform data.refuse(422, 'currency_mismatch', format('the price book has %s, the minimum %s', v_book.currency,
        v_row ->> 'currency'), 'send an amount in the book''s currency');
    end if;
  end if;
  return new;
end
$$;
create or replace trigger check_terms before insert on data.price_book_factor
  for each row execute function data.check_terms();
create or replace trigger check_terms before insert on data.minimum_charge
  for each row execute function data.check_terms();

create or replace view api.my_prices with (security_barrier) as
select n.id as config_node_id, n.name, n.provider, n.model, r.meter, r.variant, r.context_over, r.hours, r.unit_price,
  r.unit_size, a.currency::text as currency, r.effective_from, i.minimum
from data.viewer v
join data.account_balance a on a.account_id = v.account_id
join data.config_node n on n.status = 'active' and n.id = any (array(
  select m.config_node_id
  from data.virtual_key_config_node m
  join data.virtual_key k on k.id = m.virtual_key_id
  where k.user_id = any (array(select u.id from data.visible_user u))))
left join lateral (
  select s.price_book_id
  from data.price_book_assignment s
  where s.account_id = a.account_id and s.effective_from <= statement_timestamp()
  order by s.effective_from desc
  limit 1
) b on true
left join lateral (
  select f.factor
  from data.price_book_factor f
  where f.price_book_id = b.price_book_id and f.effective_from <= statement_timestamp()
  order by f.effective_from desc
  limit 1
) f on true
left join lateral (
  select p.meter, p.variant, p.context_over, p.hours, p.unit_size, p.effective_from,
    case when p.price_book_id is null then p.unit_price * coalesce(f.factor, 1) else p.unit_price end as unit_price,
    -- the book's own list counts before the list of all, and the newest of each before older ones
    rank() over (
      partition by p.meter, p.variant order by p.price_book_id is null, p.effective_from desc) as place
  from data.price p
  where p.config_node_id = n.id and p.currency = a.currency and p.effective_from <= statement_timestamp()
    and (p.price_book_id = b.price_book_id
      or p.price_book_id is null and (b.price_book_id is null or f.factor is not null))
) r on r.place = 1
-- as data.price_meters reads it, which a member may not call
left join lateral (
  select m.minimum
  from data.minimum_charge m
  where (m.price_book_id = b.price_book_id or m.config_node_id = n.id) and m.currency = a.currency
    and m.effective_from <= statement_timestamp()
  order by m.price_book_id is null, m.effective_from desc
  limit 1
) i on true
-- a member who is not active sees no more of the tenant that pays
where not v.sees_all and (v.is_active or a.account_id = v.user_id);
comment on view api.my_prices is
'The prices a member pays: of each model mounted on a key that the member sees, as it is charged now.
A row per rate: `unit_price` per `unit_size` of a meter, for a `variant` (service tier), above
`context_over` tokens of context, in `hours` of the UTC week (null: always); `minimum` is the least
that an event costs. A node without a price has one row, without a meter.';
grant select on api.my_prices to keyledger_member;

create or replace view api.price_book_assignments as
select a.account_id, a.price_book_id, a.effective_from, a.actor, a.created_at
from data.price_book_assignment a;
comment on view api.price_book_assignments is
'Which book prices an account''s usage, from when on; assign_price_book writes it.';
grant select on api.price_book_assignments to keyledger_operator;

create or replace function api.assign_price_book(
  account_id uuid,
  price_book_id uuid,
  effective_from timestamptz default now()
)
returns setof api.price_book_assignments
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
as $$
declare
  v_currency text;
  v_book data.price_book;
  v_given uuid;
begin
  select a.currency into v_currency from data.account_balance a where a.account_id = assign_price_book.account_id;
  if not found then
    perform data.refuse(404, 'account_not_found', 'account ' || coalesce(assign_price_book.account_id::text, 'null'),
      'send the id of a user or a tenant');
  elsif not coalesce(isfinite(assign_price_book.effective_from), false) then
    perform data.refuse(422, 'invalid_effective_from', 'effective_from must be a moment', 'leave it out for now');
  end if;
  if assign_price_book.price_book_id is not null then
    select * into v_book from data.price_book b where b.id = assign_price_book.price_book_id for share;
    if not found then
      perform data.refuse(404, 'price_book_not_found', 'price book ' || assign_price_book.price_book_id,
        'send the id of a row of price_books');
    elsif v_book.kind <> 'price' then
      perform data.refuse(422, 'invalid_price_book', v_book.name || ' is a book of costs',
        'send a book of kind price');
    elsif v_book.currency <> v_currency then
      perform data.refuse(422, 'currency_mismatch', format('the price book has %s, the account %s', v_book.currency,
        v_currency), 'send a book in the account''s currency');
    end if;
  end if;
  insert into data.price_book_assignment (account_id, price_book_id, effective_from, actor)
  values (assign_price_book.account_id, assign_price_book.price_book_id, assign_price_book.effective_from,
    data.actor())
  on conflict do nothing;
  select a.price_book_id into v_given
  from data.price_book_assignment a
  where a.account_id = assign_price_book.account_id and a.effective_from = assign_price_book.effective_from;
  if v_given is distinct from assign_price_book.price_book_id then
    perform data.refuse(409, 'assignment_exists', 'another book is assigned from ' || assign_price_book.effective_from,
      'assignments are never changed: send a later effective_from');
  end if;
  return query
  select a.*
  from api.price_book_assignments a
  where a.account_id = assign_price_book.account_id and a.effective_from = assign_price_book.effective_from;
end
$$;
comment on function api.assign_price_book(uuid, uuid, timestamptz) is
'Prices an account''s usage by a price book, from effective_from on (default: now).
`account_id` is the payer. Events and holds of an earlier time keep their prices. `price_book_id`
null: list prices again.
Answers the row of price_book_assignments; the same call again changes nothing. 409 assignment_exists
where another book is assigned from that very moment; 404 account_not_found, price_book_not_found;
422 invalid_price_book, currency_mismatch, invalid_effective_from.';
grant execute on function api.assign_price_book(uuid, uuid, timestamptz) to keyledger_operator;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
