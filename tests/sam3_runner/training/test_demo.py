from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sam3_runner.segmenter import Segmenter
from sam3_runner.training.architecture import HIDDEN, build_demo_model
from sam3_runner.training.data import Collate, Exemplars, SceneDataset, draw_any_prompt, paint_kinds
from sam3_runner.training.demo import (
    WARM_UP_STEPS,
    build_optimisers,
    demo_tokenizer,
    learning_rate_factor,
    pairs_to_draw,
    parse_options,
    train,
)
from sam3_runner.training.evaluate import Question, Tally, count_hits, exemplar_report, iou
from sam3_runner.training.exemplars import QUESTIONS
from sam3_runner.training.guides import Guides
from sam3_runner.training.losses import Target
from sam3_runner.training.scenes import COLOURS, SHAPES, Exemplar, Scene, SceneObject, ScenePrompt, draw_scene
from sam3_runner.types import RunLengthMask, Segmentation

PHASES = ("--image-steps", "--steps", "--box-steps", "--exemplar-steps")


def arguments(folder: Path, *steps: int) -> list[str]:
    """Train each of the phases up to its number of `steps`, in `folder`, two images and two prompts at a time."""
    fixed = ["--images", "2", "--prompts", "2", "--device", "cpu", "--save-every", "1"]
    paths = ["--out", str(folder / "out"), "--state", str(folder / "state.pt")]
    counts = [f"{phase}={count}" for phase, count in zip(PHASES, steps, strict=True)]
    return [*fixed, *paths, *counts]


def run(folder: Path, *steps: int) -> Path:
    """Train, and return the weights' file."""
    train(parse_options(arguments(folder, *steps)))
    return folder / "out" / "model.safetensors"


def test_training_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sam3_runner.training.demo.DECAY_SHARE", 1e-9
    )  # the rate must not depend on --steps here
    at_once = load_file(run(tmp_path / "at once", 2, 2, 2, 2))
    run(tmp_path / "in parts", 2, 1, 0, 0)
    run(tmp_path / "in parts", 2, 2, 2, 1)
    in_parts = load_file(run(tmp_path / "in parts", 2, 2, 2, 2))
    for name, tensor in at_once.items():
        torch.testing.assert_close(in_parts[name], tensor, rtol=0, atol=1e-3, msg=name)
    assert Segmenter.from_checkpoint(tmp_path / "in parts" / "out").info.model_version == "out"


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    alone = load_file(run(tmp_path / "alone", 1, 1, 0, 0))
    command = [
        sys.executable,
        "-m",
        "sam3_runner.training.demo",
        *arguments(tmp_path / "together", 1, 1, 0, 0),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--processes", "2"], check=True, env=environment)
    together = load_file(tmp_path / "together" / "out" / "model.safetensors")
    # The mean of two halves' losses is not quite the loss of the whole, so nearly the same step is taken, not the same.
    moved = [(alone[name] - together[name]).abs().max().item() for name in alone]
    assert max(moved) < 5e-3


def test_an_image_is_drawn_for_one_prompt_that_is_there() -> None:
    none, one = (
        Target(torch.zeros(0, 4), torch.zeros(0, 8, 8)),
        Target(torch.ones(1, 4) / 2, torch.ones(1, 8, 8)),
    )
    assert pairs_to_draw([none, one, one, none], 2).tolist() == [1, 2]
    assert pairs_to_draw([none, none, none, one], 2).tolist() == [3]
    assert pairs_to_draw([none, none], 2).tolist() == [0]


def test_every_parameter_is_trained_once() -> None:
    model, guides = build_demo_model(demo_tokenizer()), Guides(HIDDEN)
    optimisers = build_optimisers(model, guides, 1e-3)
    groups = [group for optimiser in optimisers for group in optimiser.param_groups]
    trained = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in (*model.parameters(), *guides.parameters()))
    backbone = {id(parameter) for parameter in model.vision_encoder.backbone.parameters()}
    assert backbone == {id(p) for group in groups if group["is_backbone"] for p in group["params"]}


def test_the_learning_rate_warms_up_stays_and_falls() -> None:
    rates = [learning_rate_factor(step, 10_000) for step in (0, 299, 3000, 6999, 8500, 9999)]
    assert rates[0] == 1 / WARM_UP_STEPS
    assert rates[1] == rates[2] == rates[3] == 1.0
    assert rates[4] == pytest.approx(0.5)
    assert rates[5] == pytest.approx(0.02)


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    first, second = (SceneDataset(3, 240, 160, 4)[17] for _ in range(2))
    assert first.prompts == second.prompts
    np.testing.assert_array_equal(first.pixels, second.pixels)
    assert SceneDataset(4, 240, 160, 4)[17].prompts != first.prompts


def test_a_batch_holds_the_truth_of_every_prompt() -> None:
    dataset = SceneDataset(3, 240, 160, 4)
    batch = Collate(demo_tokenizer())([dataset[index] for index in range(3)])
    assert batch.pixel_values.shape == (3, 3, 240, 240)
    assert batch.pixel_values.min() >= -1
    assert batch.pixel_values.max() <= 1
    assert len(batch.targets) == len(batch.input_ids) == 12
    for target in batch.targets:
        assert target.masks.shape == (len(target.boxes_cxcywh), 160, 160)
        for mask, (cx, cy, w, h) in zip(target.masks, target.boxes_cxcywh.tolist(), strict=True):
            rows, columns = (torch.nonzero(mask.amax(axis))[:, 0] / 160 for axis in (1, 0))
            assert abs(rows.float().mean() - cy) < h / 2
            assert columns.min() == pytest.approx(cx - w / 2, abs=0.01)


