from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Sam3Config, Sam3Model

from sam3_runner.checkpoint import DEMO_CHECKPOINT, Checkpoint
from sam3_runner.errors import CheckpointError
from sam3_runner.segmenter import Segmenter
from sam3_runner.text import PromptChecker
from tests.sam3_runner.checkpoint_forms import FORMS, meta_file, video_directory

CPU = torch.device("cpu")


@pytest.fixture
def copy(random_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_checkpoint, tmp_path / "copy"))


@pytest.fixture(scope="module")
def reference(random_checkpoint: Path) -> Sam3Model:
    """The library's own loading."""
    model = Sam3Model.from_pretrained(random_checkpoint, dtype="float32", local_files_only=True)
    loaded: Sam3Model = model.eval()
    return loaded


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written holds NaN, not luck."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_to_the_same_model_bit_for_bit(
    random_checkpoint: Path, reference: Sam3Model, tmp_path: Path, form: str
) -> None:
    path = FORMS[form](random_checkpoint, tmp_path / "sam3")
    model = Checkpoint.open(path).load_model(CPU)
    for ours, theirs in (
        (dict(model.named_parameters()), dict(reference.named_parameters())),
        (dict(model.named_buffers()), dict(reference.named_buffers())),
    ):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor), name
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_model_is_built_with_the_attention_that_the_library_chooses(reference: Sam3Model) -> None:
    model = Checkpoint.open(DEMO_CHECKPOINT).load_model(CPU)
    chosen = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    assert chosen == [
        module.config._attn_implementation for module in reference.modules() if hasattr(module, "config")
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_loaded_in_the_dtype_asked_for_and_tables_stay_exact(
    random_checkpoint: Path, reference: Sam3Model, dtype: torch.dtype
) -> None:
    model = Checkpoint.open(random_checkpoint).load_model(CPU, dtype)
    for name, tensor in reference.named_parameters():
        assert torch.equal(model.get_parameter(name), tensor.to(dtype)), name
    for name, tensor in reference.named_buffers():
        assert torch.equal(model.get_buffer(name), tensor), name


@pytest.mark.parametrize("form", ["sam3.pt", "one safetensors file, image layout"])
def test_on_a_cpu_in_the_dtype_of_the_file_parameters_stay_mapped(
    random_checkpoint: Path, tmp_path: Path, form: str
) -> None:
    path = FORMS[form](random_checkpoint, tmp_path / "sam3")
    model = Checkpoint.open(path).load_model(CPU, torch.float16)
    maps = [
        line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))
    ]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    elsewhere = [
        name
        for name, tensor in model.named_parameters()
        if not any(first <= tensor.data_ptr() < last for first, last in ranges)
    ]
    # Meta's text projection is turned, so it is copied.
    assert elsewhere == (["text_encoder.text_projection.weight"] if path.suffix == ".pt" else [])


def test_a_served_file_that_is_replaced_does_not_change_the_model(copy: Path, tmp_path: Path) -> None:
    model = Checkpoint.open(copy).load_model(CPU, torch.float16)
    weights = copy / "model.safetensors"
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    save_file({name: torch.zeros_like(t) for name, t in load_file(weights).items()}, tmp_path / "new")
    (tmp_path / "new").replace(weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


def change_tensors(path: Path, change: str) -> None:
    tensors = load_file(path / "model.safetensors")
    name = "detr_decoder.query_embed.weight"
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["detr_decoder.extra.weight"] = torch.zeros(3)
    elif change == "wrongly shaped":
        tensors[name] = torch.zeros(5, 5)
    else:
        tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change", ["missing", "unexpected", "wrongly shaped", "wrongly typed"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_the_tensor_named(copy: Path, change: str) -> None:
    change_tensors(copy, change)
    with pytest.raises(
        CheckpointError, match=rf": 1 tensors .*{change}: detr_decoder\.(query_embed|extra)\.weight"
    ):
        Checkpoint.open(copy).load_model(CPU)


def test_of_many_misfits_ten_are_named_and_all_counted(random_checkpoint: Path, tmp_path: Path) -> None:
    path = meta_file(random_checkpoint, tmp_path)
    tensors = torch.load(path)
    torch.save({name: t for name, t in tensors.items() if "trunk.blocks" not in name}, path)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path).load_model(CPU)
    layers = [name for name in tensors if "trunk.blocks" in name and "freqs_cis" not in name]
    missing = len(layers) + 2 * 2 * len(
        [name for name in layers if "qkv.weight" in name]
    )  # fused: three in one
    assert f"{missing} tensors are missing" in str(caught.value)
    assert str(caught.value).count("missing: ") == 10
    assert "\n" not in str(caught.value)


