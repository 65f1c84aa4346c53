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

// What the map holds of a pixel: the instance's number, from 1 on, and in the lowest bits how far inside it the pixel is:
// 1 is the outermost, 0 is farther in than any line. So there can be 8,191 instances.
const DEPTH_BITS = 3;
const DEPTHS = 1 << DEPTH_BITS;

const FILL_ALPHA = 0.48;
const DIMMED_ALPHA = 0.34;
const WHITE = [255, 255, 255];

/** Which instance each pixel shows, at one size. */
export class InstanceMap {
  /**
   * @param {number} width of the drawing, in its own pixels
   * @param {number} height
   * @param {Instance[]} instances in any order
   * @param {number} density of the drawing: how many of its pixels a line of one is wide
   */
  constructor(width, height, instances, density = 1) {
    this.width = width;
    this.height = height;
    this.instances = instances;
    this._cells = new Uint16Array(width * height);
    const worstFirst = instances.map((_, index) => index).sort((a, b) => instances[a].score - instances[b].score);
    for (const index of worstFirst) {
      const { ends, sizeHw } = instances[index];
      paintMask(this._cells, width, height, ends, sizeHw, (index + 1) << DEPTH_BITS);
    }
    this.outlineDepth = Math.min(3, Math.max(1, Math.round(1.2 * density))); // white, for any photo
    this.lineDepth = Math.min(DEPTHS - 1, this.outlineDepth + Math.max(1, Math.round(1.6 * density))); // coloured
    this._mark(1, (cell, other) => cell >> DEPTH_BITS !== other >> DEPTH_BITS);
    for (let depth = 2; depth <= this.lineDepth; depth++) {
      this._mark(depth, (cell, other) => (other & (DEPTHS - 1)) === depth - 1);
    }
  }

  /** The instance at a pixel that is drawn there above the threshold, or null. */
  at(x, y, threshold) {
    if (x < 0 || y < 0 || x >= this.width || y >= this.height) return null;
    const instance = this.instances[(this._cells[y * this.width + x] >> DEPTH_BITS) - 1];
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

  _mark(depth, isAtEdge) {
    const { width, height, _cells: cells } = this;
    for (let y = 0, at = 0; y < height; y++) {
      for (let x = 0; x < width; x++, at++) {
        const cell = cells[at];
        if (cell === 0 || cell & (DEPTHS - 1)) continue;
        const touches =
          (x > 0 && isAtEdge(cell, cells[at - 1])) ||
          (x + 1 < width && isAtEdge(cell, cells[at + 1])) ||
          (y > 0 && isAtEdge(cell, cells[at - width])) ||
          (y + 1 < height && isAtEdge(cell, cells[at + width]));
        if (touches) cells[at] = cell | depth;
      }
    }
  }
}

/**
 * The colour of everything that a map can hold.
 *
 * @param {InstanceMap} map
 * @param {object} how
 * @param {"overlay"|"instances"|"cutout"|"mask"} how.view
 * @param {number} how.threshold
 * @param {Instance|null} [how.lit] the one that stands out
 * @param {(instance: Instance) => number} [how.glow] 1 when it has just come, 0 when it is settled
 * @returns {Uint32Array} of every depth of every instance, after those of none
 */
export function colourTable(map, { view, threshold, lit = null, glow = () => 0 }) {
  const table = new Uint32Array(DEPTHS * (map.instances.length + 1));
  if (view === "mask") table.fill(rgba([0, 0, 0], 1));
  map.instances.forEach((instance, index) => {
    if (!(instance.score > threshold)) return;
    const isDimmed = lit !== null && lit !== instance;
    const shine = glow(instance);
    const colours = table.subarray(DEPTHS * (index + 1), DEPTHS * (index + 2));
    if (view === "cutout" || view === "mask") {
      colours.fill(rgba(WHITE, isDimmed ? 0.3 : 1));
    } else if (view === "instances") {
      colours.fill(rgba(mix(instance.ownColour, WHITE, 0.5 * shine), isDimmed ? 0.35 : 1));
      colours.fill(rgba(WHITE, isDimmed ? 0.35 : 1), 1, map.outlineDepth + 1);
    } else {
      const alpha = isDimmed ? DIMMED_ALPHA : lit === instance ? 0.7 : FILL_ALPHA + 0.45 * shine;
      colours.fill(rgba(mix(instance.promptColour, WHITE, 0.6 * shine), alpha));
      colours.fill(rgba(instance.promptColour, isDimmed ? 0.75 : 1), 1, map.lineDepth + 1);
      colours.fill(rgba(WHITE, isDimmed ? 0.75 : 0.95), 1, map.outlineDepth + 1);
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
