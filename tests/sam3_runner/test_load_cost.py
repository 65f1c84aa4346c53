"""What it costs to look at a checkpoint and to load it: host memory, and time."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Sam3Config, Sam3Model

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


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full SAM3 with random weights, 3.4 GB, in two forms, both in the page cache."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "config.json").write_text(json.dumps(Sam3Config().to_dict()))
    tensors = random_tensors({})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save({"model": to_meta(tensors)}, folder / "sam3.pt")
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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["sam3.pt", "model.safetensors"])
def test_the_full_sam3_peaks_at_the_size_of_its_file(full: Path, name: str) -> None:
    size = (full / name).stat().st_size
    assert size > 3.3e9
    peaks = {
        "info": peak_bytes_of(lambda: describe(Checkpoint.open(full / name))) / size,
        "float32": peak_bytes_of(lambda: load(full / name, torch.float32)) / size,
        "bfloat16": peak_bytes_of(lambda: load(full / name, torch.bfloat16)) / size,
    }
    print(name, size, {what: round(peak, 3) for what, peak in peaks.items()})
    assert peaks["info"] < 0.05
    assert peaks["float32"] < 1.3
    assert peaks["bfloat16"] < 0.7


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_full_sam3_loads_faster_than_by_the_library(full: Path) -> None:
    """Until every parameter has been read once; turn by turn, the best of three."""
    model = full / "model.safetensors"

    def by_the_library() -> None:
        loaded = Sam3Model.from_pretrained(full, dtype="float32", local_files_only=True)
        for tensor in loaded.eval().parameters():
            tensor.flatten()[::NUMBERS_IN_A_PAGE].sum()

    ways: dict[str, Callable[[], None]] = {
        "library": by_the_library,
        "safetensors": lambda: load(model, torch.float32),
        "sam3.pt": lambda: load(full / "sam3.pt", torch.float32),
        "sam3.pt as bfloat16": lambda: load(full / "sam3.pt", torch.bfloat16),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(3):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - started)
    print({name: f"{seconds:.2f} s" for name, seconds in best.items()})
    assert best["safetensors"] < best["library"]
    assert best["sam3.pt"] < best["library"]
