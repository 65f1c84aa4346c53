"""SAM3's layers, prepared for inference: the same function of the same weights as transformers' modules, for less.

What is done differently, and why it is the same function:

- Windowed attention cuts the image into windows, and everything else in the ViT looks at one patch at a time or at
  all of them in any order. So patches are put into window order once, at the start, and back once, at the end.
- Projections of one input are one matrix (q, k, v of an attention; k and v of all decoder layers, which all read the
  same memory). A position encoding is added before a projection; projecting it apart, once, is the same sum.
- Rotary pairs (0, 1), (2, 3), … become (0, d/2), (1, d/2 + 1), …: rows of both projections are reordered alike, so
  every inner product of a query with a key stays.
- Two linear maps with nothing between them are one: transposed convolution and 1×1 convolution in the neck.
- A 3×3 convolution over (twice upsampled x) + y is one over x, with its taps summed where upsampling made equal
  neighbours, plus one over y. y does not know the prompt, so its part is done once an image.

Layouts: tokens (B, T, C); images channels last, (B, H, W, C).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.sam3 import modeling_sam3 as reference

Activation = Callable[[Tensor], Tensor]
BOX_EPS = 1e-3  # as `inverse_sigmoid` of SAM3: keeps the logit of a box at the border finite
RPB_SCALE = (
    8.0  # box-relative positions are log2(|8·d| + 1) / log2(8), signed (SAM 3's decoder, boxRPB="log")
)


class Weights:
    """Where prepared tensors lie and in what they compute.

    Args:
        device: Of all of them.
        dtype: Of matrices; what is small and decides (scores, boxes) stays float32.
        is_float8: Multiply matrices in float8, into `dtype`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, is_float8: bool = False) -> None:
        self.device = device
        self.dtype = dtype
        self.is_float8 = is_float8

    def exact(self, tensor: Tensor | None) -> Tensor:
        """On the device, in float32. None is what the type of a module's bias allows, and none of SAM3's is."""
        assert tensor is not None
        return tensor.detach().to(self.device).float()

    def compact(self, tensor: Tensor | None) -> Tensor:
        """On the device, in the dtype that is computed in; converted there, where it is fastest."""
        assert tensor is not None
        return tensor.detach().to(self.device).to(self.dtype)

    def linear(self, *parts: nn.Linear, rows: Tensor | None = None) -> nn.Module:
        """One matrix for all `parts`, which read the same input; its rows in the order of `rows`, if given."""
        weight, bias = (
            # A single part is kept as it is: in the file that it is mapped from, if it is.
            torch.cat([self.exact(tensor) for tensor in tensors]) if len(tensors) > 1 else tensors[0].detach()
            for tensors in ([part.weight for part in parts], [part.bias for part in parts])
        )
        if rows is not None:
            weight, bias = weight[rows.to(weight.device)], bias[rows.to(bias.device)]
        if self.is_float8:
            return Float8Linear(self.exact(weight), self.compact(bias))
        return Linear(self.compact(weight), self.compact(bias))

    def norm(self, source: nn.LayerNorm) -> LayerNorm:
        """A layer normalisation."""
        return LayerNorm(self.compact(source.weight), self.compact(source.bias), source.eps)

    def head(self, source: nn.Module) -> nn.Module:
        """A small module that decides, in float32 whatever its input is in."""
        return Head(source, self.device)


class Linear(nn.Module):
    """x·Wᵀ + b, of weight (O, C) and bias (O,)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, O)."""
        return F.linear(x, self.weight, self.bias)


class Float8Linear(nn.Module):
    """x·Wᵀ + b with both matrices in float8 (e4m3), each row scaled to use its whole range."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """Quantise `weight` (O, C) float32; `bias` (O,) bfloat16 is what the result is in."""
        super().__init__()
        rounded, scale = to_float8(weight)
        self.register_buffer("weight", rounded)
        self.register_buffer("scale", scale.T)  # (1, O)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, O)."""
        rounded, scale = to_float8(x.flatten(0, -2))
        product = torch._scaled_mm(
            rounded,
            self.weight.T,
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=self.bias.dtype,
            use_fast_accum=True,
        )
        shaped: Tensor = product.unflatten(0, x.shape[:-1])
        return shaped


