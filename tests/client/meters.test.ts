// The meters of real answers: each token in one meter, whatever a provider's JSON looks like.
import fc from 'fast-check'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { boundOf, createMeters, estimateOf, type Flavor, type Measured, metersOf } from '../../src/index.ts'

const test = suite('meters')

/** The meters as numbers, and whether they are estimated. */
const read = ({ meters, estimated }: Measured) => [
  Object.fromEntries(Object.entries(meters).map(([meter, count]) => [meter, Number(count)])),
  estimated,
]
const chat = (
  usage: unknown,
  message: unknown = { role: 'assistant', content: 'hi' },
  more: object = {},
) => ({
  id: 'chatcmpl-1',
  choices: [{ index: 0, message }],
  usage,
  ...more,
})
const chunk = (delta: unknown, more: object = {}) => ({
  id: 'chatcmpl-1',
  choices: [{ index: 0, delta }],
  ...more,
})
const USAGE = { prompt_tokens: 1000, completion_tokens: 200, total_tokens: 1200 }
const PAID = { input_tokens: 1000, output_tokens: 200 }

// --- cases of real gateways

test('F1: a field that is null, or of another type, changes nothing', () => {
  for (const tool_calls of [null, 7, [null], 'no', {}, [{ function: null }]]) {
    const message = { role: 'assistant', content: 'hi', tool_calls }
    assert.equal(read(metersOf(chat(USAGE, message), 'openai-chat')), [PAID, false])
    const events = [
      chunk({ content: null, tool_calls }),
      chunk({ content: 'hi' }),
      { choices: [], usage: USAGE },
    ]
    assert.equal(read(metersOf(events, 'openai-chat')), [PAID, false])
  }
})

test('F2: a picture in a question is no text', () => {
  const url = `data:image/png;base64,${'A'.repeat(1_000_000)}`
  const content = [
    { type: 'text', text: 'What is this?' },
    { type: 'image_url', image_url: { url } },
  ]
  const body = { model: 'm', stream: true, max_tokens: 100, messages: [{ role: 'user', content }] }
  const asked = estimateOf(JSON.stringify(body))
  assert.ok(asked > 1_100 && asked < 1_200, String(asked))
  const meters = createMeters('openai-chat', { asked })
  for (let n = 0; n < 6; n++) meters.add(chunk({ content: 'word ' }))
  assert.equal(read(meters.measured()), [{ input_tokens: asked, output_tokens: 8 }, true])
})

test('F4: output beside completion_tokens is found by the total', () => {
  const of = (usage: object) => read(metersOf(chat(usage), 'openai-chat'))
  const details = { completion_tokens_details: { reasoning_tokens: 2809 } }
  assert.equal(
    of({
      prompt_tokens: 10_120,
      completion_tokens: 1_499,
      total_tokens: 14_428,
      prompt_tokens_details: { cached_tokens: 128 },
      ...details,
    }),
    [{ input_tokens: 9_992, cached_input_tokens: 128, output_tokens: 4_308 }, false],
  )
  assert.equal(of({ prompt_tokens: 55_021, completion_tokens: 923, total_tokens: 56_729 }), [
    { input_tokens: 55_021, output_tokens: 1_708 },
    false,
  ])
  const inside = { completion_tokens_details: { reasoning_tokens: 400 } }
  assert.equal(of({ prompt_tokens: 100, completion_tokens: 500, total_tokens: 600, ...inside }), [
    { input_tokens: 100, output_tokens: 500 },
    false,
  ])
  const minimal = { completion_tokens_details: { reasoning_tokens: 613 } }
  assert.equal(of({ prompt_tokens: 41, completion_tokens: 7, total_tokens: 661, ...minimal }), [
    { input_tokens: 41, output_tokens: 620 },
    false,
  ])
})

