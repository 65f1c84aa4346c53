"""Low-resolution mask logits to run-length masks of the original size, without a full-size image of any kind.

Bilinear upsampling is linear between two taps of a column. So down a column of the image the mask changes at most
once between two taps, and only where the four logits around differ in sign: along the outlines. The rows at which it
changes are computed, not searched for; they are the mask's run lengths. Work and memory go with the length of the
outlines, not with the image, and all masks go through the device together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sam3_runner.rle import odd_ones
from sam3_runner.types import RunLengthMask

# Logits that go through the device together, and pairs of a cell and an image column: some 30 and 50 bytes each.
_TAPS_AT_ONCE: Final = 1 << 22
_PAIRS_AT_ONCE: Final = 1 << 20


def masks_from_logits(logits: Tensor, size_hw: tuple[int, int]) -> tuple[RunLengthMask, ...]:
    """Upsample N masks bilinearly to the image's size and keep what is above 0 (probability above 0.5).

    On a GPU the host waits three times for 50 masks of 288×288, once more for each million pixels of outline.

    Args:
        logits: (N, h, w).
        size_hw: The original image's height and width.
    Returns:
        N masks, equal to `interpolate(logits, size_hw, mode="bilinear", align_corners=False) > 0`.
    """
    columns = _Columns.of(logits.shape[2], size_hw[1], logits.device)
    step = max(1, _TAPS_AT_ONCE // logits[:1].numel()) if len(logits) else 1
    return tuple(
        mask
        for start in range(0, len(logits), step)
        for mask in _masks(logits[start : start + step], columns, size_hw)
    )


def _masks(logits: Tensor, columns: _Columns, size_hw: tuple[int, int]) -> list[RunLengthMask]:
    # With the border's taps repeated outside, every pixel lies between four taps.
    taps = F.pad(logits.float()[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]  # (N, h + 2, w + 2)
    cells = _cells_on_outlines(taps)
    step = max(1, _PAIRS_AT_ONCE // columns.weights.shape[1])
    parts = [_changes(taps, some, columns, size_hw).cpu() for some in cells.split(step)]
    return _runs(odd_ones(np.sort(torch.cat(parts).numpy())), len(logits), size_hw)


@dataclass(frozen=True)
class _Columns:
    """Image columns by the taps that they lie between; of the padded taps c and c + 1 for row c.

    Attributes:
        first: (w + 1,) the leftmost image column.
        weights: (w + 1, K) of the right tap, for `first` and the columns after it. NaN beyond the last of them.
    """

    first: Tensor
    weights: Tensor

    @classmethod
    def of(cls, taps: int, width: int, device: torch.device) -> _Columns:
        """For `taps` logits and `width` pixels a row. Pixel centres lie at half integers, in both frames."""
        source = (np.arange(width) + 0.5) * (taps / width) + 0.5
        left = source.astype(np.int64)
        first = np.searchsorted(left, np.arange(taps + 2))
        weights = np.full((taps + 1, np.diff(first).max()), np.nan, np.float32)
        weights[left, np.arange(width) - first[left]] = source - left
        return cls(torch.from_numpy(first[:-1]).to(device), torch.from_numpy(weights).to(device))


def _cells_on_outlines(taps: Tensor) -> Tensor:
    """(M, 3) mask, row and column of the upper left one of four taps that are not all positive, nor all not.

    Above the image and below it nothing is positive.
    """
    # On the CPU numpy compares and searches ten times as fast as torch; all between is the same for both.
    on_host = _is_on_host(taps)
    inside: Any = taps.numpy() > 0 if on_host else taps > 0
    inside[:, 0] = inside[:, -1] = False
    some, every = inside[:, :, 1:] | inside[:, :, :-1], inside[:, :, 1:] & inside[:, :, :-1]
    some, every = some[:, 1:] | some[:, :-1], every[:, 1:] & every[:, :-1]  # (N, h + 1, w + 1)
    mixed = some & ~every
    if on_host:
        return torch.from_numpy(np.stack(np.unravel_index(np.flatnonzero(mixed), mixed.shape), axis=1))
    cells: Tensor = mixed.nonzero()
    return cells


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _changes(taps: Tensor, cells: Tensor, columns: _Columns, size_hw: tuple[int, int]) -> Tensor:
    """Where masks change down the columns of some cells: n·(H·W + 1) + x·H + y, in no order."""
    (height, width), last_row = size_hw, taps.shape[1] - 2
    n, row, column = cells.unbind(1)
    weights = columns.weights[column]  # (M, K)
    upper, lower = (
        torch.lerp(taps[n, at, column, None], taps[n, at, column + 1, None], weights) for at in (row, row + 1)
    )
    # Half-way between the border's tap and its negative lies the image's edge: there a mask begins or ceases.
    upper = torch.where(row[:, None] == 0, -lower.abs(), upper)
    lower = torch.where(row[:, None] == last_row, -upper.abs(), lower)
    cell, place = torch.nonzero((upper > 0) != (lower > 0), as_tuple=True)  # NaN is not positive either
    above, below = upper[cell, place].double(), lower[cell, place].double()
    n, row, column = (of_cell[cell] for of_cell in (n, row, column))
    y = (row - 0.5 + above / (above - below)) * (height / last_row) - 0.5
    # The first row beyond the zero: of a mask that begins, behind it; of one that ceases, the zero's own, too.
    y = torch.where(below > 0, y.floor() + 1, y.ceil()).clamp(0, height).long()
    return n * (height * width + 1) + (columns.first[column] + place) * height + y


def _runs(changes: npt.NDArray[np.int64], count: int, size_hw: tuple[int, int]) -> list[RunLengthMask]:
    """The run lengths of each mask, from its changes in ascending order."""
    size = size_hw[0] * size_hw[1]
    first = np.searchsorted(changes, np.arange(count + 1) * (size + 1))
    masks = []
    for n in range(count):
        bounds = changes[first[n] : first[n + 1]] - n * (size + 1)
        counts = np.diff(bounds, prepend=0, append=size).astype(np.uint32)
        ends_inside = len(bounds) > 0 and bounds[-1] == size
        masks.append(RunLengthMask(size_hw, counts[:-1] if ends_inside else counts))
    return masks
