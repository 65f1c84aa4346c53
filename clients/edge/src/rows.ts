/** Rows of `segmentation_results` in Supabase, over PostgREST. */
import { ClientError, ConnectionFailed, TimedOut } from "./errors.js";
import { Fault } from "./faults.js";
import { type RetryPolicy, retrying } from "./retry.js";

const TIMEOUT_MS = 5_000;
const RETRY: RetryPolicy = { firstPauseMs: 100, maxPauseMs: 1_000, giveUpAfterMs: 8_000 };
const MAY_PASS: ReadonlySet<number> = new Set([408, 429, 502, 503, 504, 520, 521, 522, 523, 524]);

/** What the Worker writes, and what it needs to send a task again. */
export interface NewRow {
  readonly id: string;
  readonly user_id: string;
  readonly source_image_url: string;
  readonly text_prompt: string;
}

/** What a user is told of a task. */
export interface Row {
  readonly id: string;
  readonly status: "pending" | "processing" | "done" | "error";
  readonly mask_image_url: string | null;
  readonly labels: readonly string[];
  readonly metadata: {
    readonly confidence?: number;
    readonly error?: { readonly code: string; readonly message: string };
  };
}

/** Who asks: a key, and a user's token if it is not the Worker itself. */
export interface Access {
  readonly key: string;
  readonly userToken?: string;
}

/** Supabase answered, and not as it should. */
class Refused extends ClientError {
  readonly mayPass: boolean;

  constructor(readonly status: number) {
    super(`Supabase answered ${status}.`);
    this.mayPass = MAY_PASS.has(status);
  }
}

/**
 * The table, as one of its readers sees it.
 *
 * All methods throw a `Fault` of 502 when Supabase cannot be reached or refuses.
 */
export class Rows {
  readonly #url: string;
  readonly #headers: Readonly<Record<string, string>>;

  constructor(supabaseUrl: string, { key, userToken }: Access) {
    this.#url = `${supabaseUrl.replace(/\/$/, "")}/rest/v1/segmentation_results`;
    // Legacy keys are tokens too, and count only as such; new ones (`sb_…`) only as `apikey`.
    const token = userToken ?? (key.startsWith("eyJ") ? key : undefined);
    this.#headers = {
      apikey: key,
      "Content-Type": "application/json",
      ...(token === undefined ? {} : { Authorization: `Bearer ${token}` }),
    };
  }

  /** Inserts a pending row; false if there is one with this id. */
  async insert(row: NewRow): Promise<boolean> {
    const { status } = await this.#call("POST", "", row, [409]);
    return status !== 409;
  }

  /** The row, if this reader may see it. */
  async find(id: string): Promise<(Row & NewRow) | null> {
    const rows = await this.#select<Row & NewRow>(`id=eq.${id}`, [
      ...["id", "user_id", "source_image_url", "text_prompt"],
      ...["status", "mask_image_url", "labels", "metadata"],
    ]);
    return rows[0] ?? null;
  }

  /** Rows of this status that nobody has touched since then, the oldest first. */
  async untouched(status: Row["status"], since: Date, limit: number): Promise<NewRow[]> {
    const filter = `status=eq.${status}&updated_at=lt.${since.toISOString()}&order=updated_at.asc&limit=${limit}`;
    return this.#select<NewRow>(filter, ["id", "user_id", "source_image_url", "text_prompt"]);
  }

  /** Makes a row that is still pending `error`: nobody works on it, and nobody will. */
  async fail(id: string, code: string, message: string): Promise<void> {
    await this.#call("PATCH", `id=eq.${id}&status=eq.pending`, {
      status: "error",
      metadata: { error: { code, message } },
    });
  }

  /** The same, for all that have been pending since then. */
  async failOlderThan(created: Date, code: string, message: string): Promise<void> {
    const filter = `created_at=lt.${created.toISOString()}&status=eq.pending`;
    await this.#call("PATCH", filter, { status: "error", metadata: { error: { code, message } } });
  }

  async #select<T>(filter: string, columns: readonly string[]): Promise<T[]> {
    const { text } = await this.#call("GET", `${filter}&select=${columns.join(",")}`);
    return JSON.parse(text) as T[];
  }

  async #call(
    method: "GET" | "POST" | "PATCH",
    query: string,
    body?: unknown,
    expected: readonly number[] = [],
  ): Promise<{ status: number; text: string }> {
    const attempt = (leftMs: number): Promise<{ status: number; text: string }> =>
      this.#attempt(method, query, body, expected, Math.min(TIMEOUT_MS, leftMs));
    try {
      return await retrying(attempt, RETRY);
    } catch (cause) {
      throw new Fault(502, "TASK_STORE_UNAVAILABLE", "The database cannot be used now. Try again.", undefined, {
        cause,
      });
    }
  }

  async #attempt(
    method: string,
    query: string,
    body: unknown,
    expected: readonly number[],
    timeoutMs: number,
  ): Promise<{ status: number; text: string }> {
    const timeout = AbortSignal.timeout(timeoutMs);
    let response: Response;
    let text: string;
    try {
      response = await fetch(query ? `${this.#url}?${query}` : this.#url, {
        method,
        headers: { ...this.#headers, ...(method === "GET" ? {} : { Prefer: "return=minimal" }) },
        ...(body === undefined ? {} : { body: JSON.stringify(body) }),
        signal: timeout,
      });
      text = await response.text();
    } catch (cause) {
      if (timeout.aborted) throw new TimedOut("Supabase did not answer in time.", { cause });
      throw new ConnectionFailed("Supabase could not be reached.", { cause });
    }
    if (!response.ok && !expected.includes(response.status)) throw new Refused(response.status);
    return { status: response.status, text };
  }
}
