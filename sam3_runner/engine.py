"""SAM3 prepared for inference: images in, text in, answers out, each stage by itself.

`forward.py` is the slow, obvious form of the same; a test holds the two together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam3Model

from sam3_runner.blocks import (
    GeometryEncoder,
    ImageBackbone,
    LookAtImage,
    LookAtPrompt,
    MaskEmbedder,
    Neck,
    PixelDecoder,
    QueryDecoder,
    TextEncoder,
    Weights,
)
from sam3_runner.clicks import ClickFeatures, ClickHead, ClickModel
from sam3_runner.forward import TextFeatures
from sam3_runner.graphs import CudaGraphs
from sam3_runner.prebuilt import use_prebuilt_module

# Rows that one pass takes, on a GPU as static sizes that smaller batches are padded to. A ViT of 5,184 tokens an
# image fills an H200 from one image on; more than 8 images or pairs gain little and cost memory.
STATIC_SIZES = (1, 2, 4, 8)
MAX_ROWS = STATIC_SIZES[-1]
# On a CPU a large model gains nothing from batches: as many images as fit into this, at least one.
CPU_PASS_BYTES = 64 << 20
RECOMPILE_LIMIT = 32  # two kinds of ViT layers at four batch sizes, and the same in another dtype

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedImages:
    """I encoded images: all of them that answering needs, and nothing that depends on a prompt.

    Attributes:
        pixels: (I, H·W, C) image tokens, row by row, after the first look at each other.
        geometry: (I, 1, C), what the geometry encoder says of an image with no boxes marked on it.
        fine: (I, 4H, 4W, C), what the finest level adds to the pixels of masks.
        middle: (I, 2H, 2W, C), what the level between adds.
        coarse: (I, H·W, C) image tokens before that look, which boxes are encoded from.
        seen: (I, H, W, C'), what the ViT made of them, where clicks are answered and there was none yet.
        clickable: Of one image that was clicked on, in place of `seen`, which takes as much memory.
    """

    pixels: Tensor
    geometry: Tensor
    fine: Tensor
    middle: Tensor
    coarse: Tensor
    seen: Tensor | None = field(default=None, kw_only=True)
    clickable: ClickFeatures | None = field(default=None, kw_only=True)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What words and boxes are answered from, in the order of the fields."""
        return self.pixels, self.geometry, self.fine, self.middle, self.coarse

    def split(self) -> list[EncodedImages]:
        """The images one by one, each in memory of its own."""
        return [
            EncodedImages(
                *(tensor[row : row + 1].clone() for tensor in self.tensors),
                seen=None if self.seen is None else self.seen[row : row + 1].clone(),
            )
            for row in range(len(self.pixels))
        ]

    @classmethod
    def join(cls, images: Sequence[EncodedImages]) -> EncodedImages:
        """Several as one, for words and boxes."""
        if len(images) == 1:
            return images[0]
        return cls(*(torch.cat(parts) for parts in zip(*(image.tensors for image in images), strict=True)))

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        for_clicks = [part.nbytes for part in (self.seen, self.clickable) if part is not None]
        return sum(tensor.nbytes for tensor in self.tensors) + sum(for_clicks)


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

    Attributes:
        max_rows: Images, prompts or pairs that one call takes.
        clicks: What answers clicks; None if nothing does.

    Args:
        model: On any device, in float32; not changed, and not needed afterwards.
        device: Where to compute.
        dtype: What to compute in: float32; bfloat16, in which scores and boxes are still decided in float32; or
            float8_e4m3fn, in which the image encoder's matrices are multiplied, the rest being bfloat16.
        clicks: The interactive head of the same checkpoint; likewise.
    """

    def __init__(
        self, model: Sam3Model, device: torch.device, dtype: torch.dtype, clicks: ClickModel | None = None
    ) -> None:
        super().__init__()
        is_float8 = dtype == torch.float8_e4m3fn
        weights = Weights(device, torch.bfloat16 if is_float8 else dtype)
        with torch.no_grad():
            image_weights = Weights(device, weights.dtype, is_float8)
            self.backbone = ImageBackbone(image_weights, model.vision_encoder.backbone)
            self.neck = Neck(weights, model.vision_encoder.neck)
            position = self._positions(model, device)
            self.geometry = GeometryEncoder(weights, model.geometry_encoder, position)
            self.text = TextEncoder(weights, model)
            layers = model.detr_encoder.layers
            self.looks_at_image = nn.ModuleList(LookAtImage(weights, layer, position) for layer in layers)
            self.looks_at_prompt = nn.ModuleList(LookAtPrompt(weights, layer) for layer in layers)
            self.queries = QueryDecoder(weights, model, position, self.backbone.grid)
            self.mask_embedder = MaskEmbedder(weights, model.mask_decoder)
            self.pixel_decoder = PixelDecoder(weights, model.mask_decoder)
            self.clicks = None if clicks is None else ClickHead(weights, clicks)
        self.requires_grad_(False).eval()
        self._device = device
        self._is_compiled = False
        image_bytes = position.numel() * (1 + 4 + 16) * weights.dtype.itemsize
        self.max_rows = (
            MAX_ROWS if device.type == "cuda" else min(MAX_ROWS, max(1, CPU_PASS_BYTES // image_bytes))
        )
        self._encode_images: Callable[..., tuple[Tensor, ...]] = self._run_encode_images
        self._encode_texts: Callable[..., tuple[Tensor, ...]] = self._run_encode_texts
        self._encode_boxes: Callable[..., tuple[Tensor, ...]] = self._run_encode_boxes
        self._answer: Callable[..., tuple[Tensor, ...]] = self._run_answer

    def _positions(self, model: Sam3Model, device: torch.device) -> Tensor:
        """(T, C) float32, the position encoding of the image tokens that the DETR encoder reads."""
        encoding, grid = model.vision_encoder.neck.position_encoding, self.backbone.grid
        table: Tensor = encoding(torch.Size((1, 1, grid, grid)), device, torch.float32)  # (1, C, H, W)
        return table[0].flatten(1).T

    def encode_images(self, pixels: Tensor) -> EncodedImages:
        """Encode I images, (I, S, S, 3) uint8 on the device, at most `max_rows`.

        The result may be overwritten by the next call; `split` copies it.
        """
        tensors = self._encode_images(pixels)
        return EncodedImages(*tensors[:5], seen=None if self.clicks is None else tensors[5])

    def prepare_clicks(self, image: EncodedImages) -> EncodedImages:
        """One image, with its `clickable` set. Only where `clicks` is set."""
        if self.clicks is None or image.seen is None:
            return image
        return replace(image, seen=None, clickable=self.clicks.encode(image.seen))

    def encode_texts(self, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
        """Encode B prompts, at most `max_rows`: (B, T) tokens, and 1 where a token is real.

        The result may be overwritten by the next call.
        """
        (tokens,) = self._encode_texts(input_ids)
        return TextFeatures(tokens, attention_mask.bool())

    def encode_boxes(
        self, images: EncodedImages, boxes_cxcywh: Tensor, is_positive: Tensor, is_box: Tensor
    ) -> TextFeatures:
        """Encode the boxes marked on B images, at most `max_rows`.

        Args:
            images: B images, or one for all.
            boxes_cxcywh: (B, K, 4) float32, centre and size in [0, 1] of the image's width and height.
            is_positive: (B, K) bool, True for "like this one".
            is_box: (B, K) bool, False where a box is padding.
        Returns:
            K + 1 tokens each, the class token last. May be overwritten by the next call.
        """
        (tokens,) = self._encode_boxes(images.coarse, boxes_cxcywh, is_positive, is_box)
        return TextFeatures(tokens, F.pad(is_box, (0, 1), value=True))

    def answer(
        self, images: EncodedImages, texts: TextFeatures, boxes: TextFeatures | None = None
    ) -> Answers:
        """Answer B pairs, at most `max_rows`.

        Args:
            images: B images, pair b being row b of images and texts; or one, for all.
            texts: B prompts.
            boxes: Of B pairs, as `encode_boxes` made them; None: no pair has any.
        Returns:
            May be overwritten by the next call.
        """
        geometry = images.geometry
        if boxes is not None:
            # Their class token stands where the one that has seen no boxes would, the others behind the words.
            texts = texts.append(boxes.tokens[:, :-1], boxes.is_token[:, :-1])
            geometry = boxes.tokens[:, -1:]
        inputs = (images.pixels, geometry, images.fine, images.middle)
        return Answers(*self._answer(*inputs, texts.tokens, texts.is_token))

    def accelerate(self) -> None:
        """On a GPU: compile the layers, and record each stage at its static sizes when they are first used."""
        torch.cuda.set_device(self._device)  # streams and recordings are of the current one
        try:
            use_prebuilt_module()
            torch.compile(F.gelu)(torch.ones(8, device=self._device))
        except (
            Exception
        ) as error:  # no C compiler, no Python headers, no Triton: whatever keeps it from compiling
            logger.warning(
                "nothing can be compiled (%s): layers run as they are, several ms slower an image", error
            )
        else:
            self.compile_layers()
        pool = torch.cuda.graph_pool_handle()
        self._encode_images = CudaGraphs(self._run_encode_images, STATIC_SIZES, pool)
        self._encode_texts = CudaGraphs(self._run_encode_texts, STATIC_SIZES, pool)
        self._encode_boxes = CudaGraphs(self._run_encode_boxes, STATIC_SIZES, pool)
        self._answer = CudaGraphs(self._run_answer, STATIC_SIZES, pool)

    def compile_layers(self) -> None:
        """Compile what repeats, not the whole: all layers of a kind share one compilation, made when first run.

        The ViT's, where nearly all time goes, are compiled for each batch size; of the others, one for every size
        above 1.
        """
        self._is_compiled = True
        torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
        for part in self.backbone.layers:
            part.compile(fullgraph=True, dynamic=False)
        for part in (*self.text.layers, *self.looks_at_image, *self.looks_at_prompt):
            part.compile(fullgraph=True)
        for part in (self.neck, *self.geometry.layers, *self.queries.layers, self.pixel_decoder):
            part.compile(fullgraph=True)

    def _run_encode_images(self, pixels: Tensor) -> tuple[Tensor, ...]:
        seen = self.backbone(pixels)
        fine, middle, coarse = self.neck(seen)
        tokens = coarse.flatten(1, 2)
        prepared = self.pixel_decoder.prepare(fine, middle)
        for_clicks = () if self.clicks is None else (seen,)
        return self.looks_at_image[0](tokens), self.geometry(tokens), *prepared, tokens, *for_clicks

    def _run_encode_texts(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.text(input_ids),)

    def _run_encode_boxes(
        self, coarse: Tensor, boxes_cxcywh: Tensor, is_positive: Tensor, is_box: Tensor
    ) -> tuple[Tensor]:
        return (self.geometry.encode_boxes(coarse, boxes_cxcywh, is_positive, is_box),)

    def _run_answer(
        self, pixels: Tensor, geometry: Tensor, fine: Tensor, middle: Tensor, tokens: Tensor, is_token: Tensor
    ) -> tuple[Tensor, ...]:
        texts = TextFeatures(tokens, is_token).append(geometry.expand(len(tokens), -1, -1))
        tokens, is_token = texts.tokens, texts.is_token
        if self._is_compiled:
            # Prompts with boxes have more tokens than others. Code is made for either number: were it made for any,
            # prompts without boxes would be answered by it too.
            for tensor in (tokens, is_token):
                torch._dynamo.mark_static(tensor, 1)
        pixels = self.looks_at_prompt[0](pixels, tokens, is_token)  # the image's first look is in `pixels`
        for at_image, at_prompt in zip(self.looks_at_image[1:], self.looks_at_prompt[1:], strict=True):
            pixels = at_prompt(at_image(pixels), tokens, is_token)
        scores, boxes, queries = self.queries(pixels, tokens, is_token)
        embeddings, shifts = self.mask_embedder(queries)
        shown = self.pixel_decoder(pixels, tokens, is_token, fine, middle)
        return scores, boxes, embeddings, shifts, shown
