/** What the page needs of the DOM, in few words. No HTML is ever parsed: text stays text. */

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/**
 * A new element.
 *
 * @param {string} tag
 * @param {object} properties `class`, `data`, `on` (event → listener), attributes with a dash or lower-case name, others
 * @param {...(Node|string|null)} children null is left out
 */
export function make(tag, { class: className, data, on, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  Object.assign(element.dataset, data);
  for (const [event, listener] of Object.entries(on ?? {})) element.addEventListener(event, listener);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Put new children in; what had the focus keeps it if something with the same `data-key` is there again. */
export function replaceKeepingFocus(container, ...children) {
  const active = document.activeElement;
  const key = container.contains(active) ? active.dataset.key : undefined;
  container.replaceChildren(...children);
  if (key !== undefined) container.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus();
}

/** A UUID (version 4); `crypto.randomUUID` is not there on pages that come over plain http from another machine. */
export function newUuid() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join("-");
}

/** Put text on the clipboard; over plain http there is only the old way. */
export async function copyText(text) {
  if (navigator.clipboard !== undefined) return navigator.clipboard.writeText(text);
  const field = make("textarea", { class: "visually-hidden", readonly: true });
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

/** Let the browser save a blob. */
export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // once it has surely begun
}

/** 12345.6 as "12,346"; small numbers with a digit behind the point. */
export function milliseconds(ms) {
  return ms < 10 ? ms.toFixed(1) : Math.round(ms).toLocaleString("en");
}