def test_painted_kinds_add_up_to_one() -> None:
    scene = draw_scene(np.random.default_rng(1))
    masks = torch.stack([torch.from_numpy(item.mask).float() for item in scene.objects])
    kinds = paint_kinds(scene, masks)
    torch.testing.assert_close(kinds[:9].sum(0), torch.ones(masks.shape[1:]))
    torch.testing.assert_close(kinds[9:].sum(0), torch.ones(masks.shape[1:]))


def test_some_prompts_name_what_scenes_never_show() -> None:
    rng = np.random.default_rng(0)
    scene = draw_scene(rng)
    unknown = [
        p
        for p in (draw_any_prompt(rng, scene) for _ in range(400))
        if "cat" in f"{p.text}" or "pink" in f"{p.text}"
    ]
    assert unknown
    assert all(prompt.matches == () for prompt in unknown)


def as_answer(*masks: np.ndarray) -> Segmentation:
    from sam3_runner.rle import encode_mask

    encoded: tuple[RunLengthMask, ...] = tuple(encode_mask(mask) for mask in masks)
    count = len(masks)
    return Segmentation(np.full(count, 0.9, np.float32), np.zeros((count, 4), np.float32), encoded)


def test_the_tally_counts_hits_misses_and_false_alarms() -> None:
    left, right = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    left[:, :2], right[:, 2:] = True, True
    objects = [SceneObject("red", "circle", mask, (0, 0, 1, 1)) for mask in (left, right)]
    scene = Scene(np.zeros((4, 4, 3), np.uint8), tuple(objects))
    tally = Tally()
    tally.add(as_answer(left), scene, ScenePrompt("red", (0, 1)))  # one found, one missed
    tally.add(as_answer(right), scene, ScenePrompt("blue", ()))  # a false alarm
    tally.add(as_answer(), scene, ScenePrompt("blue", ()))
    assert tally.mean_iou == 0.5
    assert tally.f1 == pytest.approx(2 * 1 / (2 + 2))
    assert tally.absent_share == 0.5
    assert tally.forbidden_share == 0
    tally.add(as_answer(left), scene, ScenePrompt("red", (1,), forbidden=(0,)))
    tally.add(as_answer(right), scene, ScenePrompt("red", (1,), forbidden=(0,)))
    assert tally.forbidden_share == 0.5


def test_one_true_instance_is_hit_only_once() -> None:
    mask = np.ones((4, 4), bool)
    assert count_hits([mask, mask], [mask]) == 1
    assert iou(~mask, ~mask) == 1.0


def test_questions_ask_for_something_present_and_something_absent() -> None:
    for index in range(20):
        question = Question.draw(1, index)
        present, absent = question.prompts
        assert present.matches
        assert not absent.matches
        assert question.texts == (present.text, absent.text)


@pytest.mark.parametrize("kind", QUESTIONS)
def test_a_question_by_exemplars_depends_on_seed_and_number_alone(kind: str) -> None:
    first, second = (Question.draw_by_exemplars(kind, 1, 4) for _ in range(2))
    assert first.prompts == second.prompts
    item, (prompt,) = first.item(32), first.prompts
    assert item.prompts[0].text == prompt.text
    assert [box.xyxy for box in item.prompts[0].boxes] == [e.box_xyxy_px for e in prompt.exemplars]
    assert [box.is_positive for box in item.prompts[0].boxes] == [e.is_positive for e in prompt.exemplars]


def test_the_reports_have_a_row_for_each_kind_of_question() -> None:
    asked, answered = Tally([0.9, 0.8], hits=2, found=3, there=2, forbidden=4, forbidden_found=1), Tally()
    answered.absent, answered.absent_answered = 8, 2
    lines = exemplar_report(
        {"like this, not like that": asked, "a box around nothing": answered}
    ).splitlines()
    assert "| like this, not like that | 0.850 | 0.800 | – | 25.0% of 4 |" in lines
    assert "| a box around nothing | – | – | 25.0% of 8 | – |" in lines


def test_exemplars_of_a_batch_lie_in_order_and_without_needless_padding() -> None:
    scene = draw_scene(np.random.default_rng(3), min_objects=6)
    boxes = [Exemplar(item.box_xyxy_px, True, index) for index, item in enumerate(scene.objects)]
    red = scene.objects[0]
    prompts = [
        ScenePrompt("red", (0,)),
        ScenePrompt(None, (0,), (boxes[0], replace(boxes[1], is_positive=False))),
        ScenePrompt(None, (), (Exemplar((1.0, 2.0, 5.0, 10.0), True, None),)),
    ]
    one = Exemplars.gather(scene, prompts)
    both = Exemplars.join([one, Exemplars.gather(scene, prompts[:1])])
    assert both.is_box.tolist() == [[False, False], [True, True], [True, False], [False, False]]
    assert both.is_positive.tolist() == [[False, False], [True, False], [True, False], [False, False]]
    own = [[None, *COLOURS].index(red.colour), [None, *SHAPES].index(red.shape)]
    assert both.kinds[1, 0].tolist() == both.shared[1].tolist() == own
    assert both.kinds[2, 0].tolist() == both.shared[0].tolist() == [0, 0]
    height, width = scene.image.shape[:2]
    expected = torch.tensor([3 / width, 6 / height, 4 / width, 8 / height])
    torch.testing.assert_close(both.boxes_cxcywh[2, 0], expected)


def test_at_rest_the_encoders_do_not_change(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = build_demo_model(demo_tokenizer()).half().state_dict()
    after = load_file(run(tmp_path, 0, 0, 1, 1))
    moved = {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {
        "geometry_encoder",
        "detr_encoder",
        "detr_decoder",
        "mask_decoder",
        "dot_product_scoring",
    }
