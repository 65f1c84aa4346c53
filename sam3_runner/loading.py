"""From mapped tensors to a model on its device: every parameter comes from the file, none is ever initialised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Sam3Config, Sam3Model
from transformers.initialization import no_init_weights

from sam3_runner import meta_keys
from sam3_runner.checkpoint import CLICK_MARKS
from sam3_runner.clicks import ClickModel
from sam3_runner.errors import CheckpointError
from sam3_runner.mapped import map_tensors, release_pages

ModelT = TypeVar("ModelT", bound=nn.Module)

NAMED_TENSORS = 10  # how many an error names; a wrong checkpoint has hundreds
NAMED_PARTS = 4
# What a weight may be stored as. Integers and float8 mean nothing without scales that lie somewhere else.
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SAM2_PART = "sam_mask_decoder"


@dataclass(frozen=True)
class Layout:
    """How one published form of SAM3 names its tensors.

    Attributes:
        name: For people.
        mark: What some names of this layout, and no names of another, begin with.
        detector: What stands before `Sam3Model`'s own names.
        tracker: What the names of the video tracker begin with.
    """

    name: str
    mark: str
    detector: str
    tracker: tuple[str, ...]


META = Layout("Meta's", meta_keys.DETECTOR, meta_keys.DETECTOR, (meta_keys.TRACKER,))
VIDEO = Layout("video", "detector_model.", "detector_model.", ("tracker_model.", "tracker_neck."))
IMAGE = Layout("image", "detr_decoder.", "", ())
LAYOUTS = (META, VIDEO, IMAGE)

# The video layout calls what answers clicks as `ClickModel` does, behind these.
CLICKS_BEHIND = {"tracker_neck.": "neck.", "tracker_model.": ""}
CLICK_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"
SAME_POSITIONS = (
    "shared_image_embedding.positional_embedding"  # once more: the tables of clicks and pixels are one
)
# What else it holds, and only a video needs; see `meta_keys.VIDEO_ONLY`.
VIDEO_ONLY = (
    "memory_attention.",
    "memory_encoder.",
    "memory_temporal_positional_encoding",
    "no_memory_positional_encoding",
    "mask_downsample.",
    "object_pointer_proj.",
    "temporal_positional_encoding_projection_layer.",
    "no_object_pointer",
    "occlusion_spatial_embedding_parameter",
)


@dataclass(frozen=True)
class Contents:
    """What weights files hold: mapped, not read.

    Attributes:
        layout: How the files name it.
        detector: By `Sam3Model`'s names; what has no such name keeps its own.
        tracker: By the files' own names.
        clicks: What answers clicks, by `ClickModel`'s names; likewise. Empty if the files hold no mask decoder for it.
    """

    layout: Layout
    detector: dict[str, Tensor]
    tracker: dict[str, Tensor]
    clicks: dict[str, Tensor]


def read_contents(files: Iterable[Path]) -> Contents:
    """Map the tensors of one checkpoint's files, and tell the detector's from the tracker's.

    Raises:
        CheckpointError: a file is broken, or this is not SAM3.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        mapped = map_tensors(file)
        if twice := mapped.keys() & tensors.keys():
            raise CheckpointError(
                f"{file} holds {min(twice)}, and so does another file of the same checkpoint"
            )
        tensors |= mapped
    layout = next((layout for layout in LAYOUTS if any(n.startswith(layout.mark) for n in tensors)), None)
    if layout is None:
        raise CheckpointError(f"{file} {_other_model(tensors)}")
    tracker = {name: tensor for name, tensor in tensors.items() if name.startswith(layout.tracker)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in tracker}
    has_clicks = any(name.startswith(CLICK_MARKS) for name in tracker)
    if layout is META:
        clicks = meta_keys.clicks_from_meta(tensors) if has_clicks else {}
        return Contents(layout, meta_keys.from_meta(rest), tracker, clicks)
    clicks = _clicks_of_video(tracker) if has_clicks else {}
    return Contents(
        layout, {name.removeprefix(layout.detector): t for name, t in rest.items()}, tracker, clicks
    )


