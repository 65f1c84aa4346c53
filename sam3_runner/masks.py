"""Masks as the PNG that callers fetch."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from sam3_runner import rle
from sam3_runner.run_deflate import deflate_runs
from sam3_runner.types import RunLengthMask


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