test('F5: cached tokens under any name, within the prompt and beside it', () => {
  const of = (usage: object) => read(metersOf(chat(usage), 'openai-chat'))
  const counts = { prompt_tokens: 10_000, completion_tokens: 10, total_tokens: 10_010 }
  const expected = [{ input_tokens: 1_000, cached_input_tokens: 9_000, output_tokens: 10 }, false]
  for (const names of [
    { prompt_tokens_details: { cached_tokens: 9_000 } },
    { prompt_cache_hit_tokens: 9_000, prompt_cache_miss_tokens: 1_000 },
    { cached_tokens: 9_000 },
    { prompt_tokens_details: { cached_tokens: 0 }, prompt_cache_hit_tokens: 9_000 },
  ])
    assert.equal(of({ ...counts, ...names }), expected)
  const apart = { prompt_tokens: 1, completion_tokens: 80, prompt_tokens_details: { cached_tokens: 965_602 } }
  const meters = { input_tokens: 1, cached_input_tokens: 965_602, output_tokens: 80 }
  assert.equal(of(apart), [meters, true])
  // the total says so: no contradiction
  assert.equal(of({ ...apart, total_tokens: 965_683 }), [meters, false])
  const written = { prompt_tokens_details: { cached_tokens: 100, cache_write_tokens: 50 } }
  assert.equal(of({ ...USAGE, ...written }), [
    { input_tokens: 850, cached_input_tokens: 100, cache_write_tokens: 50, output_tokens: 200 },
    false,
  ])
})

test('F6: a hold counts pictures, files and addresses by their possible cost', () => {
  const bound = (part: object, more: object = {}) => {
    const body = { model: 'm', max_tokens: 100, messages: [{ role: 'user', content: [part] }], ...more }
    return Number(boundOf(body, 'openai-chat').input_tokens)
  }
  const image = (url: string) => ({ type: 'image_url', image_url: { url } })
  const byUrl = bound(image('https://example.com/a.png'))
  const inline = bound(image(`data:image/png;base64,${'A'.repeat(400_000)}`))
  assert.ok(byUrl >= 10_000 && byUrl < 10_300, String(byUrl))
  assert.ok(inline >= 10_000 && inline < 10_300, String(inline))
  assert.ok(bound(image('https://example.com/a.png'), { model: 'gpt-4o-mini' }) > 48_169)
  assert.ok(bound({ type: 'file', file: { file_id: 'file-1' } }) > 200_000)
  assert.ok(
    bound({ type: 'file', file: { file_data: `data:text/plain;base64,${'A'.repeat(4_000)}` } }) > 4_000,
  )
  assert.ok(bound({ type: 'input_audio', input_audio: { data: 'A'.repeat(40_000), format: 'mp3' } }) < 2_000)
  // text that looks like a picture is text
  assert.ok(bound({ type: 'text', text: `data:image/png;base64,${'A'.repeat(40_000)}` }) > 40_000)
  assert.ok(bound({ type: 'text', text: 'hi' }, { tools: [{ type: 'web_search' }] }) > 200_000)

  const all: [Flavor, object, string][] = [
    [
      'openai-responses',
      { input: [{ content: [{ type: 'input_image', image_url: 'https://a.b/c' }] }] },
      'picture',
    ],
    [
      'openai-responses',
      { input: [{ content: [{ type: 'input_file', file_url: 'https://a.b/c' }] }] },
      'file',
    ],
    ['openai-responses', { input: 'go on', previous_response_id: 'resp_1' }, 'file'],
    [
      'anthropic',
      { messages: [{ content: [{ type: 'image', source: { type: 'url', url: 'https://a.b/c' } }] }] },
      'picture',
    ],
    [
      'anthropic',
      { messages: [{ content: [{ type: 'document', source: { type: 'file', file_id: 'f' } }] }] },
      'file',
    ],
    [
      'gemini',
      { contents: [{ parts: [{ inlineData: { mimeType: 'image/png', data: 'A'.repeat(90_000) } }] }] },
      'picture',
    ],
    [
      'gemini',
      { contents: [{ parts: [{ fileData: { mimeType: 'video/mp4', fileUri: 'https://a.b/c' } }] }] },
      'file',
    ],
    ['gemini', { contents: [], cachedContent: 'cachedContents/1' }, 'file'],
  ]
  for (const [flavor, body, kind] of all) {
    const input = Number(boundOf(body, flavor).input_tokens)
    const least = kind === 'picture' ? 10_000 : 200_000
    assert.ok(
      input >= least && input < least + 300,
      `${flavor} ${JSON.stringify(body).slice(0, 99)}: ${input}`,
    )
  }
})

