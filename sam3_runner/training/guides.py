"""Throwaway heads that show the encoders what there is to see and say, long before the detector can ask them.

A detector trained from scratch first has to find out that words are about colours and shapes at all: all of its
losses wait for that at once, on a plateau of thousands of steps. These heads ask the two encoders directly. They
are trained beside the model and never saved with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3_runner.forward import ImageFeatures, TextFeatures
from sam3_runner.training.data import Batch, Exemplars
from sam3_runner.training.losses import dice_loss, union_masks
from sam3_runner.training.scenes import COLOURS, SHAPES

KINDS = (1 + len(COLOURS), 1 + len(SHAPES))  # nothing or a colour; nothing or a shape
LEVELS = (0, -1)  # the finest, which masks are made from, and the one that the DETR encoder reads


class Guides(nn.Module):
    """Two questions, asked of two levels of the image features, and two asked of the geometry encoder.

    - `kinds`: which colour and which shape does this pixel show?
    - `match`: does this pixel show what the prompt says? By a plain inner product with the pooled prompt, which
      makes all encoders speak one language.
    - `shown`: which colour and which shape does this box show?
    - `shared`: and which have all positive boxes in common? Asked of the class token.

    Args:
        channels: C of the image and text features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kinds = nn.ModuleList(nn.Conv2d(channels, sum(KINDS), 1) for _ in LEVELS)
        self.match = nn.ModuleList(nn.Linear(channels, channels + 1) for _ in LEVELS)
        self.shown = nn.Linear(channels, sum(KINDS))
        self.shared = nn.Linear(channels, sum(KINDS))

    def kind_loss(self, image: ImageFeatures, batch: Batch) -> Tensor:
        """What `kinds` adds to the loss, weighted."""
        losses = [
            pixel_kind_loss(ask(image.levels[level]), batch.kinds)
            for level, ask in zip(LEVELS, self.kinds, strict=True)
        ]
        return 5.0 * torch.stack(losses).sum()

    def match_loss(self, image: ImageFeatures, prompts: TextFeatures, batch: Batch) -> Tensor:
        """What `match` adds to the loss, weighted, for I images with P prompts each, words or boxes or both."""
        is_token = prompts.is_token[..., None]
        pooled = (prompts.tokens * is_token).sum(1) / is_token.sum(1)  # (I·P, C)
        losses = []
        for level, ask in zip(LEVELS, self.match, strict=True):
            features = image.levels[level]  # (I, C, h, w)
            asked = ask(pooled).unflatten(0, (len(features), -1))  # (I, P, C + 1)
            products = torch.einsum("ipc,ichw->iphw", asked[..., :-1], features)
            losses.append(_match_loss((products + asked[..., -1, None, None]).flatten(0, 1), batch))
        return 8.0 * torch.stack(losses).sum()

    def exemplar_losses(self, boxes: TextFeatures, exemplars: Exemplars) -> dict[str, Tensor]:
        """What `shown` and `shared` add to the loss, weighted.

        Args:
            boxes: As `encode_boxes` made them, the class token last.
            exemplars: The same boxes, with what they show.
        """
        has_positive = (exemplars.is_positive & exemplars.is_box).any(1)
        shown = self.shown(boxes.tokens[:, :-1][exemplars.is_box])
        shared = self.shared(boxes.tokens[:, -1][has_positive])
        return {
            "shown": 4.0 * _exemplar_loss(shown, exemplars.kinds[exemplars.is_box]),
            "shared": 4.0 * _exemplar_loss(shared, exemplars.shared[has_positive]),
        }


def pixel_kind_loss(logits: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy of which colour and which shape each pixel shows.

    Args:
        logits: (I, K, h, w).
        shares: (I, K, m, m) true shares of each pixel, as `paint_kinds` makes them. Pixels that show nothing are
            most of every image, and count a tenth.
    """
    height, width = logits.shape[-2:]
    shares = F.adaptive_avg_pool2d(shares, (height, width))
    total = logits.new_zeros((), dtype=torch.float32)
    for asked, truth in zip(logits.float().split(KINDS, 1), shares.split(KINDS, 1), strict=True):
        per_pixel = -(truth * asked.log_softmax(1)).sum(1)
        weight = 0.1 * truth[:, 0] + (1 - truth[:, 0])
        total = total + (weight * per_pixel).sum() / weight.sum()
    return total


def _exemplar_loss(logits: Tensor, kinds: Tensor) -> Tensor:
    """Cross-entropy of (M, K) logits of colour and shape against (M, 2) true ones; M may be 0."""
    asked = zip(logits.float().split(KINDS, 1), kinds.unbind(1), strict=True)
    total = torch.stack([F.cross_entropy(part, truth, reduction="sum") for part, truth in asked]).sum()
    return total / max(len(kinds), 1)


def _match_loss(logits: Tensor, batch: Batch) -> Tensor:
    """BCE, pixels of the prompt's objects counting as much in all as the others, and dice where there are any."""
    logits = logits.float()
    union = union_masks(batch.targets, logits)
    pixels = F.binary_cross_entropy_with_logits(logits, union, reduction="none")
    inside = (pixels * union).sum() / union.sum().clamp(min=1)
    outside = (pixels * (1 - union)).sum() / (1 - union).sum()
    present = union.flatten(1).any(1)
    dice = dice_loss(logits[present], union[present]).sum() / present.sum().clamp(min=1)
    return inside + outside + dice
