"""Our three-part forward pass against `Sam3Model.forward`, the reference."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from transformers import Sam3Model

from sam3_runner.forward import LayerOutputs, decode, encode_boxes, encode_image, encode_text
from sam3_runner.training.architecture import IMAGE_SIZE_PX, build_demo_model
from sam3_runner.training.attention import use_plain_attention
from sam3_runner.training.demo import demo_tokenizer
from sam3_runner.training.losses import to_xyxy

PROMPTS = ["red circle", "a very long prompt about stars", "cross"]
# For each prompt: one reaches over the image's edge, one is smaller than a patch, a row has fewer than the others.
BOXES = torch.tensor(
    [
        [[0.5, 0.5, 0.3, 0.4], [0.1, 0.2, 0.2, 0.4]],
        [[0.7, 0.3, 0.01, 0.02], [0.9, 0.9, 0.3, 0.3]],
        [[0.3, 0.6, 0.5, 0.1], [0.0, 0.0, 0.0, 0.0]],
    ]
)
IS_POSITIVE = torch.tensor([[1, 0], [1, 1], [0, 0]])
IS_BOX = torch.tensor([[True, True], [True, True], [True, False]])
PADDING_LABEL = -10  # of transformers


@pytest.fixture(scope="module")
def model() -> Sam3Model:
    torch.manual_seed(3)
    model = build_demo_model(demo_tokenizer()).eval()
    with torch.no_grad():  # the box head starts at zero, which would hide mistakes
        model.detr_decoder.box_head.layer3.weight.normal_(std=0.5)
        for name, tensor in model.geometry_encoder.named_parameters():
            if name.endswith("bias"):
                tensor.normal_(std=0.1)  # likewise
    return model


def with_plain_attention(model: Sam3Model) -> Sam3Model:
    model = copy.deepcopy(model)
    use_plain_attention(model)
    return model


close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


def assert_is_reference(outputs: LayerOutputs, expected: Any) -> None:
    masks = torch.einsum("bnc,bchw->bnhw", outputs.mask_embeddings[-1], outputs.pixel_embeddings)
    close(outputs.logits[-1], expected.pred_logits)
    close(outputs.presence_logits[-1], expected.presence_logits[:, 0])
    close(to_xyxy(outputs.boxes_cxcywh[-1]), expected.pred_boxes)
    close(masks, expected.pred_masks)
    close(outputs.semantic_logits, expected.semantic_seg[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("plain", [False, True], ids=["fused attention", "plain attention"])
def test_decode_equals_the_reference_forward(model: Sam3Model, plain: bool) -> None:
    pixels = torch.rand(1, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX) * 2 - 1
    tokens = demo_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    # Only with a box does the reference run its geometry encoder; -10 marks the box as padding.
    padding = {"input_boxes": torch.zeros(3, 1, 4), "input_boxes_labels": torch.full((3, 1), -10)}
    expected = model(pixel_values=pixels.expand(3, -1, -1, -1), **tokens, **padding)
    if plain:
        model = with_plain_attention(model)
    image = encode_image(model, pixels).repeat_each(3)
    outputs = decode(model, image, encode_text(model, **tokens), drawn=torch.arange(3))
    assert_is_reference(outputs, expected)


@torch.no_grad()
@pytest.mark.parametrize("plain", [False, True], ids=["fused attention", "plain attention"])
def test_decode_with_boxes_equals_the_reference_forward(model: Sam3Model, plain: bool) -> None:
    pixels = torch.rand(3, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX) * 2 - 1
    tokens = demo_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    labels = IS_POSITIVE.masked_fill(~IS_BOX, PADDING_LABEL)
    expected = model(pixel_values=pixels, **tokens, input_boxes=BOXES, input_boxes_labels=labels)
    if plain:
        model = with_plain_attention(model)
    image = encode_image(model, pixels)
    boxes = encode_boxes(model, image, BOXES, IS_POSITIVE, IS_BOX)
    outputs = decode(model, image, encode_text(model, **tokens), boxes=boxes, drawn=torch.arange(3))
    assert_is_reference(outputs, expected)
    assert (boxes.tokens[:, -1:] - image.geometry).abs().max() > 0.01  # it has seen the boxes


@torch.no_grad()
def test_padding_among_boxes_changes_nothing(model: Sam3Model) -> None:
    image = encode_image(model, torch.rand(3, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX))
    nothing = encode_boxes(model, image, BOXES, IS_POSITIVE, torch.zeros(3, 2).bool())
    close(nothing.tokens[:, -1:], image.geometry)
    assert nothing.is_token.tolist() == [[False, False, True]] * 3
    padded, positive, is_box = (
        torch.cat([part[:, :1], part[:, 1:].roll(1, 0), part[:, 1:]], dim=1)
        for part in (BOXES, IS_POSITIVE, IS_BOX)
    )
    is_box[:, 1] = False
    one, other = (
        encode_boxes(model, image, *boxes)
        for boxes in ((BOXES, IS_POSITIVE, IS_BOX), (padded, positive, is_box))
    )
    close(other.tokens[other.is_token], one.tokens[one.is_token])


def test_boxes_teach_the_image_encoder_and_every_weight_of_their_own(model: Sam3Model) -> None:
    features = encode_image(model, torch.rand(1, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)).repeat_each(3)
    level = features.levels[-1].detach().requires_grad_()
    image = dataclasses.replace(features, levels=(*features.levels[:-1], level))
    encoder = model.geometry_encoder
    boxes = encode_boxes(model, image, BOXES, IS_POSITIVE, IS_BOX)
    # The same for all keys, the bias of a key is nothing to attention.
    learning = [weight for name, weight in encoder.named_parameters() if not name.endswith("k_proj.bias")]
    gradients = torch.autograd.grad((boxes.tokens[boxes.is_token] ** 3).sum(), [level, *learning])
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 1e-4


@torch.no_grad()
def test_selecting_and_repeating_features_agree(model: Sam3Model) -> None:
    features = encode_image(model, torch.rand(2, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX))
    repeated, selected = features.repeat_each(2), features.select(torch.tensor([0, 0, 1, 1]))
    for one, other in zip(
        [*repeated.levels, repeated.geometry], [*selected.levels, selected.geometry], strict=True
    ):
        assert torch.equal(one, other)
