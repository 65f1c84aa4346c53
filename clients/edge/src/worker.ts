/**
 * The Edge's part of the flow, as a Cloudflare Worker.
 *
 *     POST /segment     an image and a prompt → R2, a pending row, 202; the service is called after the answer
 *     GET  /tasks/:id   the row, as far as its user may see it
 *     every minute      tasks that the service could not be told of, or lost, are sent again
 *
 * Users send their Supabase session's token; their rows are their own.
 */
import { type Context, Hono } from "hono";
import { bodyLimit } from "hono/body-limit";
import { verify } from "hono/jwt";
import { ClientError, SegmentClient, ServiceError } from "./client.js";
import { envelope, Fault, invalid } from "./faults.js";
import { kindOfImage } from "./images.js";
import { type NewRow, type Row, Rows } from "./rows.js";

export interface Bindings {
  readonly IMAGES: R2Bucket;
  /** The custom domain of the bucket. */
  readonly R2_PUBLIC_URL: string;
  readonly SERVICE_URL: string;
  readonly SUPABASE_URL: string;
  /** Of one call to the service, and of all calls of one delivery, in ms. */
  readonly CALL_TIMEOUT_MS: string;
  readonly GIVE_UP_AFTER_MS: string;
  // secrets
  readonly API_SECRET_KEY: string;
  readonly SUPABASE_SERVICE_KEY: string;
  readonly SUPABASE_PUBLISHABLE_KEY: string;
  readonly SUPABASE_JWT_SECRET: string;
}

interface User {
  readonly id: string;
  readonly token: string;
}

interface Upload {
  readonly image: ArrayBuffer;
  readonly prompt: string;
  readonly taskId: string;
}

type Env = { Bindings: Bindings; Variables: { requestId: string; user: User } };

const MAX_IMAGE_BYTES = 25_000_000;
const MAX_FORM_BYTES = 10_000; // around the image
const MAX_PROMPT_CHARS = 1000;
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;
const REQUEST_ID = /^[A-Za-z0-9_.:-]{1,128}$/;
// biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is refused
const CONTROLS = /[\x00-\x1f\x7f-\x9f]/;

const SWEEP = 50; // rows in one go
const MINUTE_MS = 60_000;
const PENDING_MS = MINUTE_MS; // longer than a delivery lasts
const PROCESSING_MS = 15 * MINUTE_MS; // longer than the service tries: it lost the task, with its disk
const HOPELESS_MS = 24 * 60 * MINUTE_MS;
/** The request itself is at fault, and no repeat will change that. */
const FINAL: ReadonlySet<number> = new Set([400, 404, 409, 413, 415, 422]);

const app = new Hono<Env>();

app.use(async (context, next) => {
  const sent = context.req.header("X-Request-ID") ?? "";
  context.set("requestId", REQUEST_ID.test(sent) ? sent : crypto.randomUUID());
  await next();
  context.header("X-Request-ID", context.get("requestId"));
});

app.use("/segment", signedIn);
app.use("/tasks/*", signedIn);

app.post("/segment", bodyLimit({ maxSize: MAX_IMAGE_BYTES + MAX_FORM_BYTES, onError: tooLarge }), async (context) => {
  const { env } = context;
  const { image, prompt, taskId } = await readUpload(context);
  const row: NewRow = {
    id: taskId,
    user_id: context.get("user").id,
    source_image_url: `${env.R2_PUBLIC_URL}/${await keep(env, context.get("user"), image)}`,
    text_prompt: prompt,
  };
  const rows = new Rows(env.SUPABASE_URL, { key: env.SUPABASE_SERVICE_KEY });
  if (!(await rows.insert(row))) await requireSame(rows, row);
  context.executionCtx.waitUntil(deliver(env, row, context.get("requestId")));
  context.header("Location", `/tasks/${taskId}`);
  return context.json({ task_id: taskId, status: "pending" }, 202);
});

