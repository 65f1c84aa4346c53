"""Instances as pictures: numbers as pixels, and the photo with them in colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from sam3_runner import palette, rle, tags
from sam3_runner.images import Rectangle
from sam3_runner.types import RunLengthMask, Segmentation

_FILL_OPACITY: Final = 0.4
_STRIP_ROWS: Final = 256  # blended at a time: what is in between never has the photo's size

Pixels = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Found = Sequence[tuple[str, Segmentation]]  # label and instances of each prompt, in order


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """One of all instances of an image.

    Attributes:
        number: From 1 on, through all prompts in order, each one's best first.
        label: Of its prompt.
        score: In [0, 1].
        box_xyxy_px: As the model gave it.
        mask: Of the image's size.
    """

    number: int
    label: str
    score: float
    box_xyxy_px: tuple[float, float, float, float]
    mask: RunLengthMask


def numbered(found: Found, size_hw: tuple[int, int]) -> list[Instance]:
    """Give the instances of all prompts their numbers.

    Raises:
        ValueError: a mask is not of the image's size.
    """
    instances: list[Instance] = []
    for label, segmentation in found:
        for score, box, mask in zip(
            segmentation.scores.tolist(),
            segmentation.boxes_xyxy_px.tolist(),
            segmentation.masks,
            strict=True,
        ):
            if mask.size_hw != size_hw:
                raise ValueError(f"Expected masks of the image's size {size_hw} (H, W), got {mask.size_hw}.")
            instances.append(Instance(len(instances) + 1, label, score, tuple(box), mask))
    return instances


def number_map(
    instances: Sequence[Instance], size_hw: tuple[int, int]
) -> tuple[Numbers, dict[int, Rectangle]]:
    """Which instance each pixel shows: where several are, the one that scored best.

    Returns:
        (H, W): 0 or the instance's number, uint8 if 255 suffices; and for each instance whose mask is not empty the
        rectangle that its mask fills: x0, y0, x1, y1, the last two exclusive.
    """
    dtype = np.uint8 if len(instances) <= 255 else np.uint16
    numbers = np.zeros(size_hw, dtype)
    boxes = {}
    for instance in reversed(best_first(instances)):
        inside, (left, top) = rle.decode_tight(instance.mask)
        if inside.size:
            height, width = inside.shape
            boxes[instance.number] = left, top, left + width, top + height
            np.copyto(numbers[top : top + height, left : left + width], instance.number, where=inside)
    return numbers, boxes


def best_first(instances: Sequence[Instance]) -> list[Instance]:
    """By score; those that are equal, by number."""
    return sorted(instances, key=lambda instance: -instance.score)


def draw_overlay(pixels: Pixels, instances: Sequence[Instance]) -> Pixels:
    """Lay the instances over the photo: a tint, a line around each, and a tag with label and score.

    The line is double, a bright colour's outer half black and a dark one's white, so that it is seen on any photo.
    Where masks overlap, the best one is seen. A tag says `#3 0.97` (number and score) if the font has not all
    characters of the label or if it would be wider than half of the photo, then `#3`; it is left out if that is
    too wide, too, or higher than a third of the photo.

    Args:
        pixels: (H, W, 3) RGB. Left as they are.
        instances: Masks of the photo's size.
    Returns:
        (H, W, 3) RGB.
    """
    height, width = pixels.shape[:2]
    numbers, boxes = number_map(instances, (height, width))
    drawn = pixels.copy()
    if not boxes:
        return drawn
    colors = palette.colors(len(instances))
    contrasts = palette.contrasting(colors)
    line_px = max(1, round(max(height, width) / 500))
    x0, y0 = (min(box[side] for box in boxes.values()) for side in (0, 1))
    x1, y1 = (max(box[side] for box in boxes.values()) for side in (2, 3))
    for top in range(y0, y1, _STRIP_ROWS):
        strip = np.s_[top : min(top + _STRIP_ROWS, y1), x0:x1]
        _tint(drawn[strip], numbers[strip], colors)
        _outline(drawn[strip], numbers, strip, 2 * line_px, colors)
        _outline(drawn[strip], numbers, strip, line_px, contrasts)
    _draw_tags(drawn, best_first(instances), boxes, colors, contrasts)
    return drawn


def _tint(drawn: Pixels, numbers: Numbers, colors: Pixels) -> None:
    share = round(256 * _FILL_OPACITY)
    weighted = colors.astype(np.uint16) * np.uint16(share) + np.uint16(128)
    tinted = (drawn * np.uint16(256 - share) + weighted[numbers]) >> 8
    np.copyto(drawn, tinted, casting="unsafe", where=(numbers > 0)[:, :, None])


def _outline(
    drawn: Pixels, numbers: Numbers, strip: tuple[slice, slice], line_px: int, colors: Pixels
) -> None:
    """Colour those pixels of instances from which another number, or none, is at most `line_px` away."""
    rows, columns = strip
    top, left = max(0, rows.start - line_px), max(0, columns.start - line_px)
    around = numbers[top : rows.stop + line_px, left : columns.stop + line_px]
    height, width = around.shape
    # Whether a pixel differs from its right or its lower neighbour, behind `line_px` of nothing.
    edges = np.zeros((height + line_px, width + line_px), bool)
    edges[line_px:, line_px:-1] = around[:, 1:] != around[:, :-1]
    edges[line_px:-1, line_px:] |= around[1:] != around[:-1]
    _spread(edges, 2 * line_px)
    own = numbers[strip]
    near = edges[rows.start - top :, columns.start - left :][: own.shape[0], : own.shape[1]]
    on_line = np.nonzero(near & (own > 0))
    drawn[on_line] = colors[own[on_line]]


def _spread(marks: npt.NDArray[np.bool_], reach: int) -> None:
    """Mark each place that has a mark less than `reach` to the right and below, in as few steps as that has bits."""
    for along in (marks, marks.T):
        seen = 1
        while seen < reach:
            step = min(seen, reach - seen)
            along[:-step] |= along[step:]
            seen += step


def _draw_tags(
    drawn: Pixels,
    instances: Sequence[Instance],
    boxes: dict[int, Rectangle],
    colors: Pixels,
    contrasts: Pixels,
) -> None:
    height, width = drawn.shape[:2]
    font_px = _font_px(height, width, len(boxes))
    inks = []
    for instance in instances:
        score = f"{instance.score:.2f}"
        texts = (f"{instance.label} {score}", f"#{instance.number} {score}", f"#{instance.number}")
        ink = tags.written(texts, font_px, width // 2) if instance.number in boxes else None
        if ink is not None and ink.shape[0] <= height // 3:
            inks.append((instance.number, ink))
    corners = tags.placed(
        [boxes[number] for number, _ in inks], [ink.shape[::-1] for _, ink in inks], (width, height)
    )
    for (number, ink), (left, top) in reversed([*zip(inks, corners, strict=True)]):
        share = ink[:, :, None] / np.float32(255)
        tag = colors[number] * (1 - share) + contrasts[number] * share
        drawn[top : top + ink.shape[0], left : left + ink.shape[1]] = np.round(tag)


def _font_px(height: int, width: int, tags_count: int) -> int:
    """Smaller where there are many; 11 pixels are read on any screen."""
    room_px = math.sqrt(height * width / tags_count)
    return max(11, round(min(max(height, width) / 65, room_px / 6)))
