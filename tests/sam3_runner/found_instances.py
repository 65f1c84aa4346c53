"""Made-up instances, and photos to draw them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sam3_runner import rle
from sam3_runner.types import RunLengthMask, Segmentation

Size = tuple[int, int]


def disc(size_hw: Size, y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.ogrid[: size_hw[0], : size_hw[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def ring(size_hw: Size, y: float, x: float, radius: float) -> np.ndarray:
    """With a hole."""
    return disc(size_hw, y, x, radius) & ~disc(size_hw, y, x, radius / 2)


def segmentation(masks: Sequence[np.ndarray], scores: Sequence[float] | None = None) -> Segmentation:
    """Boxes are what the masks fill; of an empty one, (1, 2, 3, 4)."""
    given = scores if scores is not None else np.linspace(0.97, 0.51, max(1, len(masks)))[: len(masks)]
    boxes = [box_of(mask) if mask.any() else (1, 2, 3, 4) for mask in masks]
    return Segmentation(
        np.asarray(given, np.float32),
        np.array(boxes, np.float32).reshape(-1, 4),
        tuple(rle.encode_mask(mask) for mask in masks),
    )


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def many(
    count: int,
    size_hw: Size,
    radii: tuple[float, float],
    shape: Callable[..., np.ndarray] = disc,
    seed: int = 0,
) -> Segmentation:
    """Instances anywhere, best first, one at a time as pixels."""
    random = np.random.default_rng(seed)
    masks: list[RunLengthMask] = []
    boxes = []
    for _ in range(count):
        y, x = random.uniform(0, size_hw[0]), random.uniform(0, size_hw[1])
        radius = random.uniform(*radii)
        mask = shape(size_hw, int(y), int(x), radius)
        mask[int(y), int(x) : int(x) + 2] = True
        masks.append(rle.encode_mask(mask))
        boxes.append(box_of(mask))
    scores = np.sort(random.uniform(0.5, 1, count))[::-1].astype(np.float32)
    return Segmentation(scores, np.array(boxes, np.float32).reshape(-1, 4), tuple(masks))
