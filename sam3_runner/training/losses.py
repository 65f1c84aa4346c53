"""The loss that SAM3's detector is trained with: set prediction, as in DETR and MaskFormer.

Each prompt's ground-truth instances are matched one to one with queries (Hungarian algorithm); matched queries
learn class, box and mask, the others learn to be nothing, and the presence token learns whether the prompt is in
the image at all. Beside them the semantic head learns the union of the instances, pixel by pixel: it teaches image
and text to find each other long before the queries can. Every decoder layer is supervised with a matching of its own.

Sources: DETR (Carion et al., 2020) for matching and boxes, RetinaNet (Lin et al., 2017) for the focal loss,
MaskFormer (Cheng et al., 2021) for BCE + dice, SAM 3 (Meta, 2025) for the presence token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sam3_runner.forward import LayerOutputs


@dataclass(frozen=True)
class Target:
    """Ground truth of one (image, prompt) pair with G instances; G = 0 says the prompt is not in the image.

    Attributes:
        boxes_cxcywh: (G, 4) in [0, 1] of the image's width and height.
        masks: (G, h, w) in [0, 1], coverage of each pixel. Any resolution; logits are upsampled to it.
    """

    boxes_cxcywh: Tensor
    masks: Tensor


@dataclass(frozen=True)
class LossWeights:
    """Weight of each term in the sum, and of each cost in the matching.

    `focal_alpha` is 0.5, not RetinaNet's 0.25: a score of 0.5 then means even odds, which is where the runner's
    default threshold lies.
    """

    presence: float = 2.0
    classes: float = 4.0
    box_l1: float = 5.0
    box_giou: float = 2.0
    mask_bce: float = 5.0
    mask_dice: float = 5.0
    semantic_bce: float = 40.0
    semantic_dice: float = 8.0
    focal_alpha: float = 0.5
    focal_gamma: float = 2.0
    match_class: float = 2.0
    match_box_l1: float = 5.0
    match_box_giou: float = 2.0


def detection_loss(
    outputs: LayerOutputs, targets: Sequence[Target], weights: LossWeights | None = None
) -> dict[str, Tensor]:
    """The loss of B (image, prompt) pairs over all L decoder layers.

    Args:
        outputs: Of B pairs.
        targets: B of them; no pair may hold more instances than there are queries.
    Returns:
        `"total"`, which is to be differentiated, and each term's weighted share of it. Terms are summed over the
        layers, and boxes and masks averaged over the instances of the batch.
    Raises:
        ValueError: A pair has more instances than there are queries.
    """
    weights = weights or LossWeights()
    truth = _Truth.gather(targets)
    queries = torch.stack(
        [
            match(logits, boxes, targets, weights)
            for logits, boxes in zip(outputs.logits, outputs.boxes_cxcywh, strict=True)
        ]
    )  # (L, M)
    terms = {
        "presence": weights.presence * _presence_loss(outputs.presence_logits, truth),
        "classes": weights.classes * _class_loss(outputs.logits, truth, queries, weights),
    }
    terms |= _box_losses(outputs.boxes_cxcywh, truth, queries, weights)
    if outputs.drawn is not None:
        is_drawn = torch.isin(truth.pair, outputs.drawn)
        queries = queries[:, is_drawn]
        truth = _Truth.gather([targets[pair] for pair in outputs.drawn.tolist()])
    terms |= _mask_losses(outputs, truth, queries, weights)
    if outputs.semantic_logits is not None:
        terms |= _semantic_losses(outputs.semantic_logits, truth, weights)
    return {"total": torch.stack(list(terms.values())).sum(), **terms}


@dataclass(frozen=True)
class _Truth:
    """All M instances of a batch, one after another; `pair[m]` says which of the B pairs instance m answers."""

    pair: Tensor  # (M,)
    sizes: list[int]  # B counts that add up to M
    boxes_cxcywh: Tensor  # (M, 4)
    masks: Tensor  # (M, h, w)

    @classmethod
    def gather(cls, targets: Sequence[Target]) -> _Truth:
        sizes = [len(target.boxes_cxcywh) for target in targets]
        device = targets[0].boxes_cxcywh.device
        return cls(
            pair=torch.arange(len(sizes), device=device).repeat_interleave(
                torch.tensor(sizes, device=device)
            ),
            sizes=sizes,
            boxes_cxcywh=torch.cat([target.boxes_cxcywh for target in targets]),
            masks=torch.cat([target.masks for target in targets]),
        )


@torch.no_grad()
def match(logits: Tensor, boxes_cxcywh: Tensor, targets: Sequence[Target], weights: LossWeights) -> Tensor:
    """Assign every ground-truth instance of B pairs the query that fits it best, each query at most once.

    Args:
        logits: (B, N).
        boxes_cxcywh: (B, N, 4).
        targets: B of them, with M instances in all.
    Returns:
        (M,) query index of every instance, instances in the order of `targets`.
    Raises:
        ValueError: A pair has more instances than there are queries.
    """
    truth = _Truth.gather(targets)
    if max(truth.sizes) > logits.shape[1]:
        raise ValueError(f"{max(truth.sizes)} instances cannot be matched with {logits.shape[1]} queries")
    predicted = boxes_cxcywh[truth.pair]  # (M, N, 4)
    expected = truth.boxes_cxcywh[:, None].expand_as(predicted)
    cost = (
        -weights.match_class * logits[truth.pair].sigmoid()
        + weights.match_box_l1 * (predicted - expected).abs().sum(-1)
        - weights.match_box_giou * generalised_iou(to_xyxy(predicted), to_xyxy(expected))
    )  # (M, N)
    chosen = [linear_sum_assignment(block.numpy())[1] for block in cost.cpu().split(truth.sizes)]
    return torch.as_tensor(np.concatenate(chosen), dtype=torch.long, device=logits.device)


def _presence_loss(presence_logits: Tensor, truth: _Truth) -> Tensor:
    is_present = torch.tensor([float(size > 0) for size in truth.sizes], device=presence_logits.device)
    expected = is_present.expand_as(presence_logits)  # (B,) -> (L, B)
    return F.binary_cross_entropy_with_logits(presence_logits, expected, reduction="none").mean(1).sum()


def _class_loss(logits: Tensor, truth: _Truth, queries: Tensor, weights: LossWeights) -> Tensor:
    expected = torch.zeros_like(logits)  # (L, B, N)
    layers = torch.arange(len(logits), device=logits.device)[:, None]
    expected[layers, truth.pair, queries] = 1.0
    return focal_loss(logits, expected, weights.focal_alpha, weights.focal_gamma).sum() / max(
        len(truth.pair), 1
    )


def _box_losses(
    boxes_cxcywh: Tensor, truth: _Truth, queries: Tensor, weights: LossWeights
) -> dict[str, Tensor]:
    layers = torch.arange(len(boxes_cxcywh), device=boxes_cxcywh.device)[:, None]
    predicted = boxes_cxcywh[layers, truth.pair, queries]  # (L, M, 4)
    expected = truth.boxes_cxcywh.expand_as(predicted)
    count = max(len(truth.pair), 1)
    giou = generalised_iou(to_xyxy(predicted), to_xyxy(expected))
    return {
        "box_l1": weights.box_l1 * (predicted - expected).abs().sum() / count,
        "box_giou": weights.box_giou * (1 - giou).sum() / count,
    }


def _mask_losses(
    outputs: LayerOutputs, truth: _Truth, queries: Tensor, weights: LossWeights
) -> dict[str, Tensor]:
    """BCE and dice of the matched queries' masks.

    The last layer is compared at the truth's own resolution, after the same bilinear upsampling that the runner
    thresholds; the layers before it at the logits' resolution, which is enough to steer them and costs less.
    """
    logits = _matched_mask_logits(outputs, truth, queries)  # (L, M, h, w)
    coarse = _pool(truth.masks, logits)
    fine = F.interpolate(logits[-1][:, None], truth.masks.shape[-2:], mode="bilinear", align_corners=False)[
        :, 0
    ]
    count = max(len(truth.pair), 1)
    bce = dice = logits.new_zeros(())
    for predicted, expected in [*((layer, coarse) for layer in logits[:-1]), (fine, truth.masks)]:
        pixels = F.binary_cross_entropy_with_logits(predicted, expected, reduction="none")
        bce = bce + pixels.flatten(1).mean(1).sum() / count
        dice = dice + dice_loss(predicted, expected).sum() / count
    return {"mask_bce": weights.mask_bce * bce, "mask_dice": weights.mask_dice * dice}


def _semantic_losses(logits: Tensor, truth: _Truth, weights: LossWeights) -> dict[str, Tensor]:
    """BCE over all pixels of all pairs, and dice where the prompt is present, of (B, h, w) logits."""
    logits = logits.float()
    union = _union(truth, logits)
    present = truth.pair.unique()
    dice = dice_loss(logits[present], union[present]).sum() / max(len(present), 1)
    return {
        "semantic_bce": weights.semantic_bce * F.binary_cross_entropy_with_logits(logits, union),
        "semantic_dice": weights.semantic_dice * dice,
    }


def union_masks(targets: Sequence[Target], like: Tensor) -> Tensor:
    """(B, h, w) coverage by any instance of each of B pairs, in the size and on the device of `like`."""
    return _union(_Truth.gather(targets), like)


def _union(truth: _Truth, like: Tensor) -> Tensor:
    coarse = _pool(truth.masks, like)
    union: Tensor = torch.zeros_like(like).index_add(0, truth.pair, coarse)
    return union.clamp(max=1)  # instances are disjoint, but for rounding


def _pool(masks: Tensor, like: Tensor) -> Tensor:
    """(M, H, W) coverage -> (M, h, w). M may be 0, which torch's pooling takes in the batch dimension alone."""
    height, width = like.shape[-2:]
    return F.adaptive_avg_pool2d(masks[:, None], (height, width))[:, 0]


