/** The picture, what lies over it, and what is under the pointer. */
import { colourTable, InstanceMap, paint } from "./painter.js";

// More would not be seen, and would make the slider slow.
const MAX_DRAWN_PIXELS = 1_800_000;
const MAX_HEIGHT_SHARE = 0.76; // of the window
const MIN_HEIGHT_PX = 220;
const GLOW_MS = 900;

/** See the module. Sizes are in CSS pixels unless they say otherwise. */
export class Stage {
  /**
   * @param {HTMLElement} stage around the frame; its width is what there is
   * @param {HTMLElement} frame
   * @param {HTMLCanvasElement} photo
   * @param {HTMLCanvasElement} overlay
   */
  constructor(stage, frame, photo, overlay) {
    this._stage = stage;
    this._frame = frame;
    this._photo = photo;
    this._overlay = overlay;
    this._context = overlay.getContext("2d");
    this._picture = null;
    this._size = null;
    this._instances = [];
    this._how = { view: "overlay", threshold: 0.5, lit: null };
    this._arrivals = new Map();
    this._isDue = false;
    this._reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
    new ResizeObserver(() => this._fit()).observe(stage);
    addEventListener("resize", () => this._fit());
  }

  /** The picture that is shown, if any, and the size of the picture that is segmented, once it is known. */
  setPicture(picture, size) {
    this._picture = picture;
    this._size = size;
    this._frame.classList.toggle("unseen", picture === null);
    this._fit();
  }

  /**
   * What was found. Those in `arrived` light up.
   *
   * @param {import("./painter.js").Instance[]} instances
   * @param {import("./painter.js").Instance[]} arrived
   */
  setInstances(instances, arrived = []) {
    this._instances = instances;
    if (!this._reducedMotion.matches) {
      for (const instance of arrived) this._arrivals.set(instance, performance.now());
    }
    this._rebuild();
  }

  /** Change the view, the threshold, or which instance is lit; nothing is asked of the service. */
  show(change) {
    Object.assign(this._how, change);
    this._frame.dataset.view = this._how.view;
    this._request();
  }

  /** The visible instance at a place of the frame, both from 0 to 1, or null. */
  at(x, y) {
    const map = this._map;
    return map?.at(Math.floor(x * map.width), Math.floor(y * map.height), this._how.threshold) ?? null;
  }

  _fit() {
    if (this._size === null) return;
    const { width, height } = this._size;
    const room = this._stage.clientWidth;
    const tallest = Math.max(MIN_HEIGHT_PX, innerHeight * MAX_HEIGHT_SHARE);
    const shown = Math.min(room, (tallest * width) / height);
    this._frame.style.width = `${shown}px`;
    this._frame.style.height = `${(shown * height) / width}px`;
    const densest = Math.sqrt(MAX_DRAWN_PIXELS / (shown * ((shown * height) / width)));
    const density = Math.min(devicePixelRatio, densest);
    const drawnWidth = Math.max(1, Math.round(shown * density));
    const drawnHeight = Math.max(1, Math.round((shown * density * height) / width));
    if (drawnWidth === this._drawn?.width && drawnHeight === this._drawn.height && this._picture === this._drawn.picture)
      return;
    this._drawn = { width: drawnWidth, height: drawnHeight, density, picture: this._picture };
    for (const canvas of [this._photo, this._overlay]) Object.assign(canvas, { width: drawnWidth, height: drawnHeight });
    if (this._picture !== null) {
      const context = this._photo.getContext("2d");
      context.imageSmoothingQuality = "high";
      context.drawImage(this._picture, 0, 0, drawnWidth, drawnHeight);
    }
    this._image = this._context.createImageData(drawnWidth, drawnHeight);
    this._rebuild();
  }

  _rebuild() {
    if (this._drawn === undefined) return;
    const { width, height, density } = this._drawn;
    this._map = new InstanceMap(width, height, this._instances, density);
    this._request();
  }

  _request() {
    if (this._isDue) return;
    this._isDue = true;
    requestAnimationFrame(() => {
      this._isDue = false;
      this._draw();
    });
  }

  _draw() {
    if (this._map === undefined) return;
    const began = performance.now();
    for (const [instance, arrived] of this._arrivals) if (began - arrived > GLOW_MS) this._arrivals.delete(instance);
    const table = colourTable(this._map, { ...this._how, glow: (instance) => this._glow(instance, began) });
    const picture = this._picture === null ? null : this._photo;
    paint(this._context, this._map, table, { view: this._how.view, picture, image: this._image });
    performance.clearMeasures("draw"); // one is kept: the last
    performance.measure("draw", { start: began, end: performance.now() });
    if (this._arrivals.size > 0) this._request();
  }

  _glow(instance, now) {
    const arrived = this._arrivals.get(instance);
    return arrived === undefined ? 0 : Math.max(0, 1 - (now - arrived) / GLOW_MS) ** 2;
  }
}
