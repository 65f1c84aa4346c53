/**
 * What can go wrong with a call, as types.
 *
 *     ClientError
 *     ├── ServiceError        the service answered with an error
 *     ├── TaskFailed          the task was accepted and ended as `error`
 *     ├── UnexpectedAnswer    an answer that is not the service's
 *     ├── TimedOut            no whole answer in time
 *     └── ConnectionFailed    no answer at all
 */
import type { ErrorDetail, ErrorResponse } from "./schema.js";

const MAY_PASS: ReadonlySet<number> = new Set([429, 502, 503, 504]);

export type Details = NonNullable<ErrorDetail["details"]>;

/** Everything that a client throws, but for what a caller's own signal is aborted with. */
export abstract class ClientError extends Error {
  /** Whether the same call, made again, may succeed. */
  abstract readonly mayPass: boolean;

  /** How long the service asks to be left alone, in ms; null if it does not say. */
  readonly retryAfterMs: number | null = null;

  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = new.target.name;
  }
}

/** The service, or what stands before it, answered with a status of 400 or more. */
export class ServiceError extends ClientError {
  readonly mayPass: boolean;

  /**
   * @param status Of the answer.
   * @param code As in the contract's table; `HTTP_<status>` where a body of ours is missing.
   * @param details One entry per field at fault; often none.
   * @param requestId What the service's log has it under.
   */
  constructor(
    readonly status: number,
    readonly code: string,
    message: string,
    readonly details: Details,
    readonly requestId: string | null,
    override readonly retryAfterMs: number | null,
  ) {
    super(message);
    this.mayPass = MAY_PASS.has(status);
  }

  /** Reads an answer, whoever sent it. */
  static of(response: Response, body: string): ServiceError {
    const told = readError(body);
    const retryAfterMs = readRetryAfter(response.headers.get("Retry-After"), Date.now());
    return new ServiceError(
      response.status,
      told?.error.code ?? `HTTP_${response.status}`,
      told?.error.message ?? `The service answered ${response.status} without saying why.`,
      told?.error.details ?? [],
      told?.meta.request_id ?? response.headers.get("X-Request-ID"),
      retryAfterMs,
    );
  }
}

/** An accepted task ended as `error`; its row says the same. The same request may be sent again. */
export class TaskFailed extends ClientError {
  readonly mayPass = false;

  constructor(
    readonly taskId: string,
    readonly code: string,
    message: string,
  ) {
    super(message);
  }
}

/** A status below 400 whose body the service did not write, or a redirect: is the base URL right? */
export class UnexpectedAnswer extends ClientError {
  readonly mayPass = false;

  constructor(readonly status: number) {
    super(`Expected the service's JSON, got something else with status ${status}: check the base URL.`);
  }
}

/** The whole answer was not there in time. What was asked for may have happened, or may yet. */
export class TimedOut extends ClientError {
  readonly mayPass = true;
}

/** The service could not be reached, or the connection broke. What was asked for may have happened. */
export class ConnectionFailed extends ClientError {
  readonly mayPass = true;
}

/**
 * `Retry-After` in ms from `nowMs` on, never negative; null if it is neither seconds nor a date.
 */
export function readRetryAfter(value: string | null, nowMs: number): number | null {
  if (value === null) return null;
  if (/^\s*\d{1,9}\s*$/.test(value)) return Number(value) * 1000;
  const date = Date.parse(value);
  return Number.isNaN(date) ? null : Math.max(0, date - nowMs);
}

function readError(body: string): ErrorResponse | null {
  try {
    const value: unknown = JSON.parse(body);
    return isErrorResponse(value) ? value : null;
  } catch {
    return null;
  }
}

function isErrorResponse(value: unknown): value is ErrorResponse {
  const { error, meta } = (value ?? {}) as Partial<ErrorResponse>;
  return typeof error?.code === "string" && typeof error.message === "string" && typeof meta?.request_id === "string";
}
