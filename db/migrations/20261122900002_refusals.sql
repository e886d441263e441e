-- migrate:up
-- How the database refuses: a code, a status for HTTP and a hint; and triggers that forbid changes.

set local role keyledger_owner;

-- raise a coded refusal: PostgREST answers with the status, pg shows the same fields
create or replace function data.refuse(
  status integer,
  code text,
  detail text default '',
  hint text default ''
)
returns void
language plpgsql
as $$
begin
  raise exception using errcode = 'PT' || status, message = code, detail = detail, hint = hint;
end
$$;

-- history is append-only: this trigger refuses every other change
create or replace function data.forbid_change()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform data.refuse(409, 'append_only', lower(tg_op) || ' on ' || tg_table_name,
    'add a new row that corrects the old one');
  return null;
end
$$;

-- truncate fires no row triggers, so it would pass the outbox by
create or replace function data.forbid_truncate()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform data.refuse(409, 'truncate_forbidden', 'table ' || tg_table_name,
    'set a status to close rows; keyledger never removes them');
  return null;
end
$$;

-- refuse a value that is no array, or has more than 10000 elements
create or replace function data.require_array(
  name text,
  elements jsonb
)
returns void
language plpgsql
stable
as $$
begin
  if jsonb_typeof(elements) is distinct from 'array' then
    perform data.refuse(422, 'invalid_' || name, name || ' must be a JSON array',
      'send an array, of one element for a single request');
  elsif jsonb_array_length(elements) > 10000 then
    perform data.refuse(422, 'too_many_elements',
      name || ' has ' || jsonb_array_length(elements) || ' elements, of 10000 allowed', 'send them in several calls');
  end if;
end
$$;

-- refuse an amount that is not positive money
create or replace function data.require_positive_amount(amount numeric)
returns void
language plpgsql
as $$
begin
  if amount is null or not data.is_amount(amount) or amount <= 0 then
    perform data.refuse(422, 'invalid_amount', 'amount must be above 0, below 1e12, with at most 10 decimals',
      'send a plain decimal as a string, for example "12.50"');
  end if;
end
$$;

-- refuse an act without a reason; `deed` names the act: "a freeze"
create or replace function data.require_reason(
  deed text,
  reason text
)
returns void
language plpgsql
as $$
begin
  if reason is null or reason !~ '\S' then
    perform data.refuse(422, 'invalid_reason', deed || ' needs a reason', 'say why in reason');
  end if;
end
$$;

-- refuse a reference that is empty or too long
create or replace function data.require_reference(reference text)
returns void
language plpgsql
immutable
as $$
begin
  if length(reference) not between 1 and 512 then
    perform data.refuse(422, 'invalid_reference', 'reference must have 1 to 512 characters',
      'leave it out for no idempotency');
  end if;
end
$$;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
