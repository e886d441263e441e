// Query building, as both transports do it: reads names, columns, order and limit, and refuses
// anything else.
import { invalidInput } from './errors.ts'

// PostgREST gives these a meaning of its own in a query string
const reserved = ['select', 'order', 'limit', 'offset', 'and', 'or', 'not', 'columns', 'on_conflict']

/**
 * A lower-case identifier, which means the same in SQL and in a URL. Throws 400 `invalid_input` for
 * any other name.
 */
export function identifier(name: string): string {
  if (/^[a-z_][a-z0-9_]*$/.test(name) && !reserved.includes(name)) return name
  throw invalidInput(
    `${JSON.stringify(name)} is no name of schema api`,
    'use lower-case letters, digits and _',
  )
}

/** Reads `select`: `column`, `column::type` or `*`. */
export function columns(select: readonly string[]): { name: string; type?: string }[] {
  if (!select.length) throw invalidInput('`select` is empty', 'name the columns')
  return select.map((item) => {
    if (item === '*') return { name: item }
    const [name, type, more] = item.split('::')
    if (more !== undefined) throw invalidInput(`\`select\` has ${JSON.stringify(item)}`, 'write column::type')
    return type === undefined
      ? { name: identifier(name!) }
      : { name: identifier(name!), type: identifier(type) }
  })
}

/** Reads `order`. */
export function ordering(order: string): { name: string; desc: boolean }[] {
  return order.split(',').map((item) => {
    const [name, direction, more] = item.split('.')
    if (more !== undefined || !['asc', 'desc', undefined].includes(direction)) {
      throw invalidInput(`\`order\` has ${JSON.stringify(item)}`, 'write column or column.desc')
    }
    return { name: identifier(name!), desc: direction === 'desc' }
  })
}

/** Checks `limit`: a whole number from 0 on. */
export function count(limit: number): number {
  if (Number.isSafeInteger(limit) && limit >= 0) return limit
  throw invalidInput(`\`limit\` is ${limit}`, 'give a whole number, 0 or more')
}
