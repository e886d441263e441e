// The money of one try at a node: a hold before it, kept up while it lasts, and one way out.
import type { ConfigNode, Meters, UsageAnswer, UsageEvent, UserContext } from 'keyledger'
import { billing, seenThrough } from './billing.ts'

// s that a hold outlives this process; while an answer lasts, it is extended
const HOLD_SECONDS = Number(process.env.HOLD_SECONDS ?? 900)

/** The usage, and its labels. */
export type Used = Pick<
  UsageEvent,
  'meters' | 'variant' | 'upstream_cost' | 'estimated' | 'request_id' | 'metadata'
>

/**
 * Sets aside the most that the try may cost, by the dearest of the tiers. `end` counts once: it charges the usage, or gives
 * everything back.
 */
export async function openHold(
  context: UserContext,
  { id: config_node_id }: ConfigNode,
  meters: Meters,
  variants: string[],
) {
  const hold = await billing.hold(context, {
    config_node_id,
    meters,
    variants,
    expires_in: HOLD_SECONDS,
  })
  // three times in the life of the hold
  const extending = setInterval(() => billing.extend(hold, HOLD_SECONDS).catch(() => {}), HOLD_SECONDS * 333)
  let ended: Promise<UsageAnswer | undefined> | undefined
  let close = () => {}
  // a stream outlasts the answer that it came with
  seenThrough(
    new Promise<void>((resolve) => {
      close = resolve
    }),
  )

  async function charge(used: Used) {
    // one event a hold, so that the hold's id will do
    const { virtual_key_id, account_id } = context
    const event = { id: hold.id, hold_id: hold.id, account_id, virtual_key_id, config_node_id, ...used }
    try {
      return await billing.recordUsage(event)
    } catch (error) {
      console.error(`nobody knows if this is recorded; repeat it as it is: ${JSON.stringify(event)}`, error)
    }
  }
  async function release() {
    // if this fails, the hold expires
    await billing.release(hold).catch(() => {})
    return undefined
  }

  return {
    id: hold.id,
    end(used?: Used) {
      clearInterval(extending)
      ended ??= (used ? charge(used) : release()).finally(close)
      return ended
    },
  }
}
