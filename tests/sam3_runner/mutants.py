"""Image files of every kind, broken in every way that a machine thinks of. Number and seed say which."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from tests.sam3_runner import made_images
from tests.sam3_runner.made_images import KINDS

SEED = 20260101
# Numbers at which sizes, offsets and counts go wrong.
EDGES = (0, 1, 2, 7, 8, 255, 256, 32767, 32768, 65535, 65536, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_TURNED = ("JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF")


@dataclass(frozen=True)
class Mutant:
    """One broken file.

    Attributes:
        number: Makes it again.
        kind: What it was.
        ways: What was done to it.
    """

    number: int
    kind: str
    ways: tuple[str, ...]
    data: bytes

    def __str__(self) -> str:
        return f"mutant {self.number}: {self.kind}, {', '.join(self.ways)}"


def mutant(number: int) -> Mutant:
    """The same one for the same number."""
    random = np.random.default_rng([SEED, number])
    kinds = sorted(seeds())
    kind = kinds[int(random.integers(len(kinds)))]
    data, ways = seeds()[kind], []
    for _ in range(int(random.choice([1, 1, 1, 2, 3]))):
        way = list(WAYS)[int(random.integers(len(WAYS)))]
        data = WAYS[way](data, random)
        ways.append(way)
    if data.startswith(b"\x89PNG") and random.random() < 0.7:
        data = _with_right_checksums(data)  # past the first check
    return Mutant(number, kind, tuple(ways), data)


@cache
def seeds() -> dict[str, bytes]:
    """Whole files, made once."""
    whole = {kind: made.make() for kind, made in KINDS.items()}
    turned = {f"{name.lower()}_turned": made_images.with_orientation(name, 6) for name in _TURNED}
    return whole | turned


# --- anywhere -----------------------------------------------------------------------------------------------


def _flip_bits(data: bytes, random: np.random.Generator) -> bytes:
    broken = bytearray(data)
    for at in random.integers(0, max(1, len(data)), size=int(random.choice([1, 2, 8, 64]))):
        if at < len(broken):
            broken[at] ^= 1 << int(random.integers(8))
    return bytes(broken)


def _truncate(data: bytes, random: np.random.Generator) -> bytes:
    return data[: int(random.integers(0, len(data) + 1))]


def _cut_out(data: bytes, random: np.random.Generator) -> bytes:
    begin, end = sorted(map(int, random.integers(0, len(data) + 1, size=2)))
    return data[:begin] + data[end:]


def _insert_noise(data: bytes, random: np.random.Generator) -> bytes:
    at = int(random.integers(0, len(data) + 1))
    return data[:at] + random.bytes(int(random.choice([1, 2, 4, 100, 5000]))) + data[at:]


def _repeat_a_part(data: bytes, random: np.random.Generator) -> bytes:
    begin, end = sorted(map(int, random.integers(0, len(data) + 1, size=2)))
    return data[:end] + data[begin:end] * int(random.choice([1, 2, 20])) + data[end:]


def _splice(data: bytes, random: np.random.Generator) -> bytes:
    """The beginning of this, the end of another, often of another format."""
    other = seeds()[sorted(seeds())[int(random.integers(len(seeds())))]]
    return data[: int(random.integers(0, len(data) + 1))] + other[int(random.integers(0, len(other) + 1)) :]


def _write_an_edge(data: bytes, random: np.random.Generator, below: int | None = None) -> bytes:
    """A number of 1, 2 or 4 bytes, in either order."""
    code = str(random.choice(["B", "<H", ">H", "<I", ">I"]))
    size = struct.calcsize(code)
    at = int(random.integers(0, max(1, min(len(data), below or len(data)) - size + 1)))
    value = EDGES[int(random.integers(len(EDGES)))] & ((1 << 8 * size) - 1)
    return data[:at] + struct.pack(code, value) + data[at + size :]


def _lie_in_the_header(data: bytes, random: np.random.Generator) -> bytes:
    return _write_an_edge(data, random, below=64)


# --- by the pieces that a file is made of -------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A chunk, segment, box or directory entry, and where its length stands: offset and `struct` code."""

    begin: int
    end: int
    length_at: int
    length_code: str


def pieces(data: bytes) -> list[Piece]:
    """Of the outermost level; none where a file is not made of pieces."""
    if data.startswith(b"\x89PNG"):
        return _walk(data, 8, ">I", 0, 12)
    if data.startswith(b"\xff\xd8"):
        return _jpeg_segments(data)
    if data.startswith(b"RIFF"):
        return _walk(data, 12, "<I", 4, 8)
    if data[4:8] == b"ftyp":
        return _walk(data, 0, ">I", 0, 0)
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _tiff_entries(data)
    return []


