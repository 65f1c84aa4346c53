from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sam3_runner.checkpoint import DEMO_CHECKPOINT, Checkpoint
from sam3_runner.errors import CheckpointError
from sam3_runner.segmenter import Segmenter

CPU = torch.device("cpu")


@pytest.fixture
def copy(random_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_checkpoint, tmp_path / "copy"))


def change_tensors(path: Path, change: str) -> None:
    tensors = load_file(path / "model.safetensors")
    name = "detr_decoder.query_embed.weight"
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["detr_decoder.extra.weight"] = torch.zeros(3)
    else:
        tensors[name] = torch.zeros(5, 5)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change", ["missing", "unexpected", "wrongly shaped"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_the_tensor_named(copy: Path, change: str) -> None:
    change_tensors(copy, change)
    with pytest.raises(CheckpointError, match=rf"{change}: detr_decoder\.(query_embed|extra)\.weight"):
        Checkpoint.open(copy).load_model(CPU)


def test_every_tensor_of_the_file_arrives_in_the_model(random_checkpoint: Path) -> None:
    model = Checkpoint.open(random_checkpoint).load_model(CPU)
    saved = load_file(random_checkpoint / "model.safetensors")
    loaded = model.state_dict()
    assert set(saved) == set(loaded)
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor.float()), name


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sam3.pt"
    file.write_bytes(b"anything")
    with pytest.raises(CheckpointError, match="is a file: expected a Hugging Face directory"):
        Checkpoint.open(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "is missing", id="no config"),
        pytest.param("{", "cannot be read", id="broken config"),
        pytest.param("[1]", "not a JSON object", id="list"),
        pytest.param('{"model_type": "sam"}', "model_type 'sam'", id="another model"),
    ],
)
def test_a_directory_that_is_not_sam3_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_a_truncated_weights_file_is_refused(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Checkpoint.open(copy).load_model(CPU)


def test_the_video_layout_loads_its_detector(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({"model_type": "sam3_video", "detector_config": config}))
    tensors = {f"detector_model.{name}": t for name, t in load_file(copy / "model.safetensors").items()}
    tensors["tracker_model.something"] = torch.zeros(2)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert Segmenter.from_checkpoint(copy).info.input_size_px == 240


def test_info_counts_what_is_loaded(demo: Segmenter) -> None:
    tensors = load_file(DEMO_CHECKPOINT / "model.safetensors")
    parameters = sum(tensor.numel() for tensor in tensors.values())
    assert demo.info.model_name == "SAM3"
    assert demo.info.model_version == "demo"
    assert demo.info.parameters == parameters
    assert demo.info.weights_size_gb == pytest.approx(4 * parameters / 1e9)
    assert (demo.info.device, demo.info.dtype) == ("cpu", "float32")


def test_the_demo_checkpoint_is_small_enough_to_live_in_the_repository() -> None:
    assert sum(file.stat().st_size for file in DEMO_CHECKPOINT.iterdir()) <= 8_000_000
