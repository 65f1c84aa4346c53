"""Which images a command line names, and what each is called in the results."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# By name alone: what a file really is, the service tells by its bytes.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif", ".avif", ".bmp", ".tif", ".tiff", ".gif"}
)
_MAGIC = frozenset("*?[")


class InputError(Exception):
    """The command line names nothing, or two things by one name, or what has no name below a folder."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image to segment.

    Attributes:
        path: Where it is.
        name: In the results: its path below the folder or the pattern's fixed part that named it, with slashes and
            never with `..`, so that what is named after it lies below the results.
    """

    path: Path
    name: str


def find_images(arguments: Sequence[str], masks: Path) -> list[ImageFile]:
    """Everything that the arguments name, each file once, in the order of names.

    Args:
        arguments: A file is taken whatever its name. Of a folder (all the way down) and of a pattern such as
            `photos/**/*.jpg` only images are, and nothing that is hidden.
        masks: A folder that is left out, so that results are not segmented in their turn.
    Raises:
        InputError: an argument names no image, or goes up again behind a wildcard, or two files would have one name.
    """
    found: dict[str, ImageFile] = {}
    for argument in arguments:
        images = list(_named_by(argument, masks.resolve()))
        if not images:
            raise InputError(f"{argument} names no image: expected a file, a folder of images or a pattern")
        for image in images:
            other = found.setdefault(image.name, image)
            if other.path.resolve() != image.path.resolve():
                raise InputError(
                    f"{other.path} and {image.path} would both be {image.name} in the results: name the folder that "
                    "both are in, or a pattern in quotes"
                )
    return [found[name] for name in sorted(found)]


def _named_by(argument: str, masks: Path) -> Iterator[ImageFile]:
    path = Path(argument)
    if path.is_dir():
        yield from _images_below(path, _walk(path), masks)
    elif os.path.lexists(path):
        yield ImageFile(path, path.name)
    elif _MAGIC & set(argument):
        root = Path(*_fixed_parts(path))
        if ".." in path.relative_to(root).parts:
            raise InputError(
                f"{argument} goes up again behind a wildcard: name the folder that its images are in"
            )
        yield from _images_below(root, map(Path, glob.iglob(argument, recursive=True)), masks)


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def _fixed_parts(pattern: Path) -> Iterator[str]:
    for part in pattern.parts[:-1]:
        if _MAGIC & set(part):
            return
        yield part


def _images_below(root: Path, paths: Iterator[Path], masks: Path) -> Iterator[ImageFile]:
    for path in paths:
        is_result = path.resolve().is_relative_to(masks)
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not is_result:
            yield ImageFile(path, path.relative_to(root).as_posix())
