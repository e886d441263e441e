// Reads server-sent events as they come. The work grows with the bytes, in packets of any size.

/** An event's data; or text to pass on unread: a keep-alive, or a piece of too large an event. */
export type Part =
  | { data: string; text?: undefined; tooLarge?: undefined }
  | { data?: undefined; text: string; tooLarge: boolean }

/** Characters of an event that are kept. A larger one is passed on in pieces, and never read. */
const MAX_EVENT = 32_000_000

/**
 * All events of a stream, in order. No packet is looked at twice: an event's pieces are joined when
 * it ends. The last event may lack its empty line, if it is whole: the upstream sent and bills it.
 */
export async function* serverSentEvents(
  body: AsyncIterable<Uint8Array>,
  most = MAX_EVENT,
): AsyncGenerator<Part> {
  const decoder = new TextDecoder()
  // of the event that has not ended: its data, and the pieces of its last line
  let data: string[] = []
  let line: string[] = []
  let size = 0
  let tooLarge = false
  let lineIsEmpty = true

  function add(piece: string): Part | undefined {
    lineIsEmpty = false
    if (tooLarge) return { text: piece, tooLarge }
    line.push(piece)
    size += piece.length
    if (size <= most) return undefined
    tooLarge = true
    return { text: [...data.map((value) => `data: ${value}\n`), ...line].join(''), tooLarge }
  }

  function endLine(): Part | undefined {
    const [text, isLast] = [tooLarge ? '' : line.join(''), lineIsEmpty]
    line = []
    lineIsEmpty = true
    if (isLast) return endEvent()
    if (tooLarge) return { text: '\n', tooLarge }
    if (text.startsWith('data:')) data.push(text.slice(text[5] === ' ' ? 6 : 5))
    if (!text.startsWith(':')) return undefined
    // it is no part of the event that it may interrupt
    size -= text.length
    return { text: `${text}\n`, tooLarge }
  }

  function endEvent(): Part {
    const [value, wasTooLarge] = [data.join('\n'), tooLarge]
    data = []
    size = 0
    tooLarge = false
    // an empty line alone keeps a connection alive, too
    return value && !wasTooLarge ? { data: value } : { text: '\n', tooLarge: wasTooLarge }
  }

  let afterCr = false
  for await (const bytes of body) {
    const text = decoder.decode(bytes, { stream: true })
    if (!text) continue
    // two packets may share a line's end
    let from = afterCr && text.startsWith('\n') ? 1 : 0
    afterCr = text.endsWith('\r')
    for (const { 0: end, index } of text.matchAll(/\r\n|\r|\n/g)) {
      if (index < from) continue
      const parts = [index > from ? add(text.slice(from, index)) : undefined, endLine()]
      for (const part of parts) if (part) yield part
      from = index + end.length
    }
    const part = from < text.length ? add(text.slice(from)) : undefined
    if (part) yield part
  }
  const rest = lineIsEmpty ? undefined : endLine()
  if (rest) yield rest
  if (tooLarge || isWhole(data.join('\n'))) yield endEvent()
}

// the first part of an event that was cut off is no event
function isWhole(data: string): boolean {
  try {
    return data === '[DONE]' || Boolean(JSON.parse(data))
  } catch {
    return false
  }
}

/** An event of this data, and of this name: Anthropic's clients go by it. */
export const eventOf = (data: string, name?: unknown) =>
  `${typeof name === 'string' && /^[\w.]+$/.test(name) ? `event: ${name}\n` : ''}data: ${data.replaceAll('\n', '\ndata: ')}\n\n`
