-- migrate:up
-- Upkeep: months made ahead, purges, and warnings about an installation.

set local role keyledger_owner;

-- Purges ended request holds and resolved parked events whose id is below the floor: they can't
-- come back.
-- Freezes stay: they are history. A call purges at most a portion of each, from a page of accounts.
-- The next call goes on where it ended.
create or replace function data.purge_ended(
  portion bigint default 100000,
  accounts bigint default 1000000,
  out holds bigint,
  out events bigint
)
returns record
language plpgsql
set enable_seqscan = off
as $$
declare
  v_window data.accepted_ids;
  v_first_kept uuid;
  v_last uuid;
  v_page uuid;
begin
  select * into v_window from data.accepted_ids for update;
  v_first_kept := data.uuid_floor(v_window.floor);
  holds := 0;
  events := 0;
  if v_window.purged_before >= v_window.floor then
    return;
  end if;
  -- where the page of accounts ends, null if it is the last one
  select a.account_id into v_page
  from data.account_balance a
  where a.account_id >= coalesce(v_window.purging_from, '00000000-0000-0000-0000-000000000000')
  order by a.account_id
  offset purge_ended.accounts
  limit 1;
  with ended as (
    select e.account_id, e.id
    from data.account_balance a
    cross join lateral (
      select h.account_id, h.id
      from data.hold h
      where h.account_id = a.account_id and h.id < v_first_kept and h.ended_at is not null and h.expires_at is not null
      order by h.id
      limit portion
      offset 0
    ) e
    where a.account_id >= coalesce(v_window.purging_from, '00000000-0000-0000-0000-000000000000')
      and (a.account_id < v_page or v_page is null)
    order by a.account_id
    limit portion
  ), gone as (
    delete from data.hold h using ended e where h.account_id = e.account_id and h.id = e.id returning h.account_id
  )
  select count(*), (array_agg(g.account_id order by g.account_id desc))[1] into holds, v_last from gone g;
  with gone as (
    delete from data.parked_usage r
    where r.id = any (array(
      select u.id from data.parked_usage u where u.resolved_at is not null and coalesce(
        -- an id that is none has no time of its own
        case when u.code not in ('invalid_id', 'invalid_event')
          then u.usage_id end, data.uuid_floor(u.created_at)) < v_first_kept
      limit portion))
    returning r.id
  )
  select count(*) into events from gone g;
  update data.accepted_ids w
  set purged_before = case when greatest(holds, events) < portion and v_page is null
    then v_window.floor else w.purged_before end,
    purging_from = case
      when holds = portion then v_last
      when events = portion then coalesce(v_page, w.purging_from)
      else v_page
    end;
end
$$;

-- Purges rows of the outboxes after two days: a portion of each, oldest first. A reader that may
-- have missed rows starts anew.
create or replace function data.purge_outboxes(
  portion bigint default 100000,
  out invalidations bigint,
  out events bigint
)
returns record
language plpgsql
as $$
begin
  with invalidation as (
    delete from data.cache_invalidation c
    where c.id = any (array(
      select i.id from data.cache_invalidation i
      where i.created_at < now() - interval '48 hours' or data.is_foreign(i.xid)
      order by i.created_at
      limit portion))
    returning c.xid
  ), event as (
    delete from data.account_news e
    where e.id = any (array(
      select n.id from data.account_news n
      where n.created_at < now() - interval '48 hours' or data.is_foreign(n.xid)
      order by n.created_at
      limit portion))
    returning e.xid
  ), gone as (
    select 'cache' as outbox, i.xid from invalidation i
    union all
    select 'account', e.xid from event e
  ), horizon as (
    update data.outbox_horizon h
    set purged_xid = greatest(case when not data.is_foreign(h.purged_xid) then h.purged_xid end, m.xid, '0')
    from (
      select o.outbox, (select max(g.xid) from gone g where g.outbox = o.outbox and not data.is_foreign(g.xid)) as xid
      from data.outbox_horizon o
    ) m
    where h.outbox = m.outbox and (m.xid is not null or data.is_foreign(h.purged_xid))
  )
  select count(*) filter (where g.outbox = 'cache'), count(*) filter (where g.outbox = 'account')
  into invalidations, events
  from gone g;