def _walk(data: bytes, at: int, code: str, length_at: int, more: int) -> list[Piece]:
    found = []
    while at + 8 <= len(data):
        size = struct.unpack_from(code, data, at + length_at)[0] + more
        size += size % 2 if code == "<I" else 0  # RIFF
        if size < 8:
            break
        found.append(Piece(at, min(at + size, len(data)), at + length_at, code))
        at += size
    return found


def _jpeg_segments(data: bytes) -> list[Piece]:
    found, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in (0xD9, 0xDA):
        size = 2 + struct.unpack_from(">H", data, at + 2)[0]
        found.append(Piece(at, min(at + size, len(data)), at + 2, ">H"))
        at += size
    return found


def _tiff_entries(data: bytes) -> list[Piece]:
    order = "<" if data.startswith(b"II") else ">"
    directory = struct.unpack_from(f"{order}I", data, 4)[0] if len(data) >= 8 else len(data)
    if directory + 2 > len(data):
        return []
    entries = struct.unpack_from(f"{order}H", data, directory)[0]
    begins = range(directory + 2, min(directory + 2 + 12 * entries, len(data) - 11), 12)
    return [Piece(at, at + 12, at + 4 + 4 * (at // 12 % 2), f"{order}I") for at in begins]


def _one_piece(data: bytes, random: np.random.Generator) -> Piece | None:
    found = pieces(data)
    return found[int(random.integers(len(found)))] if found else None


def _lie_about_a_length(data: bytes, random: np.random.Generator) -> bytes:
    piece = _one_piece(data, random)
    if piece is None:
        return _lie_in_the_header(data, random)
    size = struct.calcsize(piece.length_code)
    true = struct.unpack_from(piece.length_code, data, piece.length_at)[0]
    lies = (*EDGES, true + 1, max(0, true - 1), true * 2, len(data))
    value = lies[int(random.integers(len(lies)))] & ((1 << 8 * size) - 1)
    return data[: piece.length_at] + struct.pack(piece.length_code, value) + data[piece.length_at + size :]


def _repeat_a_piece(data: bytes, random: np.random.Generator) -> bytes:
    piece = _one_piece(data, random)
    if piece is None:
        return _repeat_a_part(data, random)
    again = data[piece.begin : piece.end] * int(random.choice([1, 2, 50]))
    return data[: piece.end] + again + data[piece.end :]


def _drop_a_piece(data: bytes, random: np.random.Generator) -> bytes:
    piece = _one_piece(data, random)
    return _cut_out(data, random) if piece is None else data[: piece.begin] + data[piece.end :]


def _swap_pieces(data: bytes, random: np.random.Generator) -> bytes:
    found = pieces(data)
    if len(found) < 2:
        return _splice(data, random)
    first, second = (found[i] for i in sorted(map(int, random.choice(len(found), size=2, replace=False))))
    return (
        data[: first.begin]
        + data[second.begin : second.end]
        + data[first.end : second.begin]
        + data[first.begin : first.end]
        + data[second.end :]
    )


def _fill_a_piece(data: bytes, random: np.random.Generator) -> bytes:
    piece = _one_piece(data, random)
    if piece is None or piece.end - piece.begin <= 8:
        return _flip_bits(data, random)
    begin = int(random.integers(piece.begin + 8, piece.end))
    fill = random.bytes(piece.end - begin) if random.random() < 0.5 else b"\xff" * (piece.end - begin)
    return data[:begin] + fill + data[piece.end :]


def _with_right_checksums(data: bytes) -> bytes:
    whole = bytearray(data)
    for piece in pieces(data):
        if piece.end - piece.begin >= 12:
            struct.pack_into(">I", whole, piece.end - 4, zlib.crc32(whole[piece.begin + 4 : piece.end - 4]))
    return bytes(whole)


WAYS: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "bits flipped": _flip_bits,
    "truncated": _truncate,
    "a part cut out": _cut_out,
    "noise put in": _insert_noise,
    "a part repeated": _repeat_a_part,
    "spliced with another": _splice,
    "a number on an edge": _write_an_edge,
    "header lies": _lie_in_the_header,
    "a length lies": _lie_about_a_length,
    "a piece repeated": _repeat_a_piece,
    "a piece dropped": _drop_a_piece,
    "pieces swapped": _swap_pieces,
    "a piece overwritten": _fill_a_piece,
}
