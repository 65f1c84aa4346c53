from __future__ import annotations

import dataclasses
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sam3_runner import rle
from sam3_runner.errors import DeviceOutOfMemory, InvalidPrompt, TooManyPrompts, UnsupportedPrompt
from sam3_runner.images import resize_for_model
from sam3_runner.segmenter import Segmenter
from sam3_runner.training.evaluate import Question, evaluate
from sam3_runner.training.scenes import Scene
from sam3_runner.types import Box, Point, Prompt, Segmentation, SegmentItem, Selection


def ask(*texts: str, **selection: Any) -> tuple[Prompt, ...]:
    return tuple(Prompt(text, selection=Selection(**selection)) for text in texts)


def item_of(scene: Scene, texts: tuple[str, ...], **selection: Any) -> SegmentItem:
    height, width = scene.image.shape[:2]
    return SegmentItem(resize_for_model(scene.image, 240), (height, width), ask(*texts, **selection))


def assert_same_answer(one: Segmentation, other: Segmentation) -> None:
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)
    np.testing.assert_allclose(one.boxes_xyxy_px, other.boxes_xyxy_px, atol=0.05)
    for first, second in zip(one.masks, other.masks, strict=True):
        assert first.size_hw == second.size_hw
        differing = np.count_nonzero(rle.decode_mask(first) != rle.decode_mask(second))
        assert differing <= 1e-3 * first.size_hw[0] * first.size_hw[1]


PROMPT_SETS = [
    ("red circle",),
    ("circle", "square", "star", "red", "blue"),
    ("GREEN", "triangles"),
    ("ring",) * 20,  # more pairs than one pass decodes
    ("yellow star", "cat"),
    ("white", "black", "cross"),
]


def test_a_batch_gives_the_same_answers_as_single_calls(demo: Segmenter, scenes: list[Scene]) -> None:
    there = [f"{scene.objects[-1].colour} {scene.objects[-1].shape}" for scene in scenes]
    prompts = [(*texts, present) for texts, present in zip(PROMPT_SETS, there, strict=True)]
    items = [item_of(scene, texts) for scene, texts in zip(scenes, prompts, strict=True)]
    results = demo.segment_batch(items)
    found = 0
    for scene, texts, result in zip(scenes, prompts, results, strict=True):
        assert result.error is None
        assert result.batch_size == len(items)
        for one, other in zip(result.segmentations, demo.segment(scene.image, ask(*texts)), strict=True):
            assert_same_answer(one, other)
            found += len(one.scores)
    assert found >= 5  # equal for a better reason than both being empty


def test_the_demo_checkpoint_sees(demo: Segmenter) -> None:
    tally = evaluate(demo, scenes=40, seed=77)
    assert tally.mean_iou > 0.8
    assert tally.f1 > 0.85
    assert tally.absent_share < 0.1


def test_scores_descend_and_boxes_and_masks_lie_in_the_image(demo: Segmenter, scenes: list[Scene]) -> None:
    for scene in scenes:
        height, width = scene.image.shape[:2]
        (found,) = demo.segment(scene.image, ask("shape", score_threshold=0.01))
        assert (np.diff(found.scores) <= 0).all()
        assert (found.scores > 0.01).all()
        assert (found.boxes_xyxy_px >= 0).all()
        assert (found.boxes_xyxy_px <= [width, height, width, height]).all()
        assert len(found.masks) == len(found.scores) == len(found.boxes_xyxy_px)
        assert all(mask.size_hw == (height, width) for mask in found.masks)


def test_the_score_threshold_decides_what_is_kept(demo: Segmenter) -> None:
    question = Question.draw(5, 1)
    text, photo = question.texts[0], question.scene.image
    counts = [len(demo.segment(photo, ask(text, score_threshold=t))[0].scores) for t in (0.0, 0.5, 1.0)]
    assert counts[0] == 24  # every query
    assert counts[0] > counts[1] > counts[2] == 0


