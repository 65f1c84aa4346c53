"""Clicks, ours against Meta's own interactive predictor, which runs in an environment of its own (`tests/parity`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sam3_runner import clicks
from sam3_runner.segmenter import Segmenter
from tests.parity.clicks import REDUCED_CLICKS, ask_meta, click_cases, click_differences

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
CASES = click_cases()
# Of the mask for several clicks: with this it is stable, or is not.
GAINS = {"stable": 30.0, "unstable": 0.1}


@pytest.fixture(scope="module", params=GAINS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    ask_meta(path, REDUCED_CLICKS, CASES, single_gain=GAINS[request.param])
    return path


@pytest.fixture(scope="module")
def segmenter(folder: Path) -> Segmenter:
    return Segmenter.from_checkpoint(folder / "sam3.pt")


def test_clicks_are_answered_as_metas_predictor_does(folder: Path, segmenter: Segmenter) -> None:
    differences = click_differences(folder, segmenter, CASES)

    for found in differences:
        print(found)
    assert [found.clicks for found in differences] == [1, 3, 1]
    assert [found for found in differences if not found.is_same] == []
    # And the answers are worth comparing: another choice, or a hole that stays, would be seen.
    assert all(found.apart > 0.1 for found in differences)
    assert any(found.filled for found in differences)
    assert [found.chosen == 0 for found in differences] == [False, folder.name.startswith("stable"), False]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        pytest.param("fill_holes", lambda logits: logits, id="holes that stay"),
        pytest.param(
            "clicks_to_tensors",
            lambda points, size_hw, device: (
                torch.tensor([point.xy[::-1] for point in points]) / torch.tensor(size_hw),
                torch.tensor([point.is_positive for point in points]),
            ),
            id="y before x",
        ),
    ],
)
def test_the_comparison_sees(
    folder: Path,
    segmenter: Segmenter,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    wrong: Callable[..., object],
) -> None:
    module = "sam3_runner.segmenter" if name == "clicks_to_tensors" else clicks.__name__
    monkeypatch.setattr(f"{module}.{name}", wrong)

    differences = click_differences(folder, segmenter, CASES)

    assert not all(found.is_same for found in differences)
