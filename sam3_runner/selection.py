"""Which of the instances found for a prompt are kept."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sam3_runner.types import Selection


def best_above(scores: npt.NDArray[np.float32], selection: Selection) -> npt.NDArray[np.intp]:
    """(K,) indices of the scores (N,) above the threshold, best first; of equal ones the first."""
    kept = np.flatnonzero(scores > selection.score_threshold)
    return kept[np.argsort(-scores[kept], kind="stable")]


def logit_shift(selection: Selection) -> float:
    """What is taken off mask logits, so that a pixel belongs to its mask where what is left is above 0."""
    return math.log(selection.mask_threshold / (1 - selection.mask_threshold))


def without_duplicates(logits: Tensor, max_iou: float) -> npt.NDArray[np.intp]:
    """Greedy non-maximum suppression of masks at the model's own resolution.

    Args:
        logits: (K, h, w), best first.
        max_iou: Of a mask with a better one that is kept; beyond, it is dropped.
    Returns:
        Indices of the masks that are kept, ascending. An empty mask overlaps nothing.
    """
    inside = (logits > 0).flatten(1).float()  # (K, h·w); counts up to 2^24 are exact
    shared = inside @ inside.T  # (K, K) pixels
    areas = shared.diagonal()
    either = areas[:, None] + areas[None, :] - shared
    overlaps = (shared > max_iou * either).cpu().numpy()
    kept: list[int] = []
    for index in range(len(overlaps)):
        if not overlaps[index, kept].any():
            kept.append(index)
    return np.array(kept, np.intp)