def to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(T, C) -> the same in float8 and the factor (T, 1) float32 that each row was divided by."""
    limit = torch.finfo(torch.float8_e4m3fn).max  # 448
    scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / limit
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, C)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Head(nn.Module):
    """A module of the model's own, in float32."""

    def __init__(self, source: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.source = copy.deepcopy(source).to(device).float().eval()

    def forward(self, x: Tensor) -> Tensor:
        """Whatever the module makes of `x`, in float32."""
        result: Tensor = self.source(x.float())
        return result


class Mlp(nn.Module):
    """Two linear maps with an activation between."""

    def __init__(self, weights: Weights, first: nn.Linear, second: nn.Linear, activation: Activation) -> None:
        super().__init__()
        self.first = weights.linear(first)
        self.second = weights.linear(second)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, C)."""
        hidden: Tensor = self.second(self.activation(self.first(x)))
        return hidden


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, C) -> (B, heads, T, C / heads), a view."""
    shaped: Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return shaped


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
) -> Tensor:
    """(B, T, C) each -> (B, T, C), each head by itself; `mask` (B, 1, 1, T) is False where a key is hidden."""
    queries, keys, values = (split_heads(part, heads) for part in (queries, keys, values))
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=is_causal)
    return merge_heads(mixed)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, T, D) -> (B, T, heads·D)."""
    return x.transpose(1, 2).flatten(2)


# --- image ---------------------------------------------------------------------------------------------------------


class ImageBackbone(nn.Module):
    """The ViT: pixels to one vector a patch.

    Args:
        weights: Where to and in what.
        source: The ViT of transformers.
    """

    embed: Tensor
    positions: Tensor
    cos: Tensor
    sin: Tensor
    window_cos: Tensor
    window_sin: Tensor

    def __init__(self, weights: Weights, source: reference.Sam3ViTModel) -> None:
        super().__init__()
        config = source.config
        self.patch_px: int = config.patch_size
        self.grid: int = config.image_size // config.patch_size
        self.window: int = config.window_size
        if self.grid % self.window:
            raise ValueError(f"a grid of {self.grid} patches cannot be cut into windows of {self.window}")
        self.dtype = weights.dtype
        embeddings = source.embeddings
        self.register_buffer(
            "embed", weights.compact(embeddings.patch_embeddings.projection.weight).flatten(1)
        )
        positions = embeddings._tile_position_embeddings(embeddings.position_embeddings, self.grid, self.grid)
        self.register_buffer("positions", self._to_windows(weights.compact(positions)[0]))
        self.norm = weights.norm(source.layer_norm)
        self.layers = nn.ModuleList(ImageLayer(weights, layer) for layer in source.layers)
        self.is_windowed = tuple(layer.window_size > 0 for layer in source.layers)
        self._register_rotations(weights, source)

    def _register_rotations(self, weights: Weights, source: reference.Sam3ViTModel) -> None:
        """Tables (T, d/2) for windows, and for the whole image in window order; each if a layer needs it."""
        for is_windowed, prefix in ((True, "window_"), (False, "")):
            cos = sin = torch.zeros(0)
            if is_windowed in self.is_windowed:
                layer = source.layers[self.is_windowed.index(is_windowed)]
                # (1, T, d) with every value twice, for the pair it turns -> (T, d/2)
                tables = layer.rotary_emb(layer.position_ids, layer.position_ids)
                cos, sin = (weights.exact(table[0, :, ::2]) for table in tables)
                if not is_windowed:
                    cos, sin = self._to_windows(cos), self._to_windows(sin)
            self.register_buffer(f"{prefix}cos", cos.contiguous())
            self.register_buffer(f"{prefix}sin", sin.contiguous())

    def _to_windows(self, tokens: Tensor) -> Tensor:
        """(grid·grid, C) row by row -> the same, window by window."""
        cuts = self.grid // self.window
        windows = tokens.unflatten(0, (cuts, self.window, cuts, self.window))
        shaped: Tensor = windows.transpose(1, 2).flatten(0, 3)
        return shaped

    def _from_windows(self, tokens: Tensor) -> Tensor:
        """(I, grid·grid, C) window by window -> (I, grid, grid, C)."""
        cuts = self.grid // self.window
        windows = tokens.unflatten(1, (cuts, cuts, self.window, self.window))  # (I, cy, cx, y, x, C)
        shaped: Tensor = windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return shaped

    def forward(self, pixels: Tensor) -> Tensor:
        """(I, S, S, 3) uint8 -> (I, grid, grid, C)."""
        x: Tensor = self.norm(self._embed(pixels))
        whole, window = (
            (len(pixels), self.grid**2),
            (-1, self.window**2),
        )  # images, tokens of each; or windows
        for layer, is_windowed in zip(self.layers, self.is_windowed, strict=True):
            tables = (self.window_cos, self.window_sin) if is_windowed else (self.cos, self.sin)
            x = layer(x.reshape(*(window if is_windowed else whole), x.shape[-1]), *tables)
        x = x.reshape(*whole, x.shape[-1])
        return self._from_windows(x)

    def _embed(self, pixels: Tensor) -> Tensor:
        """(I, S, S, 3) uint8 -> (I, T, C) in window order."""
        cuts, patch = self.grid // self.window, self.patch_px
        # (I, S, S, 3) -> (I, cy, y, py, cx, x, px, 3) -> (I, cy, cx, y, x, 3, py, px) -> (I, T, 3·p·p)
        parts = pixels.unflatten(2, (cuts, self.window, patch)).unflatten(1, (cuts, self.window, patch))
        patches = parts.permute(0, 1, 4, 2, 5, 7, 3, 6).flatten(5).flatten(1, 4)
        return F.linear(normalise(patches).to(self.dtype), self.embed) + self.positions


def normalise(pixels: Tensor) -> Tensor:
    """Bytes to float32 in [-1, 1]: mean and standard deviation 0.5, as SAM3's image processor has them."""
    return pixels.float() / 127.5 - 1


