"""The systems that the bench of the model compares: all answer the same `Workload` with random weights.

What comes out of a call lies on the device: scores, boxes and mask logits. Transformers and Meta's code make the
masks of all queries; ours makes those of the `KEPT` best, since nobody asks for the others. None of them resizes
masks to the size of a photo, or leaves out queries by their score.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Sam3Config

from bench.model_inputs import SETS, Workload, random_model
from bench.timing import FP8, has_fp8
from sam3_runner.engine import MAX_ROWS, Answers, EncodedImages, Engine
from sam3_runner.forward import TextFeatures, decode, encode_image, encode_text

KEPT = 20  # instances of a pair whose masks are made; photos seldom hold more of one kind
PAIRS_PER_CALL = 16  # decoded together by the others; ours has its own number
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


class LeftOut(Exception):
    """A system that cannot run here, and why."""


class System(Protocol):
    """A model on its device, ready to be called."""

    weight_bytes: int

    def call(self, work: Workload, turn: int) -> object:
        """Answer all pairs of one set of images; everything that comes out stays on the device."""


@dataclass(frozen=True)
class Setting:
    """What all systems of a run share.

    Attributes:
        config: Of the model.
        device: They run on.
        dtype: They compute in.
        meta: The folder that `bench.prepare_meta` made, or None.
    """

    config: Sam3Config
    device: torch.device
    dtype: torch.dtype
    meta: Path | None = None

    def autocast(self) -> torch.autocast:
        """For systems that keep their weights in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def bytes_of(module: torch.nn.Module) -> int:
    """Memory of a module's tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def chunks(count: int, size: int) -> Iterator[slice]:
    """So many at a time."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def best_masks(scores: Tensor, embeddings: Tensor, pixels: Tensor, shifts: Tensor) -> Tensor:
    """Mask logits (B, K, h·w) of each pair's best queries.

    Chosen on the device: to keep those above a threshold the caller must first be told how many they are.

    Args:
        scores: (B, N).
        embeddings: (B, N, C).
        pixels: (B, C, h·w).
        shifts: (B, N), added to a query's logits.
    """
    best = scores.topk(min(KEPT, scores.shape[1]), dim=1).indices  # (B, K)
    chosen = embeddings.gather(1, best[..., None].expand(-1, -1, embeddings.shape[-1]))
    return chosen.to(pixels.dtype) @ pixels + shifts.gather(1, best)[..., None].to(pixels.dtype)


