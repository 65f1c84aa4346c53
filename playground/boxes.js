/** Example boxes on the picture: drawn and moved by pointer, edited by keyboard. */
import { make, replaceKeepingFocus } from "./dom.js";

const LEAST_DRAG_PX = 5;
const STEP = 0.01; // of the picture, for one press of an arrow key
const KEYS = "Arrow keys move it, with Shift they resize it; N turns it round; Delete takes it away.";

/**
 * @typedef {object} Box
 * @property {[number, number, number, number]} xyxy pixels of the upright picture
 * @property {"positive"|"negative"} label
 */

/** See the module. */
export class BoxEditor {
  /**
   * @param {HTMLElement} layer over the picture
   * @param {object} listeners
   * @param {(box: Box) => void} listeners.onAdd
   * @param {(box: Box) => void} listeners.onChange it was moved, resized or turned round
   * @param {(box: Box) => void} listeners.onRemove
   */
  constructor(layer, listeners) {
    this._layer = layer;
    this._listeners = listeners;
    this._size = null;
    this._drag = null; // stops the one under way
    this._waiting = null; // what was to be shown meanwhile
    this.tool = null; // "positive", "negative", or null: pointers but fingers draw positive ones
    layer.addEventListener("pointerdown", (event) => this._begin(event));
  }

  /**
   * Show boxes; those of the same picture wait for the end of a drag, another picture ends it.
   *
   * @param {{width: number, height: number}|null} size of the picture
   * @param {{box: Box, key: string, about: string, isCurrent: boolean, colour: string}[]} boxes
   */
  show(size, boxes) {
    if (this._drag !== null && size === this._size) {
      this._waiting = boxes;
      return;
    }
    this._drag?.abort();
    Object.assign(this, { _drag: null, _waiting: null, _size: size });
    replaceKeepingFocus(this._layer, ...boxes.map((shown) => this._element(shown)));
  }

  /** Add one in the middle, for those who do not drag; it has the focus then. */
  addInMiddle(label) {
    if (this._size === null) return;
    const { width, height } = this._size;
    const box = { xyxy: [0.375 * width, 0.375 * height, 0.625 * width, 0.625 * height].map(Math.round), label };
    this._listeners.onAdd(box);
    [...this._layer.children].find((element) => element.box === box)?.focus();
  }

  _element({ box, key, about, isCurrent, colour }) {
    const kind = box.label === "positive" ? "Like this" : "Not this";
    const element = make(
      "div",
      {
        class: `box ${box.label}${isCurrent ? "" : " faint"}`,
        data: { key },
        tabindex: "0",
        role: "group",
        "aria-roledescription": "example box",
        "aria-label": `${kind}, for ${about}: ${box.xyxy.join(", ")} pixels. ${KEYS}`,
        title: `${kind}. ${KEYS}`,
        on: { keydown: (event) => this._press(event, box) },
      },
      make("span", { class: "badge", "aria-hidden": "true" }, box.label === "positive" ? "+" : "−"),
      make("span", { class: "corner", "aria-hidden": "true" }),
    );
    element.box = box;
    element.style.setProperty("--colour", colour);
    this._place(element, box.xyxy);
    return element;
  }

  _place(element, [x0, y0, x1, y1]) {
    const { width, height } = this._size;
    element.style.left = `${(100 * x0) / width}%`;
    element.style.top = `${(100 * y0) / height}%`;
    element.style.width = `${(100 * (x1 - x0)) / width}%`;
    element.style.height = `${(100 * (y1 - y0)) / height}%`;
  }

  _begin(event) {
    if (this._size === null || this._drag !== null || event.button !== 0) return;
    const element = event.target.closest(".box");
    if (element !== null) return this._follow(event, element, event.target.matches(".corner") ? "resize" : "move");
    if (event.pointerType === "touch" && this.tool === null) return; // the page is scrolled
    const label = event.shiftKey || this.tool === "negative" ? "negative" : "positive";
    this._follow(event, null, "draw", label);
  }

