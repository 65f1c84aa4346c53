"""Meta's interactive predictor and ours on the same weights, images and clicks, and how far apart the answers are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sam3_runner.clicks import ClickAnswer, fill_holes
from sam3_runner.images import resize_for_model
from sam3_runner.rle import decode_mask
from sam3_runner.segmenter import Segmenter
from sam3_runner.text import VOCABULARY_FILE
from sam3_runner.types import Point, Prompt, Segmentation, SegmentItem, Selection
from tests.parity.compare import (
    MASK_LOGIT_TOLERANCE,
    REDUCED,
    SCORE_TOLERANCE,
    TIMEOUT_S,
    Arrays,
    Size,
    made_cases,
)
from tests.parity.environment import ROOT, bpe_file, meta_python

Clicks = tuple[tuple[float, float, int], ...]  # x and y in pixels, and 1 on the object or 0 beside it

REDUCED_CLICKS = Size({**REDUCED.meta, "Sam3TrackerPredictor": {"image_size": 672}}, REDUCED.ours)
LARGEST_LOGIT = (
    32.0  # Meta's predictor cuts off the logits that it hands out, not those that masks are made of
)


@dataclass(frozen=True)
class ClickCase:
    """One image, (H, W, 3) uint8, and what is clicked on."""

    image: npt.NDArray[np.uint8]
    prompts: tuple[Clicks, ...]


def click_cases() -> list[ClickCase]:
    """Two prompts on the first image; one click, and three of which one is negative."""
    first, second, *_ = made_cases()  # 420×300 and 256×511 pixels
    one, three = ((130.0, 85.5, 1),), ((301.25, 200.0, 1), (90.0, 270.0, 1), (210.0, 33.0, 0))
    return [ClickCase(first.image, (one, three)), ClickCase(second.image, (((255.0, 510.0, 1),),))]


@dataclass(frozen=True)
class ClickDifference:
    """How far ours is from Meta's answer to the same clicks.

    Attributes:
        case: Number of the image.
        clicks: How many.
        chosen: Which of the four masks Meta's code took; the first is the one for several clicks.
        is_same_choice: Whether ours took the same.
        apart: By how much the other masks' logits differ from it at most: what a wrong choice would show.
        score: Difference of the score.
        mask_logit: The largest of a mask logit.
        pixels: Pixels of the final masks that differ.
        of_pixels: Of so many.
        filled: Pixels of the logits that were holes.
        logit_there: The largest absolute value of the filled logit, upsampled in float64, where a pixel differs.
        is_tight: Whether the box is the tight one of Meta's mask, to a pixel.
    """

    case: int
    clicks: int
    chosen: int
    is_same_choice: bool
    apart: float
    score: float
    mask_logit: float
    pixels: int
    of_pixels: int
    filled: int
    logit_there: float
    is_tight: bool

    @property
    def is_same(self) -> bool:
        """Whether it is Meta's answer, within what rounding in float32 may do."""
        return (
            self.is_same_choice
            and self.score <= SCORE_TOLERANCE
            and self.mask_logit <= MASK_LOGIT_TOLERANCE
            and self.logit_there <= MASK_LOGIT_TOLERANCE
            and self.is_tight
        )


def ask_meta(
    folder: Path,
    size: Size,
    cases: Sequence[ClickCase],
    *,
    single_gain: float,
    threads: int = 1,
    seed: int = 3,
) -> None:
    """Build Meta's model with seeded weights, save it as `sam3.pt`, and ask it everything.

    Args:
        folder: Where all of it lies afterwards.
        size: Of the model.
        cases: What is asked.
        single_gain: Factor of what makes the mask for several clicks: the larger, the more stable it is.
        threads: Of torch.
        seed: Of the weights.
    """
    config = size.config()
    for number, case in enumerate(cases):
        Image.fromarray(case.image).save(folder / f"{number}.png")
    request = {
        "size": size.meta,
        "input_size_px": config["vision_config"]["backbone_config"]["image_size"],
        "seed": seed,
        "threads": threads,
        "single_gain": single_gain,
        "cases": [{"image": f"{number}.png", "prompts": case.prompts} for number, case in enumerate(cases)],
    }
    (folder / "request.json").write_text(json.dumps(request))
    (folder / "config.json").write_text(json.dumps(config))
    python = meta_python()
    (folder / VOCABULARY_FILE).write_bytes(bpe_file(python).read_bytes())
    finished = subprocess.run(
        [python, "-m", "tests.parity.clicks_reference", folder, folder / VOCABULARY_FILE],
        cwd=ROOT,
        stdout=sys.stderr,
        timeout=TIMEOUT_S,
        check=False,
    )
    if finished.returncode != 0:
        raise RuntimeError("Meta's code failed: see its message above")


