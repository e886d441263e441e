#!/usr/bin/env node
// The command `keyledger`: `npx keyledger prices …`.
import { prices } from './prices.ts'

const [command, ...args] = process.argv.slice(2)
if (command === 'prices') await prices(args)
else {
  console.error('usage: keyledger prices --help')
  process.exitCode = command === undefined || command === '--help' ? 0 : 2
}