test('a hold has the output that the request allows, and the meters that the node prices', () => {
  const output = (body: object, flavor: Flavor) => boundOf(body, flavor).output_tokens
  assert.is(output({ max_completion_tokens: 70, max_tokens: 50, n: 3 }, 'openai-chat'), '210')
  assert.is(output({ max_output_tokens: 70 }, 'openai-responses'), '70')
  assert.is(output({ max_tokens: 70 }, 'anthropic'), '70')
  assert.is(output({ generationConfig: { maxOutputTokens: 70, candidateCount: 2 } }, 'gemini'), '140')
  assert.is(output({}, 'openai-chat'), '4096')
  assert.is(boundOf({}, 'openai-chat', { output: 9 }).output_tokens, '9')
  const tools = [{ type: 'web_search_20250305', max_uses: 3 }]
  const priced = ['input_tokens', 'output_tokens', 'web_searches', 'requests']
  const { requests, web_searches } = boundOf({ tools }, 'anthropic', { priced })
  assert.equal([requests, web_searches], ['1', '3'])
  assert.equal(boundOf({}, 'openai-chat', { priced: ['requests'] }), { requests: '1' })
})

test('F7: all that is said counts, under any name', () => {
  const words = 'x'.repeat(400)
  for (const delta of [
    { content: words },
    { reasoning_content: words },
    { reasoning: words },
    { reasoning_details: [{ type: 'reasoning.text', text: words, id: 'id-1', format: 'a-format' }] },
    { function_call: { name: 'f', arguments: words } },
    { tool_calls: [{ index: 0, id: 'call-1', function: { arguments: words } }] },
    { audio: { id: 'audio-1', transcript: words } },
    { content: [{ type: 'text', text: words }] },
    { refusal: words },
  ]) {
    const { meters, estimated } = metersOf(
      [chunk({ role: 'assistant' }), chunk(delta)],
      'openai-chat',
      undefined,
      7,
    )
    assert.equal([meters.input_tokens, estimated], ['7', true])
    const made = Number(meters.output_tokens)
    assert.ok(made >= 100 && made <= 101, `${JSON.stringify(delta).slice(0, 60)}: ${made}`)
  }
})

test('F8: a zero is not believed over text, or over a count before it', () => {
  const zero = { prompt_tokens: 0, completion_tokens: 0, total_tokens: 0 }
  const said = [chunk({ content: 'x'.repeat(1_400) }), { choices: [], usage: zero }]
  assert.equal(read(metersOf(said, 'openai-chat', undefined, 9)), [
    { input_tokens: 9, output_tokens: 350 },
    true,
  ])
  const counted = [chunk({ content: 'hi' }, { usage: USAGE }), { choices: [], usage: zero }]
  assert.equal(read(metersOf(counted, 'openai-chat')), [PAID, false])
  const later = [chunk({ content: 'hi' }, { usage: zero }), { choices: [], usage: USAGE }]
  assert.equal(read(metersOf(later, 'openai-chat')), [PAID, false])
  const free = { prompt_tokens: 0, completion_tokens: 500, total_tokens: 500 }
  assert.equal(read(metersOf(chat(free), 'openai-chat', undefined, 40)), [
    { input_tokens: 40, output_tokens: 500 },
    true,
  ])
  // nothing was said: a zero is a zero
  assert.equal(read(metersOf(chat(zero, { content: '' }), 'openai-chat', undefined, 9)), [
    { input_tokens: 0, output_tokens: 0 },
    false,
  ])
  for (const usage of [{}, null, undefined, 7, 'none'])
    assert.equal(read(metersOf(chat(usage), 'openai-chat', undefined, 9)), [
      { input_tokens: 9, output_tokens: 1 },
      true,
    ])
})

test('F12: usage in the choice, or in an object of the provider, is seen', () => {
  const usage = { prompt_tokens: 5_000, completion_tokens: 3_000, total_tokens: 8_000 }
  const expected = [{ input_tokens: 5_000, output_tokens: 3_000 }, false]
  const moonshot = [chunk({ content: 'hi' }), { choices: [{ index: 0, delta: {}, usage }] }]
  assert.equal(read(metersOf(moonshot, 'openai-chat')), expected)
  assert.equal(read(metersOf([chunk({ content: 'hi' }), { x_groq: { usage } }], 'openai-chat')), expected)
})

// --- each API

