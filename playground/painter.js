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
// 1 is the outermost, 0 is farther in than any line. So there can be 4,095 instances.
const DEPTH_BITS = 4;
const DEPTHS = 1 << DEPTH_BITS;

// Of distances: a step to the side and one across, and what is as far as can be told.
const UNIT = 10;
const DIAGONAL = 14;
const FAR = 240;

// The contour, from the edge inwards, in pixels of the screen: dark and then white, to be seen on any photo, and the
// prompt's colour, to be told from another's.
const DARK_PX = 1;
const WHITE_PX = 2;
const COLOUR_PX = 1.5;
const MAX_LINE_SCALE = 5; // so that `FAR` is farther than lines reach
const DARK = [16, 19, 22];

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
    const scale = Math.min(MAX_LINE_SCALE, Math.max(1, density));
    this._reach = (DARK_PX + WHITE_PX + COLOUR_PX) * scale + 0.5;
    this.lines = Array.from({ length: DEPTHS - 1 }, (_, index) => linesAt(((index + 0.5) / (DEPTHS - 1)) * this._reach, scale));
    this._measure();
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

  /** Note in each cell how far inside its instance it is, as far as lines reach. */
  _measure() {
    const distances = this._distances();
    const { _cells: cells, _reach: reach } = this;
    for (let at = 0; at < cells.length; at++) {
      if (cells[at] === 0 || distances[at] >= reach * UNIT) continue;
      cells[at] |= 1 + Math.floor((distances[at] / (reach * UNIT)) * (DEPTHS - 1));
    }
  }

  /**
   * From each pixel's centre to the nearest edge of its instance, in `UNIT`s of a pixel: two passes that go by steps to
   * the eight neighbours (Borgefors, 1986), at most 8 % off.
   */
  _distances() {
    const { width, height, _cells: cells } = this;
    const distances = new Uint8Array(width * height).fill(FAR);
    const step = (at, next, length) => {
      const there = cells[next] === cells[at] ? distances[next] + length : length / 2;
      if (there < distances[at]) distances[at] = there;
    };
    const pass = (x, y, way) => {
      const at = y * width + x;
      if (cells[at] === 0) return;
      const [hasBefore, hasAfter] = way > 0 ? [x > 0, x + 1 < width] : [x + 1 < width, x > 0];
      const hasRow = way > 0 ? y > 0 : y + 1 < height;
      if (hasBefore) step(at, at - way, UNIT);
      if (!hasRow) return;
      const row = at - way * width;
      step(at, row, UNIT);
      if (hasBefore) step(at, row - way, DIAGONAL);
      if (hasAfter) step(at, row + way, DIAGONAL);
    };
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) pass(x, y, 1);
    for (let y = height - 1; y >= 0; y--) for (let x = width - 1; x >= 0; x--) pass(x, y, -1);
    return distances;
  }
}

/** How much of a pixel so far inside each of the lines covers. */
function linesAt(distance, scale) {
  const past = (edgePx) => Math.min(1, Math.max(0, distance - edgePx * scale + 0.5));
  const ends = [DARK_PX, DARK_PX + WHITE_PX, DARK_PX + WHITE_PX + COLOUR_PX].map(past);
  return { dark: 1 - ends[0], white: ends[0] - ends[1], coloured: ends[1] - ends[2], area: ends[2] };
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
      const alpha = isDimmed ? 0.35 : 1;
      fillLined(colours, map, { colour: mix(instance.ownColour, WHITE, 0.5 * shine), alpha, dark: alpha, white: alpha, line: alpha });
    } else {
      const alpha = isDimmed ? DIMMED_ALPHA : lit === instance ? 0.7 : FILL_ALPHA + 0.45 * shine;
      const lines = isDimmed ? { dark: 0.5, white: 0.75, line: 0.75 } : { dark: 0.7, white: 0.95, line: 1 };
      fillLined(colours, map, { colour: mix(instance.promptColour, WHITE, 0.6 * shine), alpha, ...lines });
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

/** One instance's colours, with its contour; `alpha` is the area's, `dark`, `white` and `line` are the lines'. */
function fillLined(colours, map, { colour, alpha, dark, white, line }) {
  colours.fill(rgba(colour, alpha));
  for (let depth = 1; depth < DEPTHS; depth++) {
    const share = map.lines[depth - 1];
    const layers = [
      [DARK, dark * share.dark],
      [WHITE, white * share.white],
      [colour, line * share.coloured + alpha * share.area],
    ];
    const sum = layers.reduce((all, [, part]) => all + part, 0);
    const blend = [0, 1, 2].map((channel) => layers.reduce((all, [of, part]) => all + of[channel] * part, 0) / sum);
    colours[depth] = rgba(blend, sum);
  }
}

function mix(from, to, share) {
  return from.map((part, index) => part + (to[index] - part) * share);
}

function rgba([red, green, blue], alpha) {
  return ((Math.round(alpha * 255) << 24) | (Math.round(blue) << 16) | (Math.round(green) << 8) | Math.round(red)) >>> 0;
}