def _clicks_of_video(tracker: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tracker.items():
        behind = next(prefix for prefix in CLICKS_BEHIND if name.startswith(prefix))
        ours = CLICKS_BEHIND[behind] + name.removeprefix(behind)
        if not ours.startswith(VIDEO_ONLY):
            renamed[ours] = tensor
    if SAME_POSITIONS in renamed:
        same = renamed.pop(SAME_POSITIONS)
        renamed.setdefault(CLICK_POSITIONS, same)
    return renamed


def _other_model(names: Iterable[str]) -> str:
    parts = list(dict.fromkeys(name.partition(".")[0] for name in names))
    which = " (that is SAM 2)" if SAM2_PART in parts else ""
    shown = ", ".join(f"{part}.*" for part in parts[:NAMED_PARTS]) + (
        ", …" if len(parts) > NAMED_PARTS else ""
    )
    expected = ", ".join(f"{layout.mark}*" for layout in LAYOUTS)
    return f"is not SAM3{which}: its tensors are {shown or 'none'}, where one of {expected} was expected"


def unset_model(config: Mapping[str, Any]) -> Sam3Model:
    """A model whose parameters are memory that nobody has touched; its buffers are computed, and right.

    Raises:
        CheckpointError: the configuration does not describe a SAM3.
    """
    with _described_by_config():
        return Sam3Model(Sam3Config.from_dict(dict(config)))


def unset_click_model(config: Mapping[str, Any], tracker: Mapping[str, Any]) -> ClickModel:
    """Likewise what answers clicks.

    Args:
        config: The detector's, whose image encoder it reads.
        tracker: The tracker's; may be empty.
    Raises:
        CheckpointError: the configuration does not describe it.
    """
    with _described_by_config():
        return ClickModel(Sam3Config.from_dict(dict(config)).vision_config, tracker)


@contextlib.contextmanager
def _described_by_config() -> Iterator[None]:
    """Where models are built of a checkpoint's configuration, and nothing is initialised."""
    try:
        with no_init_weights():
            yield
    except Exception as error:  # transformers raises what a wrong value happens to break
        words = " ".join(str(error).split())
        raise CheckpointError(
            f"config.json does not describe a SAM3 ({type(error).__name__}: {words})"
        ) from error


def compute_as_meta(model: Sam3Model) -> None:
    """Undo the one number in which transformers' configuration of the published weights is not Meta's.

    Meta's vision encoder normalises with an epsilon of 1e-5; `config.json` says 1e-6. See decision 6.
    """
    for part in model.vision_encoder.backbone.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = meta_keys.VISION_LAYER_NORM_EPS


def misfits(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """What keeps tensors from being the whole model, one line each: the missing, the unexpected, the misshapen.

    Args:
        expected: The model's own, for their names and shapes.
        tensors: By the model's names.
    """
    common = sorted(expected.keys() & tensors.keys())
    return [
        *(f"missing: {name}" for name in sorted(expected.keys() - tensors.keys())),
        *(f"unexpected: {name}" for name in sorted(tensors.keys() - expected.keys())),
        *(
            f"wrongly shaped: {name} {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in common
            if tensors[name].shape != expected[name].shape
        ),
        *(
            f"wrongly typed: {name} {tensors[name].dtype} instead of a float of 16 bits or more"
            for name in common
            if tensors[name].dtype not in WEIGHT_DTYPES
        ),
    ]


def misfits_in_a_line(lines: list[str]) -> str:
    """All counted, the first ten named."""
    shown = "; ".join(lines[:NAMED_TENSORS]) + ("; …" if len(lines) > NAMED_TENSORS else "")
    return f"{len(lines):,} tensors are missing, unexpected or wrongly shaped ({shown})"


def fill(model: ModelT, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> ModelT:
    """Give a model the tensors that fit it (see `misfits`), one at a time, so that no second copy ever stands.

    What is on the CPU in its own dtype stays mapped: it is read when it is first used.

    Args:
        model: From `unset_model` or `unset_click_model`.
        tensors: By the model's names; emptied.
        device: Where parameters and buffers go.
        dtype: Of the parameters. Buffers, the tables of rotary positions, stay as they are.
    """
    placed = {}
    for name in list(tensors):
        mapped = tensors.pop(name)
        placed[name] = mapped.to(device).to(dtype).contiguous()  # converted there, where it is fast
        if placed[name].data_ptr() != mapped.data_ptr():
            release_pages(mapped)
    model.load_state_dict(placed, assign=True)
    filled: ModelT = model.to(device).eval().requires_grad_(False)
    return filled
