// The error of a call that must fail.

/** Gives the error the promise rejects with; throws if it doesn't. */
// biome-ignore lint/suspicious/noExplicitAny: errors have the fields their origin gave them
export async function failure(promise: Promise<unknown>): Promise<any> {
  const value = await promise.then(
    (value) => ({ value }),
    (error) => ({ error }),
  )
  if ('error' in value) return value.error
  throw new Error(`this should have failed, and gave ${JSON.stringify(value.value)}`)
}
