// docs/prices.md, executed.
import { document } from '../readme/document.ts'

const { test } = await document('docs/prices.md')

test.run()
