// Metrics, as an OpenTelemetry SDK collects them; and none of their cost without one.
import { readFileSync } from 'node:fs'
import { metrics } from '@opentelemetry/api'
import {
  AggregationTemporality,
  type DataPoint,
  type Histogram,
  InMemoryMetricExporter,
  MeterProvider,
  PeriodicExportingMetricReader,
} from '@opentelemetry/sdk-metrics'
import { Redis } from 'ioredis'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { until } from '../../scripts/supervise.ts'
import { KeyledgerError } from '../../src/errors.ts'
import {
  type BillingModule,
  type BillingModuleOptions,
  createBillingModule,
  newId,
  pgRpc,
} from '../../src/index.ts'
import { createMetrics } from '../../src/metrics.ts'
import { database } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { payer } from '../support/payer.ts'

const test = suite('metrics')
const db = await database(test)

// the instruments that the tests have seen, as `name unit`
const collected = new Set<string>()

interface Metric {
  unit: string
  points: DataPoint<number | Histogram>[]
}

/**
 * What a provider registered for the run of `work` has collected by the end of `work`, and may
 * collect before.
 */
async function collecting(work: (collect: () => Promise<Record<string, Metric>>) => Promise<void>) {
  const reader = new PeriodicExportingMetricReader({
    exporter: new InMemoryMetricExporter(AggregationTemporality.CUMULATIVE),
    exportIntervalMillis: 3_600_000,
  })
  const provider = new MeterProvider({ readers: [reader] })
  metrics.setGlobalMeterProvider(provider)
  try {
    await work(async () => {
      const { resourceMetrics, errors } = await reader.collect()
      assert.equal(errors, [])
      const found = resourceMetrics.scopeMetrics.flatMap(({ scope, metrics }) => {
        assert.is(scope.name, 'keyledger')
        for (const { descriptor } of metrics) collected.add(`${descriptor.name} ${descriptor.unit}`)
        return metrics
      })
      return Object.fromEntries(
        found.map(({ descriptor, dataPoints }) => [
          descriptor.name,
          { unit: descriptor.unit, points: dataPoints as Metric['points'] },
        ]),
      )
    })
  } finally {
    metrics.disable()
    await provider.shutdown()
  }
}

async function withModule(
  options: Partial<BillingModuleOptions>,
  run: (billing: BillingModule) => Promise<void>,
) {
  const rpc = options.rpc ?? pgRpc({ connectionString: db.loginUrl })
  const billing = createBillingModule({ ...options, rpc })
  try {
    await run(billing)
  } finally {
    await billing.stop()
    await rpc.close()
  }
}

/** `a=1 b=2: value`, sorted; of a histogram the count. */
const shown = ({ points }: Metric) =>
  points
    .map(({ attributes, value }) => {
      const about = Object.entries(attributes).map(
        ([name, value]) => `${name.replace('keyledger.', '')}=${value}`,
      )
      return `${about.sort().join(' ')}: ${typeof value === 'number' ? value : value.count}`
    })
    .sort()

const histograms = ({ points }: Metric) => points.map(({ value }) => value as Histogram)

test('without an SDK, each wrapper gives its function back unchanged', () => {
  const made = createMetrics()
  const identify = async () => ({ code: null })
  const send = async () => []
  assert.is(made.lookUps(identify), identify)
  assert.is(made.batches('hold', send), send)
  assert.not.throws(made.watch(createBillingModule({ rpc: pgRpc({ connectionString: db.loginUrl }) }).health))
})