app.get("/tasks/:id", async (context) => {
  const { env } = context;
  const id = context.req.param("id");
  const access = { key: env.SUPABASE_PUBLISHABLE_KEY, userToken: context.get("user").token };
  const row = UUID.test(id) ? await new Rows(env.SUPABASE_URL, access).find(id) : null;
  if (row === null) throw new Fault(404, "TASK_NOT_FOUND", "You have no task with this id.");
  return context.json(shown(row));
});

app.notFound((context) => fail(context, new Fault(404, "NOT_FOUND", "There is no such route.")));

app.onError((error, context) => {
  const fault = error instanceof Fault ? error : new Fault(500, "INTERNAL_ERROR", "Something is wrong here.");
  if (fault.status >= 500)
    log("error", "failed", { requestId: context.get("requestId"), cause: `${error.cause ?? error}` });
  return fail(context, fault);
});

export default {
  fetch: app.fetch,

  async scheduled(_controller, env) {
    await sweep(env);
  },
} satisfies ExportedHandler<Bindings>;

/** Lets a request through that has a valid session. */
async function signedIn(context: Context<Env>, next: () => Promise<void>): Promise<void> {
  const [, token] = /^Bearer (\S+)$/i.exec(context.req.header("Authorization") ?? "") ?? [];
  const claims = token && (await verify(token, context.env.SUPABASE_JWT_SECRET, "HS256").catch(() => undefined));
  const id = claims ? claims.sub : undefined;
  if (!token || !claims || claims.role !== "authenticated" || typeof id !== "string" || !UUID.test(id)) {
    throw new Fault(401, "UNAUTHORIZED", "Send your session's token: Authorization: Bearer …");
  }
  context.set("user", { id, token });
  await next();
}

/**
 * The image and what is asked of it: a form with `image`, `text_prompt` and perhaps `task_id`, or the bare image with
 * the other two in the query.
 */
async function readUpload(context: Context<Env>): Promise<Upload> {
  const { req } = context;
  const isForm = /^multipart\/form-data\b/i.test(req.header("Content-Type") ?? "");
  const form = isForm ? await req.formData().catch(notAForm) : null;
  const field = (name: string): unknown => (form ? form.get(name) : req.query(name)) ?? undefined;
  const file = form ? field("image") : await req.arrayBuffer();
  if (typeof file === "string" || file === undefined) throw invalid("image", "Expected a file.");
  const image = file instanceof ArrayBuffer ? file : await (file as File).arrayBuffer();
  if (image.byteLength > MAX_IMAGE_BYTES) throw tooLarge();
  return { image, prompt: readPrompt(field("text_prompt")), taskId: readTaskId(field("task_id")) };
}

function readPrompt(value: unknown): string {
  if (typeof value !== "string" || value.trim() === "") throw invalid("text_prompt", "Expected what to look for.");
  if (value.length > MAX_PROMPT_CHARS) throw invalid("text_prompt", `Expected at most ${MAX_PROMPT_CHARS} characters.`);
  if (CONTROLS.test(value)) throw invalid("text_prompt", "Expected no control characters.");
  return value;
}

/** The caller's own id makes its repeats harmless. */
function readTaskId(value: unknown): string {
  if (value === undefined) return crypto.randomUUID();
  if (typeof value !== "string" || !UUID.test(value)) throw invalid("task_id", "Expected a UUID in lower case.");
  return value;
}

/** Puts the image into R2 under its own hash, so that a repeat overwrites nothing else; returns the key. */
async function keep(env: Bindings, user: User, image: ArrayBuffer): Promise<string> {
  const kind = kindOfImage(image);
  if (kind === null) {
    throw new Fault(415, "UNSUPPORTED_IMAGE", "Expected JPEG, PNG, WebP, HEIC, AVIF, BMP, TIFF or GIF.");
  }
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", image));
  const name = [...hash].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const key = `uploads/${user.id}/${name}.${kind.extension}`;
  try {
    await env.IMAGES.put(key, image, { httpMetadata: { contentType: kind.mediaType } });
  } catch (cause) {
    throw new Fault(502, "STORAGE_UNAVAILABLE", "The image could not be stored. Try again.", undefined, { cause });
  }
  return key;
}

