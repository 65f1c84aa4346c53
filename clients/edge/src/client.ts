/** The service's client: for Workers, Node 20 and browsers, on nothing but `fetch`. */
import { ConnectionFailed, ServiceError, TaskFailed, TimedOut, UnexpectedAnswer } from "./errors.js";
import { DEFAULT_RETRY, type RetryPolicy, retrying, sleep } from "./retry.js";
import type {
  AcceptedResponse,
  BatchRequest,
  BatchResponse,
  HealthResponse,
  ModelInfoResponse,
  PredictRequest,
  PredictResponse,
  TaskResponse,
} from "./schema.js";

export { ClientError, ConnectionFailed, ServiceError, TaskFailed, TimedOut, UnexpectedAnswer } from "./errors.js";
export type { RetryPolicy } from "./retry.js";
export type * from "./schema.js";

/** A call that waits for the model has an answer of the service's within its own 60 s. */
const WAITING_TIMEOUT_MS = 70_000;
const TIMEOUT_MS = 10_000;
const FIRST_POLL_MS = 200;
const MAX_POLL_MS = 5_000;
const POLL_GROWTH = 1.6;
/** The service gives a task without a waiting caller 10 minutes. */
const WAIT_MS = 660_000;

type IdIsOptional<Request extends { readonly task_id: string }> = Omit<Request, "task_id"> &
  Partial<Pick<Request, "task_id">>;

/** As in the contract; without a `task_id` one is made, and is the same in every attempt. */
export type Predict = IdIsOptional<PredictRequest>;
export type PredictBatch = IdIsOptional<BatchRequest>;

/** `location` is where the task can be asked for. */
export type Accepted = AcceptedResponse & { readonly location: string };

export interface ClientOptions {
  /** Of the service, such as `https://gpu.example.com`; a path in it is kept. */
  readonly baseUrl: string;
  readonly apiKey?: string;
  /** Of one attempt: 70 s for `predict` and `predictBatch`, and 10 s for the rest, if not given. */
  readonly timeoutMs?: number;
  readonly retry?: Partial<RetryPolicy>;
}

export interface CallOptions {
  /** Ends the call at once with the signal's reason. The service goes on with what it accepted. */
  readonly signal?: AbortSignal;
  /** Sent as `X-Request-ID`, so that both logs have the same; the service makes one if there is none. */
  readonly requestId?: string;
}

interface Call {
  readonly method: "GET" | "POST";
  readonly path: string;
  readonly body?: string;
  readonly headers?: Readonly<Record<string, string>>;
  readonly timeoutMs: number;
}

interface Answer<T> {
  readonly body: T;
  readonly headers: Headers;
}

/**
 * Calls the service, and calls again after 429, 502, 503, 504, a timeout or a broken connection, with growing pauses
 * and never before `Retry-After`. A repeat is harmless: it has the same `task_id`, and the service computes a task once.
 *
 * All methods throw `ClientError`s, or the reason of the caller's signal.
 */
export class SegmentClient {
  readonly #options: ClientOptions;
  readonly #retry: RetryPolicy;

  constructor(options: ClientOptions) {
    this.#options = options;
    this.#retry = { ...DEFAULT_RETRY, ...options.retry };
  }

  /** Segments an image by one prompt, and waits for the result. */
  async predict(request: Predict, options: CallOptions = {}): Promise<PredictResponse> {
    const answer = await this.#send<PredictResponse>(this.#post(request, WAITING_TIMEOUT_MS), options);
    return answer.body;
  }

  /** Segments an image by many prompts, and waits for the results. */
  async predictBatch(request: PredictBatch, options: CallOptions = {}): Promise<BatchResponse> {
    const answer = await this.#send<BatchResponse>(this.#post(request, WAITING_TIMEOUT_MS), options);
    return answer.body;
  }

