"""The marker structure of a JPEG stream (ITU-T T.81, Annex B), as far as its decoding cost depends on it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

# In entropy-coded data 0xFF is followed by 0 (a stuffed byte) or by a restart marker; any marker may have
# further 0xFF before it to fill up.
_NEXT_MARKER: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

_PROGRESSIVE_FRAMES: Final = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_SCAN: Final = 0xDA
_END: Final = 0xD9


@dataclass(frozen=True, slots=True)
class JpegLayout:
    """What lies between the first picture's start and end markers.

    Attributes:
        scans: How many scans it has.
        parts: How many segments it has, scans included, and bytes of no meaning before the first scan.
        progressive: Whether its frame is a progressive one.
        end: Offset of its end marker, None if it has none.
    """

    scans: int
    parts: int
    progressive: bool
    end: int | None


def read_layout(data: bytes, max_parts: int) -> JpegLayout:
    """Walk over the markers of the first picture in the file. Never raises: what is broken ends the walk.

    Args:
        data: The whole file.
        max_parts: The walk ends beyond so many.
    """
    scans, parts, progressive, at = 0, 0, False, 2
    while parts <= max_parts and (found := _NEXT_MARKER.search(data, at)) is not None:
        skipped = found.start() - at
        at, marker = found.start(), data[found.start() + 1]
        if marker == _END:
            return JpegLayout(scans, parts, progressive, at)
        parts += 1 + (0 if scans else skipped)
        progressive = progressive or marker in _PROGRESSIVE_FRAMES
        scans += marker == _SCAN
        at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4]))
    return JpegLayout(scans, parts, progressive, None)
