/** Errors, as people read them: what happened, what to do, and what to quote when asking for help. */
import { copyText, make } from "./dom.js";

const AGAIN = "It may pass: try again in a moment.";
const SMALLER = "Choose a smaller picture.";
const OTHER_PICTURE = "Choose another picture, or save this one as JPEG or PNG first.";
const ADVICE = {
  UNREACHABLE: "Is it still running, and is this machine connected? Nothing is lost: try again.",
  BAD_ANSWER: "Is the address of this page the service's own, and nobody asked to sign in on the way? Then try again.",
  UNAUTHORIZED: "Enter the service's API_SECRET_KEY.",
  VALIDATION_FAILED: "The service reads this request differently; the details say which field.",
  INVALID_PROMPT: "Say it in a few plain words, such as “red circle”.",
  UNSUPPORTED_PROMPT: "The model that is loaded cannot do this; use words or boxes.",
  IMAGE_TOO_LARGE: SMALLER,
  BODY_TOO_LARGE: SMALLER,
  UNSUPPORTED_IMAGE: OTHER_PICTURE,
  UNDECODABLE_IMAGE: OTHER_PICTURE,
  IMAGE_NOT_FOUND: "Check the key, or choose the picture again.",
  FOREIGN_IMAGE_URL: "Give a key such as uploads/desk.jpg, or a URL of the bucket.",
  OVERLOADED: "Others are being served",
  MODEL_NOT_READY: "The model is being loaded",
  SHUTTING_DOWN: "The service is about to restart",
  TASK_NOT_FOUND: "This service works on rows that exist already: the page cannot make one. Use a service without Supabase.",
};
const PASSING = new Set(["OVERLOADED", "MODEL_NOT_READY", "SHUTTING_DOWN"]); // their advice goes on with what happens next
const COUNTED_DOWN = new Set([429, 503]);
const FINAL = new Set([413, 415, 422]); // the same again would fail the same

/**
 * A card for one error.
 *
 * @param {ApiError} error
 * @param {object} how
 * @param {string} how.about what failed, such as the prompt
 * @param {(() => void)|null} how.onRetry
 * @param {boolean} how.isRepeatable whether it may be tried again without being told to, after `Retry-After`
 * @returns {{element: HTMLElement, stop: () => void}}
 */
export function errorCard(error, { about, onRetry, isRepeatable }) {
  const mayHelp = onRetry !== null && !FINAL.has(error.status);
  const counts = mayHelp && isRepeatable && COUNTED_DOWN.has(error.status) && error.retryAfterS !== null;
  const advice = adviceOn(error, counts);
  const countdown = make("span", { class: "countdown" });
  const card = make(
    "article",
    { class: "error", role: "alert", data: { code: error.code } },
    make("h3", {}, about),
    make("p", { class: "error-message" }, sentence(error.message)),
    details(error.details.filter(({ message }) => message !== error.message)),
    advice === null ? null : make("p", { class: "error-advice" }, advice),
    make(
      "p",
      { class: "error-foot" },
      make("code", {}, error.status ? `${error.status} ${error.code}` : error.code),
      error.requestId === null ? null : requestId(error.requestId),
    ),
  );
  if (!mayHelp) return { element: card, stop() {} };
  const again = make("button", { type: "button", on: { click: onRetry } }, "Try again");
  card.append(make("p", { class: "actions" }, again, countdown));
  return { element: card, stop: counts ? countDown(countdown, error.retryAfterS, onRetry) : () => {} };
}

function adviceOn({ code, status }, isRepeated) {
  const advice = ADVICE[code] ?? (status >= 500 ? AGAIN : null);
  if (!PASSING.has(code)) return advice;
  return `${advice}; ${isRepeated ? "it will be tried again by itself." : "try again in a moment."}`;
}

function details(list) {
  if (list.length === 0) return null;
  const rows = list.map(({ field, message }) => make("li", {}, make("code", {}, field), ` ${message}`));
  return make("ul", { class: "error-details" }, ...rows);
}

function sentence(text) {
  return /[.!?…]$/.test(text) ? text : `${text}.`;
}

function requestId(id) {
  const copy = async () => {
    await copyText(id);
    button.textContent = "Copied";
  };
  const button = make("button", { type: "button", "aria-label": `Copy request id ${id}`, on: { click: copy } }, "Copy");
  return make("span", { class: "request-id" }, make("code", {}, id), button);
}

function countDown(element, seconds, atZero) {
  const due = performance.now() + seconds * 1000;
  const tick = () => {
    const left = Math.ceil((due - performance.now()) / 1000);
    element.textContent = left > 0 ? `again in ${left} s` : "";
    if (left > 0) return;
    clearInterval(timer);
    atZero();
  };
  const timer = setInterval(tick, 250);
  element.textContent = `again in ${seconds} s`;
  return () => clearInterval(timer);
}
