-- migrate:up
-- Usage is charged, exactly once per id.

set local role keyledger_owner;

-- the usage that the reader may see; `with_rates`: with the rates, the book and the factor of each
create or replace view data.visible_usage as
select l.*, true as with_rates from data.usage_log l where (select v.sees_all from data.viewer v)
union all
select l.*, false from data.usage_log l
where l.account_id = any (array(select v.account_id from data.visible_account v))
  and (l.account_id = any (array(select v.account_id from data.visible_account v where v.whole))
    or l.user_id = (select v.user_id from data.viewer v));
comment on view data.visible_usage is 'Usage the reader may see.';

create or replace view api.usage_logs with (security_barrier) as
select
  to_timestamp(
    ('x' || substr(l.id::text, 1, 8) || substr(l.id::text, 10, 4))::bit(48)::bigint / 1000.0::double precision
  ) as used_at,
  l.account_id, l.id, l.transaction_seq, l.virtual_key_id, l.user_id, l.config_node_id, l.hold_id, l.final, l.meters,
  case when l.with_rates then l.price_ids end as price_ids,
  l.cost, l.request_id, l.metadata, l.recorded_at, (l.terms).variant,
  (l.terms).minimum, (l.terms).estimated,
  case when l.with_rates then (l.terms).price_book_id end as price_book_id,
  case when l.with_rates then (l.terms).factor end as factor
from data.visible_usage l;
comment on view api.usage_logs is
'Each charged event: its user, its meters, its cost, and the ledger entry (transaction_seq) that charged it.
`variant` is the service tier (null: standard), `estimated` says that its quantities were, `minimum`
is the minimum charge where that was the cost. `price_ids`, `price_book_id` and `factor`, the rates
that priced it, are null for a member.';
grant select on api.usage_logs to keyledger_operator, keyledger_member;

-- The answer to an event that can't be charged, if its id has been: by a first try with other
-- content. Null if not.
create or replace function data.charged_before(usage data.usage_log)
returns jsonb
language plpgsql
stable
as $$
declare
  v_first data.usage_log;
begin
  select l.* into v_first from data.usage_log l where l.account_id = usage.account_id and l.id = usage.id;
  if not found then
    return null;
  end if;
  return jsonb_build_object('id', v_first.id, 'status', 'duplicate', 'cost', v_first.cost::text,
    'available', (select n.available::text from data.account_now n where n.account_id = v_first.account_id),
    'seq', v_first.transaction_seq, 'mismatch', true);
end
$$;

-- Parks events of one account that can't be charged, and answers each, in order; one charged before
-- is a duplicate.
create or replace function data.answer_unfit(
  events data.usage_event[],
  sent jsonb
)
returns jsonb[]
language plpgsql
as $$
declare
  v_event data.usage_event;
  v_answer jsonb;
  v_answers jsonb[];
  v_parked jsonb[] := '{}';
  v_codes text[];
  v_hold_ids uuid[];
begin
  foreach v_event in array answer_unfit.events loop
    v_answer := data.charged_before(v_event.usage);
    if v_answer is null then
      v_parked := v_parked || (sent -> (v_event.ord - 1)::integer);
      v_codes := v_codes || v_event.code;
      v_hold_ids := v_hold_ids || (v_event.usage).hold_id;
      v_answer := jsonb_build_object(
        'id', data.text_of(sent -> (v_event.ord - 1)::integer, 'id'), 'status', 'parked', 'code', v_event.code);
    end if;
    v_answers := v_answers || v_answer;
  end loop;
  if v_parked <> '{}' then
    perform data.park(v_parked, v_codes, ((answer_unfit.events[1]).usage).account_id, v_hold_ids);
  end if;
  return v_answers;
end
$$;

-- Records events of one account: charges those it can, parks the others, and answers each, in
-- order. `wait`: as data.settle. An event that can't be charged needs the account's lock only for
-- its hold.
create or replace function data.record_for_account(
  events data.usage_event[],
  sent jsonb,
  wait boolean,
  actor text
)
returns jsonb[]
language plpgsql
as $$
declare
  v_account_id uuid := ((events[1]).usage).account_id;
  v_account data.account_balance;
  v_is_busy boolean := false;
  v_needs_lock boolean := false;
  v_usage data.usage_log[] := '{}';
  v_idle_keys uuid[] := '{}';
  v_unfit data.usage_event[] := '{}';
  v_charged jsonb[];
  v_answered jsonb[];
  v_event data.usage_event;
  v_answer jsonb;
  v_answers jsonb[];
  v_next_charged integer := 0;
  v_next_unfit integer := 0;
