// docs/metrics.md, executed.
import { document } from '../readme/document.ts'

const { test } = await document('docs/metrics.md')
test.run()
