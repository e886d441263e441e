-- migrate:up
-- The rates of nodes: list prices, and the own rates of price books.

set local role keyledger_owner;

-- prices are history: a new price is a new row
create or replace trigger append_only before update or delete on data.price
  for each row execute function data.forbid_change();
create or replace trigger append_only_truncate before truncate on data.price
  for each statement execute function data.forbid_change();

create or replace trigger check_written before insert on data.price
  for each row when (
    num_nulls(new.config_node_id, new.meter, new.variant, new.context_over, new.unit_price, new.unit_size,
      new.currency, new.effective_from) > 0
    or new.currency !~ '^[A-Z]{3}$')
  execute function data.check_written('config_node_id', 'meter', 'variant', 'context_over', 'unit_price',
    'unit_size', 'currency', 'effective_from');

create or replace view api.prices with (security_barrier) as
select p.id, p.config_node_id, p.meter, p.unit_price, p.unit_size, p.currency, p.effective_from, p.created_at,
  p.price_book_id, p.variant, p.context_over, p.hours
from data.price p
where p.price_book_id is null or pg_has_role((select c.role from data.caller c), 'keyledger_operator', 'usage');
comment on view api.prices is
'Dated rates: unit_price per unit_size of a meter, in force from effective_from until the next list.
Append-only: a new price is a new row. Rates of one node, book, meter, variant and effective_from
are a list; set_rates writes one at once. Of a list, a rate whose `hours` contain the moment counts
before one without; then the highest `context_over` below the event''s context. `variant` is the
service tier ('''': standard); `price_book_id` null is the list price, the only one that a gateway
sees. `hours` are minutes of the UTC week, from Monday 00:00: {[540,1020)}. Each list has a rate for
all hours and contexts, and each window every `context_over` of it.';
grant select on api.prices to keyledger_gateway, keyledger_operator;
grant insert (
  config_node_id, meter, unit_price, unit_size, currency, effective_from, price_book_id, variant, context_over, hours
) on api.prices to keyledger_operator;
alter view api.prices alter column unit_size set default 1;
alter view api.prices alter column currency set default 'USD';
alter view api.prices alter column effective_from set default now();
alter view api.prices alter column variant set default '';
alter view api.prices alter column context_over set default 0;

-- says a rate's fault in words, before a constraint names a table that no role sees
create or replace function data.check_rate()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_book data.price_book;
  v_old data.price;
begin
  if not coalesce(new.meter ~ '^[a-z][a-z0-9_.]{0,62}$' and new.meter <> 'minimum', true) then
    perform data.refuse(422, 'invalid_meter', 'meter ' || left(new.meter, 100), case when new.meter = 'minimum'
      then 'write a minimum to minimum_charges' else 'write a name like input_tokens, in small letters' end);
  elsif new.unit_price is not null and not (data.is_amount(new.unit_price) and new.unit_price >= 0) then
    perform data.refuse(422, 'invalid_unit_price', 'unit_price ' || left(new.unit_price::text, 100),
      'send 0 or more, below 1e12, with at most 10 decimals; a larger unit_size keeps more of a small price');
  elsif not coalesce(new.unit_size > 0 and mod(3600000000, new.unit_size::bigint) = 0, true) then
    perform data.refuse(422, 'invalid_unit_size', 'unit_size ' || new.unit_size,
      'send a whole number that divides 3600000000, like 1, 60, 1000, 3600 or 1000000');
  elsif not isfinite(new.effective_from) then
    perform data.refuse(422, 'invalid_effective_from', 'effective_from must be a moment', 'leave it out for now');
  elsif new.variant !~ '^([a-z][a-z0-9_.-]{0,62})?$' then
    perform data.refuse(422, 'invalid_variant', 'variant ' || left(new.variant, 100),
      'write a name like flex, in small letters, or nothing for the standard tier');
  elsif new.context_over not between 0 and 1000000000000 then
    perform data.refuse(422, 'invalid_context_over', 'context_over ' || new.context_over,
      'send tokens: 0 to 1000000000000');
  elsif isempty(new.hours) or not new.hours <@ '{[0,10080)}' then
    perform data.refuse(422, 'invalid_hours', 'hours ' || left(new.hours::text, 200),
      'send minutes of the UTC week from Monday 00:00, within {[0,10080)}; null is always');
  end if;
  -- its context meters stay as they are; and one list has one writer
  perform from data.config_node n where n.id = new.config_node_id for no key update;
  if not found then
    perform data.refuse(404, 'config_node_not_found', 'config node ' || new.config_node_id,
      'send the id of a row of config_nodes');
  end if;
  select * into v_old
  from data.price p
  where p.config_node_id = new.config_node_id and p.price_book_id is not distinct from new.price_book_id
    and p.meter = new.meter and p.variant = new.variant and p.currency = new.currency
    and p.effective_from = new.effective_from
    and (p.written_by <> pg_current_xact_id() or p.context_over = new.context_over and p.hours && new.hours)
  order by p.written_by = pg_current_xact_id()
  limit 1;
  if found and v_old.written_by <> pg_current_xact_id() then
    perform data.refuse(409, 'rates_exist', 'other rates are in force from ' || new.effective_from,
      'rates are never changed: send a later effective_from');
  elsif found then
    perform data.refuse(422, 'hours_overlap', format('%s: %s overlaps another rate of its list', new.meter, new.hours),
      'send windows that share no minute');
  end if;
  if new.price_book_id is not null then
    select * into v_book from data.price_book b where b.id = new.price_book_id for share;
    if not found then
      perform data.refuse(404, 'price_book_not_found', 'price book ' || new.price_book_id,
        'send the id of a row of price_books');
    elsif v_book.currency <> new.currency then
      perform data.refuse(422, 'currency_mismatch', format('the price book has %s, the rate %s', v_book.currency,
        new.currency), 'send a rate in the book''s currency');
    end if;
  end if;
  return new;
end
$$;
create or replace trigger check_rate before insert on data.price
  for each row execute function data.check_rate();

-- A list is whole at the end of its transaction: it has a rate for all hours and contexts, and each
-- window has every context_over of it. So each event finds its rate in the newest list.
create or replace function data.check_list()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_missing text;
begin
  with list as (
    select p.context_over, p.hours
    from data.price p
    where p.config_node_id = new.config_node_id and p.price_book_id is not distinct from new.price_book_id
      and p.meter = new.meter and p.variant = new.variant and p.currency = new.currency
      and p.effective_from = new.effective_from
  )
  select case when b.context_over = 0 and w.hours is null then 'a rate without hours and context_over'
      else format('a rate for hours %s above %s tokens', w.hours, b.context_over) end
  into v_missing
  from (select l.context_over from list l union select 0) b
  cross join (select l.hours from list l union select null) w
  where not exists (
    select from list l where l.context_over = b.context_over and l.hours is not distinct from w.hours)
  order by w.hours nulls first, b.context_over
  limit 1;
  if found then
    perform data.refuse(422, 'incomplete_rates',
      format('%s%s from %s: the list lacks %s', new.meter, coalesce(nullif(' ' || new.variant, ' '), ''),
        new.effective_from, v_missing),
      'write all rates of a list in one transaction, as set_rates does');
  end if;
  return null;
end
$$;
do $$ begin
  if not exists (
    select from pg_trigger t where t.tgname = 'list_is_whole' and t.tgrelid = 'data.price'::regclass
  ) then
    create constraint trigger list_is_whole after insert on data.price
      deferrable initially deferred for each row execute function data.check_list();
  end if;
end $$;

-- the rates that a caller sends, as rows; a rate that can't be read is refused
create or replace function data.read_rates(rates jsonb)
returns setof data.price
language plpgsql
stable
as $$
declare
  v_rate jsonb;
  v_row data.price;
begin
  perform data.require_array('rates', rates);
  for v_rate in select r from jsonb_array_elements(rates) r loop
    begin
      v_row := jsonb_populate_record(null::data.price, '{"variant": "", "context_over": 0, "unit_size": 1}'
        || jsonb_strip_nulls(jsonb_build_object('meter', data.text_of(v_rate, 'meter'), 'variant', v_rate -> 'variant',
          'context_over', v_rate -> 'context_over', 'hours', v_rate -> 'hours',
          'unit_price', v_rate -> 'unit_price', 'unit_size', v_rate -> 'unit_size')));
    exception when data_exception then
      v_row.unit_price := null;
    end;
    -- a misspelt field would make another rate than was meant
    if v_row.unit_price is null or v_row.meter is null
      or v_rate - array['meter', 'variant', 'context_over', 'hours', 'unit_price', 'unit_size'] <> '{}'
    then
      perform data.refuse(422, 'invalid_rates', 'a rate can''t be read: ' || left(v_rate::text, 200),
        'send {meter, variant?, context_over?, hours?, unit_price, unit_size?}, unit_price as a decimal string');
    end if;
    return next v_row;
  end loop;
end
$$;

create or replace function api.set_rates(
  config_node_id uuid,
  rates jsonb,
  price_book_id uuid default null,
  currency text default 'USD',
  effective_from timestamptz default now()
)
returns setof api.prices
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
as $$
#variable_conflict use_column
declare
  v_rates data.price[];
  v_new data.price[];
  v_list record;
  v_terms text[];
begin
  v_rates := array(select r from data.read_rates(rates) r);
  -- one writer of a node's rates at a time
  perform from data.config_node n where n.id = set_rates.config_node_id for no key update;
  if not found then
    perform data.refuse(404, 'config_node_not_found',
      'config node ' || coalesce(set_rates.config_node_id::text, 'null'), 'send the id of a row of config_nodes');
  end if;
  if (select count(*) <> count(distinct (r.meter, r.variant, r.context_over, coalesce(r.hours::text, '')))
    from unnest(v_rates) r)
  then
    perform data.refuse(422, 'invalid_rates', 'a rate is named twice', 'send each rate of a list once');
  end if;
  for v_list in
    select r.meter, r.variant, array_agg(r::data.price) as rates,
      array_agg(row(r.context_over, r.hours, trim_scale(r.unit_price), r.unit_size)::text
        order by r.context_over, r.hours) as terms
    from unnest(v_rates) r
    group by r.meter, r.variant
  loop
    -- the same call again changes nothing
    select array_agg(row(p.context_over, p.hours, trim_scale(p.unit_price), p.unit_size)::text
      order by p.context_over, p.hours)
    into v_terms
    from data.price p
    where p.config_node_id = set_rates.config_node_id and p.price_book_id is not distinct from set_rates.price_book_id
      and p.meter = v_list.meter and p.variant = v_list.variant and p.currency = set_rates.currency
      and p.effective_from = set_rates.effective_from;
    if v_terms is null then
      v_new := v_new || v_list.rates;
    elsif v_terms <> v_list.terms then
      perform data.refuse(409, 'rates_exist', 'other rates are in force from ' || set_rates.effective_from,
        'rates are never changed: send a later effective_from');
    end if;
  end loop;
  insert into data.price (
    config_node_id, price_book_id, meter, variant, context_over, hours, unit_price, unit_size, currency, effective_from)
  select set_rates.config_node_id, set_rates.price_book_id, r.meter, r.variant, r.context_over, r.hours,
    r.unit_price, r.unit_size, set_rates.currency, set_rates.effective_from
  from unnest(v_new) r;
  -- a list that is not whole is refused here, not at the end of the transaction
  set constraints data.list_is_whole immediate;
  set constraints data.list_is_whole deferred;
  return query
  select p.*
  from api.prices p
  where p.config_node_id = set_rates.config_node_id and p.price_book_id is not distinct from set_rates.price_book_id
    and p.currency = set_rates.currency and p.effective_from = set_rates.effective_from
    and (p.meter, p.variant) in (select r.meter, r.variant from unnest(v_rates) r)
  order by p.meter, p.variant, p.hours nulls first, p.context_over;
end
$$;
comment on function api.set_rates(uuid, jsonb, uuid, text, timestamptz) is
'Replaces the rates of a node: of each meter and variant that `rates` name, from effective_from on.
`config_node_id` is the node, `currency` that of all the rates (USD).
`rates` are [{meter, variant? (''''), context_over? (0), hours? (always), unit_price, unit_size?
(1)}], all of a list or none; other meters keep theirs. `price_book_id`: the own rates of a book.
Answers the lists as rows of prices. The same call again changes nothing. 409 rates_exist where
other rates are in force from that very moment; 404 config_node_not_found, price_book_not_found; 422
invalid_rates, invalid_meter, invalid_unit_price, invalid_unit_size, invalid_variant,
invalid_context_over, invalid_hours, hours_overlap, incomplete_rates, invalid_effective_from,
currency_mismatch.';
grant execute on function api.set_rates(uuid, jsonb, uuid, text, timestamptz) to keyledger_operator;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
