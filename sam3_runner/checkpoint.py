"""Where SAM3's weights lie, and how they become a model. Nothing is ever left at random."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3_runner.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import Sam3Model

DEMO_CHECKPOINT = Path(__file__).parent.parent / "weights" / "demo"
MODEL_TYPES = ("sam3", "sam3_video")  # the image layout, and the video layout, which holds the detector too
NAMED_TENSORS = 10  # how many an error names; a wrong checkpoint has hundreds


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory of SAM3, looked at but not loaded.

    Attributes:
        path: The directory, with `config.json`, safetensors, tokenizer and image processor.
        config: The detector's part of `config.json`.
    """

    path: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Look at a directory without loading its weights.

        Raises:
            CheckpointError: it is not there, or not a directory of SAM3.
        """
        path = Path(path)
        if not path.exists():
            raise CheckpointError(f"{path} does not exist: expected a Hugging Face directory of SAM3")
        if not path.is_dir():
            raise CheckpointError(
                f"{path} is a file: expected a Hugging Face directory of SAM3 "
                "(config.json, model.safetensors, tokenizer.json)"
            )
        config = _read_json(path / "config.json")
        if config.get("model_type") not in MODEL_TYPES:
            raise CheckpointError(
                f"{path / 'config.json'} is of model_type {config.get('model_type')!r}: expected one of {MODEL_TYPES}"
            )
        return cls(path, config.get("detector_config", config))

    @property
    def version(self) -> str:
        """The directory's name: "demo" for the demo checkpoint."""
        return self.path.resolve().name

    @property
    def input_size_px(self) -> int:
        """Side of the square that images are resized to."""
        size: int | list[int] = self.config["vision_config"]["backbone_config"]["image_size"]
        return size if isinstance(size, int) else size[0]

    @property
    def max_text_tokens(self) -> int:
        """Tokens that the text encoder reads, start and end included."""
        return int(self.config["text_config"]["max_position_embeddings"])

    def load_model(self, device: torch.device) -> Sam3Model:
        """Load the weights, in float32, onto `device`, ready for inference.

        Raises:
            CheckpointError: a tensor is missing, left over or of another shape; the first ten are named.
        """
        from transformers import Sam3Config, Sam3Model

        if not list(self.path.glob("*.safetensors")):
            raise CheckpointError(f"{self.path} holds no .safetensors file")
        try:
            with _quiet_library():
                model, report = Sam3Model.from_pretrained(
                    self.path,
                    config=Sam3Config.from_dict(self.config),
                    dtype="float32",
                    local_files_only=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
        except Exception as error:  # safetensors, OSError, ValueError: all say that the files are broken
            raise CheckpointError(f"{self.path} cannot be loaded: {error}") from error
        self._refuse_misfits(report)
        loaded: Sam3Model = model.to(device).eval().requires_grad_(False)
        return loaded

    def _refuse_misfits(self, report: dict[str, Any]) -> None:
        kinds = {
            "missing": "missing_keys",
            "unexpected": "unexpected_keys",
            "wrongly shaped": "mismatched_keys",
        }
        misfits = [
            f"{kind}: {_name(key)}" for kind, keys in kinds.items() for key in sorted(report[keys], key=_name)
        ]
        if misfits:
            shown = "; ".join(misfits[:NAMED_TENSORS])
            raise CheckpointError(
                f"{self.path} does not fit the model: {len(misfits)} tensors are missing, unexpected or "
                f"wrongly shaped ({shown}{'; …' if len(misfits) > NAMED_TENSORS else ''})"
            )


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    """Keep transformers from printing a progress bar and tables of what does not fit: the error says it in a line."""
    from transformers.utils import logging as library

    verbosity, has_bar = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(library.CRITICAL)
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if has_bar:
            library.enable_progress_bar()


def _name(key: str | tuple[Any, ...]) -> str:
    """A tensor's name; mismatches come with their two shapes."""
    if isinstance(key, str):
        return key
    name, *shapes = key
    return f"{name} {' instead of '.join(str(tuple(shape)) for shape in shapes)}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: expected a Hugging Face directory of SAM3") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content
