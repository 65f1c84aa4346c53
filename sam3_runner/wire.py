"""Items and results as bytes, for the way between two processes.

A frame is a small JSON header and then the raw arrays: no pixel is copied to send it, and nothing that
arrives is ever executed (a pickle would be).

    b"S3W1" | header length, uint32 | header, JSON padded with blanks to 8 bytes | arrays, one after the other

All numbers are little-endian. Arrays come out as views of the frame: they are read-only, and keep it alive.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sam3_runner.errors import RunnerError
from sam3_runner.types import (
    Box,
    ItemError,
    Point,
    Prompt,
    RunLengthMask,
    Segmentation,
    SegmentItem,
    SegmentResult,
    Selection,
)

MAGIC = b"S3W1"
_PREFIX = struct.Struct("<4sI")
_F32, _U32, _U8 = np.dtype("<f4"), np.dtype("<u4"), np.dtype("u1")

PlaceT = TypeVar("PlaceT", Box, Point)
Chunk = bytes | memoryview


class WireError(RunnerError):
    """Bytes from the other process are not a frame of this version."""


def encode_items(items: Sequence[SegmentItem]) -> list[Chunk]:
    """Chunks to send one after the other; the pixels are views of the items' own."""
    header = [
        {
            "size_hw": item.size_hw,
            "prompts": [asdict(prompt) for prompt in item.prompts],
            "shape": item.pixels.shape,
            "key": None if item.key is None else item.key.hex(),
        }
        for item in items
    ]
    return _frame(header, (_view(item.pixels, _U8) for item in items))


def decode_items(frame: bytes) -> list[SegmentItem]:
    """The items of a frame, in order; their pixels are views of it.

    Raises:
        WireError: not a frame of items.
    """
    header, arrays = _open(frame)
    try:
        return [_item(entry, arrays) for entry in header]
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"expected a frame of items: {error}") from error


def encode_results(results: Sequence[SegmentResult]) -> list[Chunk]:
    """Chunks to send one after the other."""
    header: list[dict[str, Any]] = []
    arrays: list[Chunk] = []
    for result in results:
        entry: dict[str, Any] = {"infer_ms": result.infer_ms, "batch_size": result.batch_size}
        if result.error is not None:
            entry["error"] = [result.error.code, result.error.message]
        entry["segmentations"] = [_put_segmentation(found, arrays) for found in result.segmentations]
        header.append(entry)
    return _frame(header, arrays)


def decode_results(frame: bytes) -> list[SegmentResult]:
    """The results of a frame, in order.

    Raises:
        WireError: not a frame of results.
    """
    header, arrays = _open(frame)
    try:
        return [_result(entry, arrays) for entry in header]
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"expected a frame of results: {error}") from error


def prompt_of(entry: Mapping[str, Any]) -> Prompt:
    """The prompt whose fields, as JSON values, these are.

    Raises:
        KeyError, TypeError, ValueError: they are none.
    """
    return Prompt(
        entry["text"],
        tuple(_placed(Box, box, "xyxy") for box in entry["boxes"]),
        tuple(_placed(Point, point, "xy") for point in entry["points"]),
        Selection(**entry["selection"]),
    )


def _placed(kind: type[PlaceT], entry: Mapping[str, Any], name: str) -> PlaceT:
    """A box, of four numbers, or a point, of two."""
    place = tuple(map(float, entry[name]))
    if len(place) != len(name):
        raise ValueError(f"{name} of {len(place)} numbers")
    return kind(**{**entry, name: place})


class _Arrays:
    """Takes arrays off a frame, from front to back."""

    def __init__(self, frame: bytes, offset: int) -> None:
        self._frame, self._offset = frame, offset

    def take(self, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        if count < 0:
            raise ValueError(f"an array of {count} elements")
        array = np.frombuffer(self._frame, dtype, count, self._offset)
        self._offset += array.nbytes
        return array


def _frame(header: list[dict[str, Any]], arrays: Iterable[Chunk]) -> list[Chunk]:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _PREFIX.size) % 8)
    return [_PREFIX.pack(MAGIC, len(text)) + text, *(array for array in arrays if len(array))]


def _open(frame: bytes) -> tuple[list[dict[str, Any]], _Arrays]:
    try:
        magic, length = _PREFIX.unpack_from(frame)
        start = _PREFIX.size + length
        if magic != MAGIC or start > len(frame):
            raise ValueError(f"it begins with {frame[:8]!r}")
        header = json.loads(frame[_PREFIX.size : start])
        if not isinstance(header, list):
            raise ValueError("its header is not a list")
    except (struct.error, ValueError) as error:
        raise WireError(f"expected a frame of {MAGIC!r}: {error}") from error
    return header, _Arrays(frame, start)


def _view(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> memoryview:
    flat = np.ascontiguousarray(array, dtype).reshape(-1)
    return flat.view(_U8).data


def _item(entry: dict[str, Any], arrays: _Arrays) -> SegmentItem:
    height, width = entry["size_hw"]
    rows, columns, channels = entry["shape"]
    pixels = arrays.take(_U8, rows * columns * channels)  # (rows·columns·channels,)
    return SegmentItem(
        pixels=pixels.reshape(rows, columns, channels),
        size_hw=(height, width),
        prompts=tuple(prompt_of(prompt) for prompt in entry["prompts"]),
        key=None if entry["key"] is None else bytes.fromhex(entry["key"]),
    )


def _put_segmentation(found: Segmentation, arrays: list[Chunk]) -> dict[str, Any]:
    arrays.append(_view(found.scores, _F32))
    arrays.append(_view(found.boxes_xyxy_px, _F32))
    arrays.extend(_view(mask.counts, _U32) for mask in found.masks)
    return {
        "instances": len(found.scores),
        "masks": [[*mask.size_hw, len(mask.counts)] for mask in found.masks],
    }


def _segmentation(entry: dict[str, Any], arrays: _Arrays) -> Segmentation:
    n = entry["instances"]
    scores = arrays.take(_F32, n)
    boxes = arrays.take(_F32, 4 * n).reshape(n, 4)  # (4·N,) -> (N, 4)
    masks = tuple(
        RunLengthMask((height, width), arrays.take(_U32, runs)) for height, width, runs in entry["masks"]
    )
    return Segmentation(scores, boxes, masks)


def _result(entry: dict[str, Any], arrays: _Arrays) -> SegmentResult:
    error = entry.get("error")
    return SegmentResult(
        segmentations=tuple(_segmentation(found, arrays) for found in entry["segmentations"]),
        error=ItemError(*error) if error is not None else None,
        infer_ms=entry["infer_ms"],
        batch_size=entry["batch_size"],
    )
