"""Where SAM3's weights lie, and how they become a model. Nothing is ever left at random. Needs no torch to look."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3_runner.errors import CheckpointError
from sam3_runner.weights_file import form_of, names_any, unreadable

if TYPE_CHECKING:
    import torch
    from transformers import Sam3Model

    from sam3_runner.clicks import ClickModel

DEMO_CHECKPOINT = Path(__file__).parent.parent / "weights" / "demo"
MODEL_TYPES = ("sam3", "sam3_video")  # the image layout, and the video layout, which holds the detector too
# Of a directory's files, the first that is there: many directories hold the same weights twice.
INDEX, PREFERRED = "model.safetensors.index.json", ("model.safetensors", "sam3.pt")
WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
EXPECTED = "expected SAM3's weights: Meta's sam3.pt, a safetensors file, or a Hugging Face directory"
# What some names begin with where there is an interactive head: those of its mask decoder, Meta's and transformers'.
CLICK_MARKS = ("tracker.sam_mask_decoder.", "tracker_model.mask_decoder.")
# What a file without config.json is: the one SAM3 that Meta published.
FULL_INPUT_SIZE_PX = 1008
FULL_MAX_TEXT_TOKENS = 32


@dataclass(frozen=True)
class Checkpoint:
    """SAM3's weights on disk, found but not loaded.

    Attributes:
        path: As given: a directory or a file.
        files: The weights: one file, or the shards of one.
        config: The detector's part of `config.json`; empty for a file without one, which is the full SAM3.
        tracker_config: The tracker's part; empty if it has none.
    """

    path: Path
    files: tuple[Path, ...]
    config: dict[str, Any]
    tracker_config: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Find the weights, and tell what kind of files they are, by their content; nothing is loaded.

        Raises:
            CheckpointError: nothing is there, or what is there is no weights file or of another model.
        """
        path = Path(path)
        try:
            is_directory, is_there = path.is_dir(), path.exists()
        except OSError as error:
            raise unreadable(path, error) from error
        if not is_there:
            raise CheckpointError(f"{path} does not exist: {EXPECTED}")
        config = _read_config(path if is_directory else path.parent, is_whole=is_directory)
        files = _weights_in(path) if is_directory else (path,)
        for file in files:
            form_of(file)
        detector, tracker = (config.get(part) for part in ("detector_config", "tracker_config"))
        return cls(path, files, config if detector is None else detector, tracker or {})

    @property
    def folder(self) -> Path:
        """Where what belongs to the weights lies: the tokenizer, `config.json`."""
        return self.files[0].parent

    @property
    def version(self) -> str:
        """The directory's or the file's name: "demo" for the demo checkpoint, "sam3" for `sam3.pt`."""
        path = self.path.resolve()
        return path.name if path.is_dir() else path.stem

    @property
    def input_size_px(self) -> int:
        """Side of the square that images are resized to."""
        vision = self.config.get("vision_config", {}).get("backbone_config", {})
        size: int | list[int] = vision.get("image_size", FULL_INPUT_SIZE_PX)
        return size if isinstance(size, int) else size[0]

    @property
    def max_text_tokens(self) -> int:
        """Tokens that the text encoder reads, start and end included."""
        text = self.config.get("text_config", {})
        return int(text.get("max_position_embeddings", FULL_MAX_TEXT_TOKENS))

    @property
    def answers_clicks(self) -> bool:
        """Whether the interactive head lies with the detector, told by the names in the files.

        Raises:
            CheckpointError: a file is cut off or damaged.
        """
        return any(names_any(file, CLICK_MARKS) for file in self.files)

    def load_model(self, device: torch.device, dtype: torch.dtype | None = None) -> Sam3Model:
        """Load the weights straight onto `device`, ready for inference.

        Host memory peaks at the file's size, or at the converted size where `dtype` is not the file's own. On a CPU
        in the file's own dtype the parameters stay mapped: do not write into the file while the model lives.

        Args:
            device: Where parameters and buffers go.
            dtype: Of the parameters; float32 if not given.
        Raises:
            CheckpointError: a file is broken, or a tensor is missing, left over or of another shape; the first ten
                are named, and all are counted.
        """
        import torch

        from sam3_runner import loading

        contents = loading.read_contents(self.files)
        model = loading.unset_model(self.config)
        if wrong := loading.misfits(model.state_dict(), contents.detector):
            raise CheckpointError(f"{self.path} does not fit the model: {loading.misfits_in_a_line(wrong)}")
        if contents.layout is not loading.IMAGE:  # with the tracker beside it: Meta's, in whatever form
            loading.compute_as_meta(model)
        return loading.fill(model, contents.detector, device, dtype or torch.float32)

    def load_click_model(self, device: torch.device) -> ClickModel | None:
        """Load what answers clicks, in float32; None if the files hold no interactive head.

        Args:
            device: Where parameters and buffers go.
        Raises:
            CheckpointError: as of `load_model`; what only a video needs is left where it is.
        """
        import torch

        from sam3_runner import loading

        contents = loading.read_contents(self.files)
        if not contents.clicks:
            return None
        model = loading.unset_click_model(self.config, self.tracker_config)
        if wrong := loading.misfits(model.state_dict(), contents.clicks):
            raise CheckpointError(
                f"{self.path} does not fit the interactive head: {loading.misfits_in_a_line(wrong)}"
            )
        return loading.fill(model, contents.clicks, device, torch.float32)


def _weights_in(directory: Path) -> tuple[Path, ...]:
    try:
        names = sorted(file.name for file in directory.iterdir())
    except OSError as error:
        raise unreadable(directory, error) from error
    if INDEX in names:
        return _shards(directory)
    weights = [name for name in names if name.endswith(WEIGHTS_SUFFIXES)]
    for name in PREFERRED:
        if name in weights:
            return (directory / name,)
    if not weights:
        raise CheckpointError(f"{directory} holds no weights: {EXPECTED}")
    if len(weights) > 1:
        raise CheckpointError(
            f"{directory} holds several weights files ({', '.join(weights)}): name one of them"
        )
    return (directory / weights[0],)


def _shards(directory: Path) -> tuple[Path, ...]:
    """The files that the index names, all of them there."""
    index = directory / INDEX
    placed = _read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{index} has no weight_map: expected which tensor is in which file")
    names = sorted({str(name) for name in placed.values()})
    if strays := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index} names {strays[0]!r}: expected files of the same directory")
    if missing := [name for name in names if not (directory / name).exists()]:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of its {len(names)} weights files: {', '.join(missing)}; "
            "fetch the rest"
        )
    return tuple(directory / name for name in names)


def _read_config(folder: Path, *, is_whole: bool) -> dict[str, Any]:
    """The whole of `config.json`; empty if there is none.

    Args:
        folder: Where `config.json` may lie.
        is_whole: Whether the folder was named, and not a file in it, which may have strangers for neighbours.
    """
    file = folder / "config.json"
    if not file.exists():
        return {}
    config = _read_json(file)
    if config.get("model_type") not in MODEL_TYPES:
        if not is_whole:
            return {}
        raise CheckpointError(
            f"{file} is of model_type {config.get('model_type')!r}: expected one of {MODEL_TYPES}"
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content
