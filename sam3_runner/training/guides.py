"""Throwaway heads that show the encoders what there is to see and say, long before the detector can ask them.

A detector trained from scratch first has to find out that words are about colours and shapes at all: all of its
losses wait for that at once, on a plateau of thousands of steps. These heads ask the two encoders directly. They
are trained beside the model and never saved with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3_runner.forward import ImageFeatures, TextFeatures
from sam3_runner.training.data import Batch
from sam3_runner.training.losses import dice_loss, union_masks
from sam3_runner.training.scenes import COLOURS, SHAPES

KINDS = (1 + len(COLOURS), 1 + len(SHAPES))  # nothing or a colour; nothing or a shape
LEVELS = (0, -1)  # the finest, which masks are made from, and the one that the DETR encoder reads


class Guides(nn.Module):
    """Two questions, asked of two levels of the image features.

    - `kinds`: which colour and which shape does this pixel show?
    - `match`: does this pixel show what the prompt says? By a plain inner product with the pooled prompt, which
      makes both encoders speak one language.

    Args:
        channels: C of the image and text features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kinds = nn.ModuleList(nn.Conv2d(channels, sum(KINDS), 1) for _ in LEVELS)
        self.match = nn.ModuleList(nn.Linear(channels, channels + 1) for _ in LEVELS)

    def forward(self, image: ImageFeatures, text: TextFeatures) -> tuple[list[Tensor], list[Tensor]]:
        """Logits of both questions, for I images with P prompts each.

        Returns:
            `kinds` (I, K, h, w) and `match` (I·P, h, w), each at every level.
        """
        is_token = text.is_token[..., None]
        pooled = (text.tokens * is_token).sum(1) / is_token.sum(1)  # (I·P, C)
        kinds, matches = [], []
        for level, ask_kind, ask_match in zip(LEVELS, self.kinds, self.match, strict=True):
            features = image.levels[level]  # (I, C, h, w)
            kinds.append(ask_kind(features))
            asked = ask_match(pooled).unflatten(0, (len(features), -1))  # (I, P, C + 1)
            products = torch.einsum("ipc,ichw->iphw", asked[..., :-1], features)
            matches.append((products + asked[..., -1, None, None]).flatten(0, 1))
        return kinds, matches


def guide_losses(kinds: Sequence[Tensor], matches: Sequence[Tensor], batch: Batch) -> dict[str, Tensor]:
    """What the guides add to the loss, weighted.

    Args:
        kinds: As `Guides` returns them.
        matches: Likewise.
        batch: With its ground truth.
    """
    kind = torch.stack([pixel_kind_loss(logits, batch.kinds) for logits in kinds]).sum()
    match = torch.stack([_match_loss(logits, batch) for logits in matches]).sum()
    return {"kinds": 5.0 * kind, "match": 8.0 * match}


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
