"""What the bench of the model computes on: random weights of a size, random images, prompts of usual length."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import Sam3Config, Sam3Model

from bench.results_file import ROOT

SIZES = ("full", "demo", "small")
SEED = 20251121
# Calls take turns over so many sets of inputs, so that no call finds its own still in the device's cache.
SETS = 4
WORDS = ("red", "small", "parked", "wooden", "car", "dog", "bottle", "window", "person", "tree")


def config_of(size: str) -> Sam3Config:
    """The configuration of a size.

    Args:
        size: "full" is SAM3 itself (840 M weights), "demo" the checkpoint in `weights/demo`, "small" smaller still.
    """
    if size == "full":
        return Sam3Config()
    if size == "demo":
        text = (ROOT / "weights" / "demo" / "config.json").read_text(encoding="utf-8")
        return Sam3Config.from_dict(json.loads(text))
    return _small_config()


def _small_config() -> Sam3Config:
    detr = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "dropout": 0.0}
    return Sam3Config(
        vision_config={
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 112,
                "pretrain_image_size": 56,
                "patch_size": 14,
                "window_size": 4,
                "global_attn_indexes": [1],
            },
        },
        text_config={
            "model_type": "clip_text_model",
            "vocab_size": 49408,
            "hidden_size": 32,
            "intermediate_size": 64,
            "projection_dim": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "hidden_act": "gelu",
        },
        geometry_encoder_config={**detr, "num_layers": 1, "roi_size": 3},
        detr_encoder_config={**detr, "num_layers": 2},
        detr_decoder_config={**detr, "num_layers": 2, "num_queries": 10},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2, "num_upsampling_stages": 3},
    )


def random_model(config: Sam3Config, device: torch.device) -> Sam3Model:
    """A model with random weights in float32, made on the device itself: 840 M take 26 s on two CPU cores."""
    torch.manual_seed(SEED)
    with device:
        model = Sam3Model(config)
    made: Sam3Model = model.to(device).eval().requires_grad_(False)
    return made


@dataclass(frozen=True)
class Workload:
    """What one call has to do: `images` images, each asked for `prompts` things of its own.

    Attributes:
        side_px: Of the model's input.
        vocabulary: Tokens that the text encoder knows.
        text_tokens: That it reads.
    """

    images: int
    prompts: int
    side_px: int
    vocabulary: int
    text_tokens: int
    device: torch.device

    @classmethod
    def of(cls, config: Sam3Config, images: int, prompts: int, device: torch.device) -> Workload:
        """For a model of this configuration."""
        text = config.text_config
        side = config.vision_config.backbone_config.image_size
        return cls(images, prompts, side, text.vocab_size, text.max_position_embeddings, device)

    @property
    def pairs(self) -> int:
        """(image, prompt) pairs, those of an image next to each other."""
        return self.images * self.prompts

    @cached_property
    def pixels(self) -> list[Tensor]:
        """(I, S, S, 3) uint8 each, random, on the device: `SETS` of them."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        size = (self.images, self.side_px, self.side_px, 3)
        return [
            torch.randint(0, 256, size, dtype=torch.uint8, device=self.device, generator=generator)
            for _ in range(SETS)
        ]

    @cached_property
    def image_rows(self) -> Tensor:
        """(B,) int64, the image of each pair."""
        return torch.arange(self.images, device=self.device).repeat_interleave(self.prompts)

    @cached_property
    def captions(self) -> list[str]:
        """B prompts of two or three words."""
        count = len(WORDS)
        return [
            " ".join(WORDS[(pair * step + pair // count) % count] for step in range(1, 3 + pair % 2))
            for pair in range(self.pairs)
        ]

    @cached_property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """(B, T) random tokens and (B, T) 1 where one is real: four to six of them, as short prompts have."""
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(1, self.vocabulary - 2, (self.pairs, self.text_tokens), generator=generator)
        lengths = torch.randint(4, 7, (self.pairs, 1), generator=generator)
        place = torch.arange(self.text_tokens)
        ids = torch.where(place == lengths - 1, self.vocabulary - 1, ids)  # the end token is the last one
        return ids.to(self.device), (place < lengths).long().to(self.device)

    def pixel_values(self, turn: int) -> Tensor:
        """(I, 3, S, S) float32 in [-1, 1], as the other systems want it; made on the device."""
        return self.pixels[turn % SETS].permute(0, 3, 1, 2).float() / 127.5 - 1.0