begin
  foreach v_event in array record_for_account.events loop
    v_needs_lock := v_needs_lock or v_event.code is null or (v_event.usage).hold_id is not null;
    if v_event.code is not null then
      v_unfit := v_unfit || v_event;
    else
      v_usage := v_usage || v_event.usage;
      if v_event.key_is_idle then
        v_idle_keys := v_idle_keys || (v_event.usage).virtual_key_id;
      end if;
    end if;
  end loop;
  if v_needs_lock then
    v_account := data.settle(v_account_id, wait, actor);
    v_is_busy := v_account.account_id is null and data.is_account(v_account_id);
  end if;
  if v_is_busy then
    v_unfit := array(select u from unnest(v_unfit) u where (u.usage).hold_id is null);
  elsif v_usage <> '{}' then
    v_charged := data.charge(v_account, v_usage, actor);
    if v_idle_keys <> '{}' then
      perform data.mark_used(v_idle_keys, v_usage);
    end if;
  end if;
  if v_unfit <> '{}' then
    v_answered := data.answer_unfit(v_unfit, sent);
  end if;

  foreach v_event in array record_for_account.events loop
    if v_is_busy and (v_event.code is null or (v_event.usage).hold_id is not null) then
      v_answer := jsonb_build_object('id', (v_event.usage).id, 'status', 'busy', 'code', 'account_busy');
    elsif v_event.code is null then
      v_next_charged := v_next_charged + 1;
      v_answer := v_charged[v_next_charged] || coalesce(v_event.note, '{}');
    else
      v_next_unfit := v_next_unfit + 1;
      v_answer := v_answered[v_next_unfit] || coalesce(v_event.note, '{}');
    end if;
    v_answers := v_answers || v_answer;
  end loop;
  return v_answers;
end
$$;

create or replace function api.record_usage(events jsonb)
returns jsonb
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '500ms'
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
declare
  v_actor text := data.actor();
  v_events data.usage_event[];
  v_account_ids uuid[];
  v_wait boolean;
  v_first integer := 1;
  v_last integer;
  v_of_account jsonb[];
  v_answers jsonb[];
begin
  perform data.require_array('events', events);
  v_answers := array_fill(null::jsonb, array[jsonb_array_length(events)]);
  select data.read_usage_events(events, w) into v_events from data.accepted_ids w;
  v_account_ids := array(select (e.usage).account_id from unnest(v_events) e);
  v_wait := data.is_one(v_account_ids);
  while v_first <= cardinality(v_events) loop
    v_last := data.run_end(v_account_ids, v_first);
    v_of_account := data.record_for_account(v_events[v_first:v_last], events, v_wait, v_actor);
    for i in v_first .. v_last loop
      v_answers[(v_events[i]).ord] := v_of_account[i - v_first + 1];
    end loop;
    v_first := v_last + 1;
  end loop;
  return to_jsonb(v_answers);
end
$$;
comment on function api.record_usage(jsonb) is
'Charges usage, exactly once per id.
Takes `events`, [{id, account_id, virtual_key_id, config_node_id, meters, hold_id?, final? (true),
request_id?, metadata?, variant?, estimated?, upstream_cost?}] and answers in the same order [{id,
status: charged | duplicate | parked | busy, code?, cost, available, seq, left_out?, hold?}], at most
10,000. `variant` is the service tier that was served (standard without one), `upstream_cost` the
provider''s own cost ({amount, currency}), `estimated` true where quantities were. ids are UUIDv7 made by the
caller: a repeated id charges nothing (`mismatch` says its content differs). An event that can''t be
charged is parked and kept with its code, and the money of its hold stays set aside; its neighbours
are charged. `left_out` names labels that were unfit (request_id: 1 to 512 characters; metadata: an
object of up to 16384 bytes; estimated; upstream_cost); `hold` is unknown where the account has no
such hold: the event is charged without it. An id more than 2 minutes ahead of the server''s clock is
parked as id_not_of_now. `busy`: as place_holds answers it.';
grant execute on function api.record_usage(jsonb) to keyledger_gateway;

reset role;

-- migrate:down
do $$ begin
  raise exception 'keyledger can''t be rolled back: a ledger keeps its history. %',
    'Nothing was changed; restore a backup to go back';
end $$;
