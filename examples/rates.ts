// The meters that a node prices, by tier, as the gateway may know them: those of its list prices.
import type { ConfigNode, UserContext } from 'keyledger'
import { rpc } from './billing.ts'

type Tiers = Map<string, Set<string>>

// ms for which a list is used again
const KEPT = 5_000
const kept = new Map<string, { at: number; tiers: Promise<Tiers> }>()

/** The priced meters of each tier. Empty if they can't be read: SQL knows them all the same. */
export function pricedBy({ id }: ConfigNode, { currency }: UserContext): Promise<Tiers> {
  const name = `${id} ${currency}`
  const known = kept.get(name)
  if (known && Date.now() - known.at < KEPT) return known.tiers
  const tiers = read(id, currency).catch(() => new Map())
  kept.set(name, { at: Date.now(), tiers })
  return tiers
}

async function read(config_node_id: string, currency: string): Promise<Tiers> {
  const select = ['meter', 'variant', 'effective_from'] as const
  const rows = await rpc.rows('prices', { select, where: { config_node_id, currency } })
  const tiers: Tiers = new Map()
  for (const { meter, variant, effective_from } of rows) {
    if (!meter || Date.parse(String(effective_from)) > Date.now()) continue
    tiers.set(variant ?? '', (tiers.get(variant ?? '') ?? new Set()).add(meter))
  }
  return tiers
}

/** The tiers that may serve a request: the named one, or a standard one; else all that are priced. */
export function tiersOf(asked: { service_tier?: unknown; speed?: unknown }, priced: Tiers): string[] {
  const tier = asked.speed === 'fast' ? 'fast' : asked.service_tier
  if (typeof tier === 'string' && /^(default|standard|standard_only)$/.test(tier)) return ['']
  // the provider refuses a word that is no name
  if (typeof tier === 'string' && tier !== 'auto')
    return /^[a-z][a-z0-9_.-]{0,62}$/i.test(tier) ? ['', tier.toLowerCase()] : ['']
  // the provider chooses, by the settings of our account; a batch is never chosen
  return ['', ...[...priced.keys()].filter((variant) => variant && variant !== 'batch')].slice(0, 16)
}
