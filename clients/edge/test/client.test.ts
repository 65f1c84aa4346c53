/** The client against a real HTTP server that misbehaves as told. */
import assert from "node:assert/strict";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { describe, it } from "node:test";
import {
  ClientError,
  type ClientOptions,
  ConnectionFailed,
  type Predict,
  SegmentClient,
  ServiceError,
  TaskFailed,
  TimedOut,
  UnexpectedAnswer,
} from "../src/client.js";
import { readRetryAfter } from "../src/errors.js";
import { pauseMs } from "../src/retry.js";
import { broken, error, half, hungUp, json, Scripted, type Step, silence, text } from "./scripted.js";

const REQUEST: Predict = { image_url: "uploads/desk.jpg", text_prompt: "red circle", user_id: "user-1" };
const RESULT = { task_id: "task-1", mask_url: "https://images.example.com/masks/task-1.png", labels: ["red circle"] };
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;
/** Half a second, of which the last tenth is too short for an attempt. */
const SOON = { firstPauseMs: 50, maxPauseMs: 50, giveUpAfterMs: 500 };
const ok = json(200, RESULT);

function clientOf(server: { url: string }, options: Partial<ClientOptions> = {}): SegmentClient {
  const retry = { firstPauseMs: 10, maxPauseMs: 40, giveUpAfterMs: 5_000, ...options.retry };
  return new SegmentClient({ baseUrl: server.url, apiKey: "key", ...options, retry });
}

async function thrown<T extends ClientError>(promise: Promise<unknown>, type: abstract new (...args: never[]) => T) {
  const reason: unknown = await promise.then(
    () => assert.fail("nothing was thrown"),
    (caught: unknown) => caught,
  );
  assert.ok(reason instanceof type, `expected ${type.name}, got ${reason}`);
  assert.ok(reason instanceof ClientError);
  assert.equal(reason.name, type.name);
  return reason as T;
}

describe("a call", () => {
  it("sends key, type and request id, and makes a task id", async () => {
    await using server = await Scripted.start(ok);
    const result = await clientOf(server).predict(REQUEST, { requestId: "mine-1" });
    assert.deepEqual(result, RESULT);
    const [seen] = server.seen;
    assert.equal(`${seen?.method} ${seen?.path}`, "POST /api/v1/predict");
    assert.equal(seen?.headers["x-api-key"], "key");
    assert.equal(seen?.headers["content-type"], "application/json");
    assert.equal(seen?.headers["x-request-id"], "mine-1");
    assert.match(String(server.taskIds[0]), UUID);
  });

  it("keeps the caller's task id", async () => {
    await using server = await Scripted.start(ok);
    await clientOf(server).predict({ ...REQUEST, task_id: "task-1" });
    assert.deepEqual(server.taskIds, ["task-1"]);
  });

  it("goes to the route of its kind", async () => {
    await using server = await Scripted.start(ok);
    const client = clientOf(server);
    const { text_prompt: _, ...rest } = REQUEST;
    await client.predictBatch({ ...rest, prompts: ["red circle", "blue square"] });
    await client.task("a/b");
    await client.modelInfo();
    await client.health();
    const asked = server.seen.map(({ method, path }) => `${method} ${path}`);
    assert.deepEqual(asked, [
      "POST /api/v1/predict/batch",
      "GET /api/v1/tasks/a%2Fb",
      "GET /api/v1/model/info",
      "GET /health",
    ]);
  });

  for (const prefix of ["/prefix", "/prefix/"]) {
    it(`keeps the path of the base URL: ${prefix}`, async () => {
      await using server = await Scripted.start(ok);
      const client = clientOf({ url: `${server.url}${prefix}` });
      await client.predict(REQUEST);
      await client.health();
      const paths = server.seen.map(({ path }) => path);
      assert.deepEqual(paths, ["/prefix/api/v1/predict", "/prefix/health"]);
    });
  }

  it("does not follow a redirect, which would take the key elsewhere", async () => {
    await using other = await Scripted.start(ok);
    await using server = await Scripted.start(text(307, "", { Location: `${other.url}/api/v1/predict` }));
    const caught = await thrown(clientOf(server).predict(REQUEST), UnexpectedAnswer);
    assert.equal(caught.status, 307);
    assert.equal(other.seen.length, 0);
    assert.equal(server.seen.length, 1);
  });

  it("says so when the answer is not the service's", async () => {
    await using server = await Scripted.start(text(200, "<html>welcome</html>"));
    assert.equal((await thrown(clientOf(server).health(), UnexpectedAnswer)).status, 200);
  });
});

