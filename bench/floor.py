"""What SAM3 costs at the least: FLOP and bytes of each stage, counted from the configuration.

A stage can take no less time than its FLOP at the device's matrix rate, nor than its bytes at the device's copy
rate: the larger of the two is its floor. Counted are the products of matrices that the answer needs, in the
cheapest order known (`sam3_runner/blocks.py` says what can be done once an image, or as one product): not the
neck's level that nobody reads, not the heads that only training uses, not the masks of queries that are dropped.
Every tensor that enters or leaves a stage moves once, every weight once a call; what passes between the layers of a
stage is taken to stay on the chip, so the real cost is higher. A test holds the counts to PyTorch's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Sam3Config, Sam3Model

STAGES = ("preprocess", "image", "text", "answer", "masks")
GEOMETRY_TOKENS = 1  # behind every prompt stands the geometry encoder's class token


@dataclass(frozen=True)
class Cost:
    """What has to be computed and moved.

    Attributes:
        linear_flop: Products of activations and weights, which a mode with smaller numbers can speed up.
        other_flop: Attention's products of activations, and convolutions wider than one pixel.
        bytes: Read and written in the device's memory.
    """

    linear_flop: float = 0.0
    other_flop: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.linear_flop + other.linear_flop,
            self.other_flop + other.other_flop,
            self.bytes + other.bytes,
        )

    def __mul__(self, times: int) -> Cost:
        return Cost(self.linear_flop * times, self.other_flop * times, self.bytes * times)

    @property
    def flop(self) -> float:
        """All of them."""
        return self.linear_flop + self.other_flop


@dataclass(frozen=True)
class Rates:
    """What a device was measured to do.

    Attributes:
        flop_per_s: Of a large product of matrices, in the type that the model computes in.
        bytes_per_s: Of a large copy inside the device, bytes read and bytes written counted.
    """

    flop_per_s: float
    bytes_per_s: float

    def floor_s(self, cost: Cost) -> float:
        """Less time than this the device does not take for a stage."""
        return max(cost.flop / self.flop_per_s, cost.bytes / self.bytes_per_s)


def linear(rows: float, inputs: float, outputs: float) -> float:
    """FLOP of (rows, inputs) x (inputs, outputs)."""
    return 2 * rows * inputs * outputs


def attention(queries: float, keys: float, width: float) -> float:
    """FLOP of scores and weighted sum, all heads together."""
    return 4 * queries * keys * width


class Floor:
    """The least cost of a model's stages.

    Args:
        config: Of the model.

    Attributes:
        side_px: Of the model's square input.
        grid: Patches along a side.
        levels: Sides of the feature maps that are read, fine to coarse; the last one is the grid.
        channels: Of those maps, and of everything behind them.
        prompt: Tokens of a prompt that image and queries look at.
        weights: How many weights each stage reads.
    """

    def __init__(self, config: Sam3Config) -> None:
        vit = config.vision_config.backbone_config
        self.config = config
        self.side_px: int = vit.image_size
        self.grid: int = vit.image_size // vit.patch_size
        self.levels = tuple(int(self.grid * scale) for scale in config.vision_config.scale_factors[:-1])
        self.channels: int = config.detr_encoder_config.hidden_size
        self.prompt: int = config.text_config.max_position_embeddings + GEOMETRY_TOKENS
        self.weights = _weights(config, len(self.levels))

    def stages(self, images: int, pairs: int, *, kept: int, element_bytes: int) -> dict[str, Cost]:
        """The cost of each of `STAGES` in one call.

        Args:
            images: In the call.
            pairs: (image, prompt) pairs, each with a prompt of its own.
            kept: Instances of each pair whose masks are made, at the size of the finest feature map.
            element_bytes: Of a weight or an activation.
        """
        pixels, finest = 3 * self.side_px**2, self.levels[0] ** 2
        features = self.channels * sum(side**2 for side in self.levels)
        text = (self.prompt - GEOMETRY_TOKENS) * self.channels
        shown = self.channels * finest  # what the masks of a pair are made from

        def moved(*elements: float) -> Cost:
            return Cost(bytes=sum(elements) * element_bytes)

        return {
            "preprocess": Cost(bytes=images * pixels) + moved(images * pixels),
            "image": self.image() * images + moved(self.weights["image"], images * (pixels + features)),
            "text": self.text() * pairs + moved(self.weights["text"], pairs * text),
            "answer": self.answer() * pairs
            + moved(self.weights["answer"], images * features, pairs * (text + shown)),
            "masks": Cost(linear_flop=pairs * linear(kept, self.channels, finest))
            + moved(pairs * shown, pairs * kept * finest),
        }

    def image(self) -> Cost:
        """One image: backbone, neck, geometry token, and what answering does that no prompt changes."""
        finer = sum(linear(side**2, 9 * self.channels, self.channels) for side in self.levels[:-1])
        return self._backbone() + self._neck() + self._geometry() + self._look() + Cost(other_flop=finer)

    def text(self) -> Cost:
        """One prompt: the text encoder and its projection."""
        text = self.config.text_config
        tokens, width = text.max_position_embeddings, text.hidden_size
        layer = Cost(
            linear(tokens, width, 4 * width + 2 * text.intermediate_size), attention(tokens, tokens, width)
        )
        return layer * int(text.num_hidden_layers) + Cost(linear(tokens, width, self.channels))

    def answer(self) -> Cost:
        """One (image, prompt) pair: all behind the encoders but the masks themselves."""
        return self._fusion() + self._queries() + self._pixels() + self._heads()

    def _backbone(self) -> Cost:
        vit = self.config.vision_config.backbone_config
        width, tokens = vit.hidden_size, self.grid**2
        padded = (-(-self.grid // vit.window_size) * vit.window_size) ** 2  # windows may stand over the grid
        total = Cost(linear(tokens, 3 * vit.patch_size**2, width))
        for layer in range(vit.num_hidden_layers):
            attending, keys = (
                (tokens, tokens) if layer in vit.global_attn_indexes else (padded, vit.window_size**2)
            )
            total += Cost(
                linear(attending, width, 4 * width) + linear(tokens, width, 2 * vit.intermediate_size),
                attention(attending, keys, width),
            )
        return total

    def _neck(self) -> Cost:
        """Levels that are read: transposed convolutions, the last one with the 1x1 behind it, then the 3x3."""
        vision, total = self.config.vision_config, Cost()
        fpn = vision.fpn_hidden_size
        for scale in vision.scale_factors[:-1]:
            side, width = self.grid, vision.backbone_config.hidden_size
            while scale > 2:
                total += Cost(linear(side**2, width, 4 * (width // 2)))
                side, width, scale = 2 * side, width // 2, scale / 2
            total += Cost(linear(side**2, width, fpn * int(scale) ** 2))
            total += Cost(other_flop=linear((side * int(scale)) ** 2, 9 * fpn, fpn))
        return total

    def _geometry(self) -> Cost:
        """A lone token: its attention to itself is the projection of its values."""
        part = self.config.geometry_encoder_config
        width, pixels = part.hidden_size, self.grid**2
        own = 2 * linear(1, width, width) + linear(1, width, 2 * part.intermediate_size)
        looking = 2 * linear(1, width, width) + linear(pixels, width, 2 * width)
        return Cost(own + looking, attention(1, pixels, width)) * int(part.num_layers)

    def _look(self) -> Cost:
        """Image tokens look at each other; in the first layer no prompt has been seen yet."""
        pixels, width = self.grid**2, self.channels
        return Cost(linear(pixels, width, 4 * width), attention(pixels, pixels, width))

    def _fusion(self) -> Cost:
        part = self.config.detr_encoder_config
        pixels, width = self.grid**2, part.hidden_size
        fed = linear(pixels, width, 2 * part.intermediate_size)
        layer = self._look_at_prompt(pixels) + Cost(fed)
        return layer * int(part.num_layers) + self._look() * int(part.num_layers - 1)

    def _look_at_prompt(self, asking: int) -> Cost:
        width = self.channels
        projected = linear(asking, width, 2 * width) + linear(self.prompt, width, 2 * width)
        return Cost(projected, attention(asking, self.prompt, width))

    def _queries(self) -> Cost:
        part = self.config.detr_decoder_config
        width, pixels, queries = part.hidden_size, self.grid**2, part.num_queries
        asking = queries + 1  # the presence token asks too
        own = linear(asking, width, 4 * width) + linear(asking, width, 2 * part.intermediate_size)
        looking = linear(asking, width, 2 * width) + linear(pixels, width, 2 * width)
        place = linear(queries, 2 * width, width) + linear(queries, width, width)
        bias = linear(queries * 2 * self.grid, 2 + part.num_attention_heads, width)
        boxes = linear(queries, width, 2 * width + 4)
        attended = attention(asking, asking, width) + attention(asking, pixels, width)
        layer = Cost(own + looking + place + bias + boxes, attended) + self._look_at_prompt(asking)
        return layer * int(part.num_layers) + Cost(linear(1, width, 2 * width + 1))  # presence

    def _pixels(self) -> Cost:
        """A 3x3 convolution of an image upsampled twice is four 2x2 ones of the small image."""
        width = self.channels
        taps = sum(linear(side**2, 4 * width, 4 * width) for side in self.levels[1:])
        return self._look_at_prompt(self.grid**2) + Cost(other_flop=taps)

    def _heads(self) -> Cost:
        """Scores, and mask embeddings with the pixels' 1x1 convolution in them."""
        part, width = self.config.detr_decoder_config, self.channels
        scoring = linear(self.prompt, width, 2 * part.intermediate_size) + linear(1, width, width)
        return Cost(scoring + linear(part.num_queries, width, width + 1 + 4 * width + 1))


def _weights(config: Sam3Config, levels: int) -> dict[str, int]:
    with torch.device("meta"):
        model: Any = Sam3Model(config)
    decoder = model.mask_decoder
    parts = {
        "image": [model.vision_encoder, model.geometry_encoder.layers],
        "text": [model.text_encoder, model.text_projection],
        "answer": [
            model.detr_encoder,
            model.detr_decoder,
            model.dot_product_scoring,
            decoder.prompt_cross_attn,
            decoder.pixel_decoder.conv_layers[: levels - 1],
            decoder.instance_projection,
            decoder.mask_embedder,
        ],
    }
    unread = {
        "image": model.vision_encoder.neck.fpn_layers[-1],
        "text": model.text_encoder.get_input_embeddings(),  # but for a row for each token
    }
    counts = {stage: sum(map(_count, modules)) for stage, modules in parts.items()}
    return {stage: count - _count(unread.get(stage)) for stage, count in counts.items()}


def _count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(weight.numel() for weight in module.parameters())
