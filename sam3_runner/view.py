"""`python -m sam3_runner view`: what the model finds in one image, as a picture and a table."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from sam3_runner import rle
from sam3_runner.drawing import draw_overlay, numbered
from sam3_runner.errors import InvalidInput
from sam3_runner.images import open_image
from sam3_runner.segmenter import Segmenter
from sam3_runner.types import Prompt, Segmentation

_HEADING = ("prompt", "score", "box x0 y0 x1 y1", "area px", "share")
_JPEG_QUALITY = 92  # outlines and labels stay clean


@dataclass(frozen=True)
class View:
    """What `view` found.

    Attributes:
        rows: One line of the table per instance, and one for each prompt that found nothing.
        timings_ms: Stage → how long it took.
        device: Where the model ran.
    """

    rows: tuple[tuple[str, ...], ...]
    timings_ms: dict[str, float]
    device: str

    @property
    def lines(self) -> Iterator[str]:
        """The table and the timings, for a terminal."""
        table = (_HEADING, *self.rows)
        widths = [max(len(row[column]) for row in table) for column in range(len(_HEADING))]
        for row in table:
            name, *numbers = (
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            yield "  ".join((name, *numbers)).rstrip()
        stages = ", ".join(f"{stage} {ms:,.0f} ms" for stage, ms in self.timings_ms.items())
        yield f"{stages} ({self.device})"


def view(image: Path, prompts: Sequence[Prompt], checkpoint: Path, out: Path) -> View:
    """Segment an image and write the overlay; on a GPU if there is one.

    Args:
        image: Of any kind that the service reads.
        prompts: At least one; boxes in pixels of the upright image.
        checkpoint: In any form that `Checkpoint.open` knows.
        out: The overlay, in the form that its name's ending says.
    Raises:
        InvalidInput: the image or a prompt is at fault, or `out` is the image itself, or no picture's name.
        RunnerError: the checkpoint is at fault, or the device.
        OSError: the image cannot be read, or the overlay not written.
    """
    _check_out(out, image)
    clock = _Clock()
    with clock.stage("read"):
        pixels = open_image(image.read_bytes())
    with clock.stage("load model"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        segmenter = Segmenter.from_checkpoint(checkpoint, device)
    with clock.stage("segment"):
        found = segmenter.segment(pixels, prompts)
    with clock.stage("draw"):
        Image.fromarray(_overlay(pixels, prompts, found)).save(out, quality=_JPEG_QUALITY)
    rows = [
        row for prompt, one in zip(prompts, found, strict=True) for row in _rows(prompt, one, pixels.shape)
    ]
    return View(tuple(rows), clock.stages_ms, f"{segmenter.info.model_version} on {segmenter.info.device}")


@dataclass
class _Clock:
    stages_ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.stages_ms[name] = (time.perf_counter() - started) * 1000


def _check_out(out: Path, image: Path) -> None:
    """Before the model is loaded: a name that cannot be written costs nobody's patience."""
    if out.suffix.lower() not in (".jpg", ".jpeg", ".png", ".webp"):
        raise InvalidInput(f"{out} must end in .jpg, .png or .webp")
    if out.resolve() == image.resolve():
        raise InvalidInput(f"{out} is the image itself: give the overlay another name with --out")


def _name_of(prompt: Prompt) -> str:
    """A prompt in a word or two."""
    return "like the boxes" if prompt.text is None else prompt.text


def _overlay(
    pixels: npt.NDArray[np.uint8], prompts: Sequence[Prompt], found: Sequence[Segmentation]
) -> npt.NDArray[np.uint8]:
    named = [(_name_of(prompt), one) for prompt, one in zip(prompts, found, strict=True)]
    return draw_overlay(pixels, numbered(named, (pixels.shape[0], pixels.shape[1])))


def _rows(prompt: Prompt, found: Segmentation, shape: tuple[int, ...]) -> Iterator[tuple[str, ...]]:
    if not found.masks:
        yield _name_of(prompt), "–", "nothing found", "0", "0.0 %"
    for score, box, mask in zip(found.scores, found.boxes_xyxy_px, found.masks, strict=True):
        area_px = rle.area_px(mask)
        yield (
            _name_of(prompt),
            f"{score:.3f}",
            " ".join(f"{edge:.0f}" for edge in box),
            f"{area_px:,}",
            f"{100 * area_px / (shape[0] * shape[1]):.1f} %",
        )
