// examples/statement.ts: the page has all figures of the document, and each text as it is.
import { execFile } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { money, renderStatement, type Statement } from '../../examples/statement.ts'
import { database } from '../support/database.ts'
import { failure } from '../support/failure.ts'
import { type Payer, payer } from '../support/payer.ts'

const test = suite('statement page')
const db = await database(test)

const evil = `<script>alert("1")</script> & 'co'`
const escaped = '&#60;script&#62;alert(&#34;1&#34;)&#60;/script&#62; &#38; &#39;co&#39;'

async function page(account: Payer, start: string): Promise<string> {
  const { url, token } = await db.postgrest()
  const env = {
    ...process.env,
    POSTGREST_URL: url,
    OPERATOR_TOKEN: await token({ role: 'keyledger_operator' }),
  }
  const script = fileURLToPath(new URL('../../examples/statement.ts', import.meta.url))
  const tsx = fileURLToPath(import.meta.resolve('tsx'))
  const argv = ['--import', tsx, script, account.accountId, start]
  return (await promisify(execFile)(process.execPath, argv, { env })).stdout
}

/** Closes now; gives where the period began, and the document. */
async function closed(account: Payer): Promise<[start: string, doc: Statement]> {
  await db.operator('select account_id from api.close_period(clock_timestamp(), null, 10000)')
  const [row] = await db.operator(
    `select period_start::text as start, api.statement(account_id, period_start) as doc
    from api.accounting_snapshots where account_id = $1 order by period_start desc limit 1`,
    [account.accountId],
  )
  return [row!.start, row!.doc]
}

/** The texts of each row's cells. */
const rows = (html: string) =>
  [...html.matchAll(/<tr[^>]*>(.*?)<\/tr>/gs)].map(([, row]) =>
    [...row!.matchAll(/<t[hd][^>]*>(.*?)<\/t[hd]>/gs)].map(([, cell]) =>
      cell!.replace(/<[^>]*>/g, '').trim(),
    ),
  )

const account = await payer(db, { funds: '1234567.5' })

test('every figure is on it, the rows add up, and texts stay texts', async () => {
  await db.sql('update data.user_profile set display_name = $1 where id = $2', [evil, account.userId])
  await db.sql('update data.config_node set name = $1, provider = $1, model = $1 where id = $2', [
    evil,
    account.nodeId,
  ])
  await account.topUp('0.0000000001', { reference: evil, reason: evil })
  await account.record(account.event('1000.25'), account.event('0.000001'))
  await account.grant('5')
  await account.post('refund_charge', { seq: 3, amount: '0.25', reason: evil })
  const [start, doc] = await closed(account)
  const html = await page(account, start)
  assert.is(html, renderStatement(doc))
  assert.not.match(html, '<script')
  assert.not.match(html, `'co'`)
  assert.is(
    html.split(escaped).length - 1,
    7,
    'the owner, name, provider and model of the node, reference and two reasons',
  )
  assert.not.match(html, /(src|href|url|import)\s*[=(]/i)
  const said = rows(html)
  const find = (name: string) => said.find(([first]) => first === name)
  assert.equal(find('Opening'), ['Opening', '', '0.00', '0.00', '0.00', '0.00'])
  assert.equal(find('Payments'), [
    'Payments',
    '2',
    '1\u202f234\u202f567.5000000001',
    '0.00',
    '0.00',
    '1\u202f234\u202f567.5000000001',
  ])
  assert.equal(find('Usage'), [
    'Usage',
    '1',
    '\u22121\u202f000.250001',
    '0.00',
    '0.00',
    '\u22121\u202f000.250001',
  ])
  assert.equal(find('Closing'), [
    'Closing',
    '',
    '1\u202f233\u202f567.4999990001',
    '5.00',
    '0.00',
    '1\u202f233\u202f572.4999990001',
  ])
  assert.equal(find('usd'), ['usd', '1\u202f000.250001', '', '1\u202f000.250001'])
  assert.equal(find('All usage'), ['All usage', '', '2', '1\u202f000.250001'])
  assert.ok(
    said.some(
      (cells) => cells[1]?.startsWith('Refund') && cells[1].includes('of entry 3') && cells[2] === '0.25',
    ),
  )
  for (const part of [doc.head, account.accountId, 'Entries 1 to 5']) assert.match(html, part)
})

test('a month of nothing, and one that ends in debt', async () => {
  const [idle, quiet] = await closed(account)
  assert.equal([quiet.movements, quiet.usage, quiet.entries], [{}, [], []])
  const html = await page(account, idle)
  for (const part of ['Nothing was used', 'There were none', 'No entry was posted', quiet.head])
    assert.match(html, part)
  assert.not.match(html, 'class="due"')

  const poor = await payer(db)
  const [, empty] = await closed(poor)
  assert.match(renderStatement(empty), 'none: no entry yet')
  await poor.use('3')
  await closed(poor)
  await poor.use('1')
  const [start, doc] = await closed(poor)
  assert.equal([doc.closing.outstanding_amount, doc.closing.overdue_amount], ['4.0000000000', '3.0000000000'])
  const due = await page(poor, start)
  assert.match(due, 'class="due"')
  assert.match(due, 'of it overdue: 3.00')
  assert.equal(
    rows(due).find(([first]) => first === 'Closing'),
    ['Closing', '', '0.00', '0.00', '4.00', '\u22124.00'],
  )
})

test('no statement: nothing but the reason', async () => {
  const { stdout, stderr } = await failure(page(account, '2020-01-01'))
  assert.is(stdout, '')
  assert.match(stderr, 'statement_not_found')
})

test('money is exact, with two decimals at least', () => {
  for (const [amount, shown] of [
    ['0.0000000000', '0.00'],
    ['-0.0000000001', '\u22120.0000000001'],
    ['999.9000000000', '999.90'],
    ['-1000.1230000000', '\u22121\u202f000.123'],
    ['999999999999.9999999999', '999\u202f999\u202f999\u202f999.9999999999'],
  ])
    assert.is(money(amount!), shown)
})

test.run()
