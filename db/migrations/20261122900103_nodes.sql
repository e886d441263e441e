-- migrate:up
-- Config nodes, and the keys on which they are mounted.

set local role keyledger_owner;

-- an operator writes these views
create or replace view api.config_nodes as
select n.id, n.name, n.provider, n.model, n.endpoint, n.status, n.created_at, n.context_meters
from data.config_node n;
comment on view api.config_nodes is 'Upstream instances (deployments, channels); each has prices.
`context_meters` are the meters whose sum is an event''s context, which chooses rates by context_over
(null: all input meters: input_…_tokens, cached_input_…_tokens, cache_write_…_tokens). They are fixed
once the node has prices.';
grant select on api.config_nodes to keyledger_gateway, keyledger_operator;
grant insert (id, name, provider, model, endpoint, status, context_meters),
  update (id, name, provider, model, endpoint, status, context_meters)
  on api.config_nodes to keyledger_operator;
alter view api.config_nodes alter column id set default gen_random_uuid();
alter view api.config_nodes alter column status set default 'active';

create or replace view api.virtual_key_config_nodes as
select m.virtual_key_id, m.config_node_id, m.created_at
from data.virtual_key_config_node m;
comment on view api.virtual_key_config_nodes is 'Mounts: the nodes a key may hold funds for.';
grant select on api.virtual_key_config_nodes to keyledger_gateway, keyledger_operator;
grant insert (virtual_key_id, config_node_id), update (virtual_key_id, config_node_id), delete
  on api.virtual_key_config_nodes to keyledger_operator;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