def test_the_best_few_are_kept_and_duplicates_are_not(demo: Segmenter, scenes: list[Scene]) -> None:
    photo = scenes[0].image
    (everything,) = demo.segment(photo, ask("shape", score_threshold=0.0))
    (few,) = demo.segment(photo, ask("shape", score_threshold=0.0, max_instances=3))
    (apart,) = demo.segment(photo, ask("shape", score_threshold=0.0, nms_iou=0.5))
    (both,) = demo.segment(photo, ask("shape", score_threshold=0.0, nms_iou=0.5, max_instances=2))
    np.testing.assert_array_equal(few.scores, everything.scores[:3])
    assert 2 < len(apart.scores) < len(everything.scores)
    np.testing.assert_array_equal(both.scores, apart.scores[:2])
    masks = [rle.decode_mask(mask) for mask in apart.masks]
    overlaps = [(one & other).sum() / max(1, (one | other).sum()) for one, other in combinations(masks, 2)]
    assert max(overlaps) < 0.6  # decided at the model's resolution, measured at the photo's


def test_a_higher_mask_threshold_makes_masks_smaller(demo: Segmenter, scenes: list[Scene]) -> None:
    loose, usual, strict = (
        demo.segment(scenes[0].image, ask("shape", mask_threshold=t))[0] for t in (0.1, 0.5, 0.9)
    )
    assert len(usual.masks) > 0
    for outer, middle, inner in zip(loose.masks, usual.masks, strict.masks, strict=True):
        assert rle.area_px(outer) > rle.area_px(middle) > rle.area_px(inner)
        assert (rle.decode_mask(outer) | ~rle.decode_mask(middle)).all()


@pytest.mark.parametrize(
    "prompt", [Prompt(points=(Point((3, 3)),)), Prompt("circle", points=(Point((1, 9)),))]
)
def test_what_the_checkpoint_cannot_read_is_refused(demo: Segmenter, prompt: Prompt) -> None:
    with pytest.raises(UnsupportedPrompt, match="no interactive head"):
        demo.segment(np.zeros((10, 10, 3), np.uint8), [prompt])


def exemplars(generator: np.random.Generator, size_hw: tuple[int, int], count: int) -> tuple[Box, ...]:
    """Boxes all over an image and a little beyond, the first of them positive."""
    height, width = size_hw
    centres = generator.uniform(0, 1, (count, 2)) * [width, height]
    halves = generator.uniform(0.02, 0.3, (count, 2)) * [width, height]
    corners = np.concatenate([centres - halves, centres + halves], axis=1)
    return tuple(Box(tuple(box), is_positive=row % 2 == 0) for row, box in enumerate(corners.tolist()))


def differ(one: Segmentation, other: Segmentation) -> bool:
    """Whether answers with all queries in them are further apart than rounding takes them, which is below 1e-6."""
    return bool(np.abs(one.scores - other.scores).max() > 1e-5)


def test_prompts_of_all_kinds_are_answered_in_their_order_whoever_stands_beside_them(
    random_checkpoint: Path, scenes: list[Scene]
) -> None:
    segmenter = Segmenter.from_checkpoint(random_checkpoint)
    generator = np.random.default_rng(8)
    every = Selection(score_threshold=0.0)
    items, photos = [], []
    for number, scene in enumerate(scenes[:3]):
        size_hw = scene.image.shape[:2]
        mixed = tuple(
            Prompt(text, exemplars(generator, size_hw, count), selection=every)
            for text, count in [("shape", 0), ("shape", 1), (None, 32), ("star", 0), (None, 2 + number)]
        )
        photos.append((scene.image, mixed[number % 2 :]))
        items.append(dataclasses.replace(item_of(scene, ()), prompts=mixed[number % 2 :]))
    results = segmenter.segment_batch(items)
    for (photo, prompts), result in zip(photos, results, strict=True):
        assert result.error is None
        for prompt, answer in zip(prompts, result.segmentations, strict=True):
            assert not differ(answer, segmenter.segment(photo, [prompt])[0])
    for one, other in combinations(results[0].segmentations, 2):
        assert differ(one, other)


