"""Small ICC profiles (ICC.1:2001-04, version 2.4) written from scratch, for tests."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np

# CIE xy of red, green and blue, and the exponent that stands for the curve. All with a D65 white.
PRIMARIES: dict[str, tuple[tuple[tuple[float, float], ...], float]] = {
    "srgb": (((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)), 2.2),
    "display_p3": (((0.68, 0.32), (0.265, 0.69), (0.15, 0.06)), 2.2),
    "adobe_rgb": (((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), 2.2),
    "wide": (((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)), 1.8),
    "swapped": (((0.15, 0.06), (0.30, 0.60), (0.64, 0.33)), 2.2),
}

_D65_TO_D50 = np.array(  # Bradford
    [[1.0478, 0.0229, -0.0501], [0.0295, 0.9905, -0.0171], [-0.0092, 0.0150, 0.7521]]
)
_D65_XYZ = np.array([0.9505, 1.0, 1.089])
_D50_XYZ = (0.9642, 1.0, 0.8249)


def rgb_profile(name: str) -> bytes:
    """A matrix-and-curve profile of the given primaries."""
    primaries, gamma = PRIMARIES[name]
    xyz = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in primaries]).T
    columns = (_D65_TO_D50 @ (xyz * np.linalg.solve(xyz, _D65_XYZ))).T
    curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256))
    tags = {b"rXYZ": _xyz(columns[0]), b"gXYZ": _xyz(columns[1]), b"bXYZ": _xyz(columns[2])}
    return _profile(b"RGB ", b"XYZ ", {**tags, b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}, name)


def cmyk_profile(to_lab: Callable[[float, float, float, float], tuple[float, float, float]]) -> bytes:
    """A lookup-table profile with two points per ink, from a function of inks in [0, 1] to L*a*b*."""
    corners = [[i >> 3 & 1, i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(16)]
    table = b"".join(
        bytes((round(lightness * 2.55), round(a) + 128, round(b) + 128))
        for lightness, a, b in (to_lab(*map(float, inks)) for inks in corners)
    )
    identity = bytes(range(256))
    lut = b"mft1" + struct.pack(">I4B", 0, 4, 3, 2, 0)
    lut += struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    lut += identity * 4 + table + identity * 3
    return _profile(b"CMYK", b"Lab ", {b"A2B0": lut}, "cmyk")


def _xyz(values: Sequence[float] | np.ndarray) -> bytes:
    return b"XYZ " + struct.pack(">I3i", 0, *(round(float(value) * 65536) for value in values))


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes], name: str) -> bytes:
    text = name.encode() + b"\0"
    tags = {
        b"desc": b"desc" + struct.pack(">II", 0, len(text)) + text + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": _xyz(_D50_XYZ),
        **tags,
    }
    directory, body, at = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, value in tags.items():
        value += bytes(-len(value) % 4)
        directory += tag + struct.pack(">II", at + len(body), len(value))
        body += value
    device = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(
        ">I4sI4s4s4s12s4s4s", at + len(body), b"", 0x02400000, device, space, connection, b"", b"acsp", b""
    )
    header += bytes(24) + struct.pack(">3i", *(round(v * 65536) for v in _D50_XYZ))
    header = header.ljust(128, b"\0")
    return header + struct.pack(">I", len(tags)) + directory + body
