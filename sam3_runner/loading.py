"""From mapped tensors to a model on its device: every parameter comes from the file, none is ever initialised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Sam3Config, Sam3Model
from transformers.initialization import no_init_weights

from sam3_runner import meta_keys
from sam3_runner.errors import CheckpointError
from sam3_runner.mapped import map_tensors, release_pages

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
        tracker: What the names of the video tracker begin with; it is not used here.
    """

    name: str
    mark: str
    detector: str
    tracker: tuple[str, ...]


META = Layout("Meta's", meta_keys.DETECTOR, meta_keys.DETECTOR, (meta_keys.TRACKER,))
VIDEO = Layout("video", "detector_model.", "detector_model.", ("tracker_model.", "tracker_neck."))
IMAGE = Layout("image", "detr_decoder.", "", ())
LAYOUTS = (META, VIDEO, IMAGE)


@dataclass(frozen=True)
class Contents:
    """What weights files hold: mapped, not read.

    Attributes:
        layout: How the files name it.
        detector: By `Sam3Model`'s names; what has no such name keeps its own.
        tracker: By the files' own names.
    """

    layout: Layout
    detector: dict[str, Tensor]
    tracker: dict[str, Tensor]


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
    if layout is META:
        return Contents(layout, meta_keys.from_meta(rest), tracker)
    return Contents(layout, {name.removeprefix(layout.detector): t for name, t in rest.items()}, tracker)


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
    try:
        with no_init_weights():
            return Sam3Model(Sam3Config.from_dict(dict(config)))
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


def misfits(expected: Mapping[str, Tensor], detector: Mapping[str, Tensor]) -> list[str]:
    """What keeps tensors from being the whole model, one line each: the missing, the unexpected, the misshapen.

    Args:
        expected: The model's own, for their names and shapes.
        detector: By the model's names.
    """
    common = sorted(expected.keys() & detector.keys())
    return [
        *(f"missing: {name}" for name in sorted(expected.keys() - detector.keys())),
        *(f"unexpected: {name}" for name in sorted(detector.keys() - expected.keys())),
        *(
            f"wrongly shaped: {name} {tuple(detector[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in common
            if detector[name].shape != expected[name].shape
        ),
        *(
            f"wrongly typed: {name} {detector[name].dtype} instead of a float of 16 bits or more"
            for name in common
            if detector[name].dtype not in WEIGHT_DTYPES
        ),
    ]


def misfits_in_a_line(lines: list[str]) -> str:
    """All counted, the first ten named."""
    shown = "; ".join(lines[:NAMED_TENSORS]) + ("; …" if len(lines) > NAMED_TENSORS else "")
    return f"{len(lines):,} tensors are missing, unexpected or wrongly shaped ({shown})"


def fill(
    model: Sam3Model, detector: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Sam3Model:
    """Give a model the tensors that fit it (see `misfits`), one at a time, so that no second copy ever stands.

    What is on the CPU in its own dtype stays mapped: it is read when it is first used.

    Args:
        model: From `unset_model`.
        detector: By the model's names; emptied.
        device: Where parameters and buffers go.
        dtype: Of the parameters. Buffers, the tables of rotary positions, stay as they are.
    """
    placed = {}
    for name in list(detector):
        mapped = detector.pop(name)
        placed[name] = mapped.to(device).to(dtype).contiguous()  # converted there, where it is fast
        if placed[name].data_ptr() != mapped.data_ptr():
            release_pages(mapped)
    model.load_state_dict(placed, assign=True)
    filled: Sam3Model = model.to(device).eval().requires_grad_(False)
    return filled
