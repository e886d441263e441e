-- migrate:up
-- The prices of nodes.

set local role keyledger_owner;

-- prices are history: a new price is a new row
create or replace trigger append_only before update or delete on data.price
  for each row execute function data.forbid_change();
create or replace trigger append_only_truncate before truncate on data.price
  for each statement execute function data.forbid_change();

create or replace view api.prices as
select p.id, p.config_node_id, p.meter, p.unit_price, p.unit_size, p.currency, p.effective_from, p.created_at
from data.price p;
comment on view api.prices is
'Dated prices: unit_price per unit_size of a meter, in force from effective_from until the next price.
Append-only: a new price is a new row. Usual meters: input_tokens, cached_input_tokens,
output_tokens, requests.';
grant select on api.prices to keyledger_gateway, keyledger_operator, keyledger_member;
grant insert (config_node_id, meter, unit_price, unit_size, currency, effective_from)
  on api.prices to keyledger_operator;
alter view api.prices alter column unit_size set default 1;
alter view api.prices alter column currency set default 'USD';
alter view api.prices alter column effective_from set default now();

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