describe("what is tried again", () => {
  const passing: [string, Step][] = [
    ["429", error(429, "OVERLOADED")],
    ["502", error(502, "STORAGE_UNAVAILABLE")],
    ["503", error(503, "MODEL_NOT_READY")],
    ["504", error(504, "TIMED_OUT")],
    ["502 of a proxy", text(502, "<html>Bad Gateway</html>")],
    ["a connection that is dropped", hungUp],
    ["an answer that breaks off", broken],
  ];
  for (const [name, step] of passing) {
    it(`${name}, with the same task id every time`, async () => {
      await using server = await Scripted.start(step, step, ok);
      assert.deepEqual(await clientOf(server).predict(REQUEST), RESULT);
      assert.equal(server.seen.length, 3);
      assert.equal(new Set(server.seen.map((seen) => seen.body)).size, 1);
      assert.match(String(server.taskIds[0]), UUID);
    });
  }

  for (const [name, step] of [
    ["no answer in time", silence],
    ["half an answer in time", half],
  ] as const) {
    it(`${name}, with the same task id`, async () => {
      await using server = await Scripted.start(step, ok);
      assert.deepEqual(await clientOf(server, { timeoutMs: 200 }).predict(REQUEST), RESULT);
      assert.equal(server.seen.length, 2);
      assert.equal(new Set(server.taskIds).size, 1);
    });
  }

  it("nobody listening, until somebody does", async () => {
    const place = createServer();
    await new Promise<void>((resolve) => place.listen(0, "127.0.0.1", resolve));
    const { port } = place.address() as AddressInfo;
    await new Promise((resolve) => place.close(resolve));
    const answer = clientOf({ url: `http://127.0.0.1:${port}` }).health();
    setTimeout(() => place.listen(port, "127.0.0.1"), 100);
    place.on("request", (_, response) => response.end('{"status":"ok"}'));
    try {
      assert.equal((await answer).status, "ok");
    } finally {
      place.closeAllConnections();
      place.close();
    }
  });
});

describe("what is not tried again", () => {
  for (const status of [400, 401, 404, 405, 409, 413, 415, 422, 500]) {
    it(`${status}`, async () => {
      await using server = await Scripted.start(error(status, "SOME_CODE"), ok);
      const caught = await thrown(clientOf(server).predict(REQUEST), ServiceError);
      assert.equal(server.seen.length, 1);
      assert.equal(caught.status, status);
      assert.equal(caught.code, "SOME_CODE");
      assert.equal(caught.message, "It is SOME_CODE.");
      assert.equal(caught.requestId, "request-1");
      assert.equal(caught.mayPass, false);
      const details = status === 422 ? [{ field: "text_prompt", message: "Field required" }] : [];
      assert.deepEqual(caught.details, details);
    });
  }

  it("an error whose body is somebody else's has a code all the same", async () => {
    await using server = await Scripted.start(text(403, "<html>no</html>", { "X-Request-ID": "edge-7" }));
    const caught = await thrown(clientOf(server).predict(REQUEST), ServiceError);
    assert.deepEqual([caught.code, caught.requestId, caught.details], ["HTTP_403", "edge-7", []]);
  });
});

