// Steps of the model test: usage, parked events, and advice.
import { fromSteps } from '../../scripts/money.ts'
import type { Row } from './database.ts'
import { idAt, newId } from './ids.ts'
import type { Event, World } from './model.ts'
import * as model from './model.ts'
import { msOf } from './model.ts'
import * as rules from './model-rules.ts'
import { amounts, availableNow, hour, type Kinds, locked, many, one } from './model-steps.ts'

export const usage: Kinds = {
  record_usage(dice, world, { nodeId }) {
    const events = Array.from({ length: 1 + dice(3) }, (): Event => {
      const account = dice(40) ? one(dice, [...world.accounts.values()])! : model.openAccount(newId())
      const known = dice(8) ? undefined : one(dice, [...account.usage.keys()])
      const of = dice(7) ? account : one(dice, [...world.accounts.values()])!
      const holds = [...of.holds.values()].filter(
        ({ status, end }) => (status === 'open' && end < Infinity) || !dice(6),
      )
      const hold_id = dice(4) ? one(dice, holds)?.id : undefined
      const meters = dice(15)
        ? { usd: fromSteps(dice(9) ? amounts(dice) : 0n), ...(dice(3) ? {} : { third: `${1 + dice(20)}` }) }
        : { unpriced: '1' }
      return {
        // now, or late
        id:
          known ?? idAt(new Date(world.began + (world.now - (dice(6) ? 0 : dice(30))) * hour * 1000 + 1000)),
        account_id: account.id,
        virtual_key_id: one(dice, [...world.users.values()])!.keyId,
        config_node_id: nodeId,
        meters: meters as Record<string, string>,
        ...(hold_id ? { hold_id } : {}),
        ...(dice(3) ? {} : { final: false }),
      }
    })
    if (events.length > 1 && dice(6) === 0)
      events[1] = { ...events[0]!, ...(dice(2) ? {} : { final: false }) }
    return many('record_usage', events, sayCharge, (world, events) => record(world, events))
  },

  replay_parked_usage(dice, world) {
    const parked = one(dice, world.parked)
    return {
      name: 'replay_parked_usage',
      role: 'keyledger_operator',
      text: `select api.replay_parked_usage(${named}) as answers`,
      values: naming(parked),
      accounts: parked ? [parked.event.account_id] : [],
      alone: true,
      say: ([row]) => (row!.answers as Row[]).map((answer) => sayCharge(answer).filter(Boolean).join(' ')),
      expect(world) {
        const again = find(world, parked)
        if (!again || again.resolution === 'charged') return []
        locked(world, [again.event.account_id])
        const { hold_id: _, ...event } = again.event
        const { code } = again
        const [answer] = record(world, [code === 'invalid_hold' ? event : again.event], false)
        // a wrong hold stays wrong, whatever else is wrong; a dismissed event stays dismissed
        if (answer![0] !== 'parked') {
          again.resolution = 'charged'
          rules.endParked(world, world.accounts.get(again.event.account_id)!, again.holdId)
        } else if (code !== 'invalid_hold') again.code = answer![1] as string
        return [answer!.filter(Boolean).join(' ')]
      },
    }
  },

  dismiss_parked_usage(dice, world) {
    const parked = one(dice, world.parked)
    return {
      name: 'dismiss_parked_usage',
      role: 'keyledger_operator',
      text: `select resolution from api.dismiss_parked_usage(${named}, 'never')`,
      values: naming(parked),
      accounts: [],
      alone: true,
      say: (rows) => rows.map(({ resolution }) => (resolution === 'dismissed' ? resolution : 'charged')),
      expect(world) {
        const again = find(world, parked)
        if (!again) return []
        if (!again.resolution) {
          locked(world, [again.event.account_id])
          again.resolution = 'dismissed'
          const account = world.accounts.get(again.event.account_id)
          if (account) rules.endParked(world, account, again.holdId)
        }
        return [again.resolution]
      },
    }
  },

  check_budget(dice, world) {
    const { id } = one(dice, [...world.users.values()])!
    const amount = amounts(dice)
    return {
      name: 'check_budget',
      role: 'keyledger_gateway',
      text: 'select * from api.check_budget($1, $2)',
      values: [id, fromSteps(amount)],
      accounts: [],
      say: ([row]) => [`${row!.code} ${row!.available}`],
      expect(world) {
        const user = world.users.get(id)!
        const account = world.accounts.get(user.tenantId ?? id)!
        const left = model.available(account, world.now)
        const over = rules.overBudget(world, account.id, null, id, amount)
        const code = user.suspended ? 'user_suspended' : amount > left ? 'insufficient_funds' : (over ?? null)
        return [`${code} ${fromSteps(left)}`]
      },
    }
  },
}

