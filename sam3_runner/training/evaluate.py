"""Measure a checkpoint on unseen scenes: `python -m sam3_runner.training.evaluate`.

Every scene is asked one prompt in words that is there and one that is not, through the same `Segmenter` that serves
requests; other scenes are asked by exemplars, a number of them for each kind of question. Ground truth is the drawn
geometry at the scene's own size.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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
from sam3_runner.training.data import MIN_OBJECTS_ALIKE, SHARE_ALIKE
from sam3_runner.training.exemplars import JITTER_SHARE, QUESTIONS
from sam3_runner.training.scenes import Scene, ScenePrompt, draw_prompt, draw_scene
from sam3_runner.types import Box, Prompt, Segmentation, SegmentItem

EVALUATION_SEED = 2_000_003  # training draws from seeds 0 to 3: no scene is in both
AREA_SIDE_PX = (192, 640)  # larger and more varied in size than training scenes
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
        forbidden: True instances that are like a negative exemplar.
        forbidden_found: Of those, the ones that are found all the same.
    """

    union_ious: list[float] = field(default_factory=list)
    hits: int = 0
    found: int = 0
    there: int = 0
    absent: int = 0
    absent_answered: int = 0
    forbidden: int = 0
    forbidden_found: int = 0

    def add(self, segmentation: Segmentation, scene: Scene, prompt: ScenePrompt) -> None:
        """Count the answer to one prompt about a scene."""
        masks = [rle.decode_mask(mask) for mask in segmentation.masks]
        truth, forbidden = (
            [scene.objects[i].mask for i in chosen] for chosen in (prompt.matches, prompt.forbidden)
        )
        self.found += len(masks)
        self.forbidden += len(forbidden)
        self.forbidden_found += count_hits(masks, forbidden)
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
        """Share of absent prompts that found something; 0 of none."""
        return self.absent_answered / max(self.absent, 1)

    @property
    def forbidden_share(self) -> float:
        """Share of what a negative exemplar forbids that is found all the same; 0 of none."""
        return self.forbidden_found / max(self.forbidden, 1)


