// PgBouncer in front of a database, for a test in transaction mode.
import { chownSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import pg from 'pg'
import { inPath, temporaryDirectory, unprivilegedUser } from '../../scripts/binaries.ts'
import { type Server, start } from '../../scripts/servers.ts'

/**
 * Starts PgBouncer in transaction mode in front of the database and login of `databaseUrl`, with `connections`
 * to it; undefined where `pgbouncer` is not in PATH.
 */
export async function startPgBouncer({ databaseUrl = '', connections = 2 }): Promise<Server | undefined> {
  const binary = inPath('pgbouncer')
  if (!binary) return undefined
  const user = unprivilegedUser() // it refuses to run as root, too
  const dir = temporaryDirectory('pgbouncer', user)
  const { hostname, port, pathname, username, password } = new URL(databaseUrl)
  const name = pathname.slice(1)
  const own = (file: string, text: string) => {
    writeFileSync(join(dir, file), text, { mode: 0o600 })
    if (user) chownSync(join(dir, file), user.uid, user.gid)
    return join(dir, file)
  }
  const auth_file = own('users', `"${username}" "${password}"\n`)
  const at = (port: number) => Object.assign(new URL(databaseUrl), { port: String(port) }).href
  return start('pgbouncer', {
    dir,
    user,
    url: at,
    argv: (listen_port) => {
      const settings = {
        ...{
          listen_addr: '127.0.0.1',
          listen_port,
          unix_socket_dir: '',
          auth_type: 'scram-sha-256',
          auth_file,
        },
        ...{
          pool_mode: 'transaction',
          default_pool_size: connections,
          ignore_startup_parameters: 'extra_float_digits',
        },
      }
      const lines = Object.entries(settings).map(([key, value]) => `${key} = ${value}`)
      const database = `${name} = host=${hostname} port=${port} dbname=${name}`
      return [binary, own('ini', ['[databases]', database, '[pgbouncer]', ...lines, ''].join('\n'))]
    },
    async ready(port) {
      const client = new pg.Client(at(port))
      client.on('error', () => {})
      await client.connect()
      await client.end()
      return true
    },
  })
}