test('look-ups by tier, operations by outcome, batches by size', () =>
  collecting(async (collect) => {
    const account = await payer(db, { funds: '10' })
    const redis = new Redis((await db.redis()).url)
    const startedAt = performance.now()
    try {
      await withModule({ redis }, async (billing) => {
        await billing.start()
        await until(() => billing.health().cache.redis, 'trust')
        const context = await billing.validate(account.key)
        for (let i = 0; i < 3; i++) await billing.validate(account.key)
        await failure(billing.validate('vk_unknown'))
        await failure(billing.validate(''))
        const validated = await collect()
        const lookUps = shown(validated['keyledger.validate.duration']!)
        assert.ok(lookUps.includes('cache.tier=memory: 3'), lookUps.join())
        assert.ok(lookUps.includes('cache.tier=database: 1'), lookUps.join())
        assert.ok(lookUps.includes('cache.tier=database error.type=virtual_key_unknown: 1'), lookUps.join())
        assert.ok(lookUps.includes('error.type=virtual_key_unknown: 1'), lookUps.join())
        await db.operator(`update api.user_profiles set status = 'suspended' where id = $1`, [account.userId])
        await until(
          () =>
            billing.validate(account.key).then(
              () => false,
              () => true,
            ),
          'the suspension',
        )
        const suspended = shown((await collect())['keyledger.validate.duration']!)
        assert.ok(
          suspended.some((each) => /tier=\w+ error.type=user_suspended: 1/.test(each)),
          suspended.join(),
        )
        await db.operator(`update api.user_profiles set status = 'active' where id = $1`, [account.userId])

        const hold = await billing.hold(context, { amount: '4' })
        await failure(billing.hold(context, { amount: '40' }))
        await billing.extend(hold)
        await billing.release(hold)
        await billing.release(hold)
        const use = { ...context, config_node_id: account.nodeId, meters: { usd: '1' }, id: newId() }
        await billing.recordUsage(use)
        await billing.recordUsage(use)
        await billing.recordUsage({ ...use, id: newId(), meters: { unpriced: 1 } })
        await Promise.all(Array.from({ length: 7 }, () => billing.recordUsage({ ...use, id: newId() })))

        const found = await collect()
        assert.equal(shown(found['keyledger.operation.duration']!), [
          'error.type=hold_released operation.name=release operation.status=closed: 1',
          'error.type=insufficient_funds operation.name=hold: 1',
          'error.type=price_not_found operation.name=record operation.status=parked: 1',
          'operation.name=extend operation.status=extended: 1',
          'operation.name=hold: 1',
          'operation.name=record operation.status=charged: 8',
          'operation.name=record operation.status=duplicate: 1',
          'operation.name=release operation.status=released: 1',
        ])
        const calls = ['extend: 1', 'hold: 2', 'record: 4', 'release: 2'].map(
          (each) => `operation.name=${each}`,
        )
        assert.equal(shown(found['keyledger.batch.duration']!), calls)
        assert.equal(shown(found['keyledger.batch.size']!), calls)
        const sizes = found['keyledger.batch.size']!.points.find(
          ({ attributes }) => attributes['keyledger.operation.name'] === 'record',
        )!.value as Histogram
        assert.equal([sizes.sum, sizes.min, sizes.max], [10, 1, 7])

        const elapsed = (performance.now() - startedAt) / 1000
        for (const name of ['validate', 'operation', 'batch']) {
          const { unit, points } = found[`keyledger.${name}.duration`]!
          assert.is(unit, 's')
          for (const { min, max } of histograms({ unit, points })) assert.ok(min! > 0 && max! < elapsed, name)
        }
      })
    } finally {
      redis.disconnect()
    }
  }))

test('how the module is: queues, trust, cursors, LISTEN and upkeep', () =>
  collecting(async (collect) => {
    const account = await payer(db, { funds: '10' })
    const made = pgRpc({ connectionString: db.loginUrl })
    let open = () => {}
    let reached = () => {}
    const stalled = new Promise<void>((resolve) => {
      reached = resolve
    })
    const gate = new Promise<void>((resolve) => {
      open = resolve
    })
    const rpc = {
      ...made,
      async call<T>(fn: string, ...rest: [args?: Record<string, unknown>]) {
        if (fn === 'record_usage') {
          reached()
          await gate
        }
        return made.call<T>(fn, ...rest)
      },
    }
    await withModule({ rpc, changes: { listen: db.loginUrl } }, async (billing) => {
      assert.equal(Object.keys(await collect()), [], 'nothing is told before the start')
      billing.on('exhausted', () => {})
      await billing.start()
      await until(() => billing.health().status === 'ok' && billing.health().maintenance.at, 'health')
      const context = await billing.validate(account.key)
      const use = { ...context, config_node_id: account.nodeId, meters: { usd: '1' } }
      const first = billing.recordUsage(use)
      await stalled
      const second = billing.recordUsage(use)
      const third = billing.recordUsage(use)

      const { listener, news } = billing.health()
      const found = await collect()
      const idle = ['extend', 'hold', 'release'].flatMap((name) =>
        ['in_flight', 'queued'].map((state) => `operation.name=${name} queue.state=${state}: 0`),
      )
      assert.equal(
        shown(found['keyledger.queue.size']!),
        [
          ...idle,
          'operation.name=record queue.state=in_flight: 1',
          'operation.name=record queue.state=queued: 2',
        ].sort(),
      )
      assert.equal(shown(found['keyledger.cache.entries']!), [': 1'])
      assert.equal(shown(found['keyledger.cache.trusted']!), ['cache.tier=memory: 1'])
      assert.equal(shown(found['keyledger.listener.up']!), [': 1'])
      const ages = new Map(
        found['keyledger.cursor.age']!.points.map(({ attributes, value }) => [
          attributes['keyledger.feed'],
          value,
        ]),
      )
      assert.equal([...ages.keys()].sort(), ['cache', 'news'])
      // a read between the two may have made them younger
      assert.ok(Number(ages.get('cache')) < listener.age! / 1000 + 1 && Number(ages.get('cache')) > 0)
      assert.ok(Number(ages.get('news')) < news.age! / 1000 + 1 && Number(ages.get('news')) > 0)
      const [upkeep] = found['keyledger.maintenance.age']!.points
      assert.ok(Number(upkeep!.value) >= 0 && Number(upkeep!.value) < 60)
      assert.equal(
        ['queue.size', 'cache.entries', 'cache.trusted', 'cursor.age', 'listener.up', 'maintenance.age'].map(
          (name) => found[`keyledger.${name}`]!.unit,
        ),
        ['{element}', '{key}', '1', 's', '1', 's'],
      )

      await db.sql(`select pg_terminate_backend(pid) from pg_stat_activity
        where application_name = 'keyledger listener' and datname = current_database()`)
      await until(async () => shown((await collect())['keyledger.listener.up']!)[0] === ': 0', 'the loss')
      open()
      await Promise.all([first, second, third])
    })
  }))

