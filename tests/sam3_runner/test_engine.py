"""The engine against `forward.py`, the slow form of the same function."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam3Model

from sam3_runner.blocks import UpsampledConv3x3, Weights
from sam3_runner.engine import STATIC_SIZES, Engine
from sam3_runner.forward import decode, encode_boxes, encode_image, encode_text
from sam3_runner.graphs import CudaGraphs, Recording, Tensors
from sam3_runner.training.architecture import IMAGE_SIZE_PX, build_demo_model
from sam3_runner.training.demo import demo_tokenizer

CPU = torch.device("cpu")
PROMPTS = ["red circle", "a very long prompt about stars", "cross"]
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def model() -> Sam3Model:
    torch.manual_seed(5)
    model = build_demo_model(demo_tokenizer()).eval()
    with torch.no_grad():
        model.detr_decoder.box_head.layer3.weight.normal_(
            std=0.5
        )  # starts at zero, which would hide mistakes
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.normal_(std=0.1)  # likewise
    return model


@pytest.fixture(scope="module")
def engine(model: Sam3Model) -> Engine:
    return Engine(model, CPU, torch.float32)


@dataclass(frozen=True)
class Case:
    """Three prompts, and one image for all or one for each."""

    pixels: Tensor
    input_ids: Tensor
    attention_mask: Tensor


@pytest.fixture(params=[1, 3], ids=["one image for all", "an image for each"])
def case(request: pytest.FixtureRequest) -> Case:
    generator = torch.Generator().manual_seed(1)
    shape = (request.param, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    tokens = demo_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    return Case(pixels, tokens["input_ids"], tokens["attention_mask"])


@dataclass(frozen=True)
class Marked:
    """Up to five boxes on the images of three prompts."""

    boxes_cxcywh: Tensor
    is_positive: Tensor
    is_box: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.boxes_cxcywh, self.is_positive, self.is_box


@pytest.fixture(params=[False, True], ids=["no boxes", "boxes"])
def marked(request: pytest.FixtureRequest) -> Marked | None:
    if not request.param:
        return None
    generator = torch.Generator().manual_seed(2)
    boxes = torch.rand(len(PROMPTS), 5, 4, generator=generator)  # some reach over the edge
    boxes[0, 0, 2:] = 0.01  # smaller than a patch
    is_positive = torch.rand(boxes.shape[:2], generator=generator) < 0.5
    is_box = torch.tensor([[True] * 5, [True, False, True, False, False], [False] * 5])
    return Marked(boxes, is_positive, is_box)


def answers_and_masks(engine: Engine, case: Case, marked: Marked | None) -> tuple[Tensor, Tensor, Tensor]:
    images = engine.encode_images(case.pixels)
    boxes = None if marked is None else engine.encode_boxes(images, *marked.tensors)
    answers = engine.answer(images, engine.encode_texts(case.input_ids, case.attention_mask), boxes)
    queries = torch.arange(answers.scores.shape[1])
    masks = torch.stack([answers.mask_logits(pair, queries) for pair in range(len(PROMPTS))])
    return answers.scores, answers.boxes_cxcywh, masks


@torch.inference_mode()
def test_the_engine_computes_what_the_reference_computes(
    model: Sam3Model, engine: Engine, case: Case, marked: Marked | None
) -> None:
    images = encode_image(model, case.pixels.permute(0, 3, 1, 2) / 127.5 - 1)
    if len(case.pixels) == 1:
        images = images.repeat_each(len(PROMPTS))
    reference_boxes = None if marked is None else encode_boxes(model, images, *marked.tensors)
    texts = encode_text(model, case.input_ids, case.attention_mask)
    expected = decode(model, images, texts, boxes=reference_boxes)
    scores, boxes, masks = answers_and_masks(engine, case, marked)
    close(scores, expected.logits[-1].sigmoid() * expected.presence_logits[-1].sigmoid()[:, None])
    close(boxes, expected.boxes_cxcywh[-1])
    close(masks, torch.einsum("bnc,bchw->bnhw", expected.mask_embeddings[-1], expected.pixel_embeddings))
    assert boxes.std() > 0.1  # spread, so that equal means something


@torch.inference_mode()
def test_the_convolution_of_an_upsampled_image_is_done_before_upsampling() -> None:
    source = nn.Conv2d(5, 7, 3, padding=1)
    image = torch.randn(2, 5, 6, 9)
    expected = F.conv2d(F.interpolate(image, scale_factor=2, mode="nearest"), source.weight, padding=1)
    ours = UpsampledConv3x3(Weights(CPU, torch.float32), source)(image.permute(0, 2, 3, 1))
    close(ours.permute(0, 3, 1, 2), expected)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_encoded_images_of_faster_modes_point_the_same_way(
    model: Sam3Model, engine: Engine, case: Case, dtype: torch.dtype
) -> None:
    fast = Engine(model, CPU, dtype).encode_images(case.pixels)
    for exact, near in zip(engine.encode_images(case.pixels).tensors, fast.tensors, strict=True):
        assert near.dtype == torch.bfloat16
        assert F.cosine_similarity(exact.flatten(), near.float().flatten(), dim=0) > 0.99


@dataclass(frozen=True)
class Again:
    """What a CUDA graph does on replay, done by Python: the function, from its static inputs to its static outputs."""

    function: functools.partial[Tensors]
    outputs: Tensors

    def replay(self) -> None:
        for output, value in zip(self.outputs, self.function(), strict=True):
            output.copy_(value)


class GraphsWithoutGpu(CudaGraphs):
    """All of it but the recording, which only a GPU can do."""

    def _record(self, inputs: Tensors, size: int) -> Recording:
        function = functools.partial(self._function, *inputs)
        outputs = self._outputs(function(), size)
        return Recording(Again(function, outputs), inputs, outputs)


@torch.inference_mode()
def test_static_sizes_change_no_answer(
    engine: Engine, case: Case, marked: Marked | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers_and_masks(engine, case, marked)
    for stage in ("encode_images", "encode_texts", "encode_boxes", "answer"):
        run = getattr(engine, f"_run_{stage}")
        monkeypatch.setattr(engine, f"_{stage}", GraphsWithoutGpu(run, STATIC_SIZES, None))
    for _ in range(2):  # recorded, then replayed
        for ours, one in zip(answers_and_masks(engine, case, marked), expected, strict=True):
            close(ours, one)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs a C++ compiler for a CPU")
@torch.inference_mode()
def test_compiled_layers_change_no_answer_and_compile_once_for_all_batch_sizes(
    model: Sam3Model, engine: Engine, case: Case, marked: Marked | None
) -> None:
    compiled = Engine(model, CPU, torch.float32)
    compiled.compile_layers()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for ours, one in zip(
        answers_and_masks(compiled, case, marked), answers_and_masks(engine, case, marked), strict=True
    ):
        close(ours, one)
    kinds = 8  # of compiled parts
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3 * kinds


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs a C++ compiler for a CPU")
@torch.inference_mode()
@pytest.mark.parametrize("marked", [True], indirect=True, ids=["boxes"])
@pytest.mark.parametrize("case", [3], indirect=True, ids=["an image for each"])
def test_code_is_compiled_for_prompts_without_boxes_and_for_those_with_boxes_apart(
    model: Sam3Model, engine: Engine, case: Case, marked: Marked
) -> None:
    compiled = Engine(model, CPU, torch.float32)
    compiled.compile_layers()
    torch._dynamo.reset()
    for one in (marked, None):
        for ours, expected in zip(
            answers_and_masks(compiled, case, one), answers_and_masks(engine, case, one), strict=True
        ):
            close(ours, expected)
    fewer = Marked(*(tensor[:, :4] for tensor in marked.tensors))
    with torch.compiler.set_stance("fail_on_recompile"):
        answers_and_masks(compiled, case, None)
        answers_and_masks(compiled, case, marked)
        with pytest.raises(RuntimeError, match="recompil"):  # no code is there for any number of tokens
            answers_and_masks(compiled, case, fewer)
