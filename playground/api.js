/** Calls to the service. The key lives in this module's memory and goes to this service alone. */

// Places of a prompt or picture under way, whatever else waits here.
const MAX_CALLS = 4;

const BASE = new URL(".", document.baseURI);
const VISIBLE_ASCII = /^[\x21-\x7e]+$/;

let key = null;
let askPerson = async () => null;
let asking = null;

/** An error of the service in the contract's form, or one that kept the call from reaching it. */
export class ApiError extends Error {
  constructor({ code, message, status = 0, details = [], requestId = null, retryAfterS = null }) {
    super(message);
    Object.assign(this, { code, status, details: details ?? [], requestId, retryAfterS });
  }
}

/** Any error as one that can be shown; what this page itself stumbled over is told as that. */
export function asApiError(error) {
  if (error instanceof ApiError) return error;
  return new ApiError({ code: "BAD_ANSWER", message: `The page could not make use of the answer: ${error.message}` });
}

/** The absolute URL of a path of this service. */
export const urlOf = (path) => new URL(path, BASE).href;

/** Whether a key was given. */
export const hasKey = () => key !== null;

/** Forget the key, or take one. */
export function setKey(value) {
  if (value !== null && !VISIBLE_ASCII.test(value)) throw new RangeError("A key has visible ASCII characters only.");
  key = value;
}

/** How a person is asked for the key: given the service's words, resolves to true once `setKey` was called. */
export function onUnauthorized(ask) {
  askPerson = ask;
}

/**
 * One call. When the service wants a key, the person is asked, once for all calls that wait, and it is made again.
 *
 * @param {string} path without a slash in front
 * @param {RequestInit & {isQuiet?: boolean}} options `isQuiet`: nobody is asked for a key
 * @returns {Promise<any>} the JSON of an answer with a status of 2xx
 * @throws {ApiError}
 */
export async function call(path, { isQuiet = false, ...options } = {}) {
  for (;;) {
    const sent = key;
    try {
      return await send(path, options);
    } catch (error) {
      if (error.status !== 401 || isQuiet) throw error;
      if (sent !== key) continue; // another call has brought one meanwhile
      asking ??= askPerson(error.message).finally(() => (asking = null));
      if (!(await asking)) throw error;
    }
  }
}

async function send(path, options) {
  const headers = { ...options.headers, ...(key === null ? {} : { "X-API-Key": key }) };
  let response;
  try {
    response = await fetch(urlOf(path), { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    throw unreachable(error, "The service did not answer.");
  }
  if (!response.ok) throw await errorOf(response);
  return readJson(response);
}

async function readJson(response) {
  let text;
  try {
    text = await response.text();
  } catch (error) {
    throw unreachable(error, "The connection broke before the answer was whole.");
  }
  try {
    return JSON.parse(text);
  } catch {
    const message = "Something between this page and the service answered in its place.";
    throw new ApiError({ code: "BAD_ANSWER", message, status: response.status, requestId: response.headers.get("X-Request-ID") });
  }
}

function unreachable(error, message) {
  return error.name === "AbortError" ? error : new ApiError({ code: "UNREACHABLE", message });
}

async function errorOf(response) {
  const retryAfterS = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const told = { status: response.status, retryAfterS: Number.isNaN(retryAfterS) ? null : retryAfterS };
  const requestId = response.headers.get("X-Request-ID");
  try {
    const { error, meta } = await response.json();
    return new ApiError({ ...told, ...error, requestId: meta.request_id });
  } catch {
    const message = `Something between this page and the service answered with status ${response.status}.`;
    return new ApiError({ ...told, code: `HTTP_${response.status}`, message, requestId });
  }
}

/** Runs at most so many tasks at once; the others wait for their turn, first come, first served. */
class Turns {
  constructor(count) {
    this._free = count;
    this._waiting = [];
  }

  async take(task) {
    if (this._free > 0) this._free--;
    else await new Promise((resolve) => this._waiting.push(resolve));
    try {
      return await task();
    } finally {
      const next = this._waiting.shift();
      if (next) next();
      else this._free++;
    }
  }
}

const turns = new Turns(MAX_CALLS);

/** What is served here: the OpenAPI document. */
export async function readDocument() {
  return call("docs.json", { isQuiet: true });
}

/** `GET /health`. */
export async function readHealth() {
  return call("health", { isQuiet: true });
}

/** `GET /api/v1/model/info`, if that needs no key or the key is known. */
export async function readModel() {
  return call("api/v1/model/info", { isQuiet: true });
}

/**
 * Store a picture.
 *
 * @param {Blob} file
 * @param {string} name under uploads/
 * @returns {Promise<string>} what may be sent as `image_url`
 */
export async function upload(file, name) {
  const options = { method: "PUT", body: file, headers: { "Content-Type": "application/octet-stream" } };
  return (await call(`files/uploads/${name}`, options)).url;
}

/**
 * `POST /api/v1/predict`.
 *
 * @param {object} body
 * @param {AbortSignal} signal
 * @returns {Promise<{answer: object, roundTripMs: number}>}
 */
export function predict(body, signal) {
  return turns.take(async () => {
    signal.throwIfAborted();
    const began = performance.now();
    const headers = { "Content-Type": "application/json" };
    const options = { method: "POST", body: JSON.stringify(body), headers, signal };
    const answer = await call("api/v1/predict", options);
    return { answer, roundTripMs: performance.now() - began };
  });
}
