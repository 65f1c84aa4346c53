"""One object by clicks: SAM3's interactive head, which comes with its video tracker.

The head reads the detector's own ViT, through a feature pyramid of its own. It is computed as in Meta's
`SAM3InteractiveImagePredictor`: one click is ambiguous, so that the mask with the best predicted overlap is taken out
of three; several clicks are answered by a fourth mask, or, where that is unstable, by the best of the three.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from transformers import Sam3VisionConfig
from transformers.models.sam3.modeling_sam3 import Sam3VisionNeck
from transformers.models.sam3_tracker_video.configuration_sam3_tracker_video import Sam3TrackerVideoConfig
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import (
    Sam3TrackerVideoMaskDecoder,
    Sam3TrackerVideoPromptEncoder,
)

from sam3_runner.blocks import Neck, Weights
from sam3_runner.errors import InvalidPrompt
from sam3_runner.rle import row_edges
from sam3_runner.selection import logit_shift
from sam3_runner.types import Point, Prompt, RunLengthMask, Segmentation, Selection
from sam3_runner.upsample import masks_from_logits

# As Meta's predictor: what is not of the mask and no larger than this, in pixels of the logits, is filled with it.
MAX_HOLE: Final = 256
FILLED_LOGIT: Final = 10.0
_NEIGHBOURS: Final = np.ones((3, 3), np.uint8)  # corners touch


class ClickModel(nn.Module):
    """The head as transformers cuts it: for its weights and their names, not to be run.

    Args:
        vision: The detector's; it says what the head reads.
        tracker: `tracker_config` of the checkpoint; empty for the published sizes.
    """

    def __init__(self, vision: Sam3VisionConfig, tracker: Mapping[str, Any]) -> None:
        super().__init__()
        config = Sam3TrackerVideoConfig.from_dict(dict(tracker))
        prompts, masks = config.prompt_encoder_config, config.mask_decoder_config
        prompts.hidden_size = masks.hidden_size = vision.fpn_hidden_size
        prompts.image_size = vision.backbone_config.image_size
        prompts.patch_size = vision.backbone_config.patch_size
        masks._attn_implementation = "sdpa"
        self.neck = Sam3VisionNeck(vision)
        self.prompt_encoder = Sam3TrackerVideoPromptEncoder(prompts)
        self.mask_decoder = Sam3TrackerVideoMaskDecoder(masks)
        self.no_memory_embedding = nn.Parameter(torch.empty(1, 1, vision.fpn_hidden_size))


@dataclass(frozen=True)
class ClickFeatures:
    """One image, as clicks on it are answered from.

    Attributes:
        coarse: (1, H, W, C).
        middle: (1, 2H, 2W, C / 4).
        fine: (1, 4H, 4W, C / 8).
    """

    coarse: Tensor
    middle: Tensor
    fine: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        return self.coarse.nbytes + self.middle.nbytes + self.fine.nbytes


@dataclass(frozen=True)
class ClickAnswer:
    """The mask of what was clicked on.

    Attributes:
        score: () float32 in [0, 1]: the overlap (IoU) with the object that the head foresees.
        mask_logits: (h, w) float32.
    """

    score: Tensor
    mask_logits: Tensor


class ClickHead(nn.Module):
    """The head prepared for inference: its pyramid in the engine's dtype, all that decides in float32.

    The projections behind the two finer levels are made part of the convolutions before them: of the pyramid's
    185 GFLOP at full size 81 are left.

    Args:
        weights: Where to and in what.
        model: Not changed, and not needed afterwards.
    """

    no_memory: Tensor
    positions: Tensor

    def __init__(self, weights: Weights, model: ClickModel) -> None:
        super().__init__()
        pyramid, decoder = copy.deepcopy(model.neck), model.mask_decoder
        for level, then in zip(pyramid.fpn_layers, (decoder.conv_s0, decoder.conv_s1), strict=False):
            level.proj2 = _as_one(level.proj2, then)
        self.neck = Neck(weights, pyramid)
        self.prompt_encoder = copy.deepcopy(model.prompt_encoder).to(weights.device).float()
        self.mask_decoder = copy.deepcopy(decoder).to(weights.device).float()
        self.input_size_px: int = model.prompt_encoder.input_image_size
        self.register_buffer("no_memory", weights.compact(model.no_memory_embedding).flatten())
        self.register_buffer("positions", self._positions())

    def _positions(self) -> Tensor:
        """(1, C, H, W), the encoding of the centres of the coarse level's pixels."""
        encoding = self.prompt_encoder.shared_embedding
        device = encoding.positional_embedding.device
        rows, columns = self.prompt_encoder.image_embedding_size
        y, x = (torch.arange(size, device=device).add(0.5) / size for size in (rows, columns))
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (H, W, 2), x first
        encoded: Tensor = encoding(centres)  # (H, W, C)
        return encoded.permute(2, 0, 1)[None]

    def encode(self, seen: Tensor) -> ClickFeatures:
        """What the ViT made of one image, (1, H, W, C'), for `answer`."""
        fine, middle, coarse = self.neck(seen)
        return ClickFeatures(coarse + self.no_memory, middle, fine)

    def answer(self, features: ClickFeatures, places: Tensor, is_positive: Tensor) -> ClickAnswer:
        """Find what was clicked on.

        Args:
            features: Of the image.
            places: (P, 2) float32, x and y in shares of the image's width and height.
            is_positive: (P,) bool: on the object, or beside it.
        """
        levels = (features.coarse, features.middle, features.fine)
        coarse, middle, fine = (level.permute(0, 3, 1, 2).float() for level in levels)
        clicks, no_mask = self.prompt_encoder(
            places[None, None] * self.input_size_px, is_positive[None, None].int(), None, None
        )
        # (1, 1, M, h, w) and (1, 1, M): one image, one object, M masks to choose from
        masks, overlaps, _, _ = self.mask_decoder(
            image_embeddings=coarse,
            image_positional_embeddings=self.positions,
            sparse_prompt_embeddings=clicks,
            dense_prompt_embeddings=no_mask,
            multimask_output=len(places) == 1,
            high_resolution_features=[fine, middle],
        )
        best = overlaps[0, 0].argmax()
        return ClickAnswer(overlaps[0, 0, best], masks[0, 0, best])