test('Chat Completions: sounds and pictures apart, each cached token once', () => {
  const usage = {
    prompt_tokens: 1_000,
    completion_tokens: 500,
    total_tokens: 1_500,
    prompt_tokens_details: {
      audio_tokens: 300,
      image_tokens: 100,
      cached_tokens: 200,
      cached_tokens_details: { audio_tokens: 50 },
    },
    completion_tokens_details: { audio_tokens: 100, reasoning_tokens: 150 },
  }
  const all = metersOf(chat(usage), 'openai-chat')
  assert.equal(read(all), [
    {
      input_tokens: 450,
      input_audio_tokens: 250,
      input_image_tokens: 100,
      cached_input_tokens: 150,
      cached_input_audio_tokens: 50,
      output_tokens: 400,
      output_audio_tokens: 100,
    },
    false,
  ])
  const priced = (...meters: string[]) => read(metersOf(chat(usage), 'openai-chat', meters))[0]
  assert.equal(priced('input_tokens', 'output_tokens'), { input_tokens: 1_000, output_tokens: 500 })
  assert.equal(priced('input_tokens', 'output_tokens', 'reasoning_tokens', 'cached_input_tokens'), {
    input_tokens: 800,
    cached_input_tokens: 200,
    output_tokens: 350,
    reasoning_tokens: 150,
  })
  assert.equal(priced('requests'), { requests: 1 })
  assert.equal(priced('images'), { images: 0 })
})

test('Responses: an event of the stream has the whole answer in it', () => {
  const usage = {
    input_tokens: 700,
    input_tokens_details: { cached_tokens: 100, cache_write_tokens: 0 },
    output_tokens: 300,
    output_tokens_details: { reasoning_tokens: 200 },
    total_tokens: 1_000,
  }
  const output = [
    { type: 'web_search_call', status: 'completed', action: { type: 'search', query: 'q' } },
    { type: 'web_search_call', status: 'completed', action: { type: 'open_page', url: 'u' } },
    { type: 'message', role: 'assistant', content: [{ type: 'output_text', text: 'hello' }] },
  ]
  const response = { id: 'resp_1', object: 'response', model: 'gpt-5', service_tier: 'flex', output, usage }
  const expected: Measured = {
    meters: { input_tokens: '600', output_tokens: '300', cached_input_tokens: '100', web_searches: '1' },
    variant: 'flex',
    estimated: false,
    request_id: 'resp_1',
    model: 'gpt-5',
  }
  const whole = metersOf(response, 'openai-responses')
  assert.equal(whole, expected)
  const events = [
    {
      type: 'response.created',
      response: { ...response, output: [], usage: null, service_tier: 'priority' },
    },
    { type: 'response.output_text.delta', delta: 'hel' },
    { type: 'response.output_text.delta', delta: 'lo' },
    { type: 'response.output_text.done', text: 'hello' },
  ]
  assert.equal(metersOf([...events, { type: 'response.completed', response }], 'openai-responses'), expected)
  // without its end: the text, once
  assert.equal(read(metersOf(events, 'openai-responses', undefined, 5)), [
    { input_tokens: 5, output_tokens: 2 },
    true,
  ])
  assert.equal(
    read(
      metersOf(
        [...events, { type: 'response.completed', response: { output, usage: null } }],
        'openai-responses',
      ),
    ),
    [{ web_searches: 1, input_tokens: 0, output_tokens: 2 }, true],
  )
})

test('Anthropic: the usage is split over message_start and message_delta', () => {
  const start = {
    type: 'message_start',
    message: {
      id: 'msg_1',
      type: 'message',
      model: 'claude',
      content: [],
      usage: {
        input_tokens: 100,
        cache_read_input_tokens: 1_000,
        cache_creation_input_tokens: 500,
        cache_creation: { ephemeral_5m_input_tokens: 200, ephemeral_1h_input_tokens: 300 },
        output_tokens: 1,
        service_tier: 'priority',
      },
    },
  }
  const delta = {
    type: 'content_block_delta',
    index: 0,
    delta: { type: 'text_delta', text: 'x'.repeat(400) },
  }
  const end = {
    type: 'message_delta',
    delta: { stop_reason: 'end_turn' },
    usage: { output_tokens: 90, input_tokens: null, server_tool_use: { web_search_requests: 2 } },
  }
  const stream = [start, { type: 'ping' }, delta, end, { type: 'message_stop' }]
  const input = {
    input_tokens: '100',
    cached_input_tokens: '1000',
    cache_write_tokens: '200',
    cache_write_1h_tokens: '300',
  }
  const measured = metersOf(stream, 'anthropic')
  assert.equal(measured, {
    meters: { output_tokens: '90', web_searches: '2', ...input },
    variant: 'priority',
    estimated: false,
    request_id: 'msg_1',
    model: 'claude',
  })
  // the count at the start is of the first token alone
  assert.equal(metersOf([start, delta], 'anthropic').meters, { output_tokens: '100', ...input })
  assert.is(metersOf([start, delta], 'anthropic').estimated, true)
  const priced = ['input_tokens', 'output_tokens', 'cache_write_tokens']
  assert.equal(metersOf(stream, 'anthropic', priced).meters, {
    input_tokens: '1100',
    cache_write_tokens: '500',
    output_tokens: '90',
  })
  // a compaction is in the rounds only
  const iterations = [
    { type: 'compaction', input_tokens: 5_000, output_tokens: 50 },
    { type: 'message', input_tokens: 100, output_tokens: 20 },
  ]
  const whole = { type: 'message', content: [], usage: { input_tokens: 100, output_tokens: 20, iterations } }
  assert.equal(read(metersOf(whole, 'anthropic')), [{ input_tokens: 5_100, output_tokens: 70 }, false])
})