def iou(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> float:
    """Intersection over union of two masks of the same size; 1 if both are empty."""
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 1.0


def count_hits(masks: Sequence[npt.NDArray[np.bool_]], truth: Sequence[npt.NDArray[np.bool_]]) -> int:
    """How many masks match a true one with IoU of at least 0.5, one to one."""
    if not masks or not truth:
        return 0
    overlaps = np.array([[iou(mask, true) for true in truth] for mask in masks])
    rows, columns = linear_sum_assignment(overlaps, maximize=True)
    return int(np.count_nonzero(overlaps[rows, columns] >= MATCH_IOU))


@dataclass(frozen=True)
class Question:
    """One unseen scene with what is asked about it."""

    scene: Scene
    prompts: tuple[ScenePrompt, ...]

    @classmethod
    def draw(cls, seed: int, index: int) -> Question:
        """Scene `index` of `seed`, with a prompt that is there and one that is not."""
        rng = np.random.default_rng([seed, index])
        scene = draw_scene(rng, AREA_SIDE_PX)
        present = draw_prompt(rng, scene, absent_share=0.0)
        absent = draw_prompt(rng, scene, absent_share=1.0)
        return cls(scene, (present, absent))

    @classmethod
    def draw_by_exemplars(cls, kind: str, seed: int, index: int) -> Question:
        """Question `index` of `seed` of this kind, one of `QUESTIONS`; about the first scene that allows one."""
        rng = np.random.default_rng([seed, index, list(QUESTIONS).index(kind)])
        while True:
            scene = draw_scene(rng, AREA_SIDE_PX, MIN_OBJECTS_ALIKE, SHARE_ALIKE)
            prompt = QUESTIONS[kind](rng, scene)
            if prompt is not None:
                return cls(scene, (prompt,))

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts that are in words."""
        return tuple(prompt.text for prompt in self.prompts if prompt.text is not None)

    def item(self, input_size_px: int) -> SegmentItem:
        """The scene as a runner takes it."""
        height, width = self.scene.image.shape[:2]
        prompts = tuple(as_asked(prompt) for prompt in self.prompts)
        return SegmentItem(resize_for_model(self.scene.image, input_size_px), (height, width), prompts)


def as_asked(prompt: ScenePrompt) -> Prompt:
    """What a caller sends."""
    boxes = tuple(Box(exemplar.box_xyxy_px, exemplar.is_positive) for exemplar in prompt.exemplars)
    return Prompt(prompt.text, boxes)


def evaluate(segmenter: Segmenter, scenes: int, seed: int = EVALUATION_SEED) -> Tally:
    """Ask in words about `scenes` unseen scenes.

    Raises:
        RuntimeError: the segmenter failed on a scene.
    """
    return _ask(segmenter, scenes, partial(Question.draw, seed))


def evaluate_exemplars(segmenter: Segmenter, kind: str, scenes: int, seed: int = EVALUATION_SEED) -> Tally:
    """Ask by exemplars, one kind of question out of `QUESTIONS`, about `scenes` unseen scenes.

    Raises:
        RuntimeError: the segmenter failed on a scene.
    """
    return _ask(segmenter, scenes, partial(Question.draw_by_exemplars, kind, seed))


def _ask(segmenter: Segmenter, scenes: int, draw: Callable[[int], Question]) -> Tally:
    tally = Tally()
    size = segmenter.info.input_size_px
    for start in tqdm(range(0, scenes, SCENES_PER_BATCH), unit="batch"):
        questions = [draw(index) for index in range(start, min(start + SCENES_PER_BATCH, scenes))]
        results = segmenter.segment_batch([question.item(size) for question in questions])
        for question, result in zip(questions, results, strict=True):
            if result.error:
                raise RuntimeError(f"the segmenter failed: {result.error.message}")
            for prompt, answer in zip(question.prompts, result.segmentations, strict=True):
                tally.add(answer, question.scene, prompt)
    return tally


def median_latency_ms(segmenter: Segmenter, runs: int = 30) -> float:
    """Median time from RGB pixels to run-length masks for one image and one prompt, after a warm-up.

    Every run has a scene of its own: a second question about an image skips the image encoder.
    """
    times = []
    for index in range(runs + 3):
        question = Question.draw(EVALUATION_SEED, index)
        start = time.perf_counter()
        segmenter.segment(question.scene.image, [as_asked(question.prompts[0])])
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


def exemplar_report(tallies: Mapping[str, Tally]) -> str:
    """A row for each kind of question by exemplars, as Markdown, conditions below it."""
    lines = [
        "| question | union mean IoU | instance F1 | found though nothing is right | forbidden instances found |",
        "|---|---|---|---|---|",
    ]
    for kind, tally in tallies.items():
        union = f"{tally.mean_iou:.3f}" if tally.union_ious else "–"
        f1 = f"{tally.f1:.3f}" if tally.there else "–"
        absent = f"{tally.absent_share:.1%} of {tally.absent}" if tally.absent else "–"
        forbidden = f"{tally.forbidden_share:.1%} of {tally.forbidden}" if tally.forbidden else "–"
        lines.append(f"| {kind} | {union} | {f1} | {absent} | {forbidden} |")
    asked = {len(tally.union_ious) + tally.absent for tally in tallies.values()}
    conditions = (
        f"{' or '.join(map(str, sorted(asked)))} unseen scenes (seed {EVALUATION_SEED}) for each, of at least "
        f"{MIN_OBJECTS_ALIKE} objects where they fit; every edge of a box off by up to {JITTER_SHARE:.0%} of its side."
    )
    return "\n".join([*lines, "", conditions])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure a checkpoint on unseen synthetic scenes.")
    parser.add_argument("--checkpoint", type=Path, default=DEMO_CHECKPOINT)
    parser.add_argument("--scenes", type=int, default=1000, help="asked about in words")
    parser.add_argument(
        "--exemplar-scenes", type=int, default=500, help="asked about by exemplars, for each kind of question"
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    segmenter = Segmenter.from_checkpoint(options.checkpoint, options.device)
    latency_ms = median_latency_ms(segmenter)
    print(report(segmenter, evaluate(segmenter, options.scenes), latency_ms))
    tallies = {kind: evaluate_exemplars(segmenter, kind, options.exemplar_scenes) for kind in QUESTIONS}
    print("", exemplar_report(tallies), sep="\n")


if __name__ == "__main__":
    main()