class Before:
    """`sam3_runner/forward.py` under autocast: the obvious form, and what the service ran at first."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._model = random_model(setting.config, setting.device)
        self.weight_bytes = bytes_of(self._model)

    def call(self, work: Workload, turn: int) -> object:
        """See `System`."""
        with self._setting.autocast():
            images = encode_image(self._model, work.pixel_values(turn))
            texts = encode_text(self._model, *work.tokens)
            return [
                self._answer(images.select(work.image_rows[part]), texts, part)
                for part in chunks(work.pairs, PAIRS_PER_CALL)
            ]

    def _answer(self, images: Any, texts: TextFeatures, part: slice) -> object:
        chosen = TextFeatures(texts.tokens[part], texts.is_token[part])
        said = decode(self._model, images, chosen)
        scores = said.logits[-1].sigmoid() * said.presence_logits[-1, :, None].sigmoid()
        masks = best_masks(
            scores, said.mask_embeddings[-1], said.pixel_embeddings.flatten(2), torch.zeros_like(scores)
        )
        return scores, said.boxes_cxcywh[-1], masks


class Ours:
    """`sam3_runner/engine.py`, as the service runs it on this device.

    Args:
        setting: Of the run; its dtype may be float8's too.
        is_eager: On a GPU, without compilation and graphs.
    """

    def __init__(self, setting: Setting, *, is_eager: bool = False) -> None:
        is_gpu = setting.device.type == "cuda"
        if is_eager and not is_gpu:
            raise LeftOut("on a CPU, ours is not compiled")
        if setting.dtype == FP8 and not has_fp8(setting.device):
            raise LeftOut("this device does not multiply 8-bit numbers")
        self.engine = Engine(random_model(setting.config, setting.device), setting.device, setting.dtype)
        self.weight_bytes = bytes_of(self.engine)
        if is_gpu and not is_eager:
            self.engine.accelerate()

    def call(self, work: Workload, turn: int) -> object:
        """See `System`."""
        return self.answer_all(work, turn)

    def answer_all(
        self,
        work: Workload,
        turn: int,
        images: Sequence[EncodedImages] | None = None,
        texts: Sequence[TextFeatures] | None = None,
    ) -> object:
        """Answer all pairs.

        Args:
            work: The inputs.
            turn: Of which set of images.
            images: Encoded before, as `encode_images` gives them; or None.
            texts: Likewise, of `encode_texts`.
        """
        answers: list[object] = []
        texts = self.encode_texts(work) if texts is None else texts
        for group, rows in enumerate(chunks(work.images, MAX_ROWS)):
            encoded = self.encode_group(work, turn, rows) if images is None else images[group]
            for part in self._parts(work, rows):
                said = self.engine.answer(
                    self.rows(work, encoded, rows.start, part), texts[part.start // MAX_ROWS]
                )
                answers.append((said.scores.clone(), said.boxes_cxcywh.clone(), self.masks(said)))
        return answers

    def _parts(self, work: Workload, rows: slice) -> Iterator[slice]:
        """The pairs of a group of images, `MAX_ROWS` at a time."""
        for part in chunks((rows.stop - rows.start) * work.prompts, MAX_ROWS):
            start = rows.start * work.prompts
            yield slice(start + part.start, start + part.stop)

    def rows(self, work: Workload, encoded: EncodedImages, start: int, part: slice) -> EncodedImages:
        """The images of some pairs: one if it is one, in place if they lie there as they are asked about."""
        first, last = part.start // work.prompts - start, (part.stop - 1) // work.prompts - start
        if first == last or work.prompts == 1:
            return EncodedImages(*(tensor[first : last + 1] for tensor in encoded.tensors))
        rows = work.image_rows[part] - start
        return EncodedImages(*(tensor[rows] for tensor in encoded.tensors))

    def encode_group(self, work: Workload, turn: int, rows: slice) -> EncodedImages:
        """Some images of a set, normalisation included; copied, as the service does, out of the next call's way."""
        encoded = self.engine.encode_images(work.pixels[turn % SETS][rows])
        return EncodedImages(*(tensor.clone() for tensor in encoded.tensors))

    def encode_images(self, work: Workload, turn: int) -> list[EncodedImages]:
        """All images of a set, `MAX_ROWS` at a time."""
        return [self.encode_group(work, turn, rows) for rows in chunks(work.images, MAX_ROWS)]

    def encode_texts(self, work: Workload) -> list[TextFeatures]:
        """All prompts, likewise."""
        parts = chunks(work.pairs, MAX_ROWS)
        texts = (self.engine.encode_texts(*(tokens[part] for tokens in work.tokens)) for part in parts)
        return [TextFeatures(text.tokens.clone(), text.is_token) for text in texts]

    def masks(self, said: Answers) -> Tensor:
        """The masks of the best queries."""
        pixels = said.pixels.flatten(1, 2).transpose(1, 2)  # (B, h, w, C) -> (B, C, h·w)
        return best_masks(said.scores, said.mask_embeddings, pixels, said.mask_shifts)


class HuggingFace:
    """`transformers.Sam3Model` in the run's dtype, as its own documentation calls it.

    Args:
        setting: Of the run.
        compiled: Through `torch.compile`, for the shapes that are asked for.
    """

    def __init__(self, setting: Setting, *, compiled: bool) -> None:
        self._model: Any = random_model(setting.config, setting.device).to(setting.dtype)
        self._dtype = setting.dtype
        self.weight_bytes = bytes_of(self._model)
        self._forward: Callable[..., Any] = (
            torch.compile(self._model, dynamic=False) if compiled else self._model
        )

    def call(self, work: Workload, turn: int) -> object:
        """See `System`."""
        pixel_values = work.pixel_values(turn).to(self._dtype)
        ids, mask = work.tokens
        if work.prompts == 1 and work.pairs <= PAIRS_PER_CALL:
            return self._forward(pixel_values=pixel_values, input_ids=ids, attention_mask=mask)
        vision = self._model.get_vision_features(pixel_values)
        return [
            self._forward(
                vision_embeds=self._chosen(vision, work.image_rows[part]),
                input_ids=ids[part],
                attention_mask=mask[part],
            )
            for part in chunks(work.pairs, PAIRS_PER_CALL)
        ]

    def _chosen(self, vision: Any, rows: Tensor) -> Any:
        """The features of each pair's image: the model does not repeat them itself."""
        return SimpleNamespace(
            fpn_hidden_states=tuple(level[rows] for level in vision.fpn_hidden_states),
            fpn_position_encoding=tuple(
                level[:1].expand(len(rows), -1, -1, -1) for level in vision.fpn_position_encoding
            ),
            hidden_states=None,
            attentions=None,
        )


