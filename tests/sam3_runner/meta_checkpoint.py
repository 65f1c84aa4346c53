"""A `sam3.pt` made of transformers' models: the tables of `meta_keys` backwards. The parity test has Meta's own."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from sam3_runner.meta_keys import (
    CLICK_MODULES,
    CLICK_POSITIONS,
    FUSED,
    MODULES,
    NO_MEMORY,
    POINT_KINDS,
    POSITIONS,
    PROJECTIONS,
    PYRAMID,
    TEXT_POSITIONS,
    TEXT_PROJECTION,
)


def to_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The detector's part of `sam3.pt` that `from_meta` turns into `tensors`, all of whose names it uses."""
    left = dict(tensors)
    positions = left.pop("vision_encoder.backbone.embeddings.position_embeddings")
    made = {
        POSITIONS: torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1),
        TEXT_POSITIONS: left.pop("text_encoder.text_model.embeddings.position_embedding.weight"),
        TEXT_PROJECTION: left.pop("text_encoder.text_projection.weight").T.contiguous(),
    }
    for name in list(left):
        for theirs, ours in FUSED.items():
            match = re.fullmatch(_pattern(ours) + r"\.q_proj\.(?P<kind>weight|bias)", name)
            if match:
                parts = [left.pop(name.replace("q_proj", part)) for part in PROJECTIONS]
                made[theirs.replace("*", match[1]) + match["kind"]] = torch.cat(parts)
    for name in list(left):
        stem, _, kind = name.rpartition(".")
        made[f"{_theirs(stem, MODULES)}.{kind}"] = left.pop(name)
    return {f"detector.{name}": tensor for name, tensor in made.items()}


def clicks_to_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of `sam3.pt` that `clicks_from_meta` turns into `tensors`, all of whose names it uses."""
    left = dict(tensors)
    made = {
        CLICK_POSITIONS: left.pop("prompt_encoder.shared_embedding.positional_embedding"),
        NO_MEMORY: left.pop("no_memory_embedding"),
        **dict(zip(POINT_KINDS, left.pop("prompt_encoder.point_embed.weight").split(1), strict=True)),
    }
    for name, tensor in left.items():
        stem, _, kind = name.rpartition(".")
        made[f"{_theirs(stem, CLICK_MODULES)}.{kind}"] = tensor
    return made


def _theirs(stem: str, modules: Mapping[str, str]) -> str:
    if stem == "vision_encoder.neck.fpn_layers.1.scale_layers.0":  # only the finest level is scaled up twice
        return "backbone.vision_backbone.convs.1.dconv_2x2"
    if stem == "neck.fpn_layers.1.scale_layers.0":
        return f"{PYRAMID}1.dconv_2x2"
    for theirs, ours in modules.items():
        match = re.fullmatch(_pattern(ours), stem)
        if match:
            return theirs.replace("*", match[1]) if "*" in theirs else theirs
    raise KeyError(stem)


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\*", r"(\d+)")