test('Gemini: each chunk has the usage so far; thoughts and results of tools are beside', () => {
  const candidates = [{ content: { role: 'model', parts: [{ text: 'hello' }] } }]
  const at = (usageMetadata: object) => ({
    responseId: 'r-1',
    modelVersion: 'gemini',
    candidates,
    usageMetadata,
  })
  const prompt = {
    promptTokenCount: 1_000,
    promptTokensDetails: [
      { modality: 'TEXT', tokenCount: 400 },
      { modality: 'AUDIO', tokenCount: 600 },
    ],
    cachedContentTokenCount: 300,
    cacheTokensDetails: [{ modality: 'AUDIO', tokenCount: 300 }],
    trafficType: 'ON_DEMAND_PRIORITY',
  }
  const stream = [
    at({ ...prompt, totalTokenCount: 1_000 }),
    at({ ...prompt, thoughtsTokenCount: 40, totalTokenCount: 1_040 }),
    at({
      ...prompt,
      candidatesTokenCount: 20,
      thoughtsTokenCount: 40,
      toolUsePromptTokenCount: 10,
      totalTokenCount: 1_070,
    }),
  ]
  assert.equal(metersOf(stream, 'gemini'), {
    meters: {
      input_tokens: '410',
      output_tokens: '60',
      cached_input_audio_tokens: '300',
      input_audio_tokens: '300',
    },
    variant: 'priority',
    estimated: false,
    request_id: 'r-1',
    model: 'gemini',
  })
  // a total without the results of tools
  const partial = {
    promptTokenCount: 1_000,
    candidatesTokenCount: 20,
    thoughtsTokenCount: 40,
    totalTokenCount: 1_060,
  }
  assert.equal(read(metersOf(at({ ...partial, toolUsePromptTokenCount: 10 }), 'gemini')), [
    { input_tokens: 1_010, output_tokens: 60 },
    true,
  ])
  // thoughts in the total only
  assert.equal(
    read(metersOf(at({ promptTokenCount: 5, candidatesTokenCount: 7, totalTokenCount: 100 }), 'gemini')),
    [{ input_tokens: 5, output_tokens: 95 }, false],
  )
})

test('a tier has a name of SQL; the standard one is none', () => {
  for (const [tier, variant] of [
    ['default', ''],
    ['standard', ''],
    ['auto', ''],
    [null, ''],
    [7, ''],
    ['Flex', 'flex'],
    ['7 days', 'tier_7_days'],
    ['priority', 'priority'],
    ['batch', 'batch'],
  ])
    assert.is(metersOf(chat(USAGE, undefined, { service_tier: tier }), 'openai-chat').variant, variant)
  for (const [trafficType, variant] of [
    ['ON_DEMAND', ''],
    ['TRAFFIC_TYPE_UNSPECIFIED', ''],
    ['ON_DEMAND_FLEX', 'flex'],
    ['PROVISIONED_THROUGHPUT', 'provisioned_throughput'],
  ])
    assert.is(metersOf({ usageMetadata: { promptTokenCount: 1, trafficType } }, 'gemini').variant, variant)
  // the meters of the tier that was served
  const priced = (variant: string) => (variant === 'flex' ? ['input_tokens', 'output_tokens'] : undefined)
  const usage = { ...USAGE, prompt_tokens_details: { cached_tokens: 10 } }
  assert.equal(
    read(metersOf(chat(usage, undefined, { service_tier: 'flex' }), 'openai-chat', priced))[0],
    PAID,
  )
})

