"""The PNG of a mask is exact for every reader."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from torchvision.io import ImageReadMode, decode_png

from sam3_runner import masks, rle
from sam3_runner.types import RunLengthMask


def disc(size_hw: tuple[int, int], y: int, x: int, radius: int) -> np.ndarray:
    rows, columns = np.mgrid[: size_hw[0], : size_hw[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def png_of(mask: np.ndarray) -> bytes:
    return masks.encode_png(rle.encode_mask(mask))


class TestPng:
    @settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(lambda shape: arrays(np.bool_, shape)))
    def test_pillow_reads_0_and_255_at_the_masks_own_size(self, mask: np.ndarray) -> None:
        image = Image.open(io.BytesIO(png_of(mask)))
        assert image.size == mask.shape[::-1]
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), np.where(mask, 255, 0))

    @pytest.mark.parametrize("value", [False, True])
    @pytest.mark.parametrize("size_hw", [(1, 1), (1, 20_000), (20_000, 1), (600, 800)])
    def test_empty_and_full_masks_are_exact(self, size_hw: tuple[int, int], value: bool) -> None:
        image = Image.open(io.BytesIO(png_of(np.full(size_hw, value))))
        assert image.size == size_hw[::-1]
        assert image.getextrema() == (255 * value, 255 * value)

    @pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
    @pytest.mark.parametrize("cells", [9, 60, 400])
    def test_libpng_reads_what_the_runs_decode_to(self, cells: int) -> None:
        noise = np.random.default_rng(cells).random((cells, cells)) < 0.4
        mask = np.asarray(Image.fromarray(noise).resize((400, 300)))
        read = decode_png(
            torch.frombuffer(bytearray(png_of(mask)), dtype=torch.uint8), ImageReadMode.UNCHANGED
        )
        assert read.shape == (1, 300, 400)
        assert np.array_equal(read[0].numpy(), np.where(rle.decode_mask(rle.encode_mask(mask)), 255, 0))

    def test_runs_of_no_length_change_nothing(self) -> None:
        plain = RunLengthMask((4, 3), np.array([5, 4, 3], np.uint32))
        cut = RunLengthMask((4, 3), np.array([2, 0, 3, 1, 0, 3, 0, 0, 3], np.uint32))
        assert masks.encode_png(cut) == masks.encode_png(plain)

    def test_the_file_follows_the_standard_to_the_byte(self) -> None:
        data = png_of(np.eye(3, 5, dtype=bool))
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        names, at = [], 8
        while at < len(data):
            length, name = struct.unpack_from(">I4s", data, at)
            assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(
                data[at + 4 : at + 8 + length]
            )
            names.append(name)
            at += 12 + length
        assert names == [b"IHDR", b"IDAT", b"IEND"]

    def test_twelve_megapixels_fit_into_a_few_kilobytes(self) -> None:
        full = RunLengthMask((3000, 4000), np.array([0, 12_000_000], np.uint32))
        assert len(masks.encode_png(full)) < 20_000