def test_place_label_and_number_of_boxes_matter_and_their_order_does_not(
    random_checkpoint: Path, scenes: list[Scene]
) -> None:
    segmenter = Segmenter.from_checkpoint(random_checkpoint)
    photo, every = scenes[0].image, Selection(score_threshold=0.0)
    height, width = photo.shape[:2]
    here, there = (2.0, 3.0, width / 3, height / 4), (width / 2, height / 2, width - 5, height - 1)

    def answer(*boxes: Box) -> Segmentation:
        return segmenter.segment(photo, [Prompt("shape", boxes, selection=every)])[0]

    one = answer(Box(here))
    for other in (answer(Box(there)), answer(Box(here, is_positive=False)), answer(Box(here), Box(there))):
        assert differ(one, other)
    assert not differ(answer(Box(here), Box(there)), answer(Box(there), Box(here)))
    whole, beyond = (0.0, 0.0, width, height), (-50.0, -1e9, width + 1.0, float("inf"))
    assert not differ(answer(Box(whole)), answer(Box(beyond)))  # it is cut at the image's edge


NAN = float("nan")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        pytest.param(Prompt(boxes=(Box((5, 1, 5, 9)),)), "x0 < x1", id="no width"),
        pytest.param(Prompt(boxes=(Box((1, 9, 5, 2)),)), "y0 < y1", id="upside down"),
        pytest.param(Prompt("circle", (Box((1, NAN, 5, 2)),)), "y0 < y1", id="not a number"),
        pytest.param(
            Prompt(boxes=(Box((20, 1, 25, 9)),)), "outside the image of 20×10 pixels", id="right of it"
        ),
        pytest.param(Prompt(boxes=(Box((1, -9, 5, 0)),)), "outside", id="above it"),
        pytest.param(Prompt(boxes=(Box((0, 0, 1, 1), is_relative=True),)), "in pixels", id="relative"),
        pytest.param(Prompt(boxes=(Box((0, 0, 1, 1)),) * 33), "at most 32 boxes", id="too many"),
        pytest.param(Prompt(), "none of them", id="nothing"),
    ],
)
def test_boxes_that_show_nothing_are_refused_and_their_neighbours_are_answered(
    demo: Segmenter, scenes: list[Scene], prompt: Prompt, message: str
) -> None:
    with pytest.raises(InvalidPrompt, match=message):
        demo.segment(np.zeros((10, 20, 3), np.uint8), [prompt])
    good = item_of(scenes[0], ("circle",))
    bad = dataclasses.replace(good, size_hw=(10, 20), prompts=(*good.prompts, prompt))
    refused, answered = demo.segment_batch([bad, good])
    assert refused.error is not None
    assert refused.error.code == "InvalidPrompt"
    assert answered.error is None


def test_one_bad_item_leaves_its_neighbours_their_answers(demo: Segmenter, scenes: list[Scene]) -> None:
    good = item_of(scenes[0], ("circle",))
    blank = item_of(scenes[1], ("circle", " "))
    crowded = item_of(scenes[2], ("circle",) * 33)
    misshapen = SegmentItem(np.zeros((10, 10, 3), np.uint8), (10, 10), ask("circle"))
    results = demo.segment_batch([blank, good, crowded, misshapen])
    codes = [result.error.code if result.error else None for result in results]
    assert codes == ["InvalidPrompt", None, "TooManyPrompts", "InferenceFailed"]
    assert_same_answer(results[1].segmentations[0], demo.segment(scenes[0].image, ask("circle"))[0])


