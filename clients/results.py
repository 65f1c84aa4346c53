"""Answers as files: masks as PNG, everything as one COCO document, one line of CSV per instance.

Every file is written whole or not at all: under another name first.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clients.client import Instance, S3ClientError
from clients.state import Answer, Found
from sam3_runner.masks import encode_png
from sam3_runner.rle import from_coco, union_rle

_PARTIAL = ".partial-"
_MAX_NAME_BYTES = 255 - len(_PARTIAL)  # what file systems allow, and is needed while a file is written
_MAX_SLUG_BYTES = 60
_HASH_DIGITS = 8
_CSV_COLUMNS = (
    "image",
    "prompt",
    "instance",
    "score",
    "x0",
    "y0",
    "x1",
    "y1",
    "area_px",
    "image_width",
    "image_height",
)


def mask_paths(masks: Path, name: str, prompts: Sequence[str]) -> dict[str, Path]:
    """Where each prompt's mask of an image goes: `masks/photos/a.jpg.red-circle.png`.

    What is too long for the name of a file is cut, and ends in a hash of the whole.
    """
    paths: dict[str, Path] = {}
    for prompt in prompts:
        slug = _cut(re.sub(r"\W+", "-", prompt).strip("-") or "prompt", _MAX_SLUG_BYTES)
        path, number = _mask_path(masks / name, slug), 1
        while path in paths.values():
            number += 1
            path = _mask_path(masks / name, f"{slug}-{number}")
        paths[prompt] = path
    return paths


def write_masks(paths: Mapping[str, Path], answer: Answer) -> None:
    """Write, for each prompt that has a path, the union of its instances.

    255 inside and 0 outside, of the upright image's size: byte for byte what the service stores.
    """
    size_hw = answer.image_size["height"], answer.image_size["width"]
    for found in answer.found:
        if path := paths.get(found.prompt):
            runs = [from_coco(_rle(instance)) for instance in found.instances]
            write_whole(path, encode_png(union_rle(runs, size_hw)))


def coco_document(answers: Mapping[str, Answer], prompts: Sequence[str], model: str) -> dict[str, Any]:
    """One COCO document of all images: a category per prompt, an annotation per instance.

    Segmentations are compressed run lengths; `bbox` is [x, y, width, height] in pixels; `score` stands beside them.
    """
    categories = {prompt: number for number, prompt in enumerate(prompts, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, answer) in enumerate(answers.items(), 1):
        images.append({"id": image_id, "file_name": name, **answer.image_size})
        for found, instance in _instances(answer):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": categories[found.prompt],
                    "segmentation": _rle(instance),
                    "bbox": _xywh(instance["box_xyxy_px"]),
                    "area": instance["area_px"],
                    "iscrowd": 0,
                    "score": instance["score"],
                }
            )
    return {
        "info": {"description": f"Segmented by {model}"},
        "licenses": [],
        "images": images,
        "categories": [{"id": number, "name": prompt} for prompt, number in categories.items()],
        "annotations": annotations,
    }


def write_coco(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document of `coco_document`."""
    write_whole(path, json.dumps(document, separators=(",", ":")).encode())


def write_csv(path: Path, answers: Mapping[str, Answer]) -> None:
    """Write one line per instance, best first within an image and a prompt; instances count from 0."""
    rows = (
        (
            name,
            found.prompt,
            number,
            instance["score"],
            *instance["box_xyxy_px"],
            instance["area_px"],
            answer.image_size["width"],
            answer.image_size["height"],
        )
        for name, answer in answers.items()
        for found in answer.found
        for number, instance in enumerate(found.instances)
    )
    write_whole(path, _csv(_CSV_COLUMNS, rows))


def write_failures(path: Path, failures: Mapping[str, S3ClientError]) -> None:
    """Write one line per image that failed; nothing but the heading if none did."""
    rows = (
        (name, error.code, error.message, error.request_id or "") for name, error in sorted(failures.items())
    )
    write_whole(path, _csv(("image", "code", "message", "request_id"), rows))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that nobody ever sees half of it; its folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{_PARTIAL}{path.name}")
    partial.write_bytes(data)
    os.replace(partial, path)


def _mask_path(image: Path, slug: str) -> Path:
    ending = f".{slug}.png"
    return image.with_name(_cut(image.name, _MAX_NAME_BYTES - len(ending.encode())) + ending)


def _cut(text: str, max_bytes: int) -> str:
    """A text of at most so many bytes; a longer one ends in a hash, so that it is not another one's beginning."""
    data = text.encode(errors="surrogateescape")  # names of files may be any bytes
    if len(data) <= max_bytes:
        return text
    ending = f"-{hashlib.sha256(data).hexdigest()[:_HASH_DIGITS]}"
    return data[: max_bytes - len(ending)].decode(errors="ignore") + ending


def _instances(answer: Answer) -> Iterable[tuple[Found, Instance]]:
    return ((found, instance) for found in answer.found for instance in found.instances)


def _rle(instance: Instance) -> Mapping[str, Any]:
    runs = instance["mask_rle"]
    if runs is None:
        raise ValueError("the service left the run-length mask out of an instance")
    return runs


def _xywh(box_xyxy: Sequence[float]) -> list[float]:
    x0, y0, x1, y1 = box_xyxy
    return [x0, y0, x1 - x0, y1 - y0]


def _csv(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heading)
    writer.writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")  # names of files may be any bytes