def test_a_tensor_of_sam3_pt_that_no_table_knows_is_refused_by_its_own_name(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    path = meta_file(random_checkpoint, tmp_path)
    torch.save(torch.load(path) | {"detector.transformer.decoder.novelty": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"unexpected: detector\.transformer\.decoder\.novelty"):
        Checkpoint.open(path).load_model(CPU)


def test_a_file_without_a_configuration_is_the_full_sam3(random_checkpoint: Path, tmp_path: Path) -> None:
    path = meta_file(random_checkpoint, tmp_path)
    (tmp_path / "config.json").unlink()
    checkpoint, full = Checkpoint.open(path), Sam3Config()
    assert checkpoint.config == {}
    assert checkpoint.input_size_px == full.vision_config.backbone_config.image_size
    assert checkpoint.max_text_tokens == full.text_config.max_position_embeddings
    with pytest.raises(CheckpointError, match="does not fit the model"):  # being the small one
        checkpoint.load_model(CPU)


def test_a_stranger_s_configuration_beside_a_file_does_not_count(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    path = meta_file(random_checkpoint, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert Checkpoint.open(path).config == {}


def test_the_tokenizer_must_lie_beside_a_file(random_checkpoint: Path, tmp_path: Path) -> None:
    path = meta_file(random_checkpoint, tmp_path)
    assert PromptChecker.from_checkpoint(path).max_tokens == 32
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        PromptChecker.from_checkpoint(path)


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param({}, "holds no weights", id="nothing"),
        pytest.param({"config.json": "{"}, "cannot be read", id="broken config"),
        pytest.param({"config.json": "[1]"}, "not a JSON object", id="list"),
        pytest.param({"config.json": '{"model_type": "sam"}'}, "model_type 'sam'", id="another model"),
        pytest.param({"config.json": '{"model_type": "sam3"}'}, "holds no weights", id="config alone"),
        pytest.param({"a.pt": "", "b.pt": ""}, r"several weights files \(a.pt, b.pt\)", id="two"),
        pytest.param({"model.safetensors.index.json": "{}"}, "has no weight_map", id="empty index"),
        pytest.param(
            {"model.safetensors.index.json": '{"weight_map": {"a": "../x.safetensors"}}'},
            "expected files of the same directory",
            id="index that leads out",
        ),
    ],
)
def test_a_directory_that_is_not_sam3_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_is_named(random_checkpoint: Path, tmp_path: Path) -> None:
    path = FORMS["Hugging Face directory, in shards"](random_checkpoint, tmp_path)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"lacks 1 of its 2 weights files: model-00002-of-00002\.safetensors"
    ):
        Checkpoint.open(path)


def test_a_configuration_of_impossible_dimensions_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["hidden_size"] = 7
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json does not describe a SAM3"):
        Checkpoint.open(copy).load_model(CPU)


@pytest.mark.parametrize("writer", [video_directory, meta_file])
def test_a_segmenter_is_made_of_it(random_checkpoint: Path, tmp_path: Path, writer) -> None:
    info = Segmenter.from_checkpoint(writer(random_checkpoint, tmp_path / "sam3")).info
    assert (info.input_size_px, info.model_version) == (240, "sam3")


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