test("the provider's own cost is read where its answer gives it", () => {
  const cost = (more: object) => metersOf(chat({ ...USAGE, ...more }), 'openai-chat').upstream_cost?.amount
  assert.is(cost({ cost: 0.00123 }), '0.00123')
  assert.is(cost({ cost: 1.2e-7 }), '0.00000012')
  assert.is(cost({ cost: 0 }), '0')
  const cost_details = { upstream_inference_cost: 0.019 }
  assert.is(cost({ cost: 0.00095, cost_details, is_byok: true }), '0.01995')
  assert.is(cost({ cost: 0.00095, cost_details, is_byok: false }), '0.00095')
  assert.is(cost({ cost_in_usd_ticks: 37_756_000 }), '0.0037756')
  assert.is(cost({ cost: { total_cost: 0.006 } }), '0.006')
  for (const none of [null, -1, 'dear', Number.NaN, {}, [1]]) assert.is(cost({ cost: none }), undefined)
})

// --- figures that contradict each other

test('of figures that contradict each other, those that can be trusted count, and the event says so', () => {
  const of = (usage: object) => read(metersOf(chat(usage), 'openai-chat'))
  const half = { prompt_tokens: 10, completion_tokens: 20 }
  assert.equal(of({ ...half, prompt_tokens: -5, total_tokens: 30 }), [
    { input_tokens: 10, output_tokens: 20 },
    true,
  ])
  assert.equal(of({ ...half, completion_tokens: 19.5 }), [{ input_tokens: 10, output_tokens: 20 }, true])
  assert.equal(of({ ...half, completion_tokens: '20' }), [{ input_tokens: 10, output_tokens: 20 }, true])
  assert.equal(of({ ...half, prompt_tokens: 'many', total_tokens: 30 }), [
    { input_tokens: 10, output_tokens: 20 },
    true,
  ])
  assert.equal(of({ ...half, total_tokens: 5 }), [{ input_tokens: 10, output_tokens: 20 }, true])
  assert.equal(of({ ...half, completion_tokens_details: { reasoning_tokens: 50 } }), [
    { input_tokens: 10, output_tokens: 70 },
    true,
  ])
  assert.equal(of({ ...half, prompt_tokens_details: { audio_tokens: 50 } }), [
    { input_audio_tokens: 10, input_tokens: 0, output_tokens: 20 },
    true,
  ])
  assert.equal(of({ ...half, total_tokens: 30, prompt_tokens_details: { cached_tokens: -3 } }), [
    { input_tokens: 10, output_tokens: 20 },
    true,
  ])
})

// --- properties

const FLAVORS: Flavor[] = ['openai-chat', 'openai-responses', 'anthropic', 'gemini']
// JSON that is near a provider's, so that more than its first letter is read
const NAMES = [
  ...[
    'usage',
    'choices',
    'message',
    'delta',
    'content',
    'response',
    'output',
    'type',
    'usageMetadata',
    'cost',
  ],
  ...['prompt_tokens', 'completion_tokens', 'total_tokens', 'input_tokens', 'output_tokens', 'iterations'],
  ...[
    'prompt_tokens_details',
    'cached_tokens',
    'reasoning_tokens',
    'completion_tokens_details',
    'audio_tokens',
  ],
  ...[
    'promptTokenCount',
    'totalTokenCount',
    'candidatesTokenCount',
    'promptTokensDetails',
    'modality',
    'tokenCount',
  ],
  ...[
    'cache_creation_input_tokens',
    'cache_creation',
    'service_tier',
    'id',
    '__proto__',
    'constructor',
    'toString',
  ],
]
const near = fc.letrec<{ value: unknown }>((tie) => ({
  value: fc.oneof(
    { depthSize: 'medium', withCrossShrink: true },
    fc.oneof(
      fc.constantFrom(null, true, 'message_start', 'response.completed', 'AUDIO', '7', ''),
      fc.integer({ min: -3, max: 2_000 }),
      fc.double(),
      fc.constantFrom(2 ** 53, 1e300, -0, 5e-324),
      fc.string(),
    ),
    fc.array(tie('value'), { maxLength: 4 }),
    fc
      .uniqueArray(fc.tuple(fc.constantFrom(...NAMES), tie('value')), {
        selector: ([name]) => name,
        maxLength: 6,
      })
      .map(
        // as JSON.parse makes it, `__proto__` too
        (entries) =>
          JSON.parse(
            `{${entries.map(([k, v]) => `${JSON.stringify(k)}:${JSON.stringify(v) ?? 'null'}`).join(',')}}`,
          ),
      ),
  ),
})).value

