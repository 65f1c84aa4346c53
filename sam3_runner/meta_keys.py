"""The names of Meta's `sam3.pt`, and what they are called in transformers' `Sam3Model` and in our `ClickModel`.

`sam3.pt` is the state of Meta's video model: `detector.*`, the image model that we run, and `tracker.*`, of which we
run what answers clicks. The two packages cut the same network into modules of other names; Meta fuses the three input
projections of an attention in the detector. Read from Meta's package `sam3` 0.1.4 and transformers 5.23; the parity
test builds both and compares every name and shape, both ways.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

DETECTOR = "detector."
TRACKER = "tracker."
VISION_LAYER_NORM_EPS = 1e-5  # transformers' own configuration says 1e-6

# Their module: ours. A `*` stands for a layer's number, the same on both sides.
MODULES = {
    # vision encoder
    "backbone.vision_backbone.trunk.patch_embed.proj": "vision_encoder.backbone.embeddings.patch_embeddings.projection",
    "backbone.vision_backbone.trunk.ln_pre": "vision_encoder.backbone.layer_norm",
    "backbone.vision_backbone.trunk.blocks.*.norm1": "vision_encoder.backbone.layers.*.layer_norm1",
    "backbone.vision_backbone.trunk.blocks.*.attn.proj": "vision_encoder.backbone.layers.*.attention.o_proj",
    "backbone.vision_backbone.trunk.blocks.*.norm2": "vision_encoder.backbone.layers.*.layer_norm2",
    "backbone.vision_backbone.trunk.blocks.*.mlp.fc1": "vision_encoder.backbone.layers.*.mlp.fc1",
    "backbone.vision_backbone.trunk.blocks.*.mlp.fc2": "vision_encoder.backbone.layers.*.mlp.fc2",
    # its feature pyramid
    "backbone.vision_backbone.convs.*.dconv_2x2_0": "vision_encoder.neck.fpn_layers.*.scale_layers.0",
    "backbone.vision_backbone.convs.*.dconv_2x2_1": "vision_encoder.neck.fpn_layers.*.scale_layers.2",
    "backbone.vision_backbone.convs.*.dconv_2x2": "vision_encoder.neck.fpn_layers.*.scale_layers.0",
    "backbone.vision_backbone.convs.*.conv_1x1": "vision_encoder.neck.fpn_layers.*.proj1",
    "backbone.vision_backbone.convs.*.conv_3x3": "vision_encoder.neck.fpn_layers.*.proj2",
    # text encoder
    "backbone.language_backbone.encoder.token_embedding": "text_encoder.text_model.embeddings.token_embedding",
    "backbone.language_backbone.encoder.transformer.resblocks.*.ln_1": (
        "text_encoder.text_model.encoder.layers.*.layer_norm1"
    ),
    "backbone.language_backbone.encoder.transformer.resblocks.*.attn.out_proj": (
        "text_encoder.text_model.encoder.layers.*.self_attn.out_proj"
    ),
    "backbone.language_backbone.encoder.transformer.resblocks.*.ln_2": (
        "text_encoder.text_model.encoder.layers.*.layer_norm2"
    ),
    "backbone.language_backbone.encoder.transformer.resblocks.*.mlp.c_fc": (
        "text_encoder.text_model.encoder.layers.*.mlp.fc1"
    ),
    "backbone.language_backbone.encoder.transformer.resblocks.*.mlp.c_proj": (
        "text_encoder.text_model.encoder.layers.*.mlp.fc2"
    ),
    "backbone.language_backbone.encoder.ln_final": "text_encoder.text_model.final_layer_norm",
    "backbone.language_backbone.resizer": "text_projection",
    # geometry encoder
    "geometry_encoder.label_embed": "geometry_encoder.label_embed",
    "geometry_encoder.cls_embed": "geometry_encoder.cls_embed",
    "geometry_encoder.boxes_direct_project": "geometry_encoder.boxes_direct_project",
    "geometry_encoder.boxes_pool_project": "geometry_encoder.boxes_pool_project",
    "geometry_encoder.boxes_pos_enc_project": "geometry_encoder.boxes_pos_enc_project",
    "geometry_encoder.final_proj": "geometry_encoder.final_proj",
    "geometry_encoder.norm": "geometry_encoder.prompt_layer_norm",
    "geometry_encoder.img_pre_norm": "geometry_encoder.vision_layer_norm",
    "geometry_encoder.encode.*.norm1": "geometry_encoder.layers.*.layer_norm1",
    "geometry_encoder.encode.*.self_attn.out_proj": "geometry_encoder.layers.*.self_attn.o_proj",
    "geometry_encoder.encode.*.norm2": "geometry_encoder.layers.*.layer_norm2",
    "geometry_encoder.encode.*.cross_attn_image.out_proj": "geometry_encoder.layers.*.cross_attn.o_proj",
    "geometry_encoder.encode.*.norm3": "geometry_encoder.layers.*.layer_norm3",
    "geometry_encoder.encode.*.linear1": "geometry_encoder.layers.*.mlp.fc1",
    "geometry_encoder.encode.*.linear2": "geometry_encoder.layers.*.mlp.fc2",
    "geometry_encoder.encode_norm": "geometry_encoder.output_layer_norm",
    # DETR encoder
    "transformer.encoder.layers.*.norm1": "detr_encoder.layers.*.layer_norm1",
    "transformer.encoder.layers.*.self_attn.out_proj": "detr_encoder.layers.*.self_attn.o_proj",
    "transformer.encoder.layers.*.norm2": "detr_encoder.layers.*.layer_norm2",
    "transformer.encoder.layers.*.cross_attn_image.out_proj": "detr_encoder.layers.*.cross_attn.o_proj",
    "transformer.encoder.layers.*.norm3": "detr_encoder.layers.*.layer_norm3",
    "transformer.encoder.layers.*.linear1": "detr_encoder.layers.*.mlp.fc1",
    "transformer.encoder.layers.*.linear2": "detr_encoder.layers.*.mlp.fc2",
    # DETR decoder
    "transformer.decoder.query_embed": "detr_decoder.query_embed",
    "transformer.decoder.reference_points": "detr_decoder.reference_points",
    "transformer.decoder.layers.*.self_attn.out_proj": "detr_decoder.layers.*.self_attn.o_proj",
    "transformer.decoder.layers.*.norm2": "detr_decoder.layers.*.self_attn_layer_norm",
    "transformer.decoder.layers.*.ca_text.out_proj": "detr_decoder.layers.*.text_cross_attn.o_proj",
    "transformer.decoder.layers.*.catext_norm": "detr_decoder.layers.*.text_cross_attn_layer_norm",
    "transformer.decoder.layers.*.cross_attn.out_proj": "detr_decoder.layers.*.vision_cross_attn.o_proj",
    "transformer.decoder.layers.*.norm1": "detr_decoder.layers.*.vision_cross_attn_layer_norm",
    "transformer.decoder.layers.*.linear1": "detr_decoder.layers.*.mlp.fc1",
    "transformer.decoder.layers.*.linear2": "detr_decoder.layers.*.mlp.fc2",
    "transformer.decoder.layers.*.norm3": "detr_decoder.layers.*.mlp_layer_norm",
    "transformer.decoder.norm": "detr_decoder.output_layer_norm",
    "transformer.decoder.bbox_embed.layers.0": "detr_decoder.box_head.layer1",
    "transformer.decoder.bbox_embed.layers.1": "detr_decoder.box_head.layer2",
    "transformer.decoder.bbox_embed.layers.2": "detr_decoder.box_head.layer3",
    "transformer.decoder.ref_point_head.layers.0": "detr_decoder.ref_point_head.layer1",
    "transformer.decoder.ref_point_head.layers.1": "detr_decoder.ref_point_head.layer2",
    "transformer.decoder.boxRPB_embed_x.layers.0": "detr_decoder.box_rpb_embed_x.layer1",
    "transformer.decoder.boxRPB_embed_x.layers.1": "detr_decoder.box_rpb_embed_x.layer2",
    "transformer.decoder.boxRPB_embed_y.layers.0": "detr_decoder.box_rpb_embed_y.layer1",
    "transformer.decoder.boxRPB_embed_y.layers.1": "detr_decoder.box_rpb_embed_y.layer2",
    "transformer.decoder.presence_token": "detr_decoder.presence_token",
    "transformer.decoder.presence_token_head.layers.0": "detr_decoder.presence_head.layer1",
    "transformer.decoder.presence_token_head.layers.1": "detr_decoder.presence_head.layer2",
    "transformer.decoder.presence_token_head.layers.2": "detr_decoder.presence_head.layer3",
    "transformer.decoder.presence_token_out_norm": "detr_decoder.presence_layer_norm",
    # scores
    "dot_prod_scoring.prompt_mlp.layers.0": "dot_product_scoring.text_mlp.layer1",
    "dot_prod_scoring.prompt_mlp.layers.1": "dot_product_scoring.text_mlp.layer2",
    "dot_prod_scoring.prompt_mlp.out_norm": "dot_product_scoring.text_mlp_out_norm",
    "dot_prod_scoring.prompt_proj": "dot_product_scoring.text_proj",
    "dot_prod_scoring.hs_proj": "dot_product_scoring.query_proj",
    # masks
    "segmentation_head.cross_attend_prompt.out_proj": "mask_decoder.prompt_cross_attn.o_proj",
    "segmentation_head.cross_attn_norm": "mask_decoder.prompt_cross_attn_norm",
    "segmentation_head.pixel_decoder.conv_layers.*": "mask_decoder.pixel_decoder.conv_layers.*",
    "segmentation_head.pixel_decoder.norms.*": "mask_decoder.pixel_decoder.norms.*",
    "segmentation_head.mask_predictor.mask_embed.layers.*": "mask_decoder.mask_embedder.layers.*",
    "segmentation_head.instance_seg_head": "mask_decoder.instance_projection",
    "segmentation_head.semantic_seg_head": "mask_decoder.semantic_projection",
}

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# Their tensor, whose rows are those of the three projections: our attention. `weight` or `bias` follows.
FUSED = {
    "backbone.vision_backbone.trunk.blocks.*.attn.qkv.": "vision_encoder.backbone.layers.*.attention",
    "backbone.language_backbone.encoder.transformer.resblocks.*.attn.in_proj_": (
        "text_encoder.text_model.encoder.layers.*.self_attn"
    ),
    "geometry_encoder.encode.*.self_attn.in_proj_": "geometry_encoder.layers.*.self_attn",
    "geometry_encoder.encode.*.cross_attn_image.in_proj_": "geometry_encoder.layers.*.cross_attn",
    "transformer.encoder.layers.*.self_attn.in_proj_": "detr_encoder.layers.*.self_attn",
    "transformer.encoder.layers.*.cross_attn_image.in_proj_": "detr_encoder.layers.*.cross_attn",
    "transformer.decoder.layers.*.self_attn.in_proj_": "detr_decoder.layers.*.self_attn",
    "transformer.decoder.layers.*.ca_text.in_proj_": "detr_decoder.layers.*.text_cross_attn",
    "transformer.decoder.layers.*.cross_attn.in_proj_": "detr_decoder.layers.*.vision_cross_attn",
    "segmentation_head.cross_attend_prompt.in_proj_": "mask_decoder.prompt_cross_attn",
}

# The three that are neither a module's `weight` nor its `bias` there.
POSITIONS = "backbone.vision_backbone.trunk.pos_embed"  # (1, 1 + N, C): a class token's position comes first
TEXT_POSITIONS = "backbone.language_backbone.encoder.positional_embedding"  # (T, C)
TEXT_PROJECTION = "backbone.language_backbone.encoder.text_projection"  # (C, D), multiplied from the right

# What `sam3.pt` holds of the detector and `Sam3Model` has no place for, and why nothing is lost by leaving it out.
# `**` stands for the rest of a name.
DROPPED = {
    "backbone.vision_backbone.trunk.blocks.*.attn.freqs_cis": "rotary table: computed from the configuration",
    "backbone.vision_backbone.sam2_convs.**": "feature pyramid of the tracker: see CLICK_MODULES",
    "geometry_encoder.points_direct_project.**": "point prompts: Meta's detector ignores them too, its tracker answers",
    "geometry_encoder.points_pool_project.**": "point prompts",
    "geometry_encoder.points_pos_enc_project.**": "point prompts",
}

# Their module: ours, of what answers clicks: the tracker's pyramid, its prompt encoder and its mask decoder.
PYRAMID = "detector.backbone.vision_backbone.sam2_convs."
_CLICKS, _MASKS = "tracker.sam_prompt_encoder.", "tracker.sam_mask_decoder."
_TWO_WAY = "transformer.layers.*."
CLICK_MODULES = {
    f"{PYRAMID}*.dconv_2x2_0": "neck.fpn_layers.*.scale_layers.0",
    f"{PYRAMID}*.dconv_2x2_1": "neck.fpn_layers.*.scale_layers.2",
    f"{PYRAMID}*.dconv_2x2": "neck.fpn_layers.*.scale_layers.0",
    f"{PYRAMID}*.conv_1x1": "neck.fpn_layers.*.proj1",
    f"{PYRAMID}*.conv_3x3": "neck.fpn_layers.*.proj2",
    # prompt encoder
    f"{_CLICKS}not_a_point_embed": "prompt_encoder.not_a_point_embed",
    f"{_CLICKS}no_mask_embed": "prompt_encoder.no_mask_embed",
    f"{_CLICKS}mask_downscaling.0": "prompt_encoder.mask_embed.conv1",
    f"{_CLICKS}mask_downscaling.1": "prompt_encoder.mask_embed.layer_norm1",
    f"{_CLICKS}mask_downscaling.3": "prompt_encoder.mask_embed.conv2",
    f"{_CLICKS}mask_downscaling.4": "prompt_encoder.mask_embed.layer_norm2",
    f"{_CLICKS}mask_downscaling.6": "prompt_encoder.mask_embed.conv3",
    # mask decoder: its transformer, whose attentions keep their projections apart
    **{
        f"{_MASKS}{attention}.{theirs}": f"mask_decoder.{attention}.{ours}"
        for attention in (
            f"{_TWO_WAY}self_attn",
            f"{_TWO_WAY}cross_attn_token_to_image",
            f"{_TWO_WAY}cross_attn_image_to_token",
            "transformer.final_attn_token_to_image",
        )
        for theirs, ours in (*((name, name) for name in PROJECTIONS), ("out_proj", "o_proj"))
    },
    **{
        f"{_MASKS}{_TWO_WAY}norm{number}": f"mask_decoder.{_TWO_WAY}layer_norm{number}"
        for number in (1, 2, 3, 4)
    },
    f"{_MASKS}{_TWO_WAY}mlp.lin1": f"mask_decoder.{_TWO_WAY}mlp.proj_in",
    f"{_MASKS}{_TWO_WAY}mlp.lin2": f"mask_decoder.{_TWO_WAY}mlp.proj_out",
    f"{_MASKS}transformer.norm_final_attn": "mask_decoder.transformer.layer_norm_final_attn",
    # and what makes masks and scores of it
    f"{_MASKS}iou_token": "mask_decoder.iou_token",
    f"{_MASKS}mask_tokens": "mask_decoder.mask_tokens",
    f"{_MASKS}obj_score_token": "mask_decoder.obj_score_token",
    f"{_MASKS}output_upscaling.0": "mask_decoder.upscale_conv1",
    f"{_MASKS}output_upscaling.1": "mask_decoder.upscale_layer_norm",
    f"{_MASKS}output_upscaling.3": "mask_decoder.upscale_conv2",
    f"{_MASKS}conv_s0": "mask_decoder.conv_s0",
    f"{_MASKS}conv_s1": "mask_decoder.conv_s1",
    **{
        f"{_MASKS}{head}.layers.{number}": f"mask_decoder.{head}.{ours}"
        for head in ("output_hypernetworks_mlps.*", "iou_prediction_head", "pred_obj_score_head")
        for number, ours in enumerate(("proj_in", "layers.0", "proj_out"))
    },
}
# The three that are no module's `weight` nor `bias` there; of the points' kinds (beside, on, two corners) a row each.
CLICK_POSITIONS = f"{_CLICKS}pe_layer.positional_encoding_gaussian_matrix"
NO_MEMORY = "tracker.no_mem_embed"
POINT_KINDS = tuple(f"{_CLICKS}point_embeddings.{kind}.weight" for kind in range(4))

# What the tracker needs to follow an object through a video, and one image does not.
VIDEO_ONLY = {
    "tracker.maskmem_backbone.**": "memory encoder",
    "tracker.transformer.**": "memory attention",
    "tracker.maskmem_tpos_enc": "how long ago a memory is",
    "tracker.no_mem_pos_enc": "position of no memory: read by the memory attention",
    "tracker.mask_downsample.**": "a given mask, on its way to an object pointer",
    "tracker.obj_ptr_proj.**": "object pointers",
    "tracker.obj_ptr_tpos_proj.**": "how long ago an object pointer is",
    "tracker.no_obj_ptr": "the pointer to an object that is hidden",
    "tracker.no_obj_embed_spatial": "the memory of an object that is hidden",
}


def from_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the detector of `sam3.pt` to `Sam3Model`. Nothing is copied: fused tensors become views of their rows.

    Args:
        tensors: What the file holds, by its own names.
    Returns:
        By `Sam3Model`'s names. `tracker.*` and what `DROPPED` names are left out. What no table knows, and a tensor
        that cannot be cut as its name asks, keeps its own name, so that a strict loader reports it.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith(TRACKER):
            renamed.update(_renamed(name, tensor))
    return renamed


def clicks_from_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename what answers clicks to `ClickModel`. Nothing is copied but the four rows of the kinds of points.

    Args:
        tensors: What the file holds, by its own names.
    Returns:
        By `ClickModel`'s names. The detector, and what `VIDEO_ONLY` names, are left out; the rest as `from_meta`.
    """
    left = {name: tensor for name, tensor in tensors.items() if name.startswith((TRACKER, PYRAMID))}
    renamed = {}
    rows = [left[name] for name in POINT_KINDS if name in left]
    if len(rows) == len(POINT_KINDS) and {(row.ndim, row.shape) for row in rows} == {(2, rows[0].shape)}:
        renamed["prompt_encoder.point_embed.weight"] = torch.cat(rows)
        left = {name: tensor for name, tensor in left.items() if name not in POINT_KINDS}
    for name, tensor in left.items():
        if not any(pattern.fullmatch(name) for pattern in _VIDEO_ONLY):
            renamed[_click_name(name)] = tensor
    return renamed