describe("pauses", () => {
  it("are never shorter than Retry-After asks, in seconds", async () => {
    await using server = await Scripted.start(error(429, "OVERLOADED", { "Retry-After": "1" }), ok);
    await clientOf(server).predict(REQUEST);
    const [pause = 0] = server.pauses;
    assert.ok(pause >= 1000 && pause < 1500, `${pause}`);
  });

  it("or as a date", async () => {
    const date = new Date(Date.now() + 2000).toUTCString(); // without its milliseconds
    await using server = await Scripted.start(error(503, "MODEL_NOT_READY", { "Retry-After": date }), ok);
    await clientOf(server).predict(REQUEST);
    assert.ok((server.pauses[0] ?? 0) >= 900, `${server.pauses}`);
  });

  it("grow, up to a limit, and differ", () => {
    const policy = { firstPauseMs: 100, maxPauseMs: 1000, giveUpAfterMs: 0 };
    const drawn = (attempt: number, retryAfterMs: number | null): number[] =>
      Array.from({ length: 200 }, () => pauseMs(attempt, retryAfterMs, policy));
    const within = (pauses: number[], least: number, most: number): void => {
      assert.ok(Math.min(...pauses) >= least && Math.max(...pauses) <= most);
      assert.ok(new Set(pauses).size > 190);
    };
    within(drawn(0, null), 50, 100);
    within(drawn(2, null), 200, 400);
    within(drawn(9, null), 500, 1000);
    within(drawn(0, 5000), 5050, 5100);
  });

  it("a Retry-After that nobody can read is none", () => {
    const now = Date.parse("2026-01-31T12:00:00Z");
    assert.equal(readRetryAfter(null, now), null);
    assert.equal(readRetryAfter("soon", now), null);
    assert.equal(readRetryAfter("-5", now) ?? 0, 0);
    assert.equal(readRetryAfter("7", now), 7000);
    assert.equal(readRetryAfter("Sat, 31 Jan 2026 12:00:10 GMT", now), 10_000);
    assert.equal(readRetryAfter("Sat, 31 Jan 2026 11:00:00 GMT", now), 0);
  });
});

describe("the end of trying", () => {
  it("comes in time, with the last failure", async () => {
    await using server = await Scripted.start(error(503, "MODEL_NOT_READY"));
    const began = performance.now();
    const caught = await thrown(clientOf(server, { retry: SOON }).predict(REQUEST), ServiceError);
    assert.equal(caught.code, "MODEL_NOT_READY");
    assert.ok(caught.mayPass);
    assert.ok(server.seen.length > 3);
    assert.ok(performance.now() - began < 1500);
  });

  it("comes at once when the service asks for more patience than there is", async () => {
    await using server = await Scripted.start(error(429, "OVERLOADED", { "Retry-After": "60" }));
    const caught = await thrown(clientOf(server).predict(REQUEST), ServiceError);
    assert.equal(caught.retryAfterMs, 60_000);
    assert.equal(server.seen.length, 1);
  });

  it("cuts the last attempt short", async () => {
    await using server = await Scripted.start(silence);
    const began = performance.now();
    await thrown(clientOf(server, { retry: { giveUpAfterMs: 300 } }).predict(REQUEST), TimedOut);
    assert.ok(performance.now() - began < 1500);
  });

  it("says that nobody answered", async () => {
    await using server = await Scripted.start(hungUp);
    const caught = await thrown(clientOf(server, { retry: SOON }).health(), ConnectionFailed);
    assert.ok(caught.cause instanceof Error);
  });

  for (const [name, step] of [
    ["a call", silence],
    ["a pause", error(503, "MODEL_NOT_READY", { "Retry-After": "3" })],
  ] as const) {
    it(`comes in the middle of ${name} when the caller has enough`, async () => {
      await using server = await Scripted.start(step);
      const reason = new Error("enough");
      const began = performance.now();
      const controller = new AbortController();
      setTimeout(() => controller.abort(reason), 150);
      await assert.rejects(clientOf(server).predict(REQUEST, { signal: controller.signal }), reason);
      assert.equal(server.seen.length, 1);
      assert.ok(performance.now() - began < 1500);
    });
  }

  it("comes before the beginning when the caller had enough before", async () => {
    await using server = await Scripted.start(ok);
    const reason = new Error("enough");
    await assert.rejects(clientOf(server).predict(REQUEST, { signal: AbortSignal.abort(reason) }), reason);
    assert.equal(server.seen.length, 0);
  });
});

