"""What a checkpoint is, told from its headers: nothing of the weights is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sam3_runner import loading
from sam3_runner.checkpoint import Checkpoint
from sam3_runner.errors import CheckpointError
from sam3_runner.text import PromptChecker
from sam3_runner.weights_file import form_of


@dataclass(frozen=True)
class Description:
    """A checkpoint, as `python -m sam3_runner info` shows it.

    Attributes:
        lines: What it is: a label and what there is to say.
        faults: What keeps it from being served, one line each; none if it can be.
    """

    lines: tuple[tuple[str, str], ...]
    faults: tuple[str, ...]


def describe(checkpoint: Checkpoint) -> Description:
    """Read the headers of a checkpoint's files and compare them with the model.

    Raises:
        CheckpointError: a file is broken, or this is not SAM3.
    """
    contents = loading.read_contents(checkpoint.files)
    with torch.device("meta"):  # names and shapes, without memory behind them
        expected = loading.unset_model(checkpoint.config).state_dict()
        misfits = {"model": loading.misfits(expected, contents.detector)}
        if contents.clicks:
            head = loading.unset_click_model(checkpoint.config, checkpoint.tracker_config).state_dict()
            misfits["interactive head"] = loading.misfits(head, contents.clicks)
    faults = [
        f"{checkpoint.path} does not fit the {part}: {loading.misfits_in_a_line(wrong)}"
        for part, wrong in misfits.items()
        if wrong
    ]
    does_fit = not faults
    try:
        PromptChecker.from_checkpoint(checkpoint.path)
        tokenizer = "present"
    except CheckpointError as error:
        faults.append(str(error))
        tokenizer = "missing"
    size = checkpoint.input_size_px
    lines = {
        "form": f"{form_of(checkpoint.files[0]).value}, {contents.layout.name} layout",
        "files": ", ".join(file.name for file in checkpoint.files),
        "size": f"{sum(file.stat().st_size for file in checkpoint.files) / 1e9:.3f} GB",
        "detector": _parameters(contents.detector.values()),
        "tracker": _parameters(contents.tracker.values()) if contents.tracker else "none",
        "clicks": f"answered, by {_parameters(contents.clicks.values())}"
        if contents.clicks
        else "not answered",
        "input": f"{size} × {size} px, texts of up to {checkpoint.max_text_tokens} tokens",
        "tokenizer": tokenizer,
        "fits": "yes, every tensor" if does_fit else "no",
    }
    return Description(tuple(lines.items()), tuple(faults))


def _parameters(tensors: Iterable[Tensor]) -> str:
    tensors = list(tensors)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    numbers = sum(tensor.numel() for tensor in tensors)
    return f"{numbers:,} parameters in {len(tensors):,} tensors, {', '.join(dtypes)}"
