// The nodes that may serve a key, with the fields a gateway needs to call them; read now and then,
// not at each request.
import type { Rpc } from './rpc.ts'
import type { ConfigNode, UserContext } from './types.ts'

const MAX_AGE_MS = 5000
const COLUMNS = ['id', 'name', 'provider', 'model', 'endpoint', 'created_at', 'status']

/**
 * Gives the active nodes among `config_node_ids`, by name. A change of a node is seen within 5 s, a
 * new node at once.
 */
export function createNodes(rpc: Pick<Rpc, 'rows'>) {
  type Row = ConfigNode & { status: string }
  // disabled nodes too: keys have them mounted, and that is no reason to read again
  let known = new Map<string, Row>()
  let readAt = Number.NEGATIVE_INFINITY
  let reading: Promise<void> | undefined

  async function read() {
    const began = performance.now()
    const rows = await rpc.rows<Row>('config_nodes', { select: COLUMNS, order: 'name' })
    known = new Map(rows.map((node) => [node.id, node]))
    readAt = began
  }

  const refresh = () => {
    reading ??= read().finally(() => {
      reading = undefined
    })
    return reading
  }

  return async ({ config_node_ids: ids }: Pick<UserContext, 'config_node_ids'>): Promise<ConfigNode[]> => {
    const complete = () => ids.every((id) => known.has(id))
    if (!complete() || performance.now() - readAt > MAX_AGE_MS) {
      const joined = reading !== undefined
      await refresh().catch((error) => {
        // the nodes we know will do
        if (!complete()) throw error
      })
      // a read that was under way may not have seen the node
      if (joined && !complete()) await refresh()
    }
    return [...known.values()]
      .filter(({ id, status }) => status === 'active' && ids.includes(id))
      .map(({ status, ...node }) => node)
  }
}
