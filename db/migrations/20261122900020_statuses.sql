-- migrate:up
-- Switching tenants, users, keys and nodes off and on.

set local role keyledger_owner;

create or replace view api.status_changes with (security_barrier) as
select c.id, c.entity, c.entity_id, c.old_status, c.new_status, c.actor, c.reason, c.created_at
from (
  select c.* from data.status_change c where (select v.sees_all from data.viewer v)
  union all
  select c.* from data.status_change c
  where c.entity_id = any (array(
    select u.id from data.visible_user u
    union all
    select k.id from data.visible_user u join data.virtual_key k on k.user_id = u.id
    union all
    select v.managed_tenant_id from data.viewer v))
) c;
comment on view api.status_changes is
'Who changed the status of a tenant, user_profile, virtual_key or config_node, when and why; old_status is null for one that began so.
What has no row here has been active from its beginning. `actor` is the claim `user_id`, else `sub`, of the token that PostgREST checked, else
the role: a login that may run SQL as the operator can set the claims.';
grant select on api.status_changes to keyledger_operator, keyledger_member;

create or replace function api.set_status(
  entity text,
  id uuid,
  status text,
  reason text default null
)
returns api.status_changes
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
set plan_cache_mode = force_custom_plan
as $$
declare
  v_shown api.status_changes;
begin
  perform set_config('keyledger.reason', coalesce(reason, ''), true);
  status := coalesce(status, 'none');
  case entity
    when 'tenant' then
      update data.tenant t set status = set_status.status where t.id = set_status.id;
    when 'user_profile' then
      update data.user_profile u set status = set_status.status where u.id = set_status.id;
    when 'config_node' then
      update data.config_node n set status = set_status.status where n.id = set_status.id;
    when 'virtual_key' then
      if status is distinct from 'revoked' then
        perform data.refuse(422, 'invalid_status', 'the status of a virtual_key', 'send revoked: a key can only be revoked');
      end if;
      perform api.revoke_virtual_key(id);
    else
      perform data.refuse(422, 'invalid_entity', 'entity names no kind of row that has a status',
        'send tenant, user_profile, virtual_key or config_node');
  end case;
  if not found then
    perform data.refuse(404, case entity when 'user_profile' then 'user' else entity end || '_not_found',
      entity || ' ' || coalesce(id::text, 'null'), 'send the id of a row that is there');
  end if;
  perform set_config('keyledger.reason', '', true);
  select * into v_shown from data.status_change c
  where c.entity_id = set_status.id
  order by c.id desc
  limit 1;
  return v_shown;
exception when check_violation or not_null_violation then
  perform data.refuse(422, 'invalid_status', 'no status of a ' || entity,
    'send active, suspended or closed; active or disabled for a config_node');
end
$$;
comment on function api.set_status(text, uuid, text, text) is
'Suspends, disables, closes, revokes or reactivates a tenant, user_profile, config_node or virtual_key, and keeps the reason.
`entity` is one of these names, `id` its row''s, `status` the new one, `reason` why. A change through the views is kept as well, without
one. Answers the last of its status_changes; setting what is set changes nothing. 404 tenant_not_found, user_not_found,
config_node_not_found, virtual_key_unknown; 409 closed_is_final; 422 invalid_entity, invalid_status.';
grant execute on function api.set_status(text, uuid, text, text) to keyledger_operator;

reset role;

-- migrate:down
do $$
begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. Nothing was changed; restore a backup to go back';
end
$$;
