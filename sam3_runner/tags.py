"""The tags on an overlay: what is written on them, in which font, and where they are put."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

_MISSING: Final = (
    "\U0010ffff"  # a place in Unicode that stays empty: drawn as the sign for what a font does not have
)
# Fonts of Debian's packages fonts-noto-cjk (the container has it) and fonts-dejavu-core, and which face of the file.
# 1 of Noto's: where countries draw a character differently, Korea's way.
FONTS_DIR: Final = Path("/usr/share/fonts")
SYSTEM_FONTS: Final = (
    (FONTS_DIR / "opentype" / "noto" / "NotoSansCJK-Regular.ttc", 1),
    (FONTS_DIR / "truetype" / "dejavu" / "DejaVuSans.ttf", 0),
)
# Shares of the font's size, which hold capitals with accents and Hangul in all of them.
_ASCENT: Final = 1.0
_LINE_HEIGHT: Final = 1.3

Font = ImageFont.FreeTypeFont


def written(texts: Sequence[str], font_px: int, max_width_px: int) -> npt.NDArray[np.uint8] | None:
    """Write the first of the texts that a font has every character of and that is no wider than allowed.

    Returns:
        (h, w), 0 to 255: how much of each pixel is ink, with a margin around. None if there is no such text.
    """
    fonts = _fonts(font_px)
    for text in texts:
        font = next((font for font in fonts if _has_all_of(font, text)), None)
        if font is not None:
            ink = _ink(text, font, font_px)
            if ink.shape[1] <= max_width_px:
                return ink
    return None


def _ink(text: str, font: Font, font_px: int) -> npt.NDArray[np.uint8]:
    """With a margin around it; all tags of one font size have one height."""
    pad = max(2, font_px // 4)
    left, _, right, _ = font.getbbox(text)
    height = math.ceil(_LINE_HEIGHT * font_px) + pad
    image = Image.new("L", (math.ceil(right - left) + 2 * pad, height))
    baseline = pad // 2 + round(_ASCENT * font_px)
    ImageDraw.Draw(image).text((pad - left, baseline), text, fill=255, font=font, anchor="ls")
    return np.asarray(image)


@lru_cache(maxsize=8)
def _fonts(font_px: int) -> tuple[Font, ...]:
    """Pillow's own, for Latin, and what the system has of those that know more."""
    latin = ImageFont.load_default(font_px)
    assert isinstance(latin, ImageFont.FreeTypeFont)
    more = ((path, index) for path, index in SYSTEM_FONTS if path.exists())
    return (latin, *(ImageFont.truetype(str(path), font_px, index) for path, index in more))


@lru_cache(maxsize=4096)
def _has(font: Font, character: str) -> bool:
    return character == " " or bytes(font.getmask(character)) != bytes(font.getmask(_MISSING))


def _has_all_of(font: Font, text: str) -> bool:
    return all(_has(font, character) for character in set(text))


# --- where they are put -------------------------------------------------------------------------------------


def placed(
    boxes_xyxy: Sequence[tuple[int, int, int, int]],
    sizes_wh: Sequence[tuple[int, int]],
    image_wh: tuple[int, int],
) -> list[tuple[int, int]]:
    """Find a place at its box for each tag: one that no earlier tag has, if there is any.

    Args:
        boxes_xyxy: Of the instances, best first.
        sizes_wh: Of their tags; none is larger than the image.
        image_wh: Width and height of the image: all of a tag is inside.
    Returns:
        Left and top edge of each tag.
    """
    taken = np.zeros((0, 4), np.int64)
    corners = []
    for box, (width, height) in zip(boxes_xyxy, sizes_wh, strict=True):
        places = _places(box, width, height)
        places = np.clip(places, 0, (image_wh[0] - width, image_wh[1] - height))
        tags = np.concatenate((places, np.add(places, (width, height))), axis=1)  # (C, 4)
        best = tags[np.argmin(_hidden_px(tags, taken))]  # the first of those that hide least
        taken = np.concatenate((taken, best[None]))
        corners.append((int(best[0]), int(best[1])))
    return corners


def _places(box: tuple[int, int, int, int], width: int, height: int) -> npt.NDArray[np.int64]:
    """(C, 2): left and top edges, the most natural first: on the upper edge, then around, then further off."""
    left, top, right, bottom = box
    rows = [top - height, top, bottom, bottom - height]
    rows += [(top + bottom - height) // 2, top - 2 * height, bottom + height]
    columns = [left, right - width, (left + right - width) // 2]
    beside = [(x, y) for x in (right, left - width) for y in (top, bottom - height, top - height, bottom)]
    return np.array([*((x, y) for y in rows for x in columns), *beside], np.int64)


def _hidden_px(tags: npt.NDArray[np.int64], taken: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(C,): how many pixels of the taken tags (P, 4) each of these (C, 4) would lie on."""
    upper_left = np.maximum(tags[:, None, :2], taken[None, :, :2])  # (C, P, 2)
    lower_right = np.minimum(tags[:, None, 2:], taken[None, :, 2:])
    hidden: npt.NDArray[np.int64] = np.clip(lower_right - upper_left, 0, None).prod(axis=2).sum(axis=1)
    return hidden
