"""SAM3 prepared for inference: images in, text in, answers out, each stage by itself.

`forward.py` is the slow, obvious form of the same; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Sam3Model

from sam3_runner.blocks import (
    FusionLayer,
    GeometryEncoder,
    ImageBackbone,
    MaskEmbedder,
    Neck,
    PixelDecoder,
    QueryDecoder,
    TextEncoder,
    Weights,
)
from sam3_runner.forward import TextFeatures


@dataclass(frozen=True)
class EncodedImages:
    """I encoded images: all of them that answering needs, and nothing that depends on a prompt.

    Attributes:
        pixels: (I, H·W, C) image tokens, row by row, after the first look at each other.
        geometry: (I, 1, C), what the geometry encoder says of an image with no boxes marked on it.
        fine: (I, 4H, 4W, C), what the finest level adds to the pixels of masks.
        middle: (I, 2H, 2W, C), what the level between adds.
    """

    pixels: Tensor
    geometry: Tensor
    fine: Tensor
    middle: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of the fields."""
        return self.pixels, self.geometry, self.fine, self.middle

    def select(self, rows: Tensor) -> EncodedImages:
        """Chosen images, one for each entry of `rows` (B,)."""
        return EncodedImages(*(tensor[rows] for tensor in self.tensors))

    def split(self) -> list[EncodedImages]:
        """The images one by one, each in memory of its own."""
        return [
            EncodedImages(*(tensor[row : row + 1].clone() for tensor in self.tensors))
            for row in range(len(self.pixels))
        ]

    @classmethod
    def join(cls, images: list[EncodedImages]) -> EncodedImages:
        """Several as one."""
        if len(images) == 1:
            return images[0]
        return cls(*(torch.cat(parts) for parts in zip(*(image.tensors for image in images), strict=True)))

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Answers:
    """What the model says of B (image, prompt) pairs, for N queries each.

    Attributes:
        scores: (B, N) float32 in [0, 1]: sigmoid(class logit) · sigmoid(presence logit).
        boxes_cxcywh: (B, N, 4) float32 in [0, 1] of the image's width and height.
        mask_embeddings: (B, N, C) float32.
        mask_shifts: (B, N) float32.
        pixels: (B, h, w, C).
    """

    scores: Tensor
    boxes_cxcywh: Tensor
    mask_embeddings: Tensor
    mask_shifts: Tensor
    pixels: Tensor

    def mask_logits(self, pair: int, queries: Tensor) -> Tensor:
        """(K, h, w) float32 mask logits of chosen queries (K,) of one pair."""
        pixels = self.pixels[pair]
        embeddings = self.mask_embeddings[pair, queries].to(pixels.dtype)  # (K, C)
        logits = torch.einsum("hwc,kc->khw", pixels, embeddings).float()
        return logits + self.mask_shifts[pair, queries, None, None]


class Engine(nn.Module):
    """A SAM3 prepared for inference. Holds no state of a request.

    Args:
        model: On any device, in float32; not changed, and not needed afterwards.
        device: Where to compute.
        dtype: What to compute in: float32, or bfloat16, in which scores and boxes are still decided in float32.
    """

    def __init__(self, model: Sam3Model, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        weights = Weights(device, dtype)
        with torch.no_grad():
            self.backbone = ImageBackbone(weights, model.vision_encoder.backbone)
            self.neck = Neck(weights, model.vision_encoder.neck)
            position = self._positions(model, device)
            self.geometry = GeometryEncoder(weights, model.geometry_encoder, position)
            self.text = TextEncoder(weights, model)
            self.fusion = nn.ModuleList(
                FusionLayer(weights, layer, position) for layer in model.detr_encoder.layers
            )
            self.queries = QueryDecoder(weights, model, position, self.backbone.grid)
            self.mask_embedder = MaskEmbedder(weights, model.mask_decoder)
            self.pixel_decoder = PixelDecoder(weights, model.mask_decoder)
        self.requires_grad_(False).eval()

    def _positions(self, model: Sam3Model, device: torch.device) -> Tensor:
        """(T, C) float32, the position encoding of the image tokens that the DETR encoder reads."""
        encoding, grid = model.vision_encoder.neck.position_encoding, self.backbone.grid
        table: Tensor = encoding(torch.Size((1, 1, grid, grid)), device, torch.float32)  # (1, C, H, W)
        return table[0].flatten(1).T

    def encode_images(self, pixels: Tensor) -> EncodedImages:
        """Encode I images, (I, S, S, 3) uint8 on the device."""
        fine, middle, coarse = self.neck(self.backbone(pixels))
        tokens = coarse.flatten(1, 2)
        return EncodedImages(
            self.fusion[0].look_at_image(tokens),
            self.geometry(tokens),
            *self.pixel_decoder.prepare(fine, middle),
        )

    def encode_texts(self, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
        """Encode B prompts: (B, T) tokens, and 1 where a token is real."""
        return TextFeatures(self.text(input_ids), attention_mask.bool())

    def answer(self, images: EncodedImages, texts: TextFeatures) -> Answers:
        """Answer B pairs: `images` and `texts` hold B of each, pair b being row b of both."""
        texts = texts.append(images.geometry)
        tokens, is_token = texts.tokens, texts.is_token
        first, *others = self.fusion
        pixels = first.look_at_prompt(images.pixels, tokens, is_token)
        for layer in others:
            pixels = layer(pixels, tokens, is_token)
        scores, boxes, queries = self.queries(pixels, tokens, is_token)
        embeddings, shifts = self.mask_embedder(queries)
        shown = self.pixel_decoder(pixels, tokens, is_token, images.fine, images.middle)
        return Answers(scores, boxes, embeddings, shifts, shown)
