"""A zlib stream (RFC 1950, RFC 1951) straight from the run lengths of what it unpacks to.

zlib has to read 12 MB of zeros and 255s to find out that they are runs. Here the runs are known, and with code
words fixed beforehand each takes one look-up: its first byte, then a copy of what exceeds a multiple of 258 bytes,
then copies of 258. One of those is two zero bits: to leave room for them is to write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

_Ints = npt.NDArray[np.int64]

# RFC 1951, §3.2.5. Codes 0 to 255 are bytes, 256 ends the block, 257 to 285 copy 3 to 258 bytes.
_END: Final = 256
_FIRST_COPY: Final = 257
_LAST_COPY: Final = 285
_LONGEST_COPY: Final = 258
_COPY_EXTRA_BITS: Final = (*[0] * 8, *[1] * 4, *[2] * 4, *[3] * 4, *[4] * 4, *[5] * 4)  # of 257 to 284

# Bits of each code word. The three of 6 make the code complete, as strict readers ask.
_WORD_BITS: Final = {
    0: 3,
    255: 3,
    **{code: 6 if code in (281, 282, 283) else 7 for code in range(_END, _LAST_COPY)},
    _LAST_COPY: 1,
}
_DISTANCE_WORD_BITS: Final = {0: 1, 1: 1}  # code 0 is the byte before; the other makes the code complete

# §3.2.7: how those lengths are written themselves. 18 stands for 11 to 138 zeros.
_LENGTH_WORD_BITS: Final = {1: 3, 3: 3, 6: 3, 7: 1, 18: 3}
_LENGTH_ORDER: Final = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1)

_ADLER_PRIME: Final = 65521


def deflate_runs(lengths: _Ints) -> bytes:
    """Compress bytes that are runs of 0 and 255 in turn, beginning with 0.

    Args:
        lengths: (R,) of the runs, R and each of them at least 1.
    Returns:
        A whole zlib stream.
    """
    codes = _codes()
    copies, rest = np.divmod(lengths - 1, _LONGEST_COPY)
    values = codes.run_values[np.arange(len(lengths)) & 1, rest]
    sizes = codes.run_sizes[rest] + 2 * copies
    stream = _join(
        np.concatenate((codes.header_values, values, codes.end_value)),
        np.concatenate((codes.header_sizes, sizes, codes.end_size)),
    )
    return b"\x78\x01" + stream + _adler32(lengths).to_bytes(4)


def _join(values: _Ints, sizes: _Ints) -> bytes:
    """Bits one after the other, the lowest first; values have up to 32, and as many zeros as fill their size."""
    ends = np.cumsum(sizes)
    word, shift = np.divmod(ends - sizes, 32)
    shifted = values << shift
    words = 1 + int(ends[-1]) // 32
    # No two values share a bit, so that sums are unions; float64 holds 32 bits exactly.
    low = np.bincount(word, shifted & 0xFFFFFFFF, words + 1)
    high = np.bincount(word + 1, shifted >> 32, words + 1)
    return (low + high).astype("<u4").tobytes()[: -(-int(ends[-1]) // 8)]


def _adler32(lengths: _Ints) -> int:
    """RFC 1950, §8.2, as sums over the runs of 255."""
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    ends, count = ends[1::2], lengths[1::2]
    # The byte at i is added to the second sum total - i times. Both sums stay below total², far from 2^63.
    first = 255 * int(count.sum())
    second = 255 * int((count * (total - ends) + count * (count + 1) // 2).sum()) + total
    return (second % _ADLER_PRIME) << 16 | (1 + first) % _ADLER_PRIME


@dataclass(frozen=True, slots=True)
class _Bits:
    """Some bits in the order of the stream: the first is the lowest."""

    value: int = 0
    size: int = 0

    def __add__(self, behind: _Bits) -> _Bits:
        return _Bits(self.value | behind.value << self.size, self.size + behind.size)


@dataclass(frozen=True, slots=True, eq=False)
class _Codes:
    """Bits to write, and how many.

    Attributes:
        header_values: (K,), and header_sizes: (K,).
        run_values: (2, 258), by the run's byte (0 or 255) and by what its length exceeds a multiple of 258 by, its
            first byte not counted.
        run_sizes: (258,), the same for both bytes.
        end_value: (1,), and end_size: (1,).
    """

    header_values: _Ints
    header_sizes: _Ints
    run_values: _Ints
    run_sizes: _Ints
    end_value: _Ints
    end_size: _Ints


@cache
def _codes() -> _Codes:
    words = _code_words(_WORD_BITS)
    header = _header()
    runs = [[_run(words, byte, rest) for rest in range(_LONGEST_COPY)] for byte in (0, 255)]
    return _Codes(
        header_values=np.array([bits.value for bits in header]),
        header_sizes=np.array([bits.size for bits in header]),
        run_values=np.array([[bits.value for bits in of_byte] for of_byte in runs]),
        run_sizes=np.array([bits.size for bits in runs[0]]),
        end_value=np.array([words[_END].value]),
        end_size=np.array([words[_END].size]),
    )


def _run(words: Mapping[int, _Bits], byte: int, rest: int) -> _Bits:
    """A run's first byte and the rest of it: copies are of 3 bytes or more."""
    if rest < 3:
        return sum([words[byte]] * rest, start=words[byte])
    code, start = _FIRST_COPY, 3
    while code + 1 < _LAST_COPY and start + (1 << _COPY_EXTRA_BITS[code - _FIRST_COPY]) <= rest:
        start += 1 << _COPY_EXTRA_BITS[code - _FIRST_COPY]
        code += 1
    longer_by = _Bits(rest - start, _COPY_EXTRA_BITS[code - _FIRST_COPY])
    return words[byte] + words[code] + longer_by + _code_words(_DISTANCE_WORD_BITS)[0]


def _header() -> list[_Bits]:
    """§3.2.7: the last block, its code words given by their lengths."""
    words = _code_words(_LENGTH_WORD_BITS)
    parts = [_Bits(1, 1), _Bits(2, 2)]
    parts += [_Bits(_LAST_COPY + 1 - 257, 5), _Bits(len(_DISTANCE_WORD_BITS) - 1, 5)]
    parts += [_Bits(len(_LENGTH_ORDER) - 4, 4)]
    parts += [_Bits(_LENGTH_WORD_BITS.get(length, 0), 3) for length in _LENGTH_ORDER]
    parts += [words[_WORD_BITS[0]]]
    parts += [
        words[18],
        _Bits(138 - 11, 7),
        words[18],
        _Bits(254 - 138 - 11, 7),
    ]  # no code words for 1 to 254
    parts += [words[_WORD_BITS[code]] for code in range(255, _LAST_COPY + 1)]
    parts += [words[size] for size in _DISTANCE_WORD_BITS.values()]
    return parts


def _code_words(sizes: Mapping[int, int]) -> dict[int, _Bits]:
    """§3.2.2: shorter words first, then lower codes. A word's highest bit comes first in the stream."""
    words, word, last = {}, 0, 0
    for code in sorted(sizes, key=lambda code: (sizes[code], code)):
        word <<= sizes[code] - last
        last = sizes[code]
        words[code] = _Bits(int(f"{word:0{last}b}"[::-1], 2), last)
        word += 1
    return words
