/**
 * COCO's compressed run lengths, and painting them at any size without ever holding a mask of the picture's own size.
 */

/**
 * Run lengths out of COCO's compressed `counts`: pixels outside and inside by turns, column after column.
 *
 * Each number is a sequence of characters with five bits each, least significant first; from the fourth on it is the
 * difference to the one before the last. Good for pictures of up to 2^29 pixels.
 *
 * @param {string} counts as in `mask_rle.counts`
 * @returns {number[]}
 */
export function decodeCounts(counts) {
  const runs = [];
  let at = 0;
  while (at < counts.length) {
    let value = 0;
    let shift = 0;
    let chunk;
    do {
      chunk = counts.charCodeAt(at++) - 48;
      value |= (chunk & 0x1f) << shift;
      shift += 5;
    } while (chunk & 0x20);
    if (chunk & 0x10) value |= -1 << shift; // the sign
    if (runs.length > 2) value += runs[runs.length - 2];
    runs.push(value);
  }
  return runs;
}

/**
 * Ends of the runs: inside is from `ends[0]` to `ends[1]`, from `ends[2]` to `ends[3]`, …
 *
 * @param {string} counts
 * @returns {Uint32Array}
 */
export function decodeEnds(counts) {
  const ends = Uint32Array.from(decodeCounts(counts));
  for (let i = 1; i < ends.length; i++) ends[i] += ends[i - 1];
  return ends;
}

/**
 * The rectangle that a mask fills.
 *
 * @param {Uint32Array} ends of `decodeEnds`
 * @param {[number, number]} sizeHw of the mask
 * @returns {[number, number, number, number]|null} x, y, width and height in the mask's pixels, or null if it is empty
 */
export function boundsOf(ends, [height]) {
  let [left, top, right, bottom] = [Infinity, Infinity, 0, 0];
  for (let run = 0; run + 1 < ends.length; run += 2) {
    const [first, last] = [ends[run], ends[run + 1] - 1];
    if (last < first) continue;
    const [x0, x1] = [Math.floor(first / height), Math.floor(last / height)];
    left = Math.min(left, x0);
    right = Math.max(right, x1 + 1);
    top = x0 === x1 ? Math.min(top, first % height) : 0; // into the next column: through its first row
    bottom = x0 === x1 ? Math.max(bottom, (last % height) + 1) : height;
  }
  return right === 0 ? null : [left, top, right - left, bottom - top];
}

/**
 * Write `value` into every pixel of `map` whose centre is inside the mask.
 *
 * @param {Uint16Array} map row by row, `width` × `height`
 * @param {Uint32Array} ends of `decodeEnds`
 * @param {[number, number]} sizeHw of the mask
 */
export function paintMask(map, width, height, ends, [maskHeight, maskWidth], value) {
  const scaleX = maskWidth / width;
  const scaleY = height / maskHeight;
  let inside = 0; // the first run that does not end before the column
  for (let x = 0; x < width; x++) {
    const top = Math.floor((x + 0.5) * scaleX) * maskHeight;
    const bottom = top + maskHeight;
    while (inside + 1 < ends.length && ends[inside + 1] <= top) inside += 2;
    for (let run = inside; run + 1 < ends.length && ends[run] < bottom; run += 2) {
      const from = Math.max(0, ends[run] - top);
      const to = Math.min(maskHeight, ends[run + 1] - top);
      const first = Math.ceil(from * scaleY - 0.5);
      const last = Math.ceil(to * scaleY - 0.5);
      for (let at = first * width + x, end = last * width + x; at < end; at += width) map[at] = value;
    }
  }
}