test('any JSON: never an exception, and each quantity is a decimal text of at least 0', () => {
  fc.assert(
    fc.property(
      fc.oneof(fc.jsonValue(), near),
      fc.constantFrom(...FLAVORS),
      fc.boolean(),
      (answer, flavor, isPriced) => {
        const priced = isPriced ? ['input_tokens', 'output_tokens', 'reasoning_tokens'] : undefined
        const measured = metersOf(answer, flavor, priced, 3)
        for (const quantities of [measured.meters, boundOf(answer, flavor)]) {
          assert.ok(Object.keys(quantities).length > 0)
          for (const [meter, quantity] of Object.entries(quantities)) {
            assert.match(meter, /^[a-z][a-z0-9_]*$/)
            assert.match(quantity, /^\d+$/)
          }
        }
        assert.match(measured.variant, /^([a-z][a-z0-9_.-]{0,62})?$/)
        assert.ok(estimateOf(answer) >= 0)
      },
    ),
    { numRuns: 2_000 },
  )
})

test("figures that agree: the sum of the meters is the provider's total", () => {
  const count = fc.integer({ min: 0, max: 100_000 })
  const counts = fc.record({
    text: count,
    cached: count,
    written: count,
    audio: count,
    said: fc.integer({ min: 1, max: 100_000 }),
    thought: count,
    spoken: count,
  })
  fc.assert(
    fc.property(counts, fc.boolean(), fc.boolean(), (n, isCachedApart, isThoughtApart) => {
      const prompt = n.text + n.cached + n.written + n.audio
      const output = n.said + n.thought + n.spoken
      const total = prompt + output
      const openai = {
        prompt_tokens: isCachedApart ? n.text + n.audio : prompt,
        completion_tokens: isThoughtApart ? n.said + n.spoken : output,
        total_tokens: total,
        prompt_tokens_details: {
          cached_tokens: n.cached,
          cache_write_tokens: n.written,
          audio_tokens: n.audio,
        },
        completion_tokens_details: { reasoning_tokens: n.thought, audio_tokens: n.spoken },
      }
      const gemini = {
        promptTokenCount: n.text + n.cached + n.audio,
        cachedContentTokenCount: n.cached,
        promptTokensDetails: [{ modality: 'AUDIO', tokenCount: n.audio }],
        candidatesTokenCount: n.said,
        thoughtsTokenCount: n.thought,
        toolUsePromptTokenCount: n.written,
        totalTokenCount: total - n.spoken,
      }
      const anthropic = {
        input_tokens: n.text,
        cache_read_input_tokens: n.cached,
        cache_creation_input_tokens: n.written,
        output_tokens: n.said,
      }
      const given: [Measured, number][] = [
        [metersOf(chat(openai), 'openai-chat'), total],
        [metersOf({ usageMetadata: gemini }, 'gemini'), total - n.spoken],
        [
          metersOf({ type: 'message', usage: anthropic }, 'anthropic'),
          n.text + n.cached + n.written + n.said,
        ],
      ]
      for (const [measured, expected] of given) {
        const sum = Object.values(measured.meters).reduce((sum, quantity) => sum + Number(quantity), 0)
        assert.is(sum, expected)
        assert.is(measured.estimated, n.text + n.cached + n.written + n.audio === 0)
      }
    }),
    { numRuns: 1_000 },
  )
})

test('an answer that throws when it is read is charged by the rest', () => {
  const meters = createMeters('openai-chat', { asked: 5 })
  meters.add({
    get id(): string {
      throw new Error('of ours')
    },
  })
  meters.add(chunk({ content: 'x'.repeat(40) }))
  assert.is(meters.unread(), true)
  assert.equal(read(meters.measured()), [{ input_tokens: 5, output_tokens: 10 }, true])
  const deep = JSON.parse(`${'[{"content":'.repeat(20_000)}1${'}]'.repeat(20_000)}`)
  assert.equal(read(metersOf({ choices: [{ message: deep }], usage: USAGE }, 'openai-chat')), [PAID, false])
})

test.run()
