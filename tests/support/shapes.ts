// Functions of every shape, beside the real ones in schema `api` of a test's database, for the transports to call.
export const shapes = `
  create table api.thing (id uuid, name text, amount numeric(28, 10), big bigint, at timestamptz, tags text[], about jsonb);
  insert into api.thing values
    ('00000000-0000-7000-8000-000000000001', 'first', 1.5, 9007199254740993, '2026-01-02 03:04:05.678+00',
      '{a,"b c",null}', '{"rate": 1.50, "on": true}'),
    ('00000000-0000-7000-8000-000000000002', 'second', 0.0000000001, -1, null, '{}', 'null');
  grant select on api.thing to keyledger_gateway;

  create function api.add(a integer, b integer default 2) returns integer language sql as 'select a + b';
  create function api.same_text(value text) returns text language sql as 'select value';
  create function api.same_json(value jsonb) returns jsonb language sql as 'select value';
  create function api.same_numeric(value numeric) returns numeric language sql as 'select value';
  create function api.same_moment(value timestamptz) returns timestamptz language sql as 'select value';
  create function api.same_ids(value uuid[]) returns uuid[] language sql as 'select value';
  create function api.same_id(id uuid, out id_again uuid, out length integer) language sql as 'select id, length(id::text)';
  create function api.to_json(value text) returns jsonb language sql as 'select value::jsonb';
  create function api.nothing() returns void language sql as 'select';
  create function api.numbers(up_to integer) returns setof integer language sql as 'select generate_series(1, up_to)';
  create function api.things() returns setof api.thing language sql as 'select * from api.thing order by id';
  create function api.one_thing() returns api.thing language sql as 'select * from api.thing order by id limit 1';
  create function api.no_thing() returns api.thing language sql as 'select null::api.thing';
  create function api.rows_of(id uuid) returns table (id uuid, amount numeric) language sql as 'select rows_of.id, 2.50';
  create function api.caller() returns jsonb language sql as
    $$ select jsonb_build_object('role', current_user, 'claims', current_setting('request.jwt.claims')::jsonb) $$;
  create function api.fail(state text, said text default 'said') returns integer language plpgsql as
    $$ begin raise exception using errcode = state, message = said, detail = 'a detail', hint = 'a hint'; end $$;
  create function api.write_and_fail(id uuid) returns void language plpgsql security definer as
    $$ begin insert into api.thing (id) values (id); raise sqlstate 'PT409' using message = 'too_late'; end $$;
  create function api.forbidden() returns integer language sql as 'select 1';
  -- waits for who holds advisory lock 1
  create function api.wait() returns boolean language sql as 'select pg_advisory_xact_lock(1) is not null';

  revoke execute on all functions in schema api from public;
  grant execute on function api.add, api.same_text, api.same_json, api.same_numeric, api.same_moment, api.same_ids,
    api.same_id, api.to_json, api.nothing, api.numbers, api.things, api.one_thing, api.no_thing, api.rows_of, api.caller, api.fail,
    api.write_and_fail, api.wait to keyledger_gateway, keyledger_member`
