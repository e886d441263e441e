// Meters an answer of the OpenAI API: by the upstream's figures, or by the text passed on if there
// are none.
import type { Meters } from 'keyledger'

/** The fields we read of a completion, or of a chunk of one. An upstream may send others. */
export interface Completion {
  id?: string
  choices?: { message?: Said; delta?: Said }[]
  usage?: Usage | null
  error?: unknown
}

interface Said {
  content?: string | null
  refusal?: string | null
  reasoning_content?: string | null
  tool_calls?: { function?: { name?: string; arguments?: string } }[] | null
}

interface Usage {
  prompt_tokens: number
  completion_tokens: number
  prompt_tokens_details?: { cached_tokens?: number | null } | null
}

// of text, for want of better; of JSON it is more than enough
const BYTES_PER_TOKEN = 4
// of an event's `request_id`: a longer one would keep its charge waiting
const MAX_ID = 512

/** Why a part of an answer was passed on, and not metered. It still counts as something said. */
export type Unread = 'event_too_large' | 'unreadable'

/**
 * Adds up an answer: a whole one, or chunk by chunk. `asked` is the size of the request in bytes.
 */
export function createMeter(asked: number) {
  let usage: Usage | undefined
  let id: string | undefined
  let unread: Unread | undefined
  let pieces = 0
  let bytes = 0

  function skip(code: Unread) {
    if (!unread) pieces++
    unread ??= code
  }

  return {
    /**
     * Never throws: an answer that we can't read is still the caller's, and the rest is charged.
     */
    add(answer: Completion) {
      try {
        // Azure's first chunk has an empty one
        if (answer.id && typeof answer.id === 'string') id ??= answer.id.slice(0, MAX_ID)
        if (isUsage(answer.usage)) usage = answer.usage
        for (const { message, delta } of answer.choices ?? []) {
          const length = Buffer.byteLength(textOf(message ?? delta ?? {}))
          if (length) pieces++
          bytes += length
        }
      } catch (error) {
        if (!unread) console.error('an answer is passed on, and not metered as a whole', error)
        skip('unreadable')
      }
    },
    /** A part is passed on without being read. */
    skip,
    /** The upstream has sent text, or a count. */
    started: () => usage !== undefined || pieces > 0,
    /** A count is above zero. */
    counted: () => usage !== undefined && usage.prompt_tokens + usage.completion_tokens > 0,
    /** The answer's id. */
    id: () => id,
    estimated: () => usage === undefined,
    unread: () => unread,
    meters(): Meters {
      if (!usage) {
        const output_tokens = Math.max(pieces, Math.ceil(bytes / BYTES_PER_TOKEN))
        return { input_tokens: Math.ceil(asked / BYTES_PER_TOKEN), output_tokens }
      }
      const { prompt_tokens, completion_tokens: output_tokens } = usage
      const cached_input_tokens = Math.min(usage.prompt_tokens_details?.cached_tokens ?? 0, prompt_tokens)
      return { input_tokens: prompt_tokens - cached_input_tokens, cached_input_tokens, output_tokens }
    },
  }
}

const isCount = (value: unknown) => Number.isSafeInteger(value) && (value as number) >= 0

const isUsage = (usage: Usage | null | undefined): usage is Usage =>
  isCount(usage?.prompt_tokens) &&
  isCount(usage?.completion_tokens) &&
  isCount(usage?.prompt_tokens_details?.cached_tokens ?? 0)

const textOf = ({ content, refusal, reasoning_content, tool_calls }: Said) =>
  [
    content,
    refusal,
    reasoning_content,
    ...(tool_calls ?? []).flatMap(({ function: f }) => [f?.name, f?.arguments]),
  ].join('')
