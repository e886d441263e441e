// The client and the baselines it is measured against, in one run:
// `npm run bench [-- record validate memory] [--trace FILE]`, a CSV as the demo reads it, for
// memory.
import { parseArgs } from 'node:util'
import { benchMemory } from './memory.ts'
import { benchRecord } from './record.ts'
import { stage, type Verdict } from './support.ts'
import { benchValidate } from './validate.ts'

const benches = { record: benchRecord, validate: benchValidate, memory: benchMemory }
type Name = keyof typeof benches

const { values, positionals: wanted } = parseArgs({
  allowPositionals: true,
  options: { trace: { type: 'string' } },
})
const unknown = wanted.find((name) => !Object.hasOwn(benches, name))
if (unknown !== undefined) {
  console.error(
    `bench: there is no ${JSON.stringify(unknown)}; give some of: ${Object.keys(benches).join(', ')}`,
  )
  process.exit(2)
}

const verdicts: Verdict[] = []
for (const name of (wanted.length ? wanted : Object.keys(benches)) as Name[]) {
  const servers = await stage()
  verdicts.push(...(await benches[name]({ ...servers, ...values })))
  await servers.stop()
}
for (const { name, says, passes } of verdicts) console.log(`${passes ? 'pass' : 'FAIL'}  ${name}: ${says}`)
process.exitCode = verdicts.every(({ passes }) => passes) ? 0 : 1
