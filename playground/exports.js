/** What can be saved. Only what is above the threshold is in it. */
import { colourTable, InstanceMap, paint } from "./painter.js";
import { boundsOf, decodeEnds } from "./rle.js";

const LINES_MADE_FOR_PX = 1200; // on a larger picture lines are wider

/**
 * A COCO document of one picture, with run-length masks and scores. As in the service's own, `bbox` is the rectangle
 * that the mask fills, of an empty mask the model's box.
 *
 * @param {string} fileName
 * @param {{width: number, height: number}} size
 * @param {{label: string, instances: object[]}[]} found what the service answered, prompt by prompt
 */
export function cocoDocument(fileName, size, found) {
  const annotations = found.flatMap(({ instances }, index) =>
    instances.map(({ box_xyxy_px: [x0, y0, x1, y1], area_px: area, mask_rle: segmentation, score }) => ({
      image_id: 1,
      category_id: index + 1,
      bbox: boundsOf(decodeEnds(segmentation.counts), segmentation.size) ?? [x0, y0, x1 - x0, y1 - y0],
      area,
      segmentation,
      iscrowd: 0,
      score,
    })),
  );
  return {
    images: [{ id: 1, file_name: fileName, ...size }],
    categories: found.map(({ label }, index) => ({ id: index + 1, name: label })),
    annotations: annotations.map((annotation, index) => ({ id: index + 1, ...annotation })),
  };
}

/**
 * The view as a PNG of the picture's own size; the view `mask` is white on black.
 *
 * @param {{width: number, height: number}} size
 * @param {CanvasImageSource|null} picture
 * @param {import("./painter.js").Instance[]} instances
 * @param {{view: string, threshold: number}} how
 * @returns {Promise<Blob>}
 */
export async function drawPng({ width, height }, picture, instances, { view, threshold }) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  const map = new InstanceMap(width, height, instances, Math.max(width, height) / LINES_MADE_FOR_PX);
  paint(context, map, colourTable(map, { view, threshold }), { view, picture });
  if (view === "overlay" && picture !== null) {
    context.globalCompositeOperation = "destination-over";
    context.drawImage(picture, 0, 0, width, height);
  }
  return new Promise((resolve, reject) => {
    const done = (blob) => (blob ? resolve(blob) : reject(new RangeError("The picture is too large to be saved here.")));
    canvas.toBlob(done, "image/png");
  });
}
