// A promise whose rejection needs no handler: Node ends a process over a rejection that nobody
// handles.

/** Gives the promise back. A handler that is attached to it later still sees the rejection. */
export function quiet<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => {})
  return promise
}
