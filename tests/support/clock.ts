// A clock that a test moves forward: a month passes at once, and no row is back-dated.
import type { Sql } from './database.ts'

// how far the test has moved its clock
let aheadMs = 0

/** Ms since 1970 by the test's clock. */
export const now = (): number => Date.now() + aheadMs

/**
 * From now on all functions and views of this database read the test's clock. The function it gives moves that clock
 * forward, and so the ids of `newId`. `sql` is the owner of the database.
 */
export async function movableClock(sql: Sql): Promise<(seconds: number) => Promise<void>> {
  await sql(`
    create schema clock;
    create table clock.ahead (seconds float8);
    insert into clock.ahead values (0);
    create function clock.ahead() returns interval language plpgsql stable security definer
      as 'begin return (select make_interval(secs => a.seconds) from clock.ahead a); end';
    create function clock.clock_timestamp() returns timestamptz language plpgsql volatile
      as 'begin return pg_catalog.clock_timestamp() + clock.ahead(); end';
    create function clock.statement_timestamp() returns timestamptz language plpgsql stable
      as 'begin return pg_catalog.statement_timestamp() + clock.ahead(); end';
    create function clock.now() returns timestamptz language plpgsql stable
      as 'begin return pg_catalog.now() + clock.ahead(); end';
    grant usage on schema clock to public;

    do $$
    declare
      v_clock text := '\\m(clock_timestamp|statement_timestamp|now)\\(\\)';
      v_object record;
    begin
      for v_object in
        select pg_get_functiondef(p.oid) as made from pg_proc p
        where p.pronamespace in ('data'::regnamespace, 'api'::regnamespace) and p.prosrc ~ v_clock
        union all
        select format('create or replace view %s %s as %s', c.oid::regclass,
          'with (' || array_to_string(c.reloptions, ', ') || ')', pg_get_viewdef(c.oid))
        from pg_class c
        where c.relnamespace in ('data'::regnamespace, 'api'::regnamespace) and c.relkind = 'v' and pg_get_viewdef(c.oid) ~ v_clock
      loop
        execute regexp_replace(v_object.made, v_clock, 'clock.\\1()', 'g');
      end loop;
    end $$`)
  return async (seconds) => {
    const [row] = await sql('update clock.ahead set seconds = seconds + $1 returning seconds', [seconds])
    aheadMs = Math.floor(row!.seconds * 1000)
  }
}
