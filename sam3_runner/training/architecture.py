"""The demo checkpoint's dimensions: SAM3's own architecture, made small enough to train on a CPU."""

from __future__ import annotations

import torch
from transformers import CLIPTokenizer, Sam3Config, Sam3Model

IMAGE_SIZE_PX = 240
PATCH_SIZE_PX = 12  # 20×20 patches; masks come out at 4 × that, 80×80
MAX_TEXT_TOKENS = 32  # as in the full model
HIDDEN = 64
NUM_QUERIES = 24  # scenes hold at most 8 objects; spare queries speed up the matching


def demo_config(tokenizer: CLIPTokenizer) -> Sam3Config:
    """The configuration of the demo model.

    Args:
        tokenizer: Its vocabulary size and special tokens go into the text encoder's configuration.
    """
    grid = IMAGE_SIZE_PX // PATCH_SIZE_PX
    detr = {
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "intermediate_size": 4 * HIDDEN,
        "dropout": 0.0,
    }
    return Sam3Config(
        vision_config={
            "fpn_hidden_size": HIDDEN,
            "backbone_feature_sizes": [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2],
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "image_size": IMAGE_SIZE_PX,
                "pretrain_image_size": IMAGE_SIZE_PX,
                "patch_size": PATCH_SIZE_PX,
                "window_size": 10,
                "global_attn_indexes": [2, 5],
            },
        },
        text_config=_text_config(tokenizer),
        geometry_encoder_config={**detr, "num_layers": 1, "roi_size": 3},
        detr_encoder_config={**detr, "num_layers": 2},
        detr_decoder_config={**detr, "num_layers": 4, "num_queries": NUM_QUERIES},
        mask_decoder_config={
            "hidden_size": HIDDEN,
            "num_attention_heads": 2,
            "num_upsampling_stages": 3,
        },
    )


def _text_config(tokenizer: CLIPTokenizer) -> dict[str, str | int | None]:
    return {
        "model_type": "clip_text_model",
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 288,
        "projection_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TEXT_TOKENS,
        "hidden_act": "gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_demo_model(tokenizer: CLIPTokenizer) -> Sam3Model:
    """A demo-sized SAM3 with weights drawn from torch's global generator (seed it first).

    The initial boxes are spread over the image, as DAB-DETR (Liu et al., 2022) does: from SAM3's own
    initialisation all start as one box in the middle, and small models take long to pull them apart.
    """
    model = Sam3Model(demo_config(tokenizer))
    centres = torch.rand(NUM_QUERIES, 2)
    sizes = torch.full((NUM_QUERIES, 2), 0.2)
    decoder = model.detr_decoder
    with torch.no_grad():
        decoder.reference_points.weight.copy_(torch.logit(torch.cat([centres, sizes], dim=1), eps=0.05))
        decoder.box_head.layer3.weight.zero_()
        decoder.box_head.layer3.bias.zero_()
    return model