end
$$;

create or replace function api.maintain()
returns jsonb
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '4s'
as $$
declare
  v_made text[] := '{}';
  v_holds bigint := 0;
  v_parked bigint := 0;
  v_invalidations bigint := 0;
  v_events bigint := 0;
  v_failed text;
begin
  -- One at a time, and nobody waits: by a row that only these functions can lock.
  perform from data.accepted_ids w for update skip locked;
  if not found then
    return jsonb_build_object('status', 'busy');
  end if;
  v_made := data.make_usage_partitions();
  -- a purge that fails stops neither the making of months nor the other purge
  begin
    select p.holds, p.events into v_holds, v_parked from data.purge_ended() p;
  exception when query_canceled or others then
    v_failed := sqlstate;
  end;
  begin
    select p.invalidations, p.events into v_invalidations, v_events from data.purge_outboxes() p;
  exception when query_canceled or others then
    v_failed := coalesce(v_failed, sqlstate);
  end;
  begin
    perform data.replay_ahead();
  exception when query_canceled or others then
    v_failed := coalesce(v_failed, sqlstate);
  end;
  return jsonb_strip_nulls(jsonb_build_object(
    'status', case when v_failed is null then 'done' else 'incomplete' end, 'code', v_failed,
    'usage_partitions_made', v_made, 'cache_invalidations_purged', v_invalidations, 'account_news_purged', v_events,
    'holds_purged', v_holds, 'parked_usage_purged', v_parked));
end
$$;
comment on function api.maintain() is
'Makes the coming months of usage_log, and purges rows that are no longer needed.
It purges the outboxes of cache_changes and account_news after 48 hours. It purges ended holds and
resolved parked_usage from before the floor that drop_usage_partitions raised. A call purges at most
100000 of each. Answers {status, …} with the months made and the rows purged: `done`; `busy`, when
another call is at it; `incomplete`, with the SQLSTATE as `code`: the months are made, and a purge
or a replay failed. 503 lock_timeout when a month can''t be made for 4 s. It charges parked events
whose ids were ahead of the clock (id_not_of_now) and are no longer. Call it daily at least, by a
scheduler; the client does so hourly. Without it, after two months events are parked as
id_outside_window.';
grant execute on function api.maintain() to keyledger_gateway, keyledger_operator;

create or replace function api.installation_warnings()
returns table (
  code text,
  detail text,
  hint text
)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
  select 'every_login_may_connect',
    'logins of other databases of this cluster may hold keyledger''s roles, and connect to this one',
    format(
      'revoke connect on database %1$I from public; grant connect on database %1$I to <each login that needs it>',
      d.datname)
  from pg_database d
  cross join lateral aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) g
  where d.datname = current_database() and g.grantee = 0 and g.privilege_type = 'CONNECT'
  union all
  select 'no_statement_timeout', format('a request of %s through PostgREST may take any time', r.name),
    format('alter role %s set statement_timeout = %L', r.name, r.timeout)
  from (values ('keyledger_gateway', '10s'), ('keyledger_member', '5s')) as r (name, timeout)
  where not exists (
    select from pg_db_role_setting s cross join unnest(s.setconfig) as c (setting)
    where s.setrole = r.name::regrole and s.setdatabase = 0
      and c.setting ~ '^statement_timeout=' and c.setting !~ '=0$');
end
$$;
comment on function api.installation_warnings() is
'Warns of settings that the migrations may not choose for a cluster: no row when all are chosen.
Answers [{code, detail, hint}]. `every_login_may_connect`: roles are the cluster''s, so a login that
another database gave a keyledger role to has it here too. `no_statement_timeout`: a role''s
requests may keep PostgREST''s connections for any time.';
grant execute on function api.installation_warnings() to keyledger_operator;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
