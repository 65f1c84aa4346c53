"""The cropped upsampling against the slow, obvious one: interpolate the whole image, then compare with 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sam3_runner import rle, upsample
from sam3_runner.upsample import masks_from_logits


def upsample_whole(logits: torch.Tensor, size_hw: tuple[int, int]) -> np.ndarray:
    return F.interpolate(logits[:, None], size_hw, mode="bilinear", align_corners=False)[:, 0].numpy()


def smooth_logits(seed: int, count: int, size_hw: tuple[int, int], offset: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 5, 4, generator=generator)
    return F.interpolate(coarse, size_hw, mode="bicubic")[:, 0] + offset


@pytest.mark.parametrize("size_hw", [(80, 80), (333, 500), (41, 7), (1, 1), (1, 900), (1200, 3)])
@pytest.mark.parametrize("offset", [-1.2, 0.0, 1.2])
def test_masks_equal_those_of_upsampling_the_whole_image(size_hw: tuple[int, int], offset: float) -> None:
    logits = smooth_logits(3, 4, (80, 60), offset)
    expected = upsample_whole(logits, size_hw)
    for mask, whole in zip(masks_from_logits(logits, size_hw), expected, strict=True):
        differs = rle.decode_mask(mask) != (whole > 0)
        assert np.abs(whole[differs]).max(initial=0) < 1e-5  # only where the sum's rounding decides


def test_run_lengths_are_the_canonical_ones_of_the_full_mask() -> None:
    logits = smooth_logits(5, 8, (24, 24), 0.1)
    for mask in masks_from_logits(logits, (50, 37)):
        np.testing.assert_array_equal(mask.counts, rle.encode_mask(rle.decode_mask(mask)).counts)


@pytest.mark.parametrize("value", [pytest.param(1.0, id="full"), pytest.param(-1.0, id="empty")])
def test_uniform_logits_give_full_and_empty_masks(value: float) -> None:
    (mask,) = masks_from_logits(torch.full((1, 8, 8), value), (30, 20))
    assert rle.area_px(mask) == (600 if value > 0 else 0)


def test_no_logits_give_no_masks() -> None:
    assert masks_from_logits(torch.zeros(0, 8, 8), (30, 20)) == ()


def test_masks_do_not_depend_on_their_neighbours_nor_on_how_many_go_through_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = smooth_logits(7, 9, (30, 20), 0.0)
    together = masks_from_logits(logits, (100, 77))
    monkeypatch.setattr(upsample, "_TAPS_AT_ONCE", 1300)
    monkeypatch.setattr(upsample, "_PAIRS_AT_ONCE", 50)
    for one, mask in zip(masks_from_logits(logits, (100, 77)), together, strict=True):
        np.testing.assert_array_equal(one.counts, mask.counts)


@pytest.mark.parametrize("size_hw", [(64, 64), (50, 37), (9, 11), (16, 16)])
def test_noise_with_exact_zeros_equals_the_whole_image_too(size_hw: tuple[int, int]) -> None:
    logits = torch.randint(-2, 3, (6, 16, 16), generator=torch.Generator().manual_seed(1)).float()
    expected = upsample_whole(logits, size_hw)
    for mask, whole in zip(masks_from_logits(logits, size_hw), expected, strict=True):
        differs = rle.decode_mask(mask) != (whole > 0)
        assert np.abs(whole[differs]).max(initial=0) < 1e-5


def test_a_device_of_its_own_finds_the_same_outlines_as_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = smooth_logits(9, 5, (40, 30), 0.0)
    on_host = masks_from_logits(logits, (333, 250))
    monkeypatch.setattr(upsample, "_is_on_host", lambda tensor: False)
    for one, mask in zip(masks_from_logits(logits, (333, 250)), on_host, strict=True):
        np.testing.assert_array_equal(one.counts, mask.counts)
