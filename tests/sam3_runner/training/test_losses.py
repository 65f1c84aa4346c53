from __future__ import annotations

import pytest
import torch
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

from sam3_runner.forward import LayerOutputs
from sam3_runner.training.losses import (
    LossWeights,
    Target,
    detection_loss,
    dice_loss,
    focal_loss,
    generalised_iou,
    match,
    to_xyxy,
)

BOXES = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.7, 0.6, 0.3, 0.4]])


def masks_of(boxes: torch.Tensor, size: int = 32) -> torch.Tensor:
    masks = torch.zeros(len(boxes), size, size)
    for mask, (x0, y0, x1, y1) in zip(masks, (to_xyxy(boxes) * size).round().int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    return masks


def outputs_for(
    boxes: torch.Tensor, scores: torch.Tensor, masks: torch.Tensor, presence: float
) -> LayerOutputs:
    """Outputs of two layers and one pair that say exactly this, query by query."""
    queries = len(boxes)
    return LayerOutputs(
        logits=torch.logit(scores).expand(2, 1, -1).clone().requires_grad_(),
        boxes_cxcywh=boxes.expand(2, 1, -1, -1).clone().requires_grad_(),
        presence_logits=torch.full((2, 1), presence, requires_grad=True),
        mask_embeddings=torch.eye(queries).expand(2, 1, -1, -1).clone().requires_grad_(),
        pixel_embeddings=(masks[None] * 40 - 20).clone().requires_grad_(),
        semantic_logits=None,
        drawn=None,
    )


def test_a_perfect_answer_costs_almost_nothing() -> None:
    masks = masks_of(BOXES)
    outputs = outputs_for(BOXES, torch.tensor([0.9999, 0.9999]), masks, presence=12.0)
    assert detection_loss(outputs, [Target(BOXES, masks)])["total"] < 0.01


@pytest.mark.parametrize("term", ["presence", "classes", "box_l1", "box_giou", "mask_bce", "mask_dice"])
def test_each_term_rises_when_its_part_of_the_answer_gets_worse(term: str) -> None:
    masks = masks_of(BOXES)
    target = [Target(BOXES, masks)]
    good = outputs_for(BOXES, torch.tensor([0.9, 0.9]), masks, presence=3.0)
    worse = {
        "presence": outputs_for(BOXES, torch.tensor([0.9, 0.9]), masks, presence=-3.0),
        "classes": outputs_for(BOXES, torch.tensor([0.9, 0.1]), masks, presence=3.0),
        "box_l1": outputs_for(BOXES + 0.05, torch.tensor([0.9, 0.9]), masks, presence=3.0),
        "box_giou": outputs_for(BOXES + 0.05, torch.tensor([0.9, 0.9]), masks, presence=3.0),
        "mask_bce": outputs_for(BOXES, torch.tensor([0.9, 0.9]), 1 - masks, presence=3.0),
        "mask_dice": outputs_for(BOXES, torch.tensor([0.9, 0.9]), 1 - masks, presence=3.0),
    }[term]
    assert detection_loss(worse, target)[term] > detection_loss(good, target)[term] + 0.05


def test_an_absent_prompt_teaches_presence_and_class_alone() -> None:
    masks = masks_of(BOXES)
    outputs = outputs_for(BOXES, torch.tensor([0.9, 0.2]), masks, presence=2.0)
    terms = detection_loss(outputs, [Target(torch.zeros(0, 4), torch.zeros(0, 32, 32))])
    assert terms["presence"] > 1
    assert terms["classes"] > 0.1
    assert terms["box_l1"] == terms["mask_dice"] == 0
    terms["total"].backward()
    assert outputs.presence_logits.grad is not None


def test_every_decoder_layer_gets_a_gradient() -> None:
    masks = masks_of(BOXES)
    outputs = outputs_for(BOXES + 0.02, torch.tensor([0.6, 0.6]), masks, presence=0.0)
    detection_loss(outputs, [Target(BOXES, masks)])["total"].backward()
    for tensor in (outputs.logits, outputs.boxes_cxcywh, outputs.presence_logits):
        assert tensor.grad is not None
        assert tensor.grad[0].abs().sum() > 0
        assert tensor.grad[1].abs().sum() > 0


def test_matching_picks_the_query_that_fits_and_uses_none_twice() -> None:
    boxes = torch.stack([BOXES[1], torch.tensor([0.5, 0.5, 0.9, 0.9]), BOXES[0]])[None]
    target = Target(BOXES, masks_of(BOXES))
    assert match(torch.zeros(1, 3), boxes, [target], LossWeights()).tolist() == [2, 0]
    same = Target(BOXES[[0, 0]], masks_of(BOXES[[0, 0]]))
    chosen = match(torch.zeros(1, 3), boxes, [same], LossWeights()).tolist()
    assert len(set(chosen)) == 2


def test_matching_refuses_more_instances_than_queries() -> None:
    target = Target(BOXES, masks_of(BOXES))
    with pytest.raises(ValueError, match="2 instances cannot be matched with 1 queries"):
        match(torch.zeros(1, 1), BOXES[None, :1], [target], LossWeights())


def test_focal_loss_and_generalised_iou_agree_with_torchvision() -> None:
    logits, truth = torch.randn(6, 5), (torch.rand(6, 5) > 0.5).float()
    expected = sigmoid_focal_loss(logits, truth, alpha=0.3, gamma=2.0)
    torch.testing.assert_close(focal_loss(logits, truth, 0.3, 2.0), expected)
    first, second = (to_xyxy(torch.rand(7, 4) + 0.01) for _ in range(2))
    torch.testing.assert_close(generalised_iou(first, second), generalized_box_iou(first, second).diagonal())


def test_dice_of_equal_masks_is_zero_and_of_disjoint_ones_nearly_one() -> None:
    masks = masks_of(BOXES)
    assert dice_loss(masks * 60 - 30, masks).max() < 1e-4
    assert dice_loss(masks.flip(0) * 60 - 30, masks).min() > 0.9


def test_the_semantic_head_learns_the_union_of_the_instances() -> None:
    masks = masks_of(BOXES)
    outputs = outputs_for(BOXES, torch.tensor([0.9, 0.9]), masks, presence=3.0)
    union = masks.amax(0, keepdim=True)
    good = LayerOutputs(**{**vars(outputs), "semantic_logits": union * 40 - 20})
    bad = LayerOutputs(**{**vars(outputs), "semantic_logits": masks[:1] * 40 - 20})
    target = [Target(BOXES, masks)]
    assert detection_loss(good, target)["semantic_dice"] < 0.01
    assert detection_loss(bad, target)["semantic_dice"] > 1


def test_pairs_that_are_not_drawn_teach_no_masks() -> None:
    masks = masks_of(BOXES)
    right = outputs_for(BOXES, torch.tensor([0.9, 0.9]), masks, presence=3.0)
    wrong = outputs_for(BOXES, torch.tensor([0.9, 0.9]), 1 - masks, presence=3.0)
    both = {
        name: torch.cat([getattr(wrong, name), getattr(right, name)], dim=1)
        for name in ("logits", "boxes_cxcywh", "presence_logits", "mask_embeddings")
    }
    for drawn, pixels in ((1, right.pixel_embeddings), (0, wrong.pixel_embeddings)):
        outputs = LayerOutputs(
            **both, pixel_embeddings=pixels, semantic_logits=None, drawn=torch.tensor([drawn])
        )
        terms = detection_loss(outputs, [Target(BOXES, masks)] * 2)
        assert (terms["mask_dice"] < 0.01) == (drawn == 1)
        assert terms["box_l1"] < 0.01