describe("a task that is handed over", () => {
  const accepted = json(202, { task_id: "task-1", status: "processing" }, { Location: "/api/v1/tasks/task-1" });
  const working = json(200, { task_id: "task-1", status: "processing", stage: "segment" });
  const done = json(200, { task_id: "task-1", status: "done", stage: "done", result: RESULT });

  it("asks not to wait, and is told where to look", async () => {
    await using server = await Scripted.start(error(503, "SHUTTING_DOWN"), accepted);
    const answer = await clientOf(server).predictAsync(REQUEST);
    assert.deepEqual(answer, { task_id: "task-1", status: "processing", location: "/api/v1/tasks/task-1" });
    assert.deepEqual(
      server.seen.map((seen) => seen.headers.prefer),
      ["respond-async", "respond-async"],
    );
    assert.equal(new Set(server.taskIds).size, 1);
  });

  it("is asked for with growing pauses until it is done", async () => {
    await using server = await Scripted.start(working, working, working, working, error(502, "X"), done);
    assert.deepEqual(await clientOf(server).waitFor("task-1"), RESULT);
    const [first = 0, , , fourth = 0] = server.pauses;
    assert.equal(server.seen.length, 6);
    // 100 to 200 ms, and 4.1 times that after three more
    assert.ok(first >= 95 && fourth >= 400, `${server.pauses}`);
  });

  it("that failed is an error", async () => {
    const failed = { task_id: "task-1", status: "error", error: { code: "UNDECODABLE_IMAGE", message: "Truncated." } };
    await using server = await Scripted.start(working, json(200, failed));
    const caught = await thrown(clientOf(server).waitFor("task-1"), TaskFailed);
    assert.deepEqual([caught.taskId, caught.code, caught.message], ["task-1", "UNDECODABLE_IMAGE", "Truncated."]);
  });

  it("that nobody knows is an error at once", async () => {
    await using server = await Scripted.start(error(404, "TASK_NOT_FOUND"));
    const caught = await thrown(clientOf(server).waitFor("task-1"), ServiceError);
    assert.equal(caught.code, "TASK_NOT_FOUND");
    assert.equal(server.seen.length, 1);
  });

  it("is waited for no longer than wanted", async () => {
    await using server = await Scripted.start(working);
    await thrown(clientOf(server).waitFor("task-1", { timeoutMs: 500 }), TimedOut);
    assert.ok(server.seen.length >= 2);
  });

  for (const [name, step, type] of [
    ["is away", error(503, "MODEL_NOT_READY"), ServiceError],
    ["is silent", silence, TimedOut],
  ] as const) {
    it(`is waited for no longer than wanted while the service ${name}`, async () => {
      await using server = await Scripted.start(working, step);
      const began = performance.now();
      const caught = await thrown<ClientError>(clientOf(server).waitFor("task-1", { timeoutMs: 500 }), type);
      assert.ok(caught.mayPass);
      assert.ok(server.seen.length >= 2);
      assert.ok(performance.now() - began < 2000);
    });
  }

  it("is no longer waited for when the caller has enough", async () => {
    await using server = await Scripted.start(working);
    const reason = new Error("enough");
    const controller = new AbortController();
    setTimeout(() => controller.abort(reason), 150);
    await assert.rejects(clientOf(server).waitFor("task-1", { signal: controller.signal }), reason);
  });
});
