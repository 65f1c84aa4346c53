"""Boxes that show what is wanted and what is not: what is refused, and what the model reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sam3_runner.errors import InvalidPrompt
from sam3_runner.types import Box, Prompt

# Boxes of one prompt. The model reads as many for each, padded, so that what is compiled and recorded for one number
# of them answers all: at full size 32 boxes cost it what 1 does.
MAX_BOXES = 32


def check_boxes(prompts: Sequence[Prompt], size_hw: tuple[int, int]) -> None:
    """Refuse boxes that show nothing of an image.

    Args:
        prompts: Their boxes in pixels.
        size_hw: The image's height and width.
    Raises:
        InvalidPrompt: a prompt has more than `MAX_BOXES`; or one of its boxes has no area, no number for an edge, or
            nothing of the image in it. Boxes that reach over the image's edge are cut there.
    """
    for prompt in prompts:
        if len(prompt.boxes) > MAX_BOXES:
            raise InvalidPrompt(f"expected at most {MAX_BOXES} boxes in a prompt, got {len(prompt.boxes)}")
        for box in prompt.boxes:
            _check_box(box, size_hw)


def _check_box(box: Box, size_hw: tuple[int, int]) -> None:
    if box.is_relative:
        raise InvalidPrompt(f"expected a box in pixels, got the shares {box.xyxy} of the image's sides")
    x0, y0, x1, y1 = box.xyxy
    if not (x0 < x1 and y0 < y1):  # nor is a NaN below anything
        raise InvalidPrompt(f"expected a box x0, y0, x1, y1 with x0 < x1 and y0 < y1, got {box.xyxy}")
    x0, y0, x1, y1 = _clip(box, size_hw)
    if not (x0 < x1 and y0 < y1):
        height, width = size_hw
        raise InvalidPrompt(f"the box {box.xyxy} lies outside the image of {width}×{height} pixels")


def _clip(box: Box, size_hw: tuple[int, int]) -> npt.NDArray[np.float64]:
    """(4,) edges of the part of a box that lies in the image."""
    height, width = size_hw
    return np.clip(box.xyxy, 0, (width, height, width, height))


def encode_exemplars(
    boxes: Sequence[Sequence[Box]], sizes_hw: Sequence[tuple[int, int]]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """The boxes of B prompts as SAM3 reads them, padded to `MAX_BOXES`.

    Args:
        boxes: Of each prompt, in pixels; checked.
        sizes_hw: Height and width of each prompt's image.
    Returns:
        Centre and size in [0, 1] of the image's width and height, (B, `MAX_BOXES`, 4); and (B, `MAX_BOXES`) each:
        whether what is wanted is like it, and whether there is a box at all.
    """
    shape = (len(boxes), MAX_BOXES)
    cxcywh = np.zeros((*shape, 4), np.float32)
    is_positive, is_box = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    for row, (marked, size_hw) in enumerate(zip(boxes, sizes_hw, strict=True)):
        is_box[row, : len(marked)] = True
        for place, box in enumerate(marked):
            x0, y0, x1, y1 = _clip(box, size_hw)
            height, width = size_hw
            cxcywh[row, place] = (
                (x0 + x1) / 2 / width,
                (y0 + y1) / 2 / height,
                (x1 - x0) / width,
                (y1 - y0) / height,
            )
            is_positive[row, place] = box.is_positive
    return cxcywh, is_positive, is_box