class ImageLayer(nn.Module):
    """One layer of the ViT, on tokens in window order."""

    def __init__(self, weights: Weights, source: reference.Sam3ViTLayer) -> None:
        super().__init__()
        attention = source.attention
        self.heads: int = attention.num_attention_heads
        self.norm1 = weights.norm(source.layer_norm1)
        rows = self._rows_in_rotary_order(len(attention.q_proj.bias))
        self.qkv = weights.linear(attention.q_proj, attention.k_proj, attention.v_proj, rows=rows)
        self.out = weights.linear(attention.o_proj)
        self.norm2 = weights.norm(source.layer_norm2)
        self.mlp = Mlp(weights, source.mlp.fc1, source.mlp.fc2, source.mlp.activation_fn)

    def _rows_in_rotary_order(self, channels: int) -> Tensor:
        """(3·C,) rows of q, k and v: of q's and k's, each head's even dimensions first, then its odd ones."""
        rows = torch.arange(3 * channels)
        pairs = rows[: 2 * channels].view(2 * self.heads, -1, 2)  # (heads of q and k, d/2, 2)
        return torch.cat([pairs.transpose(1, 2).flatten(), rows[2 * channels :]])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One layer.

        Args:
            x: (B, T, C), B windows or B whole images.
            cos: (T, d/2) float32, of the rotation by position.
            sin: Likewise.
        """
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, d) each
        attended = F.scaled_dot_product_attention(rotate(queries, cos, sin), rotate(keys, cos, sin), values)
        x = x + self.out(merge_heads(attended))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + d/2) of (…, T, d) by its angle at each position; cos and sin are (T, d/2)."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.type_as(x)


class Upsample2x(nn.Module):
    """A transposed convolution of kernel and stride 2, as the matrix it is."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weights: Weights, source: nn.ConvTranspose2d, then: nn.Conv2d | None = None) -> None:
        """Prepare `source`, followed by the 1×1 convolution `then` if there is one."""
        super().__init__()
        kernel, bias = weights.exact(source.weight), weights.exact(source.bias)  # (C, O, 2, 2)
        if then is not None:
            mix = weights.exact(then.weight)[:, :, 0, 0]  # (P, O)
            kernel = torch.einsum("coyx,po->cpyx", kernel, mix)
            bias = mix @ bias + weights.exact(then.bias)
        self.register_buffer(
            "weight", kernel.permute(2, 3, 1, 0).flatten(0, 2).to(weights.dtype)
        )  # (2·2·O, C)
        self.register_buffer("bias", bias.repeat(4).to(weights.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, 2H, 2W, O)."""
        quads = F.linear(x, self.weight, self.bias).unflatten(-1, (2, 2, -1))  # (B, H, W, 2, 2, O)
        shaped: Tensor = quads.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return shaped


class Conv3x3(nn.Module):
    """A 3×3 convolution with one pixel of zeros around, channels last."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weights: Weights, source: nn.Conv2d) -> None:
        super().__init__()
        kernel = weights.compact(source.weight)
        self.register_buffer("weight", kernel.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", weights.compact(source.bias))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, O)."""
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, padding=1).permute(0, 2, 3, 1)


class UpsampledConv3x3(nn.Module):
    """The 3×3 convolution of an image upsampled twice by repeating its pixels, without its bias.

    Of the nine taps over such an image, two fall on the same pixel along each axis. So each of the four output
    pixels over an input pixel is a 2×2 convolution of the small image: 4/9 of the work.
    """

    weight: Tensor

    def __init__(self, weights: Weights, source: nn.Conv2d) -> None:
        super().__init__()
        kernel = weights.exact(source.weight)  # (O, C, 3, 3)
        # Taps 0, 1, 2 of an even output pixel fall on inputs i - 1, i, i; of an odd one on i, i, i + 1.
        taps = kernel.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # (parity, 2, 3)
        phases = torch.einsum("ocyx,pay,qbx->pqocab", kernel, taps, taps)  # (2, 2, O, C, 2, 2)
        weight = phases.flatten(0, 2).to(weights.dtype)
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, 2H, 2W, O)."""
        height, width = x.shape[1:3]
        corners = F.conv2d(x.permute(0, 3, 1, 2), self.weight, padding=1)  # (B, 4·O, H + 1, W + 1)
        phases = corners.unflatten(1, (2, 2, -1))
        # Output pixel 2i + p reads inputs i - 1 + p and i + p: corner i + p.
        rows = [
            torch.stack([phases[:, p, q, :, p : p + height, q : q + width] for q in (0, 1)], dim=-1)
            for p in (0, 1)
        ]  # two of (B, O, H, W, 2)
        quads = torch.stack(rows, dim=3)  # (B, O, H, 2, W, 2)
        return quads.permute(0, 2, 3, 4, 5, 1).flatten(3, 4).flatten(1, 2)


class Neck(nn.Module):
    """One ViT level to the levels that the detector reads.

    The coarsest level that transformers and Meta's code make is read by nothing, and not made.
    """

    def __init__(self, weights: Weights, source: reference.Sam3VisionNeck) -> None:
        super().__init__()
        factors = source.config.scale_factors
        if list(factors) != [4.0, 2.0, 1.0, 0.5]:
            raise ValueError(f"expected scale factors 4, 2, 1 and 0.5, got {factors}")
        fine, middle, coarse, _ = source.fpn_layers
        self.fine = nn.Sequential(
            Upsample2x(weights, fine.scale_layers[0]),
            nn.GELU(),
            Upsample2x(weights, fine.scale_layers[2], then=fine.proj1),
            Conv3x3(weights, fine.proj2),
        )
        self.middle = nn.Sequential(
            Upsample2x(weights, middle.scale_layers[0], then=middle.proj1), Conv3x3(weights, middle.proj2)
        )
        self.coarse = nn.Sequential(_pointwise(weights, coarse.proj1), Conv3x3(weights, coarse.proj2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(I, H, W, C') -> (I, 4H, 4W, C), (I, 2H, 2W, C), (I, H, W, C)."""
        return self.fine(x), self.middle(x), self.coarse(x)