def _as_one(first: nn.Conv2d, then: nn.Conv2d) -> nn.Conv2d:
    """A 3×3 convolution and the 1×1 convolution behind it, as one 3×3 convolution."""
    assert first.bias is not None and then.bias is not None  # no convolution of SAM3 is without
    mix = then.weight.detach().float()[:, :, 0, 0]  # (P, O)
    one: nn.Conv2d = nn.utils.skip_init(nn.Conv2d, first.in_channels, then.out_channels, 3, padding=1)
    one.weight = nn.Parameter(torch.einsum("po,ocyx->pcyx", mix, first.weight.detach().float()))
    one.bias = nn.Parameter(mix @ first.bias.detach().float() + then.bias.detach().float())
    return one


def check_points(prompts: Sequence[Prompt], size_hw: tuple[int, int]) -> None:
    """Refuse clicks beside an image.

    Args:
        prompts: Their points in pixels.
        size_hw: The image's height and width.
    Raises:
        InvalidPrompt: a point lies outside, or is no place at all.
    """
    height, width = size_hw
    for point in (point for prompt in prompts for point in prompt.points):
        x, y = point.xy
        if point.is_relative:
            raise InvalidPrompt(f"expected a click in pixels, got the shares {point.xy} of the image's sides")
        if not (0 <= x <= width and 0 <= y <= height):  # nor is a NaN
            raise InvalidPrompt(f"the click {point.xy} lies outside the image of {width}×{height} pixels")


def clicks_to_tensors(
    points: Sequence[Point], size_hw: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Clicks in pixels of an image of `size_hw`, as `ClickHead.answer` takes them."""
    height, width = size_hw
    places = torch.tensor([point.xy for point in points]) / torch.tensor([width, height])
    return places.to(device), torch.tensor([point.is_positive for point in points], device=device)


def to_segmentation(answer: ClickAnswer, selection: Selection, size_hw: tuple[int, int]) -> Segmentation:
    """The one instance, with the box that is tight around its mask; none if its score is not above the threshold.

    Nor is it one if no pixel of the image belongs to it.
    """
    score = answer.score.cpu().numpy()
    if score > selection.score_threshold:
        logits = fill_holes(answer.mask_logits - logit_shift(selection))
        (mask,) = masks_from_logits(logits[None], size_hw)
        if len(mask.counts) > 1:
            return Segmentation(score[None], tight_box(mask)[None], (mask,))
    return Segmentation(np.zeros(0, np.float32), np.zeros((0, 4), np.float32), ())


def fill_holes(logits: Tensor) -> Tensor:
    """Give what is not above 0, and hangs together in at most `MAX_HOLE` pixels of (h, w), to the mask."""
    parts, _ = ndimage.label((logits <= 0).cpu().numpy(), _NEIGHBOURS)
    is_hole = np.bincount(parts.ravel()) <= MAX_HOLE
    is_hole[0] = False  # what is above 0
    return logits.masked_fill(torch.from_numpy(is_hole[parts]).to(logits.device), FILLED_LOGIT)


def tight_box(mask: RunLengthMask) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """(4,) float32, left, top, right and bottom edge of a mask that is not empty."""
    edges = row_edges(mask)
    rows, columns = np.divmod(edges, mask.size_hw[1] + 1)
    return np.array([columns[::2].min(), rows[0], columns[1::2].max(), rows[-1] + 1], np.float32)
