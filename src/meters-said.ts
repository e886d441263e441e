// The size of an answer's text, for want of a count: every string of it but names and ids.
import { isObject } from './meters-figures.ts'

/** Bytes of text per token, for want of better; of JSON it is more than enough. */
export const BYTES_PER_TOKEN = 4
/** A usual picture, in tokens. */
export const PICTURE_TOKENS = 1_100
// base64 of spoken words: 24,000 samples of 2 bytes a second, and 20 tokens
const AUDIO_BYTES_PER_TOKEN = 3_200

// fields that say nothing: ids, roles, names of types, signatures, addresses
const SILENT =
  /^(id|.*_id|.*Id|type|object|role|status|index|format|model|finish_reason|signature|thought_?signature|encrypted_.*|mime_?type|media_type|url|uri|file_?uri|annotations|citations|logprobs|expires_at|created|phase)$/i
const BASE64 = /^(data|b64_json|result|partial_image_b64)$/

/** Tokens of what is said, in quarters of bytes; pictures and sounds by their usual tokens. */
export function saidIn(value: unknown): { bytes: number; tokens: number } {
  let bytes = 0
  let tokens = 0
  // a list of its own: an answer may be nested deeper than we may call
  const open: [key: string, value: unknown, parent: string][] = [['', value, '']]
  while (open.length) {
    const [key, item, parent] = open.pop()!
    if (typeof item === 'string') {
      if (/^data:image\//i.test(item.slice(0, 20)) && /^(url|image_url)$/.test(key)) tokens += PICTURE_TOKENS
      else if (BASE64.test(key) && isBase64(item)) {
        tokens += parent === 'audio' ? Math.ceil(item.length / AUDIO_BYTES_PER_TOKEN) : PICTURE_TOKENS
      } else if (!SILENT.test(key)) bytes += Buffer.byteLength(item)
    } else if (Array.isArray(item)) for (const part of item) open.push([key, part, parent])
    else if (isObject(item)) {
      if (SILENT.test(key)) continue
      for (const [name, part] of Object.entries(item)) open.push([name, part, key])
    }
  }
  return { bytes, tokens }
}

// long, and of one word
const isBase64 = (text: string) => text.length > 64 && /^[\w+/=-]+$/.test(text.slice(0, 256))