  /** Hands a task over: returns once it is on the service's disk, from when on it ends in its row. */
  async predictAsync(request: Predict | PredictBatch, options: CallOptions = {}): Promise<Accepted> {
    const call = { ...this.#post(request, TIMEOUT_MS), headers: { Prefer: "respond-async" } };
    const { body, headers } = await this.#send<AcceptedResponse>(call, options);
    return { ...body, location: headers.get("Location") ?? taskPath(body.task_id) };
  }

  /**
   * Asks for a task with growing pauses until it has ended.
   *
   * @param timeoutMs For all of it, repeats included; 11 minutes if not given, which is longer than the service tries.
   * @throws TaskFailed It ended as `error`.
   * @throws TimedOut It has not ended yet. If the service did not say, its last failure is thrown instead.
   */
  async waitFor(
    taskId: string,
    options: CallOptions & { readonly timeoutMs?: number } = {},
  ): Promise<PredictResponse | BatchResponse> {
    const { timeoutMs = WAIT_MS } = options;
    const endsAt = Date.now() + timeoutMs;
    for (let longest = FIRST_POLL_MS; ; longest = Math.min(longest * POLL_GROWTH, MAX_POLL_MS)) {
      const leftMs = Math.max(0, endsAt - Date.now());
      const { status, result, error } = await this.#get<TaskResponse>(taskPath(taskId), options, leftMs);
      if (status === "done" && result) return result;
      if (error) throw new TaskFailed(taskId, error.code, error.message);
      const pause = longest * (0.5 + Math.random() / 2);
      if (Date.now() + pause >= endsAt) throw new TimedOut(`Task ${taskId} has not ended within ${timeoutMs} ms.`);
      await sleep(pause, options.signal);
    }
  }

  /** How an accepted task stands. */
  async task(taskId: string, options: CallOptions = {}): Promise<TaskResponse> {
    return this.#get<TaskResponse>(taskPath(taskId), options);
  }

  /** What model is loaded. */
  async modelInfo(options: CallOptions = {}): Promise<ModelInfoResponse> {
    return this.#get<ModelInfoResponse>("/api/v1/model/info", options);
  }

  /** Whether the service and what it needs are up. */
  async health(options: CallOptions = {}): Promise<HealthResponse> {
    return this.#get<HealthResponse>("/health", options);
  }

  async #get<T>(path: string, options: CallOptions, leftMs = Number.POSITIVE_INFINITY): Promise<T> {
    const { body } = await this.#send<T>({ method: "GET", path, timeoutMs: TIMEOUT_MS }, options, leftMs);
    return body;
  }

  #post(request: Predict | PredictBatch, timeoutMs: number): Call {
    const path = "prompts" in request ? "/api/v1/predict/batch" : "/api/v1/predict";
    const body = JSON.stringify({ ...request, task_id: request.task_id ?? crypto.randomUUID() });
    return { method: "POST", path, body, timeoutMs };
  }

  /** @param mostMs For all attempts, where the caller has less time than the policy gives. */
  #send<T>(call: Call, options: CallOptions, mostMs = Number.POSITIVE_INFINITY): Promise<Answer<T>> {
    const timeoutMs = this.#options.timeoutMs ?? call.timeoutMs;
    const policy = { ...this.#retry, giveUpAfterMs: Math.min(this.#retry.giveUpAfterMs, mostMs) };
    const attempt = (leftMs: number): Promise<Answer<T>> =>
      this.#attempt<T>(call, Math.min(timeoutMs, leftMs), options);
    return retrying(attempt, policy, options.signal);
  }

  async #attempt<T>(call: Call, timeoutMs: number, options: CallOptions): Promise<Answer<T>> {
    const timeout = AbortSignal.timeout(timeoutMs);
    let response: Response;
    let text: string;
    try {
      response = await fetch(new URL(`${this.#options.baseUrl.replace(/\/$/, "")}${call.path}`), {
        method: call.method,
        headers: this.#headers(call, options),
        ...(call.body === undefined ? {} : { body: call.body }),
        // To another host a redirect would take the key along; the service itself never redirects.
        redirect: "manual",
        signal: options.signal ? AbortSignal.any([options.signal, timeout]) : timeout,
      });
      text = await response.text();
    } catch (cause) {
      options.signal?.throwIfAborted();
      if (timeout.aborted) throw new TimedOut(`No answer within ${Math.round(timeoutMs)} ms.`, { cause });
      throw new ConnectionFailed("The service could not be reached, or the connection broke.", { cause });
    }
    if (response.status >= 400) throw ServiceError.of(response, text);
    return { body: readJson<T>(response, text), headers: response.headers };
  }

  #headers(call: Call, { requestId }: CallOptions): Record<string, string> {
    const { apiKey } = this.#options;
    return {
      Accept: "application/json",
      ...(call.body === undefined ? {} : { "Content-Type": "application/json" }),
      ...(apiKey === undefined ? {} : { "X-API-Key": apiKey }),
      ...(requestId === undefined ? {} : { "X-Request-ID": requestId }),
      ...call.headers,
    };
  }
}

function taskPath(taskId: string): string {
  return `/api/v1/tasks/${encodeURIComponent(taskId)}`;
}

/** The body of a success. That it is what the OpenAPI document says is the service's promise, held by its own tests. */
function readJson<T>(response: Response, text: string): T {
  try {
    if (response.ok) return JSON.parse(text) as T;
  } catch {
    // not JSON
  }
  throw new UnexpectedAnswer(response.status);
}