def test_a_second_question_about_an_image_skips_the_image_encoder(
    random_checkpoint: Path, scenes: list[Scene]
) -> None:
    segmenter = Segmenter.from_checkpoint(random_checkpoint)
    engine: Any = segmenter._engine
    items = [item_of(scene, ("circle", "square"), score_threshold=0.0) for scene in scenes[:2]]
    known = [dataclasses.replace(item, key=bytes([row])) for row, item in enumerate(items)]
    expected = segmenter.segment_batch([*known, known[0]])
    sound = engine.backbone
    engine.backbone = FailsOnLargeBatches(sound, ValueError("encoded again"), limit=0)
    for result, again in zip(expected, segmenter.segment_batch([*known, known[0]]), strict=True):
        assert result.error is again.error is None
        for one, other in zip(result.segmentations, again.segmentations, strict=True):
            assert_same_answer(one, other)
    assert segmenter.segment_batch(items)[0].error is not None  # nothing names these pixels
    engine.backbone = sound
    assert segmenter.segment_batch(items)[0].error is None


def test_an_empty_batch_is_answered(demo: Segmenter) -> None:
    assert demo.segment_batch([]) == []


@pytest.mark.parametrize(
    ("prompts", "error"),
    [
        (ask(" "), InvalidPrompt),
        (ask("red " * 40), InvalidPrompt),
        ((), TooManyPrompts),
        (ask("a") * 33, TooManyPrompts),
    ],
)
def test_prompts_are_refused_before_the_model_runs(
    demo: Segmenter, prompts: tuple[Prompt, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        demo.segment(np.zeros((4, 4, 3), np.uint8), prompts)


class FailsOnLargeBatches(torch.nn.Module):
    """Stands in for a device with little memory: more than `limit` images at once are too much."""

    def __init__(self, backbone: torch.nn.Module, error: Exception, limit: int) -> None:
        super().__init__()
        self.backbone, self.error, self.limit = backbone, error, limit

    def forward(self, pixels: torch.Tensor) -> object:
        if len(pixels) > self.limit:
            raise self.error
        return self.backbone(pixels)


@pytest.mark.parametrize(
    ("error", "code"),
    [(torch.OutOfMemoryError("no memory"), "DeviceOutOfMemory"), (ValueError("secret"), "InferenceFailed")],
)
def test_a_failing_batch_is_halved_until_what_fails_stands_alone(
    random_checkpoint: Path, scenes: list[Scene], error: Exception, code: str
) -> None:
    segmenter = Segmenter.from_checkpoint(random_checkpoint)
    items = [item_of(scene, ("circle",)) for scene in scenes[:5]]
    engine: Any = segmenter._engine
    sound = engine.backbone
    engine.backbone = FailsOnLargeBatches(sound, error, limit=1)
    assert all(result.error is None for result in segmenter.segment_batch(items))
    engine.backbone = FailsOnLargeBatches(sound, error, limit=0)
    results = segmenter.segment_batch(items[:2])
    assert [result.error.code for result in results if result.error] == [code, code]
    assert "secret" not in str(results)
    if code == "DeviceOutOfMemory":
        with pytest.raises(DeviceOutOfMemory):
            segmenter.segment(scenes[0].image, ask("circle"))
        assert len(segmenter._images) == 0  # what was kept may be what filled the device
    engine.backbone = sound
    assert segmenter.segment_batch(items)[0].error is None


def test_bfloat16_decides_as_float32_does(demo: Segmenter) -> None:
    half = Segmenter.from_checkpoint(dtype=torch.bfloat16)
    assert half.info.dtype == "bfloat16"
    agreed = 0
    for index in range(8):
        question = Question.draw(91, index)
        prompts = ask(*question.texts)
        pairs = zip(
            half.segment(question.scene.image, prompts),
            demo.segment(question.scene.image, prompts),
            strict=True,
        )
        agreed += sum(len(one.scores) == len(other.scores) for one, other in pairs)
    assert agreed >= 14  # of 16


def test_a_large_photo_costs_little_memory(demo: Segmenter) -> None:
    """12 megapixels with every query kept: masks are made one at a time, and only where they are."""
    import tracemalloc

    photo = np.zeros((3000, 4000, 3), np.uint8)
    tracemalloc.start()
    (found,) = demo.segment(photo, ask("circle", score_threshold=0.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.masks) == 24
    assert peak < 500e6
