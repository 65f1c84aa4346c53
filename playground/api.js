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
    Object.assign(this, { code, status, details, requestId, retryAfterS });
  }
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
 * @returns {Promise<Response>} with a status of 2xx
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
    if (error.name === "AbortError") throw error;
    throw new ApiError({ code: "UNREACHABLE", message: "The service did not answer." });
  }
  if (response.ok) return response;
  throw await errorOf(response);
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
  return (await call("docs.json", { isQuiet: true })).json();
}

/** `GET /health`. */
export async function readHealth() {
  return (await call("health", { isQuiet: true })).json();
}

/** `GET /api/v1/model/info`, if that needs no key or the key is known. */
export async function readModel() {
  return (await call("api/v1/model/info", { isQuiet: true })).json();
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
  return (await (await call(`files/uploads/${name}`, options)).json()).url;
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
    const answer = await (await call("api/v1/predict", options)).json();
    return { answer, roundTripMs: performance.now() - began };
  });
}
