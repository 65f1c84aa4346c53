/**
 * Draws instances so that moving the score threshold costs one table look-up a pixel.
 *
 * Every pixel belongs to the best-scored instance that covers it. Whatever the threshold hides has a lower score than
 * what it leaves, so the map of pixels never changes with it: only the table of colours does.
 */
import { paintMask } from "./rle.js";

/**
 * @typedef {object} Instance one that was found, as the page keeps it
 * @property {number} score 0 to 1
 * @property {Uint32Array} ends of its mask's runs
 * @property {[number, number]} sizeHw of its mask
 * @property {[number, number, number]} promptColour
 * @property {[number, number, number]} ownColour
 */

// A pixel's place in its instance: the two lowest bits of what the map holds; the others are the instance's number.
const INSIDE = 0;
const OUTLINE = 1; // the outermost pixels
const INLINE = 2; // the ones behind them

const FILL_ALPHA = 0.45;
const WHITE = [255, 255, 255];

/** Which instance each pixel shows, at one size. */
export class InstanceMap {
  /**
   * @param {number} width of the drawing, in its own pixels
   * @param {number} height
   * @param {Instance[]} instances in any order
   */
  constructor(width, height, instances) {
    this.width = width;
    this.height = height;
    this.instances = instances;
    this._cells = new Uint16Array(width * height);
    const worstFirst = instances.map((_, index) => index).sort((a, b) => instances[a].score - instances[b].score);
    for (const index of worstFirst) {
      const { ends, sizeHw } = instances[index];
      paintMask(this._cells, width, height, ends, sizeHw, (index + 1) << 2);
    }
    this._mark(OUTLINE, (cell, other) => cell >> 2 !== other >> 2);
    this._mark(INLINE, (cell, other) => (other & 3) === OUTLINE);
  }

  /** The instance at a pixel that is drawn there above the threshold, or null. */
  at(x, y, threshold) {
    if (x < 0 || y < 0 || x >= this.width || y >= this.height) return null;
    const instance = this.instances[(this._cells[y * this.width + x] >> 2) - 1];
    return instance !== undefined && instance.score > threshold ? instance : null;
  }

  /**
   * Write the colour of every pixel.
   *
   * @param {Uint32Array} pixels RGBA, little-endian
   * @param {Uint32Array} table of `colourTable`
   */
  fill(pixels, table) {
    const cells = this._cells;
    for (let i = 0; i < cells.length; i++) pixels[i] = table[cells[i]];
  }

  _mark(kind, isAtEdge) {
    const { width, height, _cells: cells } = this;
    for (let y = 0, at = 0; y < height; y++) {
      for (let x = 0; x < width; x++, at++) {
        const cell = cells[at];
        if (cell === 0 || cell & 3) continue;
        const touches =
          (x > 0 && isAtEdge(cell, cells[at - 1])) ||
          (x + 1 < width && isAtEdge(cell, cells[at + 1])) ||
          (y > 0 && isAtEdge(cell, cells[at - width])) ||
          (y + 1 < height && isAtEdge(cell, cells[at + width]));
        if (touches) cells[at] = cell | kind;
      }
    }
  }
}

/**
 * The colour of everything that a map can hold.
 *
 * @param {Instance[]} instances of the map
 * @param {object} how
 * @param {"overlay"|"instances"|"cutout"|"mask"} how.view
 * @param {number} how.threshold
 * @param {Instance|null} [how.lit] the one that stands out
 * @param {(instance: Instance) => number} [how.glow] 1 when it has just come, 0 when it is settled
 * @returns {Uint32Array} four for each instance, after four for none
 */
export function colourTable(instances, { view, threshold, lit = null, glow = () => 0 }) {
  const table = new Uint32Array(4 * (instances.length + 1));
  if (view === "mask") table.fill(rgba([0, 0, 0], 1));
  instances.forEach((instance, index) => {
    if (!(instance.score > threshold)) return;
    const isDimmed = lit !== null && lit !== instance;
    const at = 4 * (index + 1);
    if (view === "cutout" || view === "mask") {
      table.fill(rgba(WHITE, isDimmed ? 0.3 : 1), at, at + 4);
    } else if (view === "instances") {
      const colour = mix(instance.ownColour, WHITE, 0.5 * glow(instance));
      table.fill(rgba(colour, isDimmed ? 0.3 : 1), at, at + 4);
      table[at + OUTLINE] = rgba(WHITE, isDimmed ? 0.3 : 1);
    } else {
      const shine = glow(instance);
      const alpha = isDimmed ? 0.16 : lit === instance ? 0.68 : FILL_ALPHA + 0.45 * shine;
      table[at + INSIDE] = rgba(mix(instance.promptColour, WHITE, 0.6 * shine), alpha);
      table[at + OUTLINE] = rgba(WHITE, isDimmed ? 0.4 : 0.95);
      table[at + INLINE] = rgba(mix(instance.promptColour, [0, 0, 0], 0.25), isDimmed ? 0.4 : 1);
    }
  });
  return table;
}

/**
 * Draw onto a canvas of the map's size; a cutout needs the picture at that size, too.
 *
 * @param {CanvasRenderingContext2D} context
 * @param {InstanceMap} map
 * @param {Uint32Array} table
 * @param {{view: string, picture: CanvasImageSource|null, image: ImageData|null}} how `image` may be given to be reused
 */
export function paint(context, map, table, { view, picture, image = null }) {
  const target = image ?? context.createImageData(map.width, map.height);
  map.fill(new Uint32Array(target.data.buffer), table);
  context.putImageData(target, 0, 0);
  if (view !== "cutout" || picture === null) return;
  context.globalCompositeOperation = "source-in";
  context.drawImage(picture, 0, 0, map.width, map.height);
  context.globalCompositeOperation = "source-over";
}

function mix(from, to, share) {
  return from.map((part, index) => part + (to[index] - part) * share);
}

function rgba([red, green, blue], alpha) {
  return ((Math.round(alpha * 255) << 24) | (Math.round(blue) << 16) | (Math.round(green) << 8) | Math.round(red)) >>> 0;
}