test('a stopped module tells nothing more; a module that only polls tells nothing of LISTEN', () =>
  collecting(async (collect) => {
    const age = async () => shown((await collect())['keyledger.cursor.age']!)
    await withModule({}, async (billing) => {
      await billing.start()
      assert.is.not(String(await age()), String(await age()))
      assert.equal((await collect())['keyledger.listener.up']?.points ?? [], [])
    })
    // an SDK goes on to show the last value it was told
    assert.equal(await age(), await age())
  }))

test('calls that fail, by code; nobody has to handle the rejection of a recorded event', () =>
  collecting(async (collect) => {
    const account = await payer(db, { funds: '10' })
    const made = pgRpc({ connectionString: db.loginUrl })
    const rpc = {
      ...made,
      async call<T>(fn: string): Promise<T> {
        throw new KeyledgerError(fn === 'resolve_virtual_keys' ? 'timeout' : 'permission_denied', 503)
      },
    }
    const unhandled: unknown[] = []
    const note = (reason: unknown) => unhandled.push(reason)
    process.on('unhandledRejection', note)
    try {
      await withModule({ rpc, holdDeadline: 500, recordDeadline: 500 }, async (billing) => {
        await failure(billing.validate(account.key))
        const of = { account_id: account.accountId, virtual_key_id: account.keyId }
        await failure(billing.hold(of, { amount: '1' }))
        billing.recordUsage({ ...of, config_node_id: account.nodeId, meters: { usd: '1' } })
        billing.release({ id: newId(), account_id: account.accountId })
        await until(() => billing.health().queues.release.failed, 'the failure')
        await until(async () => {
          const { points } = (await collect())['keyledger.operation.duration']!
          return points.length === 3
        }, 'the operations')
        const found = await collect()
        assert.equal(shown(found['keyledger.validate.duration']!), ['error.type=unavailable: 1'])
        const names = ['hold', 'record', 'release']
        const denied = names.map((name) => `error.type=permission_denied operation.name=${name}: 1`)
        assert.equal(shown(found['keyledger.operation.duration']!), denied)
        // usage and releases were sent again until their deadline
        const once = (text: string) => text.replace(/\d+$/, '1')
        assert.equal(shown(found['keyledger.batch.duration']!).map(once), denied)
        billing.hold(of, { amount: '1' })
        await until(() => unhandled.length, 'a hold that nobody waits for')
        assert.is(unhandled.length, 1)
      })
    } finally {
      process.off('unhandledRejection', note)
    }
  }))

test('docs/metrics.md lists each instrument, with its unit', () => {
  const text = readFileSync(new URL('../../docs/metrics.md', import.meta.url), 'utf8')
  const listed = [...text.matchAll(/^\| `(keyledger\.[a-z.]+)` \| [a-z -]+ \| `([^`]+)`/gm)]
  assert.equal(listed.map(([, name, unit]) => `${name} ${unit}`).sort(), [...collected].sort())
})

test.run()
