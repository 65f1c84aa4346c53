"""Attention as three matrix operations, for training in bfloat16 on a CPU.

PyTorch's fused attention saves memory, but for the demo's short sequences on a CPU its backward pass costs 2 to 5
times as much as the plain one in bfloat16 (shapes of 100 to 400 tokens, heads of 32: 35 to 70 ms against 6 to 39).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Sam3Model
from transformers.masking_utils import sdpa_mask

NAME = "sam3_runner_plain"


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(q·kᵀ·scaling + mask)·v.

    Args:
        module: Not used; part of the interface of transformers.
        query: (B, H, Q, D).
        key: (B, H, K, D).
        value: (B, H, K, D).
        attention_mask: Broadcasts to (B, H, Q, K): bool, where False hides a key, or a bias to add.
        scaling: D ** -0.5 if not given.
        is_causal: Without a mask: hide from every query the keys behind it.
    Returns:
        (B, Q, H, D), and None in place of the weights.
    """
    scores = (query * (scaling or query.shape[-1] ** -0.5)) @ key.transpose(-1, -2)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    elif is_causal:
        behind = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(behind, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def use_plain_attention(model: Sam3Model) -> None:
    """Let every attention of `model` go through `plain_attention`."""
    AttentionInterface.register(NAME, plain_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    # `model.set_attn_implementation` warns of parts that share their configuration with no model of their own.
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = NAME
