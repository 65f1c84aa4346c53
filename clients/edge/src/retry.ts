/** Trying again: after pauses that grow, are not the same for everybody, and last as long as was asked for. */
import { ClientError } from "./errors.js";

export interface RetryPolicy {
  /** The first pause is half of this to all of it; each further one may be twice as long. */
  readonly firstPauseMs: number;
  readonly maxPauseMs: number;
  /** All attempts and the pauses between them end within this time; a repeat has at least `firstPauseMs` of it. */
  readonly giveUpAfterMs: number;
}

export const DEFAULT_RETRY: RetryPolicy = { firstPauseMs: 250, maxPauseMs: 10_000, giveUpAfterMs: 120_000 };

/**
 * How long to wait after a failed attempt.
 *
 * @param attempt 0 for the first.
 * @param retryAfterMs What the service asked for: never less, and not the same for all who were told it.
 */
export function pauseMs(attempt: number, retryAfterMs: number | null, policy: RetryPolicy): number {
  const grown = Math.min(policy.maxPauseMs, policy.firstPauseMs * 2 ** attempt);
  return (retryAfterMs ?? 0) + grown * (0.5 + Math.random() / 2);
}

/**
 * Makes a call until it succeeds, fails for good, or would go on past the limit of time.
 *
 * @param call Gets the ms that are left to it.
 * @param signal Ends it at once, also in a pause.
 * @throws What the last attempt threw; the signal's reason.
 */
export async function retrying<T>(
  call: (leftMs: number) => Promise<T>,
  policy: RetryPolicy,
  signal?: AbortSignal,
): Promise<T> {
  const endsAt = Date.now() + policy.giveUpAfterMs;
  for (let attempt = 0; ; attempt++) {
    try {
      return await call(endsAt - Date.now());
    } catch (error) {
      if (!(error instanceof ClientError && error.mayPass)) throw error;
      const pause = pauseMs(attempt, error.retryAfterMs, policy);
      // An attempt without the time to succeed would only hide why the last one failed.
      const latest = endsAt - policy.firstPauseMs;
      if (Date.now() + pause >= latest) throw error;
      await sleep(pause, signal);
      if (Date.now() >= latest) throw error;
    }
  }
}

/** @throws The signal's reason, as soon as it is aborted. */
export function sleep(ms: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const stop = (): void => {
      clearTimeout(timer);
      reject(signal?.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, ms);
    if (signal?.aborted) stop();
    else signal?.addEventListener("abort", stop, { once: true });
  });
}
