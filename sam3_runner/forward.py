"""SAM3's forward pass, in the three parts that the runner and the training need apart: image, text, decoding.

`Sam3Model.forward` does all three at once, makes the masks of all queries and returns the last decoder layer
alone. A test holds `decode` equal to it.

Two things are as in Meta's code and not as in `Sam3Model.forward`. A prompt without boxes still ends in the geometry
encoder's class token, which has looked at the image: SAM3 was trained with it, transformers leaves it out. Without
boxes it depends on the image alone, so it is made once an image. And what lies in a box is pooled in float32, whatever
else is computed in: transformers rounds the box's edges to half precision where features are bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Sam3Model

BOX_EPS = 1e-3  # as `inverse_sigmoid` of SAM3: keeps the logit of a box at the border finite


@dataclass(frozen=True)
class ImageFeatures:
    """Encoded images, or image halves of (image, prompt) pairs.

    Attributes:
        levels: (B, C, H_i, W_i) each, fine to coarse; the last one is what the DETR encoder reads.
        position: (1, C, H, W), the position encoding of the last level, the same for every image.
        geometry: (B, 1, C), what the geometry encoder says of an image with no boxes marked on it.
    """

    levels: tuple[Tensor, ...]
    position: Tensor
    geometry: Tensor

    def select(self, index: Tensor) -> ImageFeatures:
        """The features of chosen images, one for each entry of `index` (B,)."""
        return ImageFeatures(
            tuple(level[index] for level in self.levels), self.position, self.geometry[index]
        )

    def repeat_each(self, times: int) -> ImageFeatures:
        """(I, …) -> (I·times, …), by expansion: its gradient is a sum, an index's is a slow scatter."""

        def repeat(rows: Tensor) -> Tensor:
            return rows[:, None].expand(-1, times, *rows.shape[1:]).flatten(0, 1)

        return ImageFeatures(tuple(map(repeat, self.levels)), self.position, repeat(self.geometry))


@dataclass(frozen=True)
class TextFeatures:
    """Encoded prompts: `tokens` (B, T, C), and `is_token` (B, T) bool, False where a token is padding."""

    tokens: Tensor
    is_token: Tensor

    def select(self, index: Tensor) -> TextFeatures:
        """The features of chosen prompts, one for each entry of `index` (B,)."""
        return TextFeatures(self.tokens[index], self.is_token[index])

    @property
    def nbytes(self) -> int:
        """Memory of both tensors."""
        return self.tokens.nbytes + self.is_token.nbytes

    def split(self) -> list[TextFeatures]:
        """The prompts one by one, each in memory of its own."""
        return [
            TextFeatures(self.tokens[row : row + 1].clone(), self.is_token[row : row + 1].clone())
            for row in range(len(self.tokens))
        ]

    @classmethod
    def join(cls, texts: Sequence[TextFeatures]) -> TextFeatures:
        """Several as one."""
        return cls(torch.cat([text.tokens for text in texts]), torch.cat([text.is_token for text in texts]))

    def append(self, tokens: Tensor, is_token: Tensor | None = None) -> TextFeatures:
        """With `tokens` (B, K, C) behind those there are; `is_token` (B, K) if some of them are padding."""
        if is_token is None:
            is_token = self.is_token.new_ones(tokens.shape[:2])
        return TextFeatures(
            torch.cat([self.tokens, tokens], dim=1), torch.cat([self.is_token, is_token], dim=1)
        )


@dataclass(frozen=True)
class LayerOutputs:
    """What the model says after each of its L decoder layers, for B (image, prompt) pairs and N queries.

    Attributes:
        logits: (L, B, N) float32 class logits.
        boxes_cxcywh: (L, B, N, 4) float32 in [0, 1] of the image's width and height.
        presence_logits: (L, B) float32.
        mask_embeddings: (L, B, N, C), to be multiplied with `pixel_embeddings`.
        pixel_embeddings: (D, C, h, w), of all B pairs or of those drawn. Mask logits of query n are the inner
            product over C.
        semantic_logits: (D, h, w), "does this pixel belong to what the prompt names", or None if no pairs were
            named to be drawn: training learns from it, the runner has no use for it.
        drawn: (D,) the pairs that were drawn, or None for all.
    """

    logits: Tensor
    boxes_cxcywh: Tensor
    presence_logits: Tensor
    mask_embeddings: Tensor
    pixel_embeddings: Tensor
    semantic_logits: Tensor | None
    drawn: Tensor | None


def encode_image(model: Sam3Model, pixel_values: Tensor) -> ImageFeatures:
    """Encode I images.

    Args:
        model: Its vision encoder is used.
        pixel_values: (I, 3, S, S), normalised to [-1, 1].
    """
    vision = model.vision_encoder(pixel_values)
    # The last, coarsest level is made by the model's neck but not used by its detector.
    levels, position = vision.fpn_hidden_states[:-1], vision.fpn_position_encoding[-2][:1]
    class_token = model.geometry_encoder.cls_embed.weight.expand(len(pixel_values), 1, -1)
    return ImageFeatures(
        levels, position, _look_at_image(model, levels[-1], position, class_token, is_token=None)
    )