def _pointwise(weights: Weights, source: nn.Conv2d) -> Linear:
    return Linear(weights.compact(source.weight).flatten(1), weights.compact(source.bias))


# --- text ----------------------------------------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """CLIP's text encoder and the projection behind it.

    Padding stands behind the text, and attention looks back only: so it needs no mask of its own.
    """

    tokens: Tensor
    positions: Tensor

    def __init__(self, weights: Weights, model: reference.Sam3Model) -> None:
        super().__init__()
        source = model.text_encoder.text_model
        embeddings = source.embeddings
        self.register_buffer("tokens", weights.compact(embeddings.token_embedding.weight))
        self.register_buffer("positions", weights.compact(embeddings.position_embedding.weight))
        self.layers = nn.ModuleList(TextLayer(weights, layer) for layer in source.encoder.layers)
        self.norm = weights.norm(source.final_layer_norm)
        self.out = weights.linear(model.text_projection)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, C); what stands at padding means nothing."""
        x = self.tokens[input_ids] + self.positions[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        encoded: Tensor = self.out(self.norm(x))
        return encoded


class TextLayer(nn.Module):
    """One layer of the text encoder."""

    def __init__(self, weights: Weights, source: CLIPEncoderLayer) -> None:
        super().__init__()
        attention = source.self_attn
        self.heads: int = attention.num_heads
        self.norm1 = weights.norm(source.layer_norm1)
        self.qkv = weights.linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = weights.linear(attention.out_proj)
        self.norm2 = weights.norm(source.layer_norm2)
        self.mlp = Mlp(weights, source.mlp.fc1, source.mlp.fc2, source.mlp.activation_fn)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        queries, keys, values = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(attend(queries, keys, values, self.heads, is_causal=True))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


# --- both ----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Queries that attend to keys and values made elsewhere."""

    def __init__(self, weights: Weights, source: reference.Sam3Attention) -> None:
        super().__init__()
        self.heads: int = source.num_attention_heads
        self.queries = weights.linear(source.q_proj)
        self.out = weights.linear(source.o_proj)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (B, Q, C), or (1, Q, C) for all.
            keys: (B, heads, K, D).
            values: (B, heads, K, D).
            mask: Broadcasts to (B, heads, Q, K): bool, False where a key is hidden, or what is added to the scores.
        """
        queries = split_heads(self.queries(x), self.heads).expand(len(keys), -1, -1, -1)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        mixed: Tensor = self.out(merge_heads(attended))
        return mixed


class CrossAttention(nn.Module):
    """Attention to a prompt's tokens."""

    def __init__(self, weights: Weights, source: reference.Sam3Attention) -> None:
        super().__init__()
        self.attention = Attention(weights, source)
        self.keys_values = weights.linear(source.k_proj, source.v_proj)

    def forward(self, x: Tensor, tokens: Tensor, is_token: Tensor) -> Tensor:
        """(B or 1, Q, C), (B, K, C), (B, K) bool, False where a token is padding -> (B, Q, C)."""
        heads = self.attention.heads
        keys, values = (split_heads(part, heads) for part in self.keys_values(tokens).chunk(2, -1))
        attended: Tensor = self.attention(x, keys, values, is_token[:, None, None, :])
        return attended


class PixelKeys(nn.Module):
    """Keys and values of L attentions to the same image tokens. Keys carry a position encoding that never changes."""

    offset: Tensor

    def __init__(self, weights: Weights, layers: Sequence[reference.Sam3Attention], position: Tensor) -> None:
        """Prepare `layers` for image tokens with `position` (T, C) float32 on the device."""
        super().__init__()
        self.split = (len(layers), 2, layers[0].num_attention_heads, -1)
        self.keys_values = weights.linear(
            *(part for layer in layers for part in (layer.k_proj, layer.v_proj))
        )
        keys = [position @ weights.exact(layer.k_proj.weight).T for layer in layers]
        offset = torch.cat([part for each in keys for part in (each, torch.zeros_like(each))], dim=-1)
        self.register_buffer("offset", offset.to(weights.dtype))  # (T, L·2·C)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, T, C) -> (L, 2, B, heads, T, D)."""
        projected = self.keys_values(pixels) + self.offset
        shaped: Tensor = projected.unflatten(-1, self.split).permute(2, 3, 0, 4, 1, 5)
        return shaped


class SelfAttention(nn.Module):
    """Self-attention in which queries and keys, but not values, carry a position encoding that never changes."""

    offset: Tensor

    def __init__(self, weights: Weights, source: reference.Sam3Attention, position: Tensor) -> None:
        """Prepare `source` for tokens with `position` (T, C) float32 on the device."""
        super().__init__()
        self.heads: int = source.num_attention_heads
        self.qkv = weights.linear(source.q_proj, source.k_proj, source.v_proj)
        projected = [position @ weights.exact(part.weight).T for part in (source.q_proj, source.k_proj)]
        self.register_buffer("offset", torch.cat(projected, dim=-1).to(weights.dtype))  # (T, 2·C)
        self.out = weights.linear(source.o_proj)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        queries_keys, values = self.qkv(x).tensor_split([self.offset.shape[-1]], dim=-1)
        queries, keys = (queries_keys + self.offset).chunk(2, -1)
        mixed: Tensor = self.out(attend(queries, keys, values, self.heads))
        return mixed


class SineEncoding(nn.Module):
    """Numbers in [0, 1] as sines and cosines, F of each."""

    periods: Tensor

    def __init__(self, weights: Weights, source: reference.Sam3SinePositionEmbedding) -> None:
        super().__init__()
        self.scale: float = source.scale
        halves = torch.arange(source.num_position_features, device=weights.device) // 2
        self.register_buffer("periods", source.temperature ** (2 * halves / source.num_position_features))

    def forward(self, numbers: Tensor) -> Tensor:
        """(B, N, P) -> (B, N, P·F)."""
        angles = numbers[..., None] * self.scale / self.periods  # (B, N, P, F)
        return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(2)


class BoxEmbedder(nn.Module):
    """What a box is by itself: where it is, what lies in it, and whether that is wanted."""

    labels: Tensor

    def __init__(self, weights: Weights, source: reference.Sam3GeometryEncoder) -> None:
        super().__init__()
        self.edges, self.place = (
            weights.head(part) for part in (source.boxes_direct_project, source.boxes_pos_enc_project)
        )
        self.sines = SineEncoding(weights, source.position_encoding)
        self.register_buffer("labels", weights.exact(source.label_embed.weight))  # (2, C)
        self.norm = weights.norm(source.vision_layer_norm)
        self.roi_size: int = source.roi_size
        pool = source.boxes_pool_project  # a convolution as large as what it reads: one matrix
        self.pool = Linear(weights.compact(pool.weight).flatten(1), weights.compact(pool.bias))

    def forward(self, pixels: Tensor, boxes_cxcywh: Tensor, is_positive: Tensor) -> Tensor:
        """(B or 1, T, C) image tokens, (B, K, 4) float32 in [0, 1] of the image, (B, K) -> (B, K, C) float32."""
        x, y, width, height = boxes_cxcywh.unbind(-1)
        centres = self.sines(torch.stack([y, x], dim=-1))
        place = self.place(torch.cat([centres, torch.stack([height, width], dim=-1)], dim=-1))
        inside = self.pool(self._sample(pixels, boxes_cxcywh)).float()
        embedded: Tensor = self.edges(boxes_cxcywh) + place + inside + self.labels[is_positive.long()]
        return embedded

    def _sample(self, pixels: Tensor, boxes_cxcywh: Tensor) -> Tensor:
        """(B or 1, T, C) image tokens and (B, K, 4) boxes -> (B, K, C·r·r)."""
        side = math.isqrt(pixels.shape[1])
        # The sampling is done in float32: in bfloat16 a box's edges would move by pixels.
        normal = self.norm(pixels).float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (B, C, H, W)
        image = torch.arange(len(boxes_cxcywh), device=pixels.device) % len(pixels)
        images = image[:, None, None].expand(*boxes_cxcywh.shape[:2], 1)
        regions = torch.cat([images, _corners(boxes_cxcywh) * side], dim=-1).flatten(0, 1)  # (B·K, 5)
        sampled = roi_align(normal, regions, self.roi_size)  # (B·K, C, r, r)
        shaped: Tensor = sampled.flatten(1).unflatten(0, boxes_cxcywh.shape[:2]).to(pixels.dtype)
        return shaped


def _corners(boxes_cxcywh: Tensor) -> Tensor:
    """(…, 4) centre and size -> (…, 4) left, top, right and bottom edge."""
    centre, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


class GeometryEncoder(nn.Module):
    """What is marked on an image: a token for each box, and a class token, all of which have looked at the image.

    With no boxes marked, the class token attends to itself alone, which is the projection of its values.
    """

    token: Tensor

    def __init__(self, weights: Weights, source: reference.Sam3GeometryEncoder, position: Tensor) -> None:
        super().__init__()
        self.boxes = BoxEmbedder(weights, source)
        self.project = weights.linear(source.final_proj)
        self.prompt_norm = weights.norm(source.prompt_layer_norm)
        start = source.prompt_layer_norm(source.final_proj(source.cls_embed.weight))
        self.register_buffer("token", weights.compact(start))  # (1, C)
        self.layers = nn.ModuleList(GeometryLayer(weights, layer, position) for layer in source.layers)
        self.norm = weights.norm(source.output_layer_norm)

    def forward(self, pixels: Tensor) -> Tensor:
        """(I, T, C) image tokens -> (I, 1, C)."""
        x = self.token.expand(len(pixels), 1, -1)
        for layer in self.layers:
            x = layer(x, pixels)
        encoded: Tensor = self.norm(x)
        return encoded

    def encode_boxes(
        self, pixels: Tensor, boxes_cxcywh: Tensor, is_positive: Tensor, is_box: Tensor
    ) -> Tensor:
        """Boxes marked on B images.

        Args:
            pixels: (B or 1, T, C) image tokens.
            boxes_cxcywh: (B, K, 4) float32, in [0, 1] of the image.
            is_positive: (B, K) bool.
            is_box: (B, K) bool, False where a box is padding.
        Returns:
            (B, K + 1, C), the class token last.
        """
        embedded = self.boxes(pixels, boxes_cxcywh, is_positive).to(pixels.dtype)
        class_token = self.token.expand(len(embedded), 1, -1)
        x = torch.cat([self.prompt_norm(self.project(embedded)), class_token], dim=1)
        is_token = F.pad(is_box, (0, 1), value=True)[:, None, None]  # (B, 1, 1, K + 1)
        for layer in self.layers:
            assert isinstance(layer, GeometryLayer)
            x = layer.look_together(x, pixels, is_token)
        encoded: Tensor = self.norm(x)
        return encoded


class GeometryLayer(nn.Module):
    """One layer of the geometry encoder."""

    def __init__(
        self, weights: Weights, source: reference.Sam3GeometryEncoderLayer, position: Tensor
    ) -> None:
        super().__init__()
        attention = source.self_attn
        self.heads: int = attention.num_attention_heads
        self.norm1 = weights.norm(source.layer_norm1)
        self.queries_keys = weights.linear(attention.q_proj, attention.k_proj)
        self.values = weights.linear(attention.v_proj)
        self.out = weights.linear(attention.o_proj)
        self.norm2 = weights.norm(source.layer_norm2)
        self.pixel_keys = PixelKeys(weights, [source.cross_attn], position)
        self.attention = Attention(weights, source.cross_attn)
        self.norm3 = weights.norm(source.layer_norm3)
        self.mlp = Mlp(weights, source.mlp.fc1, source.mlp.fc2, source.mlp.activation_fn)

    def forward(self, x: Tensor, pixels: Tensor) -> Tensor:
        """A single token: (I, 1, C) and (I, T, C) -> (I, 1, C)."""
        x = x + self.out(self.values(self.norm1(x)))
        keys, values = self.pixel_keys(pixels)[0]
        x = x + self.attention(self.norm2(x), keys, values)
        mixed: Tensor = x + self.mlp(self.norm3(x))
        return mixed

    def look_together(self, x: Tensor, pixels: Tensor, is_token: Tensor) -> Tensor:
        """Tokens that see each other: (B, K, C), (B or 1, T, C) and (B, 1, 1, K) -> (B, K, C)."""
        normal = self.norm1(x)
        queries, own_keys = self.queries_keys(normal).chunk(2, -1)
        x = x + self.out(attend(queries, own_keys, self.values(normal), self.heads, is_token))
        keys, values = (part.expand(len(x), -1, -1, -1) for part in self.pixel_keys(pixels)[0])
        x = x + self.attention(self.norm2(x), keys, values)
        mixed: Tensor = x + self.mlp(self.norm3(x))
        return mixed


class LookAtImage(nn.Module):
    """The first half of a layer of the DETR encoder: image tokens look at each other.

    Args:
        weights: Where to and in what.
        source: The layer of transformers.
        position: (T, C) float32, the position encoding of the image tokens.
    """

    def __init__(self, weights: Weights, source: reference.Sam3DetrEncoderLayer, position: Tensor) -> None:
        super().__init__()
        self.norm = weights.norm(source.layer_norm1)
        self.attention = SelfAttention(weights, source.self_attn, position)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        attended: Tensor = x + self.attention(self.norm(x))
        return attended


class LookAtPrompt(nn.Module):
    """The second half: image tokens look at the prompt's."""

    def __init__(self, weights: Weights, source: reference.Sam3DetrEncoderLayer) -> None:
        super().__init__()
        self.norm1 = weights.norm(source.layer_norm2)
        self.attention = CrossAttention(weights, source.cross_attn)
        self.norm2 = weights.norm(source.layer_norm3)
        self.mlp = Mlp(weights, source.mlp.fc1, source.mlp.fc2, source.mlp.activation_fn)

    def forward(self, x: Tensor, tokens: Tensor, is_token: Tensor) -> Tensor:
        """(B or 1, T, C), (B, K, C), (B, K) -> (B, T, C)."""
        x = x + self.attention(self.norm1(x), tokens, is_token)
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class QueryDecoder(nn.Module):
    """The DETR decoder and its heads: N queries look for instances.

    Args:
        weights: Where to and in what.
        model: The model of transformers.
        position: (T, C) float32, the position encoding of the image tokens.
        grid: Image tokens along each side, T = grid².
    """

    start: Tensor
    start_boxes: Tensor
    ticks: Tensor

    def __init__(
        self,
        weights: Weights,
        model: reference.Sam3Model,
        position: Tensor,
        grid: int,
    ) -> None:
        super().__init__()
        source, head = model.detr_decoder, weights.head
        self.dtype, self.grid = weights.dtype, grid
        self.register_buffer(
            "start", weights.compact(torch.cat([source.presence_token.weight, source.query_embed.weight]))
        )
        self.register_buffer("start_boxes", weights.exact(source.reference_points.weight).sigmoid())
        self.register_buffer("ticks", torch.arange(grid, device=weights.device) / grid)
        self.sines = SineEncoding(weights, source.position_encoding)
        self.pixel_keys = PixelKeys(weights, [layer.vision_cross_attn for layer in source.layers], position)
        self.layers = nn.ModuleList(QueryLayer(weights, layer) for layer in source.layers)
        self.norm = weights.norm(source.output_layer_norm)
        self.box_head = head(source.box_head)
        self.box_to_position = head(source.ref_point_head)
        self.bias_x, self.bias_y = head(source.box_rpb_embed_x), head(source.box_rpb_embed_y)
        self.presence_norm, self.presence_head = head(source.presence_layer_norm), head(source.presence_head)
        self.max_presence: float = source.clamp_presence_logit_max_val
        self.scoring = Scoring(weights, model.dot_product_scoring)

    def forward(self, pixels: Tensor, tokens: Tensor, is_token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find instances.

        Args:
            pixels: (B, T, C), of the DETR encoder.
            tokens: (B, K, C) of the prompt.
            is_token: (B, K) bool.
        Returns:
            Scores (B, N) float32: sigmoid(class logit) · sigmoid(presence logit). Boxes (B, N, 4) float32, centre and
            size, in [0, 1] of the image. The queries (B, N, C) that masks are made from.
        """
        batch = len(pixels)
        projected = self.pixel_keys(pixels)
        x = self.start.expand(batch, -1, -1)  # (B, 1 + N, C); the first is the presence token
        boxes = self.start_boxes.expand(batch, -1, -1)
        for layer, (keys, values) in zip(self.layers, projected, strict=True):
            place = F.pad(self.box_to_position(self._encode_boxes(boxes)).to(self.dtype), (0, 0, 1, 0))
            x = layer(x, place, tokens, is_token, keys, values, self._bias(boxes))
            queries = self.norm(x[:, 1:])
            boxes = (torch.logit(boxes, eps=BOX_EPS) + self.box_head(queries)).sigmoid()
        presence = self.presence_head(self.presence_norm(x[:, :1])).squeeze(-1)  # (B, 1)
        presence = presence.clamp(-self.max_presence, self.max_presence)
        return joint_scores(self.scoring(queries, tokens, is_token), presence), boxes, queries

    def _encode_boxes(self, boxes: Tensor) -> Tensor:
        """(B, N, 4) -> (B, N, 2·C) sines and cosines of y, x, width, height."""
        x, y, width, height = boxes.unbind(-1)
        encoded: Tensor = self.sines(torch.stack([y, x, width, height], dim=-1))
        return encoded

    def _bias(self, boxes: Tensor) -> Tensor:
        """(B, heads, 1 + N, T): how each query's attention leans towards its box; the presence token's does not."""
        corners = _corners(boxes)
        along_x = self.bias_x(self._offsets(corners[..., 0::2]))  # (B, N, grid, heads)
        along_y = self.bias_y(self._offsets(corners[..., 1::2]))
        bias = (
            along_y.to(self.dtype)[:, :, :, None] + along_x.to(self.dtype)[:, :, None]
        )  # (B, N, y, x, heads)
        # Fused attention reads a bias only if its last axis is dense.
        return F.pad(bias.flatten(2, 3).permute(0, 3, 1, 2), (0, 0, 1, 0)).contiguous()

    def _offsets(self, edges: Tensor) -> Tensor:
        """(B, N, 2) edges of boxes along an axis -> (B, N, grid, 2), distances of ticks from each, log scale."""
        offsets = (self.ticks[:, None] - edges[:, :, None]) * RPB_SCALE
        return offsets.sign() * (offsets.abs() + 1).log2() / math.log2(RPB_SCALE)


def joint_scores(logits: Tensor, presence_logits: Tensor) -> Tensor:
    """(B, N) class logits and (B, 1) presence logits to scores: the product of both probabilities."""
    return logits.sigmoid() * presence_logits.sigmoid()


class QueryLayer(nn.Module):
    """One layer of the DETR decoder."""

    def __init__(self, weights: Weights, source: reference.Sam3DetrDecoderLayer) -> None:
        super().__init__()
        attention = source.self_attn
        self.heads: int = attention.num_attention_heads
        self.queries_keys = weights.linear(attention.q_proj, attention.k_proj)
        self.values = weights.linear(attention.v_proj)
        self.out = weights.linear(attention.o_proj)
        self.norm1 = weights.norm(source.self_attn_layer_norm)
        self.text_attention = CrossAttention(weights, source.text_cross_attn)
        self.norm2 = weights.norm(source.text_cross_attn_layer_norm)
        self.pixel_attention = Attention(weights, source.vision_cross_attn)
        self.norm3 = weights.norm(source.vision_cross_attn_layer_norm)
        self.mlp = Mlp(weights, source.mlp.fc1, source.mlp.fc2, source.mlp.activation_fn)
        self.norm4 = weights.norm(source.mlp_layer_norm)

    def forward(
        self,
        x: Tensor,
        place: Tensor,
        tokens: Tensor,
        is_token: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """One layer.

        Args:
            x: (B, 1 + N, C) presence token and queries.
            place: Likewise, the encoding of each query's box.
            tokens: (B, K, C) of the prompt.
            is_token: (B, K) bool.
            keys: (B, heads, T, D) of the image.
            values: Likewise.
            bias: (B, heads, 1 + N, T).
        """
        queries, own_keys = self.queries_keys(x + place).chunk(2, -1)
        x = self.norm1(x + self.out(attend(queries, own_keys, self.values(x), self.heads)))
        x = self.norm2(x + self.text_attention(x + place, tokens, is_token))
        x = self.norm3(x + self.pixel_attention(x + place, keys, values, bias))
        mixed: Tensor = self.norm4(x + self.mlp(x))
        return mixed


class Scoring(nn.Module):
    """Class logits: inner products of the queries with the prompt's mean, in float32."""

    def __init__(self, weights: Weights, source: reference.Sam3DotProductScoring) -> None:
        super().__init__()
        head = weights.head
        self.mlp, self.norm = head(source.text_mlp), head(source.text_mlp_out_norm)
        self.text, self.queries = head(source.text_proj), head(source.query_proj)
        self.scale: float = source.scale
        self.max_logit: float = source.clamp_max_val

    def forward(self, queries: Tensor, tokens: Tensor, is_token: Tensor) -> Tensor:
        """(B, N, C), (B, K, C), (B, K) -> (B, N) float32."""
        tokens = tokens.float()
        mixed = self.norm(self.mlp(tokens) + tokens)
        is_real = is_token[..., None]
        pooled = (mixed * is_real).sum(1) / is_real.sum(1)  # (B, C)
        logits = torch.einsum("bnc,bc->bn", self.queries(queries), self.text(pooled)) * self.scale
        return logits.clamp(-self.max_logit, self.max_logit)


class PixelDecoder(nn.Module):
    """Image and prompt to the pixels that masks are made from.

    Args:
        weights: Where to and in what.
        source: The mask decoder of transformers.
    """

    def __init__(self, weights: Weights, source: reference.Sam3MaskDecoder) -> None:
        super().__init__()
        decoder = source.pixel_decoder
        middle, fine = decoder.conv_layers[:2]  # a third is in the checkpoint, for a level that there is not
        self.norm = weights.norm(source.prompt_cross_attn_norm)
        self.attention = CrossAttention(weights, source.prompt_cross_attn)
        self.middle, self.fine = UpsampledConv3x3(weights, middle), UpsampledConv3x3(weights, fine)
        self.middle_level, self.fine_level = Conv3x3(weights, middle), Conv3x3(weights, fine)
        self.middle_norm, self.fine_norm = (GroupNorm(weights, norm) for norm in decoder.norms[:2])

    def prepare(self, fine: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
        """What the levels (I, 4H, 4W, C) and (I, 2H, 2W, C) add, whatever the prompt: of the same shapes."""
        return self.fine_level(fine), self.middle_level(middle)

    def forward(
        self, pixels: Tensor, tokens: Tensor, is_token: Tensor, fine: Tensor, middle: Tensor
    ) -> Tensor:
        """Pixels of B pairs.

        Args:
            pixels: (B, H·W, C), of the DETR encoder.
            tokens: (B, K, C) of the prompt.
            is_token: (B, K) bool.
            fine: (B or 1, 4H, 4W, C), as `prepare` made it.
            middle: (B or 1, 2H, 2W, C), likewise.
        Returns:
            (B, 4H, 4W, C).
        """
        pixels = pixels + self.attention(self.norm(pixels), tokens, is_token)
        side = math.isqrt(pixels.shape[1])
        x = pixels.unflatten(1, (side, side))
        x = self.middle_norm(self.middle(x) + middle).relu()
        shown: Tensor = self.fine_norm(self.fine(x) + fine).relu()
        return shown


class GroupNorm(nn.Module):
    """Group normalisation, channels last; its sums are float32."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weights: Weights, source: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = source.num_groups, source.eps
        self.register_buffer("weight", weights.compact(source.weight))
        self.register_buffer("bias", weights.compact(source.bias))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        normal = F.group_norm(x.permute(0, 3, 1, 2), self.groups, self.weight, self.bias, self.eps)
        return normal.permute(0, 2, 3, 1)


class MaskEmbedder(nn.Module):
    """Queries to what is multiplied with the pixels, the 1×1 convolution of the pixels included.

    (W·p + b)·e = p·(Wᵀ·e) + b·e: a product for each query instead of one for each of 83 thousand pixels.
    """

    mix: Tensor
    shift: Tensor

    def __init__(self, weights: Weights, source: reference.Sam3MaskDecoder) -> None:
        super().__init__()
        self.layers = weights.head(source.mask_embedder)
        self.register_buffer("mix", weights.exact(source.instance_projection.weight)[:, :, 0, 0])
        self.register_buffer("shift", weights.exact(source.instance_projection.bias))

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) -> embeddings (B, N, C) and what is added to the product (B, N), float32."""
        embeddings = self.layers(queries)
        return embeddings @ self.mix, embeddings @ self.shift