def click_differences(
    folder: Path, segmenter: Segmenter, cases: Sequence[ClickCase]
) -> list[ClickDifference]:
    """Ask ours the same, all images in one batch, and compare; one for each prompt, in order."""
    raw: list[ClickAnswer] = []
    head = segmenter._engine.clicks
    assert head is not None
    answer = head.answer

    def watched(*args: Any) -> ClickAnswer:
        raw.append(answer(*args))
        return raw[-1]

    with mock.patch.object(head, "answer", watched):
        results = segmenter.segment_batch([_item(segmenter, case) for case in cases])
    found = [answer for result in results for answer in result.segmentations]
    asked = [(number, place) for number, case in enumerate(cases) for place in range(len(case.prompts))]
    return [
        _difference(number, len(cases[number].prompts[place]), _answer_of(folder, number, place), ours, mask)
        for (number, place), ours, mask in zip(asked, raw, found, strict=True)
    ]


def _item(segmenter: Segmenter, case: ClickCase) -> SegmentItem:
    height, width = case.image.shape[:2]
    prompts = tuple(
        Prompt(
            points=tuple(Point((x, y), is_positive=bool(kind)) for x, y, kind in clicks),
            selection=Selection(score_threshold=0.0),
        )
        for clicks in case.prompts
    )
    pixels = resize_for_model(case.image, segmenter.info.input_size_px)
    return SegmentItem(pixels, (height, width), prompts)


def _answer_of(folder: Path, case: int, prompt: int) -> Arrays:
    with np.load(folder / f"answer-{case}.npz") as answers:
        names = [name for name in answers if name.startswith(f"{prompt}.")]
        return {name.partition(".")[2]: answers[name] for name in names}


def _difference(
    case: int, clicks: int, theirs: Arrays, ours: ClickAnswer, found: Segmentation
) -> ClickDifference:
    every, logits = (torch.from_numpy(theirs[name]) for name in ("all_logits", "logits"))
    our_logits = ours.mask_logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
    far = [_largest(one.clamp(-LARGEST_LOGIT, LARGEST_LOGIT) - logits) for one in every]
    our_far = [_largest(one.clamp(-LARGEST_LOGIT, LARGEST_LOGIT) - our_logits) for one in every]
    chosen = int(np.argmin(far))
    filled = fill_holes(every[chosen])
    mask = theirs["mask"]
    differs = mask != decode_mask(found.masks[0])
    fine = F.interpolate(filled.double()[None, None], mask.shape, mode="bilinear")[0, 0]
    rows, columns = np.nonzero(mask)
    box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return ClickDifference(
        case=case,
        clicks=clicks,
        chosen=chosen,
        is_same_choice=chosen == int(np.argmin(our_far)),
        apart=sorted(far)[1],
        score=abs(float(theirs["score"]) - float(found.scores[0])),
        mask_logit=_largest(logits - our_logits),
        pixels=int(differs.sum()),
        of_pixels=differs.size,
        filled=int((filled != every[chosen]).sum()),
        logit_there=float(np.abs(fine.numpy()[differs]).max(initial=0)),
        is_tight=bool(np.abs(found.boxes_xyxy_px[0] - box).max() <= 1),
    )


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
