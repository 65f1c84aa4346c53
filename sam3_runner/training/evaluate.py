"""Measure a checkpoint on unseen scenes: `python -m sam3_runner.training.evaluate`.

Every scene is asked one prompt that is there and one that is not, through the same `Segmenter` that serves
requests. Ground truth is the drawn geometry at the scene's own size.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import transformers
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from sam3_runner import rle
from sam3_runner.checkpoint import DEMO_CHECKPOINT
from sam3_runner.images import resize_for_model
from sam3_runner.segmenter import Segmenter
from sam3_runner.training.scenes import Scene, draw_prompt, draw_scene
from sam3_runner.types import Prompt, Segmentation, SegmentItem

EVALUATION_SEED = 2_000_003  # training draws from seeds 0 and 1: no scene is in both
SCENES_PER_BATCH = 8
MATCH_IOU = 0.5


@dataclass
class Tally:
    """Counts over all prompts so far.

    Attributes:
        union_ious: IoU of the union of what was found with the union of what is there, one per present prompt.
        hits: Instances that match a true one with IoU of at least 0.5, one to one.
        found: Instances found, for present and absent prompts.
        there: True instances.
        absent: Absent prompts asked.
        absent_answered: Of those, the ones that found something.
    """

    union_ious: list[float] = field(default_factory=list)
    hits: int = 0
    found: int = 0
    there: int = 0
    absent: int = 0
    absent_answered: int = 0

    def add(self, segmentation: Segmentation, truth: Sequence[npt.NDArray[np.bool_]]) -> None:
        """Count one prompt's answer; `truth` holds the masks of its instances, none if it is absent."""
        masks = [rle.decode_mask(mask) for mask in segmentation.masks]
        self.found += len(masks)
        if not truth:
            self.absent += 1
            self.absent_answered += bool(masks)
            return
        self.there += len(truth)
        self.hits += count_hits(masks, truth)
        self.union_ious.append(iou(np.any(masks, axis=0), np.any(truth, axis=0)) if masks else 0.0)

    @property
    def mean_iou(self) -> float:
        """Mean of the union masks' IoU over present prompts."""
        return statistics.fmean(self.union_ious)

    @property
    def f1(self) -> float:
        """Instance F1 at mask IoU 0.5; what absent prompts find counts as false positives."""
        return 2 * self.hits / (self.found + self.there)

    @property
    def absent_share(self) -> float:
        """Share of absent prompts that found something."""
        return self.absent_answered / self.absent


def iou(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> float:
    """Intersection over union of two masks of the same size; 1 if both are empty."""
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 1.0


def count_hits(masks: Sequence[npt.NDArray[np.bool_]], truth: Sequence[npt.NDArray[np.bool_]]) -> int:
    """How many masks match a true one with IoU of at least 0.5, one to one."""
    if not masks:
        return 0
    overlaps = np.array([[iou(mask, true) for true in truth] for mask in masks])
    rows, columns = linear_sum_assignment(overlaps, maximize=True)
    return int(np.count_nonzero(overlaps[rows, columns] >= MATCH_IOU))


@dataclass(frozen=True)
class Question:
    """One unseen scene with a prompt that is there and one that is not."""

    scene: Scene
    texts: tuple[str, str]
    matches: tuple[int, ...]

    @classmethod
    def draw(cls, seed: int, index: int) -> Question:
        """Scene `index` of `seed`; larger and more varied in size than training scenes."""
        rng = np.random.default_rng([seed, index])
        scene = draw_scene(rng, (192, 640))
        present = draw_prompt(rng, scene, absent_share=0.0)
        absent = draw_prompt(rng, scene, absent_share=1.0)
        return cls(scene, (present.text, absent.text), present.matches)

    def item(self, input_size_px: int) -> SegmentItem:
        """The scene as a runner takes it."""
        height, width = self.scene.image.shape[:2]
        prompts = tuple(Prompt(text) for text in self.texts)
        return SegmentItem(resize_for_model(self.scene.image, input_size_px), (height, width), prompts)


def evaluate(segmenter: Segmenter, scenes: int, seed: int = EVALUATION_SEED) -> Tally:
    """Ask about `scenes` unseen scenes.

    Raises:
        RuntimeError: the segmenter failed on a scene.
    """
    tally = Tally()
    size = segmenter.info.input_size_px
    for start in tqdm(range(0, scenes, SCENES_PER_BATCH), unit="batch"):
        questions = [Question.draw(seed, i) for i in range(start, min(start + SCENES_PER_BATCH, scenes))]
        results = segmenter.segment_batch([question.item(size) for question in questions])
        for question, result in zip(questions, results, strict=True):
            if result.error:
                raise RuntimeError(f"the segmenter failed: {result.error.message}")
            present, absent = result.segmentations
            tally.add(present, [question.scene.objects[i].mask for i in question.matches])
            tally.add(absent, [])
    return tally


def median_latency_ms(segmenter: Segmenter, runs: int = 30) -> float:
    """Median time from RGB pixels to run-length masks for one image and one prompt, after a warm-up.

    Every run has a scene of its own: a second question about an image skips the image encoder.
    """
    times = []
    for index in range(runs + 3):
        question = Question.draw(EVALUATION_SEED, index)
        start = time.perf_counter()
        segmenter.segment(question.scene.image, [Prompt(question.texts[0])])
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times[3:])


def report(segmenter: Segmenter, tally: Tally, latency_ms: float) -> str:
    """The table as Markdown, conditions below it."""
    info = segmenter.info
    rows = [
        ("union-mask mean IoU, present prompts", f"{tally.mean_iou:.3f}", "≥ 0.88", "0.93"),
        ("instance F1 at mask IoU 0.5, all prompts", f"{tally.f1:.3f}", "≥ 0.92", "0.97"),
        ("absent prompts that find something", f"{tally.absent_share:.1%}", "≤ 3 %", "1 %"),
        ("one image, one prompt, median", f"{latency_ms:.0f} ms", "≤ 150 ms", "–"),
    ]
    lines = ["| measure | value | required | aim |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    conditions = (
        f"{len(tally.union_ious)} unseen scenes (seed {EVALUATION_SEED}), one present and one absent prompt each; "
        f"{info.parameters:,} parameters, {info.input_size_px} px, {info.device}, {info.dtype}, "
        f"{torch.get_num_threads()} threads; torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}."
    )
    return "\n".join([*lines, "", conditions])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure a checkpoint on unseen synthetic scenes.")
    parser.add_argument("--checkpoint", type=Path, default=DEMO_CHECKPOINT)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    segmenter = Segmenter.from_checkpoint(options.checkpoint, options.device)
    latency_ms = median_latency_ms(segmenter)
    print(report(segmenter, evaluate(segmenter, options.scenes), latency_ms))


if __name__ == "__main__":
    main()