// a parked event, as the database finds it and as the model does
const named = 'array(select id from api.parked_usage where usage_id = $1 and event = $2::jsonb)'
const naming = (parked?: model.Parked) => [parked?.event.id ?? newId(), JSON.stringify(parked?.event ?? null)]
const find = (world: World, parked?: model.Parked) =>
  world.parked.find(({ event }) => event.id === parked?.event.id && same(event, parked.event))

const sayCharge = ({ status, code, cost, seq, mismatch, available, hold }: Row) => [
  status,
  code,
  cost,
  seq && `${seq}`,
  mismatch && 'mismatch',
  available,
  hold,
]
const same = (a: object, b: object) => JSON.stringify(a) === JSON.stringify(b)

function record(world: World, events: Event[], parks = true): (string | false | undefined)[][] {
  const holdOf = ({ account_id, hold_id }: Event) => world.accounts.get(account_id)?.holds.get(hold_id ?? '')
  const codes = events.map((event) => {
    if (!world.accounts.has(event.account_id)) return 'account_not_found'
    if (holdOf(event)?.end === Infinity) return 'invalid_hold'
    return 'unpriced' in event.meters ? 'price_not_found' : undefined
  })
  const chargeable = events.filter((_, i) => !codes[i])
  locked(
    world,
    events.filter((event, i) => !codes[i] || holdOf(event)).map(({ account_id }) => account_id),
  )
  const charged = new Set<Event>()
  for (const id of new Set(chargeable.map(({ account_id }) => account_id))) {
    const account = world.accounts.get(id)!
    const its = chargeable.filter(({ account_id }) => account_id === id)
    const mended = world.parked.filter(
      ({ event, resolution }) =>
        !resolution && event.account_id === id && its.some((it) => it.id === event.id),
    )
    for (const parked of mended) parked.resolution = 'charged'
    const fresh: Event[] = []
    for (const event of its) {
      if (account.usage.has(event.id)) continue
      const cost = model.costOf(event.meters)
      const moment = Math.max(...[event.id, holdOf(event)?.id ?? event.id].map(msOf))
      account.usage.set(event.id, {
        content: contentOf(world, event),
        cost,
        seq: account.entries.length + 1,
        keyId: event.virtual_key_id,
        hour: Math.floor((moment - world.began) / 3_600_000),
      })
      fresh.push(event)
      charged.add(event)
    }
    if (fresh.length) charge(world, account, fresh)
    for (const { holdId } of mended) rules.endParked(world, account, holdId)
  }
  return events.map((event, i) => {
    const unknown = event.hold_id && !holdOf(event) && world.accounts.has(event.account_id) && 'unknown'
    if (codes[i] && !world.accounts.get(event.account_id)?.usage.has(event.id)) {
      if (parks) park(world, event, codes[i])
      return ['parked', codes[i], event.hold_id && !holdOf(event) && 'unknown']
    }
    const account = world.accounts.get(event.account_id)!
    const { content, cost, seq } = account.usage.get(event.id)!
    // an event that could not be charged either differs from the charged one
    const mismatch = !charged.has(event) && (codes[i] || content !== contentOf(world, event)) && 'mismatch'
    return [
      charged.has(event) ? 'charged' : 'duplicate',
      fromSteps(cost),
      `${seq}`,
      mismatch,
      availableNow(world, account),
      unknown,
    ]
  })
}

function charge(world: World, account: model.Account, fresh: Event[]) {
  const cost = (some: Event[]) => model.sum(some.map(({ id }) => account.usage.get(id)!.cost))
  for (const holdId of new Set(fresh.map(({ hold_id }) => hold_id))) {
    const hold = account.holds.get(holdId ?? '')
    if (hold?.status !== 'open' && hold?.status !== 'parked') continue
    const drawing = fresh.filter(({ hold_id }) => hold_id === holdId)
    hold.captured += model.min(cost(drawing), hold.amount - hold.captured)
    if (drawing.some(({ final }) => final !== false) && !rules.waits(world, account, hold))
      hold.status = 'captured'
  }
  rules.post(account, 'usage', { outstanding: cost(fresh) })
}

function park(world: World, event: Event, code: string) {
  const account = world.accounts.get(event.account_id)
  const hold = account?.holds.get(event.hold_id ?? '')
  const setsAside =
    hold && hold.end < Infinity && (hold.status === 'open' || hold.status === 'parked') ? hold : undefined
  if (!world.parked.some((parked) => same(parked.event, event)))
    world.parked.push({ event, code, holdId: setsAside?.id })
  if (setsAside && rules.waits(world, account!, setsAside)) setsAside.status = 'parked'
}

// a hold that the account doesn't have is left out
const contentOf = (world: World, event: Event) => {
  const { account_id, virtual_key_id, config_node_id, meters, hold_id, final = true } = event
  const known = world.accounts.get(account_id)!.holds.has(hold_id ?? '') ? hold_id : undefined
  return JSON.stringify([virtual_key_id, config_node_id, meters, known, final])
}
