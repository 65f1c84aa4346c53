"""Streams made from run lengths unpack, in zlib's own hands, to those runs."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam3_runner.run_deflate import deflate_runs


def unpacked(lengths: list[int]) -> bytes:
    return b"".join(bytes([255 * (index % 2)]) * length for index, length in enumerate(lengths))


def assert_unpacks(lengths: list[int]) -> None:
    inflate = zlib.decompressobj()
    assert inflate.decompress(deflate_runs(np.array(lengths, np.int64))) == unpacked(lengths)
    assert inflate.eof and not inflate.unused_data  # it ends, its checksum is right, and nothing is behind it


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4) | st.integers(1, 600) | st.integers(1, 20_000), min_size=1, max_size=40))
def test_runs_of_all_lengths_come_out(lengths: list[int]) -> None:
    assert_unpacks(lengths)


@pytest.mark.parametrize("before", [[], [1], [7, 300]], ids=str)
def test_every_rest_after_copies_of_258_comes_out(before: list[int]) -> None:
    for length in range(1, 2 * 258 + 5):
        assert_unpacks([*before, length])
        assert_unpacks([*before, length, 2])


def test_fifty_megapixels_of_white_keep_their_checksum() -> None:
    stream = deflate_runs(np.array([1, 50_000_000]))
    assert zlib.decompress(stream) == unpacked([1, 50_000_000])
    assert len(stream) < 50_000
