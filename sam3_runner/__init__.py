"""SAM3 as a Python library: images and prompts in, instances as run-length masks out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam3_runner.images import open_image
    from sam3_runner.segmenter import Segmenter
    from sam3_runner.types import Box, Point, Prompt, Selection

__all__ = ["Box", "Point", "Prompt", "Segmenter", "Selection", "open_image"]

_HOMES = {
    "Segmenter": "segmenter",
    "open_image": "images",
    **dict.fromkeys(("Box", "Point", "Prompt", "Selection"), "types"),
}


def __getattr__(name: str) -> Any:
    """Import on first use: the web workers, which only want the types, do without PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
