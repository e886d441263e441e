-- migrate:up
-- Statuses of tenants, users, keys and nodes: their history, and the switch.

set local role keyledger_owner;

-- keep each change of a status, with the reason that set_status was given
create or replace function data.note_status()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into data.status_change (entity, entity_id, old_status, new_status, actor, reason)
  values (tg_table_name, new.id, case when tg_op = 'UPDATE' then old.status end, new.status, data.actor(),
    nullif(current_setting('keyledger.reason', true), ''));
  return null;
end
$$;
create or replace trigger note_status after update on data.tenant
  for each row when (new.status <> old.status) execute function data.note_status();
create or replace trigger note_status_inserted after insert on data.tenant
  for each row when (new.status <> 'active') execute function data.note_status();
create or replace trigger note_status after update on data.user_profile
  for each row when (new.status <> old.status) execute function data.note_status();
create or replace trigger note_status_inserted after insert on data.user_profile
  for each row when (new.status <> 'active') execute function data.note_status();
create or replace trigger note_status after update on data.virtual_key
  for each row when (new.status <> old.status) execute function data.note_status();
create or replace trigger note_status_inserted after insert on data.virtual_key
  for each row when (new.status <> 'active') execute function data.note_status();
create or replace trigger note_status after update on data.config_node
  for each row when (new.status <> old.status) execute function data.note_status();
create or replace trigger note_status_inserted after insert on data.config_node
  for each row when (new.status <> 'active') execute function data.note_status();

-- the history of statuses is append-only
create or replace trigger append_only before update or delete on data.status_change
  for each row execute function data.forbid_change();
create or replace trigger append_only_truncate before truncate on data.status_change
  for each statement execute function data.forbid_change();

create or replace view api.status_changes with (security_barrier) as
select c.id, c.entity, c.entity_id, c.old_status, c.new_status, c.actor, c.reason, c.created_at
from data.status_change c
where (select v.sees_all from data.viewer v)
union all
select c.id, c.entity, c.entity_id, c.old_status, c.new_status, c.actor, c.reason, c.created_at
from data.status_change c
where c.entity_id = any (array(
  select u.id from data.visible_user u
  union all
  select k.id from data.visible_user u join data.virtual_key k on k.user_id = u.id
  union all
  select v.managed_tenant_id from data.viewer v));
comment on view api.status_changes is
'Changes of the status of tenants, users, virtual keys and config nodes: actor, time and reason.
`entity` is tenant, user_profile, virtual_key or config_node. `old_status` is null for a row that
was inserted with this status. An entity without a row here has been active from its beginning.
`actor` is the claim `user_id`, else `sub`, of the token that PostgREST checked, else the role: a
login that may run SQL as the operator can set the claims.';
grant select on api.status_changes to keyledger_operator, keyledger_member;

-- set a status, and keep the reason for the trigger that notes the change
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
        perform data.refuse(422, 'invalid_status', 'the status of a virtual_key',
          'send revoked: a key can only be revoked');
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
'Sets the status of a tenant, user, config node or virtual key, and keeps the reason.
`entity` is tenant, user_profile, config_node or virtual_key; `id` is its row''s; `status` is the
new status: active, suspended or closed; active or disabled for a config_node; revoked for a
virtual_key. `reason` says why. A change through the views is kept too, without a reason. Answers
the last of the entity''s status_changes; setting the status that is already set changes nothing.
404 tenant_not_found, user_not_found, config_node_not_found, virtual_key_unknown; 409
closed_is_final; 422 invalid_entity, invalid_status.';
grant execute on function api.set_status(text, uuid, text, text) to keyledger_operator;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