class Meta:
    """Meta's own package under autocast, as its examples run it, but for its image processor's work on results."""

    def __init__(self, setting: Setting) -> None:
        if setting.meta is None:
            raise LeftOut("no folder with Meta's package: --meta FOLDER, made by bench.prepare_meta")
        sys.path.append(str(setting.meta))
        self._setting = setting
        try:
            with _redirected(setting.device):
                self._model = _build_meta(setting)
        except ImportError as error:
            raise LeftOut(f"Meta's package does not import here: {error}") from error
        self.weight_bytes = bytes_of(self._model)

    def call(self, work: Workload, turn: int) -> object:
        """See `System`."""
        with self._setting.autocast(), _redirected(self._setting.device):
            backbone = self._model.backbone
            seen = backbone.forward_image(work.pixel_values(turn))
            seen |= backbone.forward_text(work.captions, device=self._setting.device)
            return [
                self._ground(seen, work.image_rows[part], part) for part in chunks(work.pairs, PAIRS_PER_CALL)
            ]

    def _ground(self, seen: dict[str, Any], rows: Tensor, part: slice) -> object:
        from sam3.model.data_misc import FindStage

        stage = FindStage(
            img_ids=rows,
            text_ids=torch.arange(part.start, part.stop, device=rows.device),
            input_boxes=None,
            input_boxes_mask=None,
            input_boxes_label=None,
            input_points=None,
            input_points_mask=None,
        )
        said = self._model.forward_grounding(
            backbone_out=dict(seen),
            find_input=stage,
            geometric_prompt=self._model._get_dummy_prompt(num_prompts=len(rows)),
            find_target=None,
        )
        return [said[name] for name in ("pred_logits", "presence_logit_dec", "pred_boxes", "pred_masks")]


class _NoCuda(TorchFunctionMode):
    """Where there is no GPU, what asks for one gets the CPU: Meta's code has "cuda" and pinned memory written in."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.pin_memory:
            return args[0]
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


@contextlib.contextmanager
def _redirected(device: torch.device) -> Iterator[None]:
    with _NoCuda() if device.type == "cpu" else contextlib.nullcontext():
        yield


def _build_meta(setting: Setting) -> Any:
    """Meta's model with random weights; with the sizes of `setting.config`, whichever they are."""
    from sam3 import model_builder

    assert setting.meta is not None
    with _meta_sizes(model_builder, setting.config):
        model = model_builder.build_sam3_image_model(
            bpe_path=str(setting.meta / VOCABULARY),
            device=setting.device.type,
            load_from_HF=False,
        )
    return model.to(setting.device).eval().requires_grad_(False)


@contextlib.contextmanager
def _meta_sizes(builder: Any, config: Sam3Config) -> Iterator[None]:
    """Sizes that Meta's builder has written into it, changed to those of a smaller model while it builds."""
    vit, text = config.vision_config.backbone_config, config.text_config
    changes = {
        "ViT": {
            "img_size": vit.image_size,
            "pretrain_img_size": vit.pretrain_image_size,
            "patch_size": vit.patch_size,
            "embed_dim": vit.hidden_size,
            "depth": vit.num_hidden_layers,
            "num_heads": vit.num_attention_heads,
            "mlp_ratio": vit.intermediate_size / vit.hidden_size,
            "window_size": vit.window_size,
            "global_att_blocks": tuple(vit.global_attn_indexes),
        },
        "VETextEncoder": {
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
        },
        "TransformerDecoder": {"resolution": vit.image_size, "stride": vit.patch_size},
    }
    kept = {name: getattr(builder, name) for name in changes}
    for name, values in changes.items():
        setattr(builder, name, _with(kept[name], values))
    try:
        yield
    finally:
        for name, original in kept.items():
            setattr(builder, name, original)


def _with(make: Callable[..., Any], values: dict[str, Any]) -> Callable[..., Any]:
    return lambda **given: make(**{**given, **values})


MAKERS: dict[str, Callable[[Setting], System]] = {
    "ours": Ours,
    "ours-eager": lambda setting: Ours(setting, is_eager=True),
    "ours-float8": lambda setting: Ours(replace(setting, dtype=FP8)),
    "before": Before,
    "hf": lambda setting: HuggingFace(setting, compiled=False),
    "hf-compiled": lambda setting: HuggingFace(setting, compiled=True),
    "meta": Meta,
}
