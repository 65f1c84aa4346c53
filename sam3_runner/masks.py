"""Masks as pictures: the PNG that callers fetch, and the coloured overlay for people."""

from __future__ import annotations

import colorsys
import struct
import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from sam3_runner import rle
from sam3_runner.run_deflate import deflate_runs
from sam3_runner.types import RunLengthMask

_FILL_OPACITY: Final = 0.45
_GOLDEN_RATIO: Final = 0.61803398875  # steps of this around the hue circle never come close to an earlier one

_Color = tuple[int, int, int]


def encode_png(mask: RunLengthMask) -> bytes:
    """Encode a mask as a greyscale PNG of its own size: 255 inside, 0 outside, 8 bits per pixel.

    The pixels are never there: the file is put together from the places where rows change. One bit per pixel would
    be a tenth of the size, but many readers then give 0 and 1, not 0 and 255.
    """
    height, width = mask.size_hw
    edges = rle.row_edges(mask) + 1  # each row begins with its filter type, 0: none
    lengths = np.diff(edges, prepend=0, append=height * (width + 1))
    if lengths[-1] == 0:
        lengths = lengths[:-1]
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits, greyscale, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", deflate_runs(lengths)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, body) for name, body in chunks)


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(name)))


def draw_overlay(
    image_rgb: npt.NDArray[np.uint8], masks: Sequence[RunLengthMask], labels: Sequence[str] = ()
) -> npt.NDArray[np.uint8]:
    """Draw each mask in a colour of its own, with an outline and its label, over the image.

    Args:
        image_rgb: (H, W, 3). Left as it is.
        masks: Of the image's size, best first: earlier ones lie on top. Empty ones draw nothing.
        labels: One per mask, or none at all.
    Returns:
        (H, W, 3) RGB.
    """
    if labels and len(labels) != len(masks):
        raise ValueError(f"Expected one label for each of {len(masks)} masks, got {len(labels)}.")
    if wrong := [mask.size_hw for mask in masks if mask.size_hw != image_rgb.shape[:2]]:
        raise ValueError(f"Expected masks of the image's size {image_rgb.shape[:2]} (H, W), got {wrong[0]}.")
    overlay = image_rgb.copy()
    line_px = max(1, round(max(image_rgb.shape[:2]) / 400))
    anchors: list[tuple[int, int] | None] = [None] * len(masks)
    for index in reversed(range(len(masks))):
        anchors[index] = _draw_mask(overlay, rle.decode_mask(masks[index]), _color(index), line_px)
    return _draw_labels(overlay, [(a, label) for a, label in zip(anchors, labels, strict=False)])


def _color(index: int) -> _Color:
    red, green, blue = colorsys.hsv_to_rgb((0.58 + index * _GOLDEN_RATIO) % 1.0, 0.85, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def _draw_mask(
    overlay: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_], color: _Color, line_px: int
) -> tuple[int, int] | None:
    """Blend one mask into the overlay. Returns its box's top left corner as (x, y), None if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return None
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside, pixels = mask[box], overlay[box]
    tint = np.array(color, dtype=np.float32)
    pixels[inside] = (pixels[inside] * (1 - _FILL_OPACITY) + tint * _FILL_OPACITY).astype(np.uint8)
    rim = inside & ~_eroded(inside, 2 * line_px)
    pixels[rim] = tint.astype(np.uint8)
    pixels[rim & _eroded(inside, line_px)] = 255  # a thin white line inside: seen on every background
    return int(columns[0]), int(rows[0])


def _eroded(mask: npt.NDArray[np.bool_], steps: int) -> npt.NDArray[np.bool_]:
    """Take `steps` pixels off the border on all four sides; the edge of the array counts as border."""
    padded = np.pad(mask, 1)
    for _ in range(steps):
        core = padded[1:-1, 1:-1]
        core = core & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        padded[1:-1, 1:-1] = core
    return padded[1:-1, 1:-1]


def _draw_labels(
    overlay: npt.NDArray[np.uint8], labels: Sequence[tuple[tuple[int, int] | None, str]]
) -> npt.NDArray[np.uint8]:
    if not any(anchor and label for anchor, label in labels):
        return overlay
    image = Image.fromarray(overlay)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=max(10, round(max(image.size) / 45)))
    for index in reversed(range(len(labels))):
        anchor, label = labels[index]
        if anchor and label:
            _draw_label(draw, font, anchor, label, _color(index), image.size)
    return np.array(image)


def _draw_label(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    anchor_xy: tuple[int, int],
    label: str,
    color: _Color,
    size_wh: tuple[int, int],
) -> None:
    """A tag of the mask's colour on the upper edge of its box, kept inside the image."""
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    pad = max(2, round((bottom - top) / 4))
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    x = max(0, min(anchor_xy[0], size_wh[0] - width))
    y = max(0, min(anchor_xy[1] - height, size_wh[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=color)
    is_bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    draw.text((x + pad - left, y + pad - top), label, font=font, fill="black" if is_bright else "white")
