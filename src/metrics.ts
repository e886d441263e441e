// Metrics by OpenTelemetry: every instrument, and the wrappers that time calls. docs/metrics.md has
// a line for each.
import { type Attributes, createNoopMeter, type Meter, metrics } from '@opentelemetry/api'
import type { Answer as Looked } from './cache.ts'
import type { Charging, MeasureBatches, Queues } from './charging.ts'
import { codeOf } from './errors.ts'
import type { Health } from './health.ts'
import { quiet } from './quiet.ts'

export interface Metrics {
  /** Times look-ups of keys, by tier, and by the reason of a refusal. */
  lookUps<Args extends unknown[], Found extends Partial<Looked<unknown>> & { code: string | null }>(
    identify: (...args: Args) => Promise<Found>,
  ): (...args: Args) => Promise<Found>
  /** Times each call until it is settled. */
  operations<Made extends Charging>(made: Made): Made
  /** Sizes and times one queue's batches. */
  batches: MeasureBatches
  /** Reports `health` at each collection of metrics. Gives the function that ends this. */
  watch(health: () => Health): () => void
}

/**
 * Uses the meter provider that is registered by now. Without one, each wrapper gives its function
 * back unchanged.
 */
export function createMetrics(): Metrics {
  const meter = metrics.getMeter('keyledger')
  return meter === createNoopMeter() ? nothing : measuring(meter)
}

const nothing: Metrics = {
  lookUps: (identify) => identify,
  operations: (made) => made,
  batches: (_, send) => send,
  watch: () => () => {},
}

const MEMORY_OR_NETWORK = [
  ...[0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01],
  ...[0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5],
]
const NETWORK = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]
const SIZES = [1, 2, 5, 10, 20, 50, 100, 200, 500]

function measuring(meter: Meter): Metrics {
  const histogram = (name: string, description: string, unit: string, explicitBucketBoundaries: number[]) =>
    meter.createHistogram(name, { description, unit, advice: { explicitBucketBoundaries } })
  const validate = histogram(
    'keyledger.validate.duration',
    'Finding out whose key it is',
    's',
    MEMORY_OR_NETWORK,
  )
  const operation = histogram(
    'keyledger.operation.duration',
    'Holding, releasing, extending or recording, from the call to the commit',
    's',
    NETWORK,
  )
  const batch = histogram('keyledger.batch.duration', 'One call of Postgres for a batch', 's', NETWORK)
  const size = histogram('keyledger.batch.size', 'Elements in a batch', '{element}', SIZES)

  return {
    lookUps: (identify) =>
      timed(identify, (seconds, found, error) =>
        validate.record(seconds, {
          ...attribute('keyledger.cache.tier', found?.tier),
          ...attribute('error.type', error === undefined ? found?.code : codeOf(error)),
        }),
      ),

    operations(made) {
      const measured = <Args extends unknown[], Answer extends object>(
        name: keyof Queues,
        call: (...args: Args) => Promise<Answer>,
      ) =>
        timed(call, (seconds, answer: { status?: string; code?: string } | undefined, error) =>
          operation.record(seconds, {
            'keyledger.operation.name': name,
            ...attribute('keyledger.operation.status', answer?.status),
            ...attribute('error.type', error === undefined ? answer?.code : codeOf(error)),
          }),
        )
      const release = measured('release', made.release)
      const record = measured('record', made.recordUsage)
      return {
        ...made,
        hold: measured('hold', made.hold),
        release: (hold) => quiet(release(hold)),
        extend: measured('extend', made.extend),
        recordUsage: (event) => quiet(record(event)),
      }
    },

    batches(name, send) {
      const named = { 'keyledger.operation.name': name }
      const call = timed(send, (seconds, _, error) =>
        batch.record(seconds, { ...named, ...attribute('error.type', error && codeOf(error)) }),
      )
      return (elements) => {
        size.record(elements.length, named)
        return call(elements)
      }
    },

    watch: (health) => watch(meter, health),
  }
}

function watch(meter: Meter, health: () => Health): () => void {
  const gauge = (name: string, description: string, unit: string) =>
    meter.createObservableGauge(name, { description, unit })
  const amount = (name: string, description: string, unit: string) =>
    meter.createObservableUpDownCounter(name, { description, unit })
  const queue = amount(
    'keyledger.queue.size',
    'Elements waiting, and in a call that is under way',
    '{element}',
  )
  const entries = amount('keyledger.cache.entries', 'Keys in memory', '{key}')
  const trusted = gauge('keyledger.cache.trusted', '1 if the tier may answer by itself, else 0', '1')
  const age = gauge('keyledger.cursor.age', 'Time since the last complete read of the changes was sent', 's')
  const listening = gauge('keyledger.listener.up', '1 if the LISTEN connection is up, else 0', '1')
  const upkeep = gauge('keyledger.maintenance.age', 'Time since the hourly upkeep last succeeded', 's')
  const all = [queue, entries, trusted, age, listening, upkeep]

  const callback: Parameters<Meter['addBatchObservableCallback']>[0] = (result) => {
    const { cache, listener, news, queues, maintenance } = health()
    for (const [name, { queued, in_flight }] of Object.entries(queues)) {
      const named = { 'keyledger.operation.name': name }
      result.observe(queue, queued, { ...named, 'keyledger.queue.state': 'queued' })
      result.observe(queue, in_flight, { ...named, 'keyledger.queue.state': 'in_flight' })
    }
    result.observe(entries, cache.entries)
    result.observe(trusted, Number(cache.memory), { 'keyledger.cache.tier': 'memory' })
    if (cache.redis !== null)
      result.observe(trusted, Number(cache.redis), { 'keyledger.cache.tier': 'redis' })
    if (listener.age !== null) result.observe(age, listener.age / 1000, { 'keyledger.feed': 'cache' })
    if (news.age !== null) result.observe(age, news.age / 1000, { 'keyledger.feed': 'news' })
    if (listener.listening !== null) result.observe(listening, Number(listener.listening))
    if (maintenance.at !== null) result.observe(upkeep, (Date.now() - Date.parse(maintenance.at)) / 1000)
  }
  meter.addBatchObservableCallback(callback, all)
  return () => meter.removeBatchObservableCallback(callback, all)
}

/** Wraps the function: each call is reported once it is settled. */
function timed<Args extends unknown[], Answer>(
  call: (...args: Args) => Promise<Answer>,
  report: (seconds: number, answer?: Answer, error?: unknown) => void,
) {
  return (...args: Args): Promise<Answer> => {
    const since = performance.now()
    const seconds = () => (performance.now() - since) / 1000
    return call(...args).then(
      (answer) => {
        report(seconds(), answer)
        return answer
      },
      (error) => {
        report(seconds(), undefined, error)
        throw error
      },
    )
  }
}

const attribute = (name: string, value: unknown): Attributes =>
  value === undefined || value === null ? {} : { [name]: String(value) }
