"""What it costs to look at a checkpoint and to load it: host memory, and time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sam3_runner import loading
from sam3_runner.checkpoint import DEMO_CHECKPOINT, Checkpoint
from sam3_runner.info import describe
from tests.sam3_runner.meta_checkpoint import to_meta

CPU = torch.device("cpu")
NUMBERS_IN_A_PAGE = 1024


def random_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = loading.unset_model(config).state_dict()
    return {name: torch.rand(tensor.shape) for name, tensor in shapes.items()}


def peak_bytes_of(call: Callable[[], object]) -> int:
    """By how much the process's resident memory rose at its highest while it ran."""
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    call()
    return resident_bytes("VmHWM") - before


def resident_bytes(which: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{which}:\s+(\d+) kB", status)[0]) * 1024


def load(path: Path, dtype: torch.dtype) -> None:
    """To the last page: what stays mapped is only read when it is used."""
    for tensor in Checkpoint.open(path).load_model(CPU, dtype).parameters():
        tensor.flatten()[::NUMBERS_IN_A_PAGE].sum()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `sam3.pt` of a third of a gigabyte, nearly all of it in a few tensors."""
    folder = tmp_path_factory.mktemp("large")
    config = json.loads((DEMO_CHECKPOINT / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 150_000
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((DEMO_CHECKPOINT / "tokenizer.json").read_bytes())
    tensors = random_tensors(config)
    torch.save(to_meta(tensors), folder / "sam3.pt")
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["sam3.pt", "model.safetensors"])
def test_info_reads_no_weights_and_loading_peaks_at_the_size_of_the_file(large: Path, name: str) -> None:
    path = large / name
    size = path.stat().st_size
    assert size > 200e6
    load(DEMO_CHECKPOINT, torch.float32)  # whatever the libraries allocate but once
    assert peak_bytes_of(lambda: describe(Checkpoint.open(path))) < 0.1 * size
    assert 0.8 * size < peak_bytes_of(lambda: load(path, torch.float32)) < 1.3 * size
    assert peak_bytes_of(lambda: load(path, torch.bfloat16)) < 0.8 * size, "what was converted is let go"
