"""One set of weights in every form that the runner loads."""

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sam3_runner import loading
from tests.sam3_runner.meta_checkpoint import clicks_to_meta, to_meta

Writer = Callable[[Path, Path], Path]


def tensors_of(source: Path) -> dict[str, Tensor]:
    return load_file(source / "model.safetensors")


def click_tensors(source: Path) -> dict[str, Tensor]:
    """An interactive head for this detector, by `ClickModel`'s names: right in form, blind in answer."""
    return dict(_click_tensors(source))


@functools.cache
def _click_tensors(source: Path) -> dict[str, Tensor]:
    config = json.loads((source / "config.json").read_text())
    with torch.device("meta"):
        shapes = loading.unset_click_model(config, {}).state_dict()
    generator = torch.Generator().manual_seed(3)
    return {name: _drawn(name, tensor.shape, generator).half() for name, tensor in shapes.items()}


def _drawn(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.1 * drawn
    if len(shape) == 1:  # of a normalisation
        return 1 + 0.1 * drawn
    is_table = name.endswith(("embed.weight", "embedding", "token.weight", "tokens.weight"))
    return drawn if is_table else drawn / math.sqrt(math.prod(shape[1:]))


def video_tensors(source: Path) -> dict[str, Tensor]:
    """With what the video layout holds beside the detector's weights: the tracker."""
    detector = {f"detector_model.{name}": tensor for name, tensor in tensors_of(source).items()}
    clicks = click_tensors(source)
    named = {
        f"tracker_{name}" if name.startswith("neck.") else f"tracker_model.{name}": tensor
        for name, tensor in clicks.items()
    }
    positions = clicks["prompt_encoder.shared_embedding.positional_embedding"]
    return {
        **detector,
        **named,
        "tracker_model.shared_image_embedding.positional_embedding": positions.clone(),
        "tracker_model.memory_encoder.projection.bias": torch.ones(3),
        "tracker_model.no_object_pointer": torch.ones(1, 4),
    }


def meta_tensors(source: Path) -> dict[str, Tensor]:
    """With what `sam3.pt` holds beside the detector's weights: the tracker, and rotary tables."""
    table = torch.view_as_complex(torch.ones(4, 2, 2))
    return {
        **to_meta(tensors_of(source)),
        **clicks_to_meta(click_tensors(source)),
        "detector.backbone.vision_backbone.trunk.blocks.0.attn.freqs_cis": table,
        "tracker.maskmem_tpos_enc": torch.ones(7),
        "tracker.transformer.encoder.norm.bias": torch.ones(3),
    }


def neighbours(source: Path, folder: Path) -> Path:
    """What lies beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(source / name, folder / name)
    return folder


def image_directory(source: Path, folder: Path) -> Path:
    save_file(tensors_of(source), neighbours(source, folder) / "model.safetensors")
    return folder


def video_directory(source: Path, folder: Path) -> Path:
    save_file(video_tensors(source), neighbours(source, folder) / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "sam3_video", "detector_config": config}))
    return folder


def sharded_directory(source: Path, folder: Path) -> Path:
    tensors = tensors_of(neighbours(source, folder) and source)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def image_file(source: Path, folder: Path) -> Path:
    return image_directory(source, folder) / "model.safetensors"


def video_file(source: Path, folder: Path) -> Path:
    return video_directory(source, folder) / "model.safetensors"


def meta_file(source: Path, folder: Path) -> Path:
    file = neighbours(source, folder) / "sam3.pt"
    torch.save(meta_tensors(source), file)
    return file


def meta_file_under_model(source: Path, folder: Path) -> Path:
    file = neighbours(source, folder) / "sam3.pt"
    torch.save({"model": meta_tensors(source), "epoch": 3}, file)
    return file


def meta_file_of_detector(source: Path, folder: Path) -> Path:
    """As Meta's image model is saved: with the tracker's pyramid, and without the tracker."""
    file = neighbours(source, folder) / "sam3.pt"
    kept = {name: tensor for name, tensor in meta_tensors(source).items() if name.startswith("detector.")}
    torch.save(kept, file)
    return file


def meta_directory(source: Path, folder: Path) -> Path:
    return meta_file(source, folder).parent


def meta_safetensors(source: Path, folder: Path) -> Path:
    file = neighbours(source, folder) / "sam3.safetensors"
    tensors = {name: tensor for name, tensor in meta_tensors(source).items() if not tensor.is_complex()}
    save_file(tensors, file)
    return file


def pt_named_safetensors(source: Path, folder: Path) -> Path:
    return meta_file(source, folder).rename(folder / "weights.safetensors")


def safetensors_named_pt(source: Path, folder: Path) -> Path:
    return image_file(source, folder).rename(folder / "weights.pt")


FORMS: dict[str, Writer] = {
    "Hugging Face directory, image layout": image_directory,
    "Hugging Face directory, video layout": video_directory,
    "Hugging Face directory, in shards": sharded_directory,
    "one safetensors file, image layout": image_file,
    "one safetensors file, video layout": video_file,
    "one safetensors file, Meta's names": meta_safetensors,
    "sam3.pt": meta_file,
    "sam3.pt, under model": meta_file_under_model,
    "sam3.pt, the detector alone": meta_file_of_detector,
    "directory with sam3.pt": meta_directory,
    "PyTorch's zip under the name of safetensors": pt_named_safetensors,
    "safetensors under the name of a .pt": safetensors_named_pt,
}

# Those with an interactive head.
CLICKED_FORMS = (
    "Hugging Face directory, video layout",
    "one safetensors file, video layout",
    "one safetensors file, Meta's names",
    "sam3.pt",
    "sam3.pt, under model",
    "directory with sam3.pt",
    "PyTorch's zip under the name of safetensors",
)
