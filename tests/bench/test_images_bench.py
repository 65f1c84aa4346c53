"""The bench around the model: both ways do the same work, and what it measures is written down."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as pycocotools

from bench import images, jpeg_decisions
from sam3_runner import rle
from sam3_runner.segmenter import Segmenter


def test_both_ways_find_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "PHOTO_HW", (300, 400))
    given = images.logits(3, (20, 60))
    (_, plain), (_, ours) = images.masks_plain(given), images.masks_ours(given)
    for (theirs, area), (coco, our_area) in zip(plain, ours, strict=True):
        assert abs(area - our_area) <= 2  # where the sum's rounding decides
        differing = pycocotools.decode(theirs) != rle.decode_mask(rle.from_coco(coco))
        assert np.count_nonzero(differing) <= 2


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_a_row_is_measured_and_written_down(tmp_path: Path) -> None:
    assert images.main(["--rows", "mask-png-small", "--rounds", "1", "--out", str(tmp_path)]) == 0
    (row,) = csv.DictReader((tmp_path / "images.csv").read_text().splitlines())
    assert row["case"] == "mask-png-small" and row["commit"]
    assert float(row["plain_cpu_ms"]) > float(row["ours_cpu_ms"]) > 0
    assert float(row["times_less"]) > 5
    assert "| mask-png-small |" in (tmp_path / "images.md").read_text()


@pytest.mark.slow
def test_scaled_decoding_leaves_the_kept_set_as_it_is() -> None:
    tallies = jpeg_decisions.compare(Segmenter.from_checkpoint(), 8)
    for name in (name for name in tallies if name.startswith(("half", "quarter"))):
        assert tallies[name].same_set == tallies[name].scenes
        assert np.median(tallies[name].ious) > 0.99
