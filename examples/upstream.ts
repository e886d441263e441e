// A small upstream that speaks the OpenAI API, for trying the gateway offline. It repeats its
// prompt; a word is a token. The first part of the path names a scenario: http://…/429/v1 is always
// busy. See `scenarios`.
import { createServer, type Server, type ServerResponse } from 'node:http'
import { text } from 'node:stream/consumers'

/** The scenarios, by the path before `/v1`. */
export const scenarios = [
  'no-usage',
  'filtered',
  '400',
  '401',
  '429',
  '500',
  'billed-500',
  'cut',
  'stall',
  'hang',
  'garbage',
]

/** Words said before a `cut` or a `stall`. */
const SAID_BEFORE = 3

interface Asked {
  model?: string
  messages?: { content?: unknown }[]
  max_tokens?: number
  max_completion_tokens?: number
  stream?: boolean
  stream_options?: { include_usage?: boolean }
}

/** The server, not listening yet. */
export function createUpstream(): Server {
  return createServer(async (req, res) => {
    const [, scenario = '', path] = /^(?:\/([\w-]+))?(\/v1\/.*)$/.exec(req.url ?? '') ?? []
    if (req.method === 'GET' && path === '/v1/models') {
      return json(res, 200, { object: 'list', data: [{ id: 'demo', object: 'model', owned_by: 'upstream' }] })
    }
    if (req.method !== 'POST' || path !== '/v1/chat/completions') return json(res, 404, error('not_found'))
    const asked: Asked = JSON.parse(await text(req))
    if (scenario === 'hang') return
    if (scenario === 'garbage') return res.end('this is no answer')
    if (/^4\d\d$/.test(scenario)) {
      const busy = scenario === '429'
      const headers: Record<string, string> = busy ? { 'retry-after': '7' } : {}
      return json(res, Number(scenario), error(busy ? 'rate_limit_exceeded' : `refused_${scenario}`), headers)
    }

    const heard = (asked.messages ?? []).map(({ content }) => words(String(content)))
    const limit = asked.max_completion_tokens ?? asked.max_tokens ?? Number.POSITIVE_INFINITY
    const whole = ['You', 'said:', ...(heard.at(-1) ?? [])]
    const said = whole.slice(0, limit)
    const finish_reason = said.length < whole.length ? 'length' : 'stop'
    const prompt_tokens = heard.flat().length
    const usage = {
      ...{ prompt_tokens, completion_tokens: said.length, total_tokens: prompt_tokens + said.length },
      // all but the last message was here before
      prompt_tokens_details: { cached_tokens: heard.slice(0, -1).flat().length },
    }
    if (scenario === '500') return json(res, 500, error('overloaded'))
    if (scenario === 'billed-500') return json(res, 500, { ...error('overloaded'), usage })

    const about = { id: `chatcmpl-${Date.now()}`, created: Math.floor(Date.now() / 1000), model: asked.model }
    if (!asked.stream) {
      const message = { role: 'assistant', content: said.join(' ') }
      const choices = [{ index: 0, message, finish_reason }]
      const answer = JSON.stringify({ ...about, object: 'chat.completion', choices })
      if (scenario === 'stall' || scenario === 'cut') {
        res.writeHead(200, { 'content-type': 'application/json' }).write(answer.slice(0, 20))
        if (scenario === 'cut') setImmediate(() => res.destroy())
        return
      }
      return json(res, 200, scenario === 'no-usage' ? JSON.parse(answer) : { ...JSON.parse(answer), usage })
    }

    res.writeHead(200, { 'content-type': 'text/event-stream' })
    const wantsUsage = asked.stream_options?.include_usage === true && scenario !== 'no-usage'
    const event = (fields: object) => {
      const chunk = { ...about, object: 'chat.completion.chunk', ...fields }
      res.write(`data: ${JSON.stringify(wantsUsage ? { usage: null, ...chunk } : chunk)}\n\n`)
    }
    const choice = (delta: object, finish_reason: string | null = null) =>
      event({ choices: [{ index: 0, delta, finish_reason }] })
    // as Azure begins a stream
    if (scenario === 'filtered') event({ choices: [], prompt_filter_results: [] })
    choice({ role: 'assistant', content: '' })
    for (const [n, word] of said.entries()) {
      if (n === SAID_BEFORE && scenario === 'stall') return
      if (n === SAID_BEFORE && scenario === 'cut') return setTimeout(() => res.destroy(), 50)
      choice({ content: n ? ` ${word}` : word })
      // one packet each, as if it were thinking
      await new Promise(setImmediate)
    }
    choice({}, finish_reason)
    if (wantsUsage) event({ choices: [], usage })
    res.end('data: [DONE]\n\n')
  })
}

const words = (content: string) => content.split(/\s+/).filter(Boolean)

const error = (code: string) => ({
  error: { message: `the upstream says ${code}`, type: 'upstream_error', param: null, code },
})

function json(res: ServerResponse, status: number, body: object, headers: Record<string, string> = {}) {
  res.writeHead(status, { 'content-type': 'application/json', ...headers }).end(JSON.stringify(body))
}