/** @throws Fault The row that is there is another task's. */
async function requireSame(rows: Rows, row: NewRow): Promise<void> {
  const found = await rows.find(row.id);
  const keys = ["user_id", "source_image_url", "text_prompt"] as const;
  if (found === null || keys.some((key) => found[key] !== row[key])) {
    throw new Fault(409, "TASK_CONFLICT", "This task_id was used before with other inputs: take a new one.");
  }
}

function shown(row: Row): Record<string, unknown> {
  const { confidence = null, error = null } = row.metadata;
  return { task_id: row.id, status: row.status, mask_url: row.mask_image_url, labels: row.labels, confidence, error };
}

/**
 * Hands a task to the service. What it will never take becomes `error` in the row; what it did not take yet stays
 * `pending`, for the next sweep.
 *
 * @returns Whether the service may take another task: what stopped this one is its own, and not the service's or the
 *   key's.
 */
async function deliver(env: Bindings, row: NewRow, requestId: string): Promise<boolean> {
  const client = new SegmentClient({
    baseUrl: env.SERVICE_URL,
    apiKey: env.API_SECRET_KEY,
    timeoutMs: Number(env.CALL_TIMEOUT_MS),
    retry: { maxPauseMs: 4_000, giveUpAfterMs: Number(env.GIVE_UP_AFTER_MS) },
  });
  const { id: task_id, user_id, source_image_url: image_url, text_prompt } = row;
  try {
    await client.predictAsync({ task_id, user_id, image_url, text_prompt }, { requestId });
    return true;
  } catch (error) {
    if (!(error instanceof ClientError)) throw error;
    log("warn", "not delivered", { requestId, taskId: task_id, cause: `${error.name}: ${error.message}` });
    if (!(error instanceof ServiceError)) return !error.mayPass;
    if (!FINAL.has(error.status)) return !error.mayPass && error.status !== 401;
    await new Rows(env.SUPABASE_URL, { key: env.SUPABASE_SERVICE_KEY }).fail(task_id, error.code, error.message);
    return true;
  }
}

/**
 * Sends again what waits for the service, one by one, until it can take none; the next sweep goes on there. A task that
 * fails by itself is passed over, so that it does not stand before all others every minute.
 */
async function sweep(env: Bindings): Promise<void> {
  const rows = new Rows(env.SUPABASE_URL, { key: env.SUPABASE_SERVICE_KEY });
  const ago = (ms: number): Date => new Date(Date.now() - ms);
  await rows.failOlderThan(ago(HOPELESS_MS), "NOT_DELIVERED", "The service could not be reached for a day.");
  const waiting = [
    ...(await rows.untouched("pending", ago(PENDING_MS), SWEEP)),
    ...(await rows.untouched("processing", ago(PROCESSING_MS), SWEEP)),
  ];
  for (const row of waiting) {
    if (!(await deliver(env, row, crypto.randomUUID()))) return;
  }
}

function tooLarge(): never {
  throw new Fault(413, "IMAGE_TOO_LARGE", `Expected an image of at most ${MAX_IMAGE_BYTES} bytes.`);
}

function notAForm(cause: unknown): never {
  throw new Fault(400, "MALFORMED_FORM", "The body is not a form.", undefined, { cause });
}

function fail(context: Context<Env>, fault: Fault): Response {
  context.header("X-Request-ID", context.get("requestId"));
  return context.json(envelope(fault, context.get("requestId")), fault.status);
}

function log(level: "warn" | "error", message: string, fields: Readonly<Record<string, string>>): void {
  console[level](JSON.stringify({ message, ...fields }));
}
