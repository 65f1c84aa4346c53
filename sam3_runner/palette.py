"""The colours of instances: told apart by people of every colour vision, as far as seven hues go."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

# Okabe & Ito, "Color Universal Design" (2008), without black.
_HUES: Final = (
    (230, 159, 0),  # orange
    (86, 180, 233),  # sky blue
    (0, 158, 115),  # bluish green
    (240, 228, 66),  # yellow
    (0, 114, 178),  # blue
    (213, 94, 0),  # vermilion
    (204, 121, 167),  # reddish purple
)
# After seven instances the same hues come lighter, then darker: towards white, then towards black, by this much.
_SHADES: Final = ((0.0, 0), (0.45, 255), (0.35, 0))
_BRIGHT: Final = 130.0  # luma above which black is read better than white


def colors(count: int) -> npt.NDArray[np.uint8]:
    """Of instances 1 to `count`, in rows 1 to `count`; row 0 is black.

    Returns:
        (count + 1, 3) RGB. They begin anew after 21.
    """
    hues = np.array(_HUES, np.float64)
    shades = np.concatenate([hues * (1 - share) + towards * share for share, towards in _SHADES])  # (21, 3)
    table = np.zeros((count + 1, 3), np.uint8)
    table[1:] = np.round(np.resize(shades, (count, 3))) if count else 0
    return table


def contrasting(table: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Black for bright colours, white for dark ones.

    Args:
        table: (N, 3) RGB.
    Returns:
        (N, 3) RGB.
    """
    is_bright = table @ np.array([0.299, 0.587, 0.114]) > _BRIGHT  # (N, 3) -> (N,)
    return np.where(is_bright[:, None], np.uint8(0), np.uint8(255)).repeat(3, axis=1)
