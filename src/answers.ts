// Checks the answers to a batch: there must be one for each element, in the same order, with the
// element's own id.
import { KeyledgerError } from './errors.ts'

/**
 * Gives the answers back if each belongs to the element with the id at its place. Else throws 502
 * `invalid_response`: nobody knows then which elements were carried out.
 */
export function checkAnswers<Answer>(answers: Answer[], ids: unknown[], haveIds = true): Answer[] {
  const isAnswer = (answer: unknown, i: number) => answer !== null && (!haveIds || answersTo(answer, ids[i]))
  if (Array.isArray(answers) && answers.length === ids.length && answers.every(isAnswer)) return answers
  throw new KeyledgerError('invalid_response', 502, {
    detail: 'a batch was not answered element by element',
  })
}

// an id that is no text may have no echo, or one as text
function answersTo(answer: unknown, id: unknown): boolean {
  if (typeof answer !== 'object') return false
  const given = answer as { id?: unknown; status?: unknown }
  if (typeof given.status !== 'string') return false
  return typeof id !== 'string' || (typeof given.id === 'string' && spelled(given.id) === spelled(id))
}

// SQL echoes a uuid in lower case and without braces, and U+FFFD for each character that can't be
// stored
const spelled = (id: string) =>
  id
    .toLowerCase()
    .replace(/[{}-]/g, '')
    .replace(/\0|\p{Cs}/gu, '\ufffd')