def _click_name(theirs: str) -> str:
    if theirs == CLICK_POSITIONS:
        return "prompt_encoder.shared_embedding.positional_embedding"
    if theirs == NO_MEMORY:
        return "no_memory_embedding"
    return _of_module(theirs, _CLICK_MODULES) or theirs


def _of_module(theirs: str, modules: Iterable[tuple[re.Pattern[str], str]]) -> str | None:
    """Our name of a module's weight or bias; None if the table does not know it."""
    stem, _, kind = theirs.rpartition(".")
    for pattern, ours in modules:
        if kind in ("weight", "bias") and (match := pattern.fullmatch(stem)):
            return f"{_numbered(ours, match)}.{kind}"
    return None


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    theirs = name.removeprefix(DETECTOR)
    if theirs == name:
        return {name: tensor}  # of neither part
    if any(pattern.fullmatch(theirs) for pattern in _DROPPED):
        return {}
    if theirs == POSITIONS and tensor.ndim == 3:
        return {"vision_encoder.backbone.embeddings.position_embeddings": tensor[:, 1:]}
    if theirs == TEXT_POSITIONS:
        return {"text_encoder.text_model.embeddings.position_embedding.weight": tensor}
    if theirs == TEXT_PROJECTION and tensor.ndim == 2:
        return {"text_encoder.text_projection.weight": tensor.T}
    if ours_of_module := _of_module(theirs, _MODULES):
        return {ours_of_module: tensor}
    for pattern, ours in _FUSED:
        if (match := pattern.fullmatch(theirs)) and tensor.ndim and len(tensor) % 3 == 0:
            attention, kind = _numbered(ours, match), match["kind"]
            thirds = tensor.chunk(3)  # (3·C, …) -> 3 of (C, …)
            return {
                f"{attention}.{part}.{kind}": rows for part, rows in zip(PROJECTIONS, thirds, strict=True)
            }
    return {name: tensor}


def _pattern(theirs: str, ending: str = "") -> re.Pattern[str]:
    return re.compile(re.escape(theirs).replace(r"\*\*", ".+").replace(r"\*", r"(\d+)") + ending)


def _numbered(ours: str, match: re.Match[str]) -> str:
    """With the layer's number, which the two have in common."""
    return ours.replace("*", match[1]) if "*" in ours else ours


_MODULES = [(_pattern(theirs), ours) for theirs, ours in MODULES.items()]
_FUSED = [(_pattern(theirs, "(?P<kind>weight|bias)"), ours) for theirs, ours in FUSED.items()]
_DROPPED = [_pattern(theirs) for theirs in DROPPED]
_CLICK_MODULES = [(_pattern(theirs), ours) for theirs, ours in CLICK_MODULES.items()]
_VIDEO_ONLY = [_pattern(theirs) for theirs in VIDEO_ONLY]
