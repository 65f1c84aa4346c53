"""Low-resolution mask logits to run-length masks of the original size, without a full-size float image.

Upsampling is bilinear, so a pixel can only be positive if one of its four taps is. It is done for that part of
the image alone: a 40-pixel object in a 12-megapixel photo costs 40 pixels' work, not 12 million.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sam3_runner.types import RunLengthMask


@dataclass(frozen=True)
class _Axis:
    """Bilinear taps of the output pixels `start` … `start + len - 1` along one axis."""

    start: int
    low: Tensor  # (n,) index of the tap before
    high: Tensor  # (n,) index of the tap after; the last pixel's own, at the border
    weight: Tensor  # (n,) of the tap after, in [0, 1)


def masks_from_logits(logits: Tensor, size_hw: tuple[int, int]) -> tuple[RunLengthMask, ...]:
    """Upsample N masks bilinearly to the image's size and keep what is above 0 (probability above 0.5).

    Args:
        logits: (N, h, w).
        size_hw: The original image's height and width.
    Returns:
        N masks, equal to `interpolate(logits, size_hw, mode="bilinear", align_corners=False) > 0`.
    """
    logits = logits.float()
    positive = logits > 0
    rows, columns = positive.any(dim=2).cpu().numpy(), positive.any(dim=1).cpu().numpy()  # (N, h), (N, w)
    return tuple(
        _mask(logit, row, column, size_hw) for logit, row, column in zip(logits, rows, columns, strict=True)
    )


def _mask(
    logits: Tensor, rows: npt.NDArray[np.bool_], columns: npt.NDArray[np.bool_], size_hw: tuple[int, int]
) -> RunLengthMask:
    y, x = (_axis(taps, size, logits.device) for taps, size in ((rows, size_hw[0]), (columns, size_hw[1])))
    if y is None or x is None:
        return RunLengthMask(size_hw, np.array([size_hw[0] * size_hw[1]], np.uint32))
    rows_done = torch.lerp(logits[y.low], logits[y.high], y.weight[:, None])  # (H', w)
    crop = torch.lerp(rows_done[:, x.low], rows_done[:, x.high], x.weight) > 0  # (H', W')
    return encode_crop(crop.T.contiguous().cpu().numpy(), (y.start, x.start), size_hw)


def _axis(is_positive: npt.NDArray[np.bool_], size: int, device: torch.device) -> _Axis | None:
    """Taps of those output pixels that the positive inputs can reach; None if they reach none.

    Pixel centres lie at half integers, in both frames; what falls outside the input takes its border's value.
    """
    taps = len(is_positive)
    if not is_positive.any():
        return None
    first, last = np.flatnonzero(is_positive)[[0, -1]]
    source = ((np.arange(size) + 0.5) * (taps / size) - 0.5).clip(0, taps - 1)
    low = source.astype(np.int64)
    high = (low + 1).clip(max=taps - 1)
    reached = np.flatnonzero((high >= first) & (low <= last))
    if not len(reached):
        return None  # an image smaller than the mask skips some of its inputs
    chosen = slice(reached[0], reached[-1] + 1)
    weight = (source - low)[chosen].astype(np.float32)
    return _Axis(
        int(reached[0]),
        *(
            torch.from_numpy(np.ascontiguousarray(part)).to(device)
            for part in (low[chosen], high[chosen], weight)
        ),
    )


def encode_crop(
    crop_transposed: npt.NDArray[np.bool_], offset_yx: tuple[int, int], size_hw: tuple[int, int]
) -> RunLengthMask:
    """The run lengths of a full-size mask that is zero outside a crop.

    Args:
        crop_transposed: (w', h') bool, the crop column by column.
        offset_yx: Where the crop's top-left pixel lies in the full mask.
        size_hw: The full mask's height and width.
    """
    top, left = offset_yx
    height, width = size_hw
    columns, rows = crop_transposed.shape
    # One empty pixel before and after every column keeps runs from crossing into the next one.
    padded = np.zeros((columns, rows + 2), np.int8)
    padded[:, 1:-1] = crop_transposed
    edges = np.flatnonzero(np.diff(padded, axis=1).ravel())  # starts and ends in turn, (w'·(h'+1)) frame
    column, row = np.divmod(edges, rows + 1)
    bounds = (column + left) * height + row + top  # in the full mask's column-major order
    # A run that ends at a column's foot and goes on at the next one's head is one run.
    joined = np.flatnonzero(bounds[1:-1:2] == bounds[2::2])
    bounds = np.delete(bounds, np.concatenate([2 * joined + 1, 2 * joined + 2]))
    counts = np.diff(bounds, prepend=0, append=height * width)
    if len(bounds) and bounds[-1] == height * width:
        counts = counts[:-1]  # the mask ends in a run of ones
    return RunLengthMask(size_hw, counts.astype(np.uint32))
