"""One object by clicks: the head against the slow, obvious form of the same, and what callers get."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from sam3_runner import loading
from sam3_runner.blocks import Weights
from sam3_runner.checkpoint import DEMO_CHECKPOINT, Checkpoint
from sam3_runner.clicks import (
    FILLED_LOGIT,
    MAX_HOLE,
    ClickAnswer,
    ClickHead,
    ClickModel,
    clicks_to_tensors,
    fill_holes,
    tight_box,
)
from sam3_runner.errors import CheckpointError, InvalidPrompt, UnsupportedPrompt
from sam3_runner.images import resize_for_model
from sam3_runner.rle import decode_mask, encode_mask
from sam3_runner.segmenter import Segmenter
from sam3_runner.text import PromptChecker
from sam3_runner.training.scenes import Scene
from sam3_runner.types import Box, Point, Prompt, Segmentation, SegmentItem, Selection
from tests.sam3_runner.checkpoint_forms import (
    CLICKED_FORMS,
    FORMS,
    click_tensors,
    meta_file,
    meta_tensors,
    neighbours,
    video_directory,
)
from tests.sam3_runner.meta_checkpoint import clicks_to_meta

CPU = torch.device("cpu")
SEEN_BYTES, CLICKABLE_BYTES = 4 * 20 * 20 * 128, 4 * (20 * 20 * 64 + 40 * 40 * 16 + 80 * 80 * 8)
ONE = ((0.3, 0.6, True),)
THREE = ((0.3, 0.6, True), (0.7, 0.2, True), (0.5, 0.5, False))
SINGLE_MASK = "mask_decoder.output_hypernetworks_mlps.0.proj_out.weight"
MIDDLE = 0.6  # as a mask threshold leaves about half the image
STABILITY_DELTA, STABLE = 0.05, 0.98  # of Meta's builder


def click(*points: tuple[float, float] | tuple[float, float, bool], **selection: Any) -> Prompt:
    selection = {"score_threshold": 0.0, **selection}
    placed = tuple(Point((point[0], point[1]), all(point[2:])) for point in points)
    return Prompt(points=placed, selection=Selection(**selection))


@pytest.fixture(scope="module")
def path(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return meta_file(random_checkpoint, tmp_path_factory.mktemp("clicks") / "sam3")


@pytest.fixture(scope="module")
def loaded(path: Path) -> Segmenter:
    return Segmenter.from_checkpoint(path)


@pytest.fixture
def segmenter(loaded: Segmenter) -> Segmenter:
    """With nothing in its caches."""
    loaded._images.clear()
    return loaded


# --- the head ------------------------------------------------------------------------------------------------------


def head_model(source: Path, single_gain: float = 1.0) -> ClickModel:
    tensors = {name: tensor.float() for name, tensor in click_tensors(source).items()}
    tensors[SINGLE_MASK] *= single_gain
    model = loading.unset_click_model(Checkpoint.open(source).config, {})
    return loading.fill(model, tensors, CPU, torch.float32)


def all_masks(model: ClickModel, seen: Tensor, clicks: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """(4, h, w) mask logits and (4,) overlaps, the single mask's first: by transformers' modules as they are."""
    coarse, middle, fine = reversed(model.neck(seen.permute(0, 3, 1, 2))[0][:3])
    decoder, encoder = model.mask_decoder, model.prompt_encoder
    grid = coarse.shape[-1]
    centres = (torch.arange(grid) + 0.5) / grid
    table = torch.stack([centres.expand(grid, grid), centres[:, None].expand(grid, grid)], dim=-1)
    places = torch.tensor([[click[:2] for click in clicks]]) * encoder.input_image_size
    labels = torch.tensor([[int(click[2]) for click in clicks]])
    sparse, dense = encoder(places[None], labels[None], None, None)
    answers = []
    for multimask in (False, True):
        decoder.dynamic_multimask_via_stability = False
        masks, overlaps, _, _ = decoder(
            image_embeddings=coarse + model.no_memory_embedding.view(1, -1, 1, 1),
            image_positional_embeddings=encoder.shared_embedding(table).permute(2, 0, 1)[None],
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
            high_resolution_features=[decoder.conv_s0(fine), decoder.conv_s1(middle)],
        )
        answers.append((masks[0, 0], overlaps[0, 0]))
    (single, single_overlap), (three, three_overlaps) = answers
    return torch.cat([single, three]), torch.cat([single_overlap, three_overlaps])


def stability(logits: Tensor) -> float:
    return int((logits > STABILITY_DELTA).sum()) / int((logits > -STABILITY_DELTA).sum())


@pytest.mark.parametrize(
    ("clicks", "single_gain", "is_single"),
    [
        pytest.param(ONE, 1.0, False, id="one click"),
        pytest.param(THREE, 100.0, True, id="three clicks, stable"),
        pytest.param(THREE, 0.1, False, id="three clicks, unstable"),
    ],
)
@torch.inference_mode()
def test_the_head_answers_as_transformers_modules_and_chooses_as_metas(
    random_checkpoint: Path, clicks: tuple[Any, ...], single_gain: float, is_single: bool
) -> None:
    model = head_model(random_checkpoint, single_gain)
    seen = torch.randn(1, 20, 20, 128, generator=torch.Generator().manual_seed(2))
    head = ClickHead(Weights(CPU, torch.float32), model).eval()
    places = torch.tensor([place[:2] for place in clicks])
    labels = torch.tensor([place[2] for place in clicks])

    answer = head.answer(head.encode(seen), places, labels)

    masks, overlaps = all_masks(model, seen, clicks)
    assert (stability(masks[0]) >= STABLE) == (single_gain > 1)
    best = 0 if is_single else 1 + int(overlaps[1:].argmax())
    rounding = 2e-5 * float(masks[best].abs().max())
    torch.testing.assert_close(answer.mask_logits, masks[best], rtol=0, atol=rounding)
    torch.testing.assert_close(answer.score, overlaps[best], rtol=1e-5, atol=1e-5)
    for other in {0, 1, 2, 3} - {best}:
        assert (masks[other] - masks[best]).abs().max() > 1000 * rounding
    assert 0.05 < (answer.mask_logits > 0).float().mean() < 0.95


@torch.inference_mode()
def test_places_and_kinds_of_clicks_and_the_memory_that_there_is_none_of_all_count(
    random_checkpoint: Path,
) -> None:
    model = head_model(random_checkpoint)
    seen = torch.randn(1, 20, 20, 128, generator=torch.Generator().manual_seed(2))
    head = ClickHead(Weights(CPU, torch.float32), model).eval()

    def ask(head: ClickHead, *clicks: tuple[float, float, bool]) -> Tensor:
        places = torch.tensor([place[:2] for place in clicks])
        return head.answer(
            head.encode(seen), places, torch.tensor([place[2] for place in clicks])
        ).mask_logits

    usual = ask(head, *ONE)
    others = [ask(head, (0.6, 0.3, True)), ask(head, (0.3, 0.6, False))]
    model.no_memory_embedding.zero_()
    others.append(ask(ClickHead(Weights(CPU, torch.float32), model).eval(), *ONE))
    assert all((other - usual).abs().max() > 0.01 for other in others)


# --- holes and boxes -----------------------------------------------------------------------------------------------


def filled_slowly(logits: Tensor) -> Tensor:
    """Flood by flood."""
    outside = {(int(y), int(x)) for y, x in (logits <= 0).nonzero()}
    filled = logits.clone()
    while outside:
        part, border = set(), {outside.pop()}
        while border:
            part |= border
            around = {(y + i, x + j) for y, x in border for i in (-1, 0, 1) for j in (-1, 0, 1)}
            border = around & outside
            outside -= border
        if len(part) <= MAX_HOLE:
            filled[tuple(torch.tensor(sorted(part)).T)] = FILLED_LOGIT
    return filled


@pytest.mark.parametrize(("coarseness", "share"), [(2, -0.2), (9, 0.5)])
def test_holes_are_filled_as_flooding_them_one_by_one_would(coarseness: int, share: float) -> None:
    generator = torch.Generator().manual_seed(coarseness)
    noise = torch.randn(1, 1, 96 // coarseness, 80 // coarseness, generator=generator) + share
    logits = F.interpolate(noise, (96, 80), mode="bilinear")[0, 0]

    filled = fill_holes(logits)

    assert torch.equal(filled, filled_slowly(logits))
    assert 0 < (filled != logits).sum() < (logits <= 0).sum()  # some are, and some are too large


def test_a_hole_of_256_is_filled_one_of_257_is_not_and_corners_hang_together() -> None:
    logits = torch.ones(60, 60)
    logits[2:18, 2:18] = -1
    logits[30:46, 2:18] = -1
    logits[46, 18] = 0  # diagonally, and exactly 0 is outside
    filled = fill_holes(logits)
    assert (filled[2:18, 2:18] == FILLED_LOGIT).all()
    assert torch.equal(filled[30:], logits[30:])


def test_a_box_is_tight_around_its_mask() -> None:
    generator = np.random.default_rng(4)
    for _ in range(50):
        mask = generator.random((11, 17)) > generator.choice([0.5, 0.98])
        mask[generator.integers(11), generator.integers(17)] = True
        rows, columns = np.nonzero(mask)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert tight_box(encode_mask(mask)).tolist() == expected


# --- the segmenter -------------------------------------------------------------------------------------------------


def assert_equal(one: Segmentation, other: Segmentation) -> None:
    np.testing.assert_array_equal(one.scores, other.scores)
    np.testing.assert_array_equal(one.boxes_xyxy_px, other.boxes_xyxy_px)
    for first, second in zip(one.masks, other.masks, strict=True):
        np.testing.assert_array_equal(first.counts, second.counts)


def test_clicks_find_one_instance_of_the_images_size_with_a_tight_box(
    segmenter: Segmenter, scenes: list[Scene]
) -> None:
    assert segmenter.answers_clicks
    for scene in scenes[:3]:
        height, width = scene.image.shape[:2]
        one, two = segmenter.segment(
            scene.image,
            [
                click((width / 3, height / 2), mask_threshold=MIDDLE),
                click((1, 1), (width - 1, height - 1, False), mask_threshold=MIDDLE),
            ],
        )
        for found in (one, two):
            (mask,) = found.masks
            assert mask.size_hw == (height, width)
            assert found.scores.shape == (1,)
            assert found.scores.dtype == np.float32
            assert 0 < found.scores[0] < 1
            rows, columns = np.nonzero(decode_mask(mask))
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert found.boxes_xyxy_px.tolist() == [box]
        assert not np.array_equal(one.masks[0].counts, two.masks[0].counts)


def test_a_mask_is_the_logits_filled_upsampled_and_cut_where_it_was_asked(
    segmenter: Segmenter, scenes: list[Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = segmenter._engine.clicks
    assert head is not None
    answers = []
    answer = head.answer

    def watched(*args: Any) -> ClickAnswer:
        answers.append(answer(*args))
        return answers[-1]

    monkeypatch.setattr(head, "answer", watched)
    size_hw = scenes[0].image.shape[:2]
    for threshold in (0.5, 0.7):
        (found,) = segmenter.segment(scenes[0].image, [click((50, 60), mask_threshold=threshold)])
        logits = filled_slowly(answers[-1].mask_logits - np.log(threshold / (1 - threshold)))
        expected = F.interpolate(logits[None, None], size_hw, mode="bilinear")[0, 0] > 0
        assert np.count_nonzero(decode_mask(found.masks[0]) != expected.numpy()) <= 2  # rounding
        assert expected.any()


def test_pixels_become_shares_of_the_images_width_and_height() -> None:
    places, kinds = clicks_to_tensors([Point((30, 5)), Point((15, 20), is_positive=False)], (20, 60), CPU)
    assert places.tolist() == [[0.5, 0.25], [0.25, 1.0]]
    assert kinds.tolist() == [True, False]


def test_clicks_are_told_in_pixels_of_the_image(segmenter: Segmenter, scenes: list[Scene]) -> None:
    scene = scenes[0]
    height, width = scene.image.shape[:2]
    pixels = np.zeros((240, 240, 3), np.uint8)
    small = SegmentItem(pixels, (height, width), (click((width / 4, height / 2)),))
    large = SegmentItem(pixels, (2 * height, 2 * width), (click((width / 2, height)),))
    elsewhere = SegmentItem(pixels, (height, width), (click((width / 2, height)),))
    one, two, other = (
        result.segmentations[0] for result in segmenter.segment_batch([small, large, elsewhere])
    )
    assert one.scores[0] == pytest.approx(two.scores[0], abs=1e-6)
    np.testing.assert_allclose(2 * one.boxes_xyxy_px, two.boxes_xyxy_px, atol=2)
    assert other.scores[0] != pytest.approx(one.scores[0], abs=1e-6)


def test_words_and_clicks_in_one_item_are_answered_in_their_places(
    segmenter: Segmenter, scenes: list[Scene]
) -> None:
    height, width = scenes[0].image.shape[:2]
    words = [Prompt(text, selection=Selection(score_threshold=0.0)) for text in ("circle", "red star")]
    clicks = [click((width / 2, 9)), click((9, height / 2)), click((3, 3), (40, 40))]
    prompts = [clicks[0], words[0], clicks[1], clicks[2], words[1]]
    together = segmenter.segment(scenes[0].image, prompts)
    assert len(together) == len(prompts)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = segmenter.segment(scenes[0].image, [prompt])
        if prompt.points:
            assert_equal(found, alone)
        else:
            np.testing.assert_allclose(found.scores, alone.scores, atol=1e-4)
    assert [len(found.scores) for found in together] == [1, 24, 1, 1, 24]


def test_a_batch_of_images_is_clicked_on_as_each_alone(segmenter: Segmenter, scenes: list[Scene]) -> None:
    items, alone = [], []
    for scene in scenes[:3]:
        size_hw = scene.image.shape[:2]
        prompts = (click((size_hw[1] / 2, size_hw[0] / 3)),)
        items.append(SegmentItem(resize_for_model(scene.image, 240), size_hw, prompts))
        alone.append(segmenter.segment(scene.image, prompts)[0])
    results = segmenter.segment_batch(items)
    for result, expected in zip(results, alone, strict=True):
        assert result.error is None
        np.testing.assert_allclose(result.segmentations[0].scores, expected.scores, atol=1e-4)
        np.testing.assert_allclose(result.segmentations[0].boxes_xyxy_px, expected.boxes_xyxy_px, atol=1)


def test_in_bfloat16_a_click_is_answered_nearly_as_in_float32(
    segmenter: Segmenter, path: Path, scenes: list[Scene]
) -> None:
    compact = Segmenter.from_checkpoint(path, dtype=torch.bfloat16)
    prompt = click((50, 60), (9, 9, False), mask_threshold=MIDDLE)
    (exact,), (near,) = (one.segment(scenes[0].image, [prompt]) for one in (segmenter, compact))
    assert near.scores[0] == pytest.approx(exact.scores[0], abs=0.01)
    differing = decode_mask(near.masks[0]) != decode_mask(exact.masks[0])
    assert 0 < differing.mean() < 0.05  # and it was not float32


def test_the_next_click_on_an_image_encodes_nothing(
    segmenter: Segmenter, scenes: list[Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, head = segmenter._engine, segmenter._engine.clicks
    assert head is not None
    calls = []

    def watch(part: object, name: str) -> None:
        method = getattr(part, name)

        def watched(*args: Any) -> Any:
            calls.append(name)
            return method(*args)

        monkeypatch.setattr(part, name, watched)

    watch(engine, "encode_images")
    watch(head, "encode")
    image = scenes[0].image
    first = segmenter.segment(image, [Prompt("circle")])
    kept = segmenter._images.nbytes
    assert calls == ["encode_images"]
    one, two = segmenter.segment(image, [click((5, 5)), click((50, 50))])
    assert calls == ["encode_images", "encode"]
    (again,) = segmenter.segment(image, [click((5, 5))])
    assert calls == ["encode_images", "encode"]
    assert_equal(again, one)
    assert not np.array_equal(one.scores, two.scores)
    assert segmenter._images.nbytes == kept + CLICKABLE_BYTES - SEEN_BYTES
    assert len(segmenter.segment(image, [Prompt("circle")])) == len(first)


def test_the_memory_of_a_kept_image_is_counted_and_only_grows_where_clicks_are_answered(
    segmenter: Segmenter, demo: Segmenter
) -> None:
    pixels = torch.zeros(2, 240, 240, 3, dtype=torch.uint8)
    with torch.inference_mode():
        plain = demo._engine.encode_images(pixels).split()[0]
        seen = segmenter._engine.encode_images(pixels).split()[0]
        clickable = segmenter._engine.prepare_clicks(seen)
    assert plain.seen is None
    assert seen.nbytes - plain.nbytes == SEEN_BYTES
    assert clickable.nbytes - plain.nbytes == CLICKABLE_BYTES


def test_a_score_that_is_not_above_the_threshold_and_an_empty_mask_are_no_instance(
    segmenter: Segmenter, scenes: list[Scene]
) -> None:
    image = scenes[0].image
    (usual,) = segmenter.segment(image, [click((5, 5))])
    score = float(usual.scores[0])
    prompts = [
        click((5, 5), score_threshold=score),
        click((5, 5), score_threshold=score - 1e-6),
        click((5, 5), mask_threshold=1 - 1e-15),
    ]
    counts = [len(found.masks) for found in segmenter.segment(image, prompts)]
    assert counts == [0, 1, 0]


# --- what is refused -----------------------------------------------------------------------------------------------


def test_clicks_stand_alone(segmenter: Segmenter) -> None:
    image, points = np.zeros((10, 10, 3), np.uint8), (Point((3, 3)),)
    for prompt in (Prompt("circle", points=points), Prompt(boxes=(Box((1, 1, 9, 9)),), points=points)):
        with pytest.raises(InvalidPrompt, match="clicks alone"):
            segmenter.segment(image, [prompt])


@pytest.mark.parametrize(
    ("point", "said"),
    [
        pytest.param(Point((30.5, 5)), "outside the image of 30×20", id="right of it"),
        pytest.param(Point((3, -0.1)), "outside", id="above it"),
        pytest.param(Point((float("nan"), 5)), "outside", id="nowhere"),
        pytest.param(Point((0.5, 0.5), is_relative=True), "in pixels", id="relative"),
    ],
)
def test_clicks_beside_the_image_are_refused(segmenter: Segmenter, point: Point, said: str) -> None:
    prompt = Prompt(points=(Point((30, 20)), point))
    with pytest.raises(InvalidPrompt, match=said):
        segmenter.segment(np.zeros((20, 30, 3), np.uint8), [prompt])
    item = SegmentItem(np.zeros((240, 240, 3), np.uint8), (20, 30), (prompt,))
    (refused,) = segmenter.segment_batch([item])
    assert refused.error is not None
    assert refused.error.code == "InvalidPrompt"


@pytest.mark.parametrize("form", FORMS)
def test_whether_clicks_are_answered_is_told_from_the_files_as_from_the_loaded_model(
    random_checkpoint: Path, tmp_path: Path, form: str
) -> None:
    path = FORMS[form](random_checkpoint, tmp_path / "sam3")
    checkpoint = Checkpoint.open(path)
    checker = PromptChecker.from_checkpoint(path)
    does_answer = form in CLICKED_FORMS
    assert checkpoint.answers_clicks == checker.answers_clicks == does_answer
    model = checkpoint.load_click_model(CPU)
    assert (model is not None) == does_answer
    if model is not None:
        checker.check([click((3, 3))])
        expected = click_tensors(random_checkpoint)
        assert model.state_dict().keys() == expected.keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name].float()), name
        assert not any(parameter.requires_grad for parameter in model.parameters())
    else:
        with pytest.raises(UnsupportedPrompt, match=r"no interactive head: use the file sam3\.pt"):
            checker.check([Prompt("circle"), click((3, 3))])


def test_without_a_head_clicks_are_refused_and_words_are_not(demo: Segmenter) -> None:
    assert not demo.answers_clicks
    assert not Checkpoint.open(DEMO_CHECKPOINT).answers_clicks
    with pytest.raises(UnsupportedPrompt, match="interactive head"):
        demo.segment(np.zeros((10, 10, 3), np.uint8), [click((3, 3))])
    item = SegmentItem(np.zeros((240, 240, 3), np.uint8), (10, 10), (click((3, 3)),))
    fine = SegmentItem(np.zeros((240, 240, 3), np.uint8), (10, 10), (Prompt("circle"),))
    refused, answered = demo.segment_batch([item, fine])
    assert refused.error is not None
    assert refused.error.code == "UnsupportedPrompt"
    assert answered.error is None


def test_the_head_is_counted_among_the_parameters(segmenter: Segmenter, random_checkpoint: Path) -> None:
    tensors = [*load_file(random_checkpoint / "model.safetensors").values()]
    head = click_tensors(random_checkpoint)
    head.pop("prompt_encoder.shared_embedding.positional_embedding")  # a table
    tensors += head.values()
    assert segmenter.info.parameters == sum(tensor.numel() for tensor in tensors)


# --- broken heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(
            lambda tensors: tensors.pop("tracker.sam_mask_decoder.conv_s1.bias"),
            "1 tensors .*missing: mask_decoder.conv_s1.bias",
            id="missing",
        ),
        pytest.param(
            lambda tensors: tensors.pop("detector.backbone.vision_backbone.sam2_convs.2.conv_3x3.bias"),
            "1 tensors .*missing: neck.fpn_layers.2.proj2.bias",
            id="missing from the pyramid",
        ),
        pytest.param(
            lambda tensors: tensors.pop("tracker.sam_prompt_encoder.point_embeddings.2.weight"),
            "4 tensors .*missing: prompt_encoder.point_embed.weight; "
            "unexpected: tracker.sam_prompt_encoder.point_embeddings.0.weight",
            id="one kind of points missing",
        ),
        pytest.param(
            lambda tensors: tensors.update({"tracker.novelty": torch.zeros(1)}),
            r"1 tensors .*unexpected: tracker\.novelty",
            id="unexpected",
        ),
        pytest.param(
            lambda tensors: tensors.update({"tracker.no_mem_embed": torch.zeros(1, 1, 7)}),
            r"1 tensors .*wrongly shaped: no_memory_embedding \(1, 1, 7\) instead of \(1, 1, 64\)",
            id="wrongly shaped",
        ),
        pytest.param(
            lambda tensors: tensors.update(
                {"tracker.no_mem_embed": tensors["tracker.no_mem_embed"].to(torch.int8)}
            ),
            "1 tensors .*wrongly typed: no_memory_embedding",
            id="wrongly typed",
        ),
    ],
)
def test_a_head_that_does_not_fit_is_refused_and_the_tensor_named(
    random_checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    tensors = clicks_to_meta(click_tensors(random_checkpoint))
    change(tensors)
    torch.save(tensors, neighbours(random_checkpoint, tmp_path) / "sam3.pt")
    with pytest.raises(CheckpointError, match=f"does not fit the interactive head: {said}"):
        Checkpoint.open(tmp_path / "sam3.pt").load_click_model(CPU)


def test_a_segmenter_is_not_made_of_a_checkpoint_whose_head_does_not_fit(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    path = meta_file(random_checkpoint, tmp_path)
    torch.save(meta_tensors(random_checkpoint) | {"tracker.novelty": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"the interactive head: .*unexpected: tracker\.novelty"):
        Segmenter.from_checkpoint(path)


def test_a_tensor_of_the_video_layouts_head_that_is_not_there_is_named(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    path = video_directory(random_checkpoint, tmp_path / "sam3")
    tensors = load_file(path / "model.safetensors")
    del tensors["tracker_neck.fpn_layers.0.proj1.weight"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: neck\.fpn_layers\.0\.proj1\.weight"):
        Checkpoint.open(path).load_click_model(CPU)


@pytest.mark.parametrize("kept", ["prompt_encoder.shared_embedding", "shared_image_embedding"])
def test_of_the_two_equal_tables_of_positions_in_the_video_layout_one_is_enough(
    random_checkpoint: Path, tmp_path: Path, kept: str
) -> None:
    path = video_directory(random_checkpoint, tmp_path / "sam3")
    tensors = load_file(path / "model.safetensors")
    tensors = {n: t for n, t in tensors.items() if "positional_embedding" not in n or kept in n}
    save_file(tensors, path / "model.safetensors")
    assert Checkpoint.open(path).load_click_model(CPU) is not None


def test_the_trackers_configuration_counts(random_checkpoint: Path, tmp_path: Path) -> None:
    path = video_directory(random_checkpoint, tmp_path / "sam3")
    config = json.loads((path / "config.json").read_text())
    config["tracker_config"] = {"mask_decoder_config": {"dynamic_multimask_stability_thresh": 0.5}}
    (path / "config.json").write_text(json.dumps(config))
    model = Checkpoint.open(path).load_click_model(CPU)
    assert model is not None
    assert model.mask_decoder.dynamic_multimask_stability_thresh == 0.5
    config["tracker_config"] = {"mask_decoder_config": {"mlp_dim": 7}}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"wrongly shaped: mask_decoder\.transformer.*mlp"):
        Checkpoint.open(path).load_click_model(CPU)


def test_a_file_that_is_cut_off_is_refused_where_its_names_are_looked_at(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    (tmp_path / "sam3.pt").write_bytes(whole[: len(whole) // 2])
    checkpoint = Checkpoint.open(tmp_path / "sam3.pt")
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        checkpoint.answers_clicks  # noqa: B018