def _matched_mask_logits(outputs: LayerOutputs, truth: _Truth, queries: Tensor) -> Tensor:
    """(L, M, h, w) mask logits of the matched queries; the other queries' masks are never made."""
    layers = torch.arange(len(queries), device=queries.device)[:, None]
    pair = truth.pair if outputs.drawn is None else outputs.drawn[truth.pair]
    embeddings = outputs.mask_embeddings[layers, pair, queries]  # (L, M, C)
    pixels = outputs.pixel_embeddings
    per_pair = zip(embeddings.split(truth.sizes, dim=1), pixels.flatten(2).unbind(0), strict=True)
    flat: Tensor = torch.cat([part @ image for part, image in per_pair], dim=1)  # (L, M, h·w)
    return flat.view(*flat.shape[:2], *pixels.shape[-2:]).float()


def focal_loss(logits: Tensor, truth: Tensor, alpha: float, gamma: float) -> Tensor:
    """Elementwise focal loss of `logits` against `truth` in {0, 1}; same shape as both."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    probability = logits.sigmoid()
    missing = probability + truth - 2 * probability * truth  # 1 - p of the true class
    balance = alpha * truth + (1 - alpha) * (1 - truth)
    return balance * missing**gamma * cross_entropy


def dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """(M,) one minus the soft Dice coefficient of (M, h, w) logits and coverage in [0, 1]."""
    probability, truth = logits.sigmoid().flatten(1), truth.flatten(1)
    overlap = (probability * truth).sum(-1)
    # One pixel of smoothing keeps the smallest masks differentiable.
    return 1 - (2 * overlap + 1) / (probability.sum(-1) + truth.sum(-1) + 1)


def generalised_iou(first_xyxy: Tensor, second_xyxy: Tensor) -> Tensor:
    """Elementwise generalised IoU in (-1, 1] of two (…, 4) sets of boxes (Rezatofighi et al., 2019)."""
    top_left = torch.maximum(first_xyxy[..., :2], second_xyxy[..., :2])
    bottom_right = torch.minimum(first_xyxy[..., 2:], second_xyxy[..., 2:])
    overlap = (bottom_right - top_left).clamp(min=0).prod(-1)
    union = _area(first_xyxy) + _area(second_xyxy) - overlap
    hull_top_left = torch.minimum(first_xyxy[..., :2], second_xyxy[..., :2])
    hull_bottom_right = torch.maximum(first_xyxy[..., 2:], second_xyxy[..., 2:])
    hull = (hull_bottom_right - hull_top_left).clamp(min=0).prod(-1)
    tiny = torch.finfo(union.dtype).eps
    return overlap / (union + tiny) - (hull - union) / (hull + tiny)


def _area(boxes_xyxy: Tensor) -> Tensor:
    return (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0).prod(-1)


def to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """(…, 4) centre, width, height to corners; any unit."""
    centre, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)
