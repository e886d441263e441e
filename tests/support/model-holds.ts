// Steps of the model test: holds and freezes.
import { fromSteps } from '../../scripts/money.ts'
import type { Row } from './database.ts'
import { idAt, newId } from './ids.ts'
import * as model from './model.ts'
import { msOf, Refused, type World } from './model.ts'
import * as rules from './model-rules.ts'
import {
  availableNow,
  type Dice,
  hour,
  type Kinds,
  locked,
  many,
  nearAll,
  type Operation,
  one,
  reference,
  single,
  someAccount,
} from './model-steps.ts'

export const holds: Kinds = {
  freeze_funds(dice, world) {
    const frozen = someAccount(dice, world)
    const [amount, ref] = [nearAll(dice, world, frozen), reference(dice)]
    const shown = ({ id, status, amount }: Row) => `${id} ${status} ${amount}`
    return single(
      'freeze_funds',
      frozen,
      { amount, reason: 'model', reference: ref },
      (world, account, [said]) => {
        let hold = [...account.holds.values()].find((hold) => ref !== undefined && hold.reference === ref)
        if (hold && hold.amount !== amount) throw new Refused('reference_mismatch')
        if (!hold) {
          if (amount > model.backing(account, world.now, Infinity)) throw new Refused('insufficient_funds')
          const id = said!.split(' ')[0]!
          hold = { id, amount, captured: 0n, status: 'open', end: Infinity, content: null, reference: ref }
          account.holds.set(id, hold)
        }
        return shown({ ...hold, amount: fromSteps(hold.amount) })
      },
      shown,
    )
  },

  unfreeze_funds(dice, world) {
    const account = someAccount(dice, world, ({ holds }) =>
      [...holds.values()].some(({ end }) => end === Infinity),
    )
    const freezes = [...account.holds.values()].filter(({ end }) => end === Infinity || dice(12) === 0)
    const id = one(dice, freezes)?.id ?? newId()
    return single(
      'unfreeze_funds',
      account,
      { id },
      (_, account) => {
        const hold = account.holds.get(id)
        if (hold?.end !== Infinity) throw new Refused('freeze_not_found')
        hold.status = 'released'
        return `${id} released`
      },
      ({ id, status }) => `${id} ${status}`,
    )
  },

  place_holds(dice, world, { nodeId }) {
    const all = one(dice, [...world.users.values()])!
    const requests = Array.from({ length: 1 + dice(3) }, () => {
      const user = dice(2) ? all : one(dice, [...world.users.values()])!
      const account = dice(9)
        ? world.accounts.get(user.tenantId ?? user.id)!
        : one(dice, [...world.accounts.values()])!
      const known = dice(6) ? undefined : one(dice, [...account.holds.keys()])
      const [amount, priced] = [nearAll(dice, world, account), dice(3) === 0]
      return {
        id: known ?? idAt(new Date(world.began + world.now * hour * 1000 - 60_000)),
        account_id: account.id,
        virtual_key_id: user.keyId,
        expires_in: ([0, 1, 2, 5, 20][dice(5)]! + 0.5) * hour,
        ...(priced
          ? { config_node_id: nodeId, meters: { usd: fromSteps(amount) } }
          : { amount: fromSteps(amount) }),
      }
    })
    return many(
      'place_holds',
      requests,
      ({ status, code, hold_status, mismatch, available }) => [
        status,
        code,
        hold_status,
        mismatch && 'mismatch',
        status === 'held' && available,
      ],
      (world, requests) => {
        const codes = requests.map(({ id, account_id, virtual_key_id }) => {
          // an id made a minute before the hour is too old once an hour has passed
          if (msOf(id) < world.began + (world.now - 1) * hour * 1000) return 'id_not_of_now'
          const user = rules.userOf(world, virtual_key_id)
          if (user.suspended) return 'user_suspended'
          return (user.tenantId ?? user.id) === account_id ? undefined : 'invalid_account'
        })
        locked(
          world,
          requests.filter((_, i) => !codes[i]).map(({ account_id }) => account_id),
        )
        return requests.map(({ id, account_id, virtual_key_id, ...request }, i) => {
          const account = world.accounts.get(account_id)!
          const content = JSON.stringify([virtual_key_id, { ...request, expires_in: null }])
          const first = account.holds.get(id)
          if (first)
            return ['duplicate', model.holdNow(first, world.now), first.content !== content && 'mismatch']
          if (codes[i]) return ['refused', codes[i]]
          const amount = model.steps('amount' in request ? request.amount : request.meters.usd)
          const end = world.now + request.expires_in / hour
          if (amount > model.backing(account, world.now, end)) return ['refused', 'insufficient_funds']
          const { id: userId } = rules.userOf(world, virtual_key_id)
          const over = rules.overBudget(world, account_id, virtual_key_id, userId, amount)
          if (over) return ['refused', over]
          const keyId = virtual_key_id
          account.holds.set(id, { id, amount, captured: 0n, status: 'open', end, content, keyId })
          return ['held', availableNow(world, account)]
        })
      },
    )
  },

  release_holds: (dice, world) => endOrExtend(dice, world, 'release_holds'),
  extend_holds: (dice, world) => endOrExtend(dice, world, 'extend_holds'),
}

function endOrExtend(dice: Dice, world: World, name: 'release_holds' | 'extend_holds'): Operation {
  const requests = Array.from({ length: 1 + dice(3) }, () => {
    const isOpen = ({ status, end }: model.Hold) => status === 'open' && (end < Infinity || dice(6) === 0)
    const account = someAccount(dice, world, ({ holds }) => [...holds.values()].some(isOpen))
    const holds = [...account.holds.values()].filter((hold) => isOpen(hold) || dice(6) === 0)
    const id = one(dice, holds)?.id ?? newId()
    return { id, account_id: account.id, expires_in: ([0, 1, 5, 20][dice(4)]! + 0.5) * hour }
  })
  return many(
    name,
    requests,
    ({ status, code, available }) => [status, code, !code && available],
    (world, requests) => {
      locked(
        world,
        requests.map(({ account_id }) => account_id),
      )
      return requests.map(({ id, account_id, expires_in }) => {
        const account = world.accounts.get(account_id)
        if (!account) return ['closed', 'account_not_found']
        const hold = account.holds.get(id)
        if (!hold) return ['closed', 'hold_not_found']
        if (hold.status !== 'open') return ['closed', `hold_${hold.status}`]
        if (hold.end === Infinity) return ['refused', 'hold_frozen']
        if (name === 'release_holds') {
          hold.status = 'released'
          return ['released', availableNow(world, account)]
        }
        const end = Math.max(hold.end, world.now + expires_in / hour)
        const moments = account.grants.filter(
          (grant) => grant.remaining > 0n && grant.end >= hold.end && grant.end < end,
        )
        const longer = new Map(account.holds).set(id, { ...hold, end })
        if (moments.some((grant) => model.past({ ...account, holds: longer }, grant.end).left < 0n))
          return ['refused', 'insufficient_funds']
        hold.end = end
        return ['extended', availableNow(world, account)]
      })
    },
  )
}