def encode_boxes(
    model: Sam3Model, image: ImageFeatures, boxes_cxcywh: Tensor, is_positive: Tensor, is_box: Tensor
) -> TextFeatures:
    """What the geometry encoder says of boxes marked on B images, for `decode` in place of what it says of none.

    Args:
        model: Its geometry encoder is used.
        image: B images, pair b being row b of all that is given.
        boxes_cxcywh: (B, K, 4) float32, centre and size in [0, 1] of the image's width and height.
        is_positive: (B, K), 1 or True for "like this one".
        is_box: (B, K) bool, False where a box is padding; wherever it stands, and all of a row may be.
    Returns:
        K + 1 tokens each, the class token last. It is never padding, and alone it is `image.geometry`.
    """
    encoder, level = model.geometry_encoder, image.levels[-1]
    normal = encoder.vision_layer_norm(level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    marked, _ = encoder._encode_boxes(boxes_cxcywh.float(), is_box, is_positive, normal.float())
    class_token = encoder.cls_embed.weight.expand(len(marked), 1, -1)
    is_token = torch.cat([is_box, is_box.new_ones(len(is_box), 1)], dim=1)
    tokens = torch.cat([marked, class_token.type_as(marked)], dim=1)
    return TextFeatures(_look_at_image(model, level, image.position, tokens, is_token), is_token)


def _look_at_image(
    model: Sam3Model, level: Tensor, position: Tensor, tokens: Tensor, is_token: Tensor | None
) -> Tensor:
    """Tokens (B, K, C) through the geometry encoder's layers.

    They see each other, where `is_token` (B, K) if given, and the image: (B, C, H, W) features, position encoding.
    """
    encoder = model.geometry_encoder
    pixels, positions = (part.flatten(2).transpose(1, 2) for part in (level, position))  # (·, H·W, C)
    mask = None if is_token is None else is_token[:, None, None, :]  # over heads and queries
    tokens = encoder.prompt_layer_norm(encoder.final_proj(tokens))
    for layer in encoder.layers:
        tokens = layer(
            prompt_feats=tokens, vision_feats=pixels, vision_pos_encoding=positions, prompt_mask=mask
        )
    encoded: Tensor = encoder.output_layer_norm(tokens)
    return encoded


def encode_text(model: Sam3Model, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
    """Encode B prompts.

    Args:
        model: Its text encoder is used.
        input_ids: (B, T) tokens.
        attention_mask: (B, T), 1 where the detector may read a token. The text encoder itself, as Meta's, looks back
            at all tokens: padding comes last, where no other token sees it.
    """
    encoded = model.get_text_features(input_ids=input_ids)
    return TextFeatures(encoded.pooler_output, attention_mask.bool())


def decode(
    model: Sam3Model,
    image: ImageFeatures,
    text: TextFeatures,
    *,
    boxes: TextFeatures | None = None,
    drawn: Tensor | None = None,
) -> LayerOutputs:
    """Answer B (image, prompt) pairs: `image` and `text` hold B of each, pair b being row b of both.

    Args:
        model: All but its encoders is used.
        image: B images.
        text: B prompts.
        boxes: Of B pairs, as `encode_boxes` made them; None: no pair has any.
        drawn: (D,) for training: the pairs whose pixels are decoded, the semantic head's among them.
    """
    text = text.append(image.geometry) if boxes is None else text.append(boxes.tokens, boxes.is_token)
    finest_read = image.levels[-1]
    encoded = model.detr_encoder(
        vision_features=[finest_read],
        text_features=text.tokens,
        vision_pos_embeds=[image.position.expand(len(finest_read), -1, -1, -1)],
        text_mask=text.is_token,
    )
    decoded = model.detr_decoder(
        vision_features=encoded.last_hidden_state,
        text_features=encoded.text_features,
        vision_pos_encoding=encoded.pos_embeds_flattened,
        text_mask=text.is_token,
        spatial_shapes=encoded.spatial_shapes,
    )
    queries = decoded.intermediate_hidden_states  # (L, B, N, C)
    offsets = model.detr_decoder.box_head(queries)
    found = (torch.logit(decoded.reference_boxes.float(), eps=BOX_EPS) + offsets.float()).sigmoid()
    logits = model.dot_product_scoring(
        decoder_hidden_states=queries, text_features=encoded.text_features, text_mask=text.is_token
    )
    hidden = encoded.last_hidden_state
    if drawn is not None:
        image, text, hidden = image.select(drawn), text.select(drawn), hidden[drawn]
    pixels = _decode_pixels(model, image, text, hidden)
    head = model.mask_decoder
    return LayerOutputs(
        logits=logits.squeeze(-1).float(),
        boxes_cxcywh=found,
        presence_logits=decoded.presence_logits.squeeze(-1).float(),
        mask_embeddings=head.mask_embedder(queries),
        pixel_embeddings=head.instance_projection(pixels),
        semantic_logits=None if drawn is None else head.semantic_projection(pixels)[:, 0],
        drawn=drawn,
    )


def _decode_pixels(model: Sam3Model, image: ImageFeatures, text: TextFeatures, encoded: Tensor) -> Tensor:
    """(B, C, h, w) features at the finest level, as the mask decoder makes them."""
    decoder = model.mask_decoder
    attended, _ = decoder.prompt_cross_attn(
        query=decoder.prompt_cross_attn_norm(encoded),
        key=text.tokens,
        value=text.tokens,
        attention_mask=text.is_token[:, None, None, :],  # (B, T) -> (B, 1, 1, T), over heads and pixels
    )
    pixels: Tensor = decoder._embed_pixels(list(image.levels), encoded + attended)
    return pixels
