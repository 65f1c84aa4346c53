"""Our three-part forward pass against `Sam3Model.forward`, the reference."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import Sam3Model

from sam3_runner.forward import decode, encode_image, encode_text
from sam3_runner.training.architecture import IMAGE_SIZE_PX, build_demo_model
from sam3_runner.training.attention import use_plain_attention
from sam3_runner.training.demo import demo_tokenizer
from sam3_runner.training.losses import to_xyxy

PROMPTS = ["red circle", "a very long prompt about stars", "cross"]


@pytest.fixture(scope="module")
def model() -> Sam3Model:
    torch.manual_seed(3)
    model = build_demo_model(demo_tokenizer()).eval()
    with torch.no_grad():  # the box head starts at zero, which would hide mistakes
        model.detr_decoder.box_head.layer3.weight.normal_(std=0.5)
    return model


@torch.no_grad()
@pytest.mark.parametrize("plain", [False, True], ids=["fused attention", "plain attention"])
def test_decode_equals_the_reference_forward(model: Sam3Model, plain: bool) -> None:
    pixels = torch.rand(1, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX) * 2 - 1
    tokens = demo_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    # Only with a box does the reference run its geometry encoder; -10 marks the box as padding.
    padding = {"input_boxes": torch.zeros(3, 1, 4), "input_boxes_labels": torch.full((3, 1), -10)}
    expected = model(pixel_values=pixels.expand(3, -1, -1, -1), **tokens, **padding)
    if plain:
        torch.manual_seed(3)
        use_plain_attention(model)
    image = encode_image(model, pixels).repeat_each(3)
    outputs = decode(model, image, encode_text(model, **tokens), drawn=torch.arange(3))
    masks = torch.einsum("bnc,bchw->bnhw", outputs.mask_embeddings[-1], outputs.pixel_embeddings)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(outputs.logits[-1], expected.pred_logits)
    close(outputs.presence_logits[-1], expected.presence_logits[:, 0])
    close(to_xyxy(outputs.boxes_cxcywh[-1]), expected.pred_boxes)
    close(masks, expected.pred_masks)
    close(outputs.semantic_logits, expected.semantic_seg[:, 0])


@torch.no_grad()
def test_selecting_and_repeating_features_agree(model: Sam3Model) -> None:
    features = encode_image(model, torch.rand(2, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX))
    repeated, selected = features.repeat_each(2), features.select(torch.tensor([0, 0, 1, 1]))
    for one, other in zip(
        [*repeated.levels, repeated.geometry], [*selected.levels, selected.geometry], strict=True
    ):
        assert torch.equal(one, other)
