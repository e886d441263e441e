// A migrated Postgres server of a test's own: to kill it, or to read all it logs.
import { migrate, prepareRoles, type Server, startPostgres, withDatabase } from '../../scripts/servers.ts'

/**
 * Starts it with `settings` (`name=value`) and migrates database `keyledger`. On that database `url` is the
 * superuser's, `loginUrl` the login role's. The test must `stop()` it.
 */
export async function ownPostgres(settings: string[] = []): Promise<Server & { loginUrl: string }> {
  const server = await startPostgres({ settings })
  const url = withDatabase(server.url, 'keyledger')
  await migrate(url)
  const { url: loginUrl } = await prepareRoles(url)
  return Object.assign(server, { url, loginUrl })
}
