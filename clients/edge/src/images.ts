/** What kind of image some bytes are, told from the bytes: names and declared types are anybody's. */

export interface ImageKind {
  readonly extension: string;
  readonly mediaType: string;
}

const WEBP = { extension: "webp", mediaType: "image/webp" };
/** ISO media files say in bytes 8 to 12 what they are. */
const BRANDS: Readonly<Record<string, ImageKind>> = {
  heic: { extension: "heic", mediaType: "image/heic" },
  heix: { extension: "heic", mediaType: "image/heic" },
  mif1: { extension: "heic", mediaType: "image/heif" },
  avif: { extension: "avif", mediaType: "image/avif" },
};
const SIGNATURES: readonly (readonly [string, ImageKind])[] = [
  ["\xff\xd8\xff", { extension: "jpg", mediaType: "image/jpeg" }],
  ["\x89PNG\r\n\x1a\n", { extension: "png", mediaType: "image/png" }],
  ["GIF8", { extension: "gif", mediaType: "image/gif" }],
  ["BM", { extension: "bmp", mediaType: "image/bmp" }],
  ["II*\0", { extension: "tif", mediaType: "image/tiff" }],
  ["MM\0*", { extension: "tif", mediaType: "image/tiff" }],
];

/** Of the kinds that the service reads; null for all others. Whether it decodes, the service finds out. */
export function kindOfImage(image: ArrayBuffer): ImageKind | null {
  const head = String.fromCharCode(...new Uint8Array(image.slice(0, 12)));
  if (head.startsWith("RIFF") && head.endsWith("WEBP")) return WEBP;
  if (head.slice(4, 8) === "ftyp") return BRANDS[head.slice(8)] ?? null;
  return SIGNATURES.find(([signature]) => head.startsWith(signature))?.[1] ?? null;
}
