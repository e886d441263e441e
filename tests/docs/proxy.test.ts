// docs/proxy.md, executed by a reader who has pasted the lines of `make dev`.
import { document } from '../readme/document.ts'

const { test } = await document('docs/proxy.md', { dev: true })

test.run()