  _follow(start, element, kind, label) {
    const from = this._pixelAt(start);
    const original = element?.box.xyxy;
    let xyxy = null;
    const move = (event) => {
      const to = this._pixelAt(event);
      const isFar = Math.hypot(event.clientX - start.clientX, event.clientY - start.clientY) >= LEAST_DRAG_PX;
      if (xyxy === null && !isFar) return;
      const by = [to[0] - from[0], to[1] - from[1]];
      if (kind === "draw") xyxy = this._between(from, to);
      else xyxy = kind === "move" ? this._moved(original, by) : this._resized(original, by);
      element ??= this._draft(label);
      this._place(element, xyxy);
    };
    const end = (event) => {
      controller.abort();
      this._drag = null;
      if (this._waiting !== null) this.show(this._size, this._waiting);
      const isDone = event.type === "pointerup" && xyxy !== null;
      if (kind === "draw") element?.remove();
      else if (isDone) this._listeners.onChange(Object.assign(element.box, { xyxy }));
      else this._place(element, original);
      if (kind === "draw" && isDone) this._listeners.onAdd({ xyxy, label });
    };
    const controller = (this._drag = new AbortController());
    const options = { signal: controller.signal };
    this._layer.setPointerCapture(start.pointerId);
    this._layer.addEventListener("pointermove", move, options);
    this._layer.addEventListener("pointerup", end, options);
    this._layer.addEventListener("pointercancel", end, options);
    this._layer.addEventListener("lostpointercapture", end, options);
  }

  _draft(label) {
    const draft = make("div", { class: `box draft ${label}` });
    this._layer.append(draft);
    return draft;
  }

  _press(event, box) {
    const { width, height } = this._size;
    const across = Math.max(1, Math.round(STEP * width));
    const down = Math.max(1, Math.round(STEP * height));
    const by = { ArrowLeft: [-across, 0], ArrowRight: [across, 0], ArrowUp: [0, -down], ArrowDown: [0, down] }[event.key];
    if (by !== undefined) {
      box.xyxy = event.shiftKey ? this._resized(box.xyxy, by) : this._moved(box.xyxy, by);
    } else if (event.key.toLowerCase() === "n") {
      box.label = box.label === "positive" ? "negative" : "positive";
    } else if (event.key !== "Delete" && event.key !== "Backspace") {
      return;
    }
    event.preventDefault();
    if (event.key === "Delete" || event.key === "Backspace") this._listeners.onRemove(box);
    else this._listeners.onChange(box);
  }

  _pixelAt({ clientX, clientY }) {
    const { left, top, width, height } = this._layer.getBoundingClientRect();
    const x = Math.round(((clientX - left) / width) * this._size.width);
    const y = Math.round(((clientY - top) / height) * this._size.height);
    return [clamp(x, this._size.width), clamp(y, this._size.height)];
  }

  /** A box with these corners, at least a pixel wide and high. */
  _between([xa, ya], [xb, yb]) {
    const x0 = Math.min(xa, xb, this._size.width - 1);
    const y0 = Math.min(ya, yb, this._size.height - 1);
    return [x0, y0, Math.max(xa, xb, x0 + 1), Math.max(ya, yb, y0 + 1)];
  }

  _moved([x0, y0, x1, y1], [byX, byY]) {
    const dx = Math.min(Math.max(byX, -x0), this._size.width - x1);
    const dy = Math.min(Math.max(byY, -y0), this._size.height - y1);
    return [x0 + dx, y0 + dy, x1 + dx, y1 + dy];
  }

  _resized([x0, y0, x1, y1], [byX, byY]) {
    return [x0, y0, Math.max(x0 + 1, clamp(x1 + byX, this._size.width)), Math.max(y0 + 1, clamp(y1 + byY, this._size.height))];
  }
}

function clamp(value, most) {
  return Math.min(Math.max(value, 0), most);
}
