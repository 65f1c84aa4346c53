/** A real HTTP server that answers as it is told, and remembers what came. */
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";

export interface Seen {
  readonly method: string;
  readonly path: string;
  readonly headers: IncomingMessage["headers"];
  readonly body: string;
  readonly atMs: number;
}

/** One answer; the last of a script is given again and again. */
export type Step = (response: ServerResponse) => void;

export class Scripted {
  readonly seen: Seen[] = [];
  #steps: Step[];
  readonly #server = createServer((request, response) => this.#answer(request, response));

  private constructor(steps: Step[]) {
    this.#steps = steps;
  }

  static async start(...steps: Step[]): Promise<Scripted> {
    const scripted = new Scripted(steps);
    await new Promise<void>((resolve) => scripted.#server.listen(0, "127.0.0.1", resolve));
    return scripted;
  }

  get url(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  /** Between one request and the next, in ms. */
  get pauses(): number[] {
    return this.seen.slice(1).map((seen, index) => seen.atMs - (this.seen[index]?.atMs ?? 0));
  }

  /** Of the requests, what was sent as `task_id`. */
  get taskIds(): unknown[] {
    return this.seen.map((seen) => (JSON.parse(seen.body) as { task_id: unknown }).task_id);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#server.closeAllConnections();
    await new Promise((resolve) => this.#server.close(resolve));
  }

  async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const atMs = performance.now();
    const chunks: Buffer[] = [];
    for await (const chunk of request) chunks.push(chunk as Buffer);
    const { method = "", url: path = "", headers } = request;
    this.seen.push({ method, path, headers, body: Buffer.concat(chunks).toString(), atMs });
    const step = this.#steps.length > 1 ? this.#steps.shift() : this.#steps[0];
    step?.(response);
  }
}

export function json(status: number, body: unknown, headers: Readonly<Record<string, string>> = {}): Step {
  return (response) => {
    response.writeHead(status, { "Content-Type": "application/json", ...headers });
    response.end(JSON.stringify(body));
  };
}

export function text(status: number, body: string, headers: Readonly<Record<string, string>> = {}): Step {
  return (response) => {
    response.writeHead(status, { "Content-Type": "text/html", ...headers });
    response.end(body);
  };
}

/** An error as the service says it. */
export function error(status: number, code: string, headers: Readonly<Record<string, string>> = {}): Step {
  const details = status === 422 ? { details: [{ field: "text_prompt", message: "Field required" }] } : {};
  return json(
    status,
    {
      success: false,
      data: null,
      error: { code, message: `It is ${code}.`, ...details },
      meta: { request_id: "request-1", timestamp: "2026-01-31T12:00:00+00:00" },
    },
    headers,
  );
}

/** Takes the request, and never answers. */
export const silence: Step = () => {};

/** Begins to answer, and never ends. */
export const half: Step = (response) => {
  response.writeHead(200, { "Content-Type": "application/json", "Content-Length": "1000" });
  response.write('{"task_id":');
};

/** Drops the connection in the middle of the answer. */
export const broken: Step = (response) => {
  half(response);
  setTimeout(() => response.destroy(), 5);
};

/** Drops the connection without a word. */
export const hungUp: Step = (response) => {
  response.destroy();
};
