"""A second implementation of the runner: finds pixels of a named colour. It knows neither model nor GPU."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import numpy as np
import numpy.typing as npt

from sam3_runner import rle
from sam3_runner.types import ItemError, ModelInfo, Prompt, Segmentation, SegmentItem, SegmentResult

RGB = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ColourRunner:
    """Segments "red", "green" and "blue": one instance of all pixels near that colour.

    Attributes:
        calls: Items seen so far.
        before: Awaited at the beginning of each call; may raise, wait, or break a server.
        answer: When set, given back instead of an answer of its own.
    """

    def __init__(self) -> None:
        self.calls: list[SegmentItem] = []
        self.info_calls = 0
        self.before: Callable[[], Awaitable[None]] | None = None
        self.answer: SegmentResult | None = None
        self.info_error: Exception | None = None

    async def segment(self, item: SegmentItem) -> SegmentResult:
        self.calls.append(item)
        if self.before is not None:
            await self.before()
        if self.answer is not None:
            return self.answer
        found = tuple(_segmentation(item, prompt) for prompt in item.prompts)
        return SegmentResult(found, infer_ms=0.01, batch_size=3)

    async def info(self) -> ModelInfo:
        self.info_calls += 1
        if self.info_error is not None:
            raise self.info_error
        return ModelInfo(
            model_name="COLOUR",
            model_version="test",
            parameters=0,
            weights_size_gb=0.0,
            device="cpu",
            dtype="uint8",
            input_size_px=256,
            max_text_tokens=32,
        )


def failed(code: str, message: str) -> SegmentResult:
    return SegmentResult(error=ItemError(code, message))


def _segmentation(item: SegmentItem, prompt: Prompt) -> Segmentation:
    text = prompt.text or ""
    mask = _mask(item.pixels, item.size_hw, text)
    if not mask.any():
        return Segmentation(np.zeros(0, np.float32), np.zeros((0, 4), np.float32), ())
    rows, columns = np.nonzero(mask)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    score = np.array([0.9 if text == "red" else 0.7], np.float32)
    keep = score > prompt.selection.score_threshold
    masks = (rle.encode_mask(mask),) if keep.any() else ()
    return Segmentation(score[keep], np.array([box], np.float32)[keep], masks)


def _mask(pixels: npt.NDArray[np.uint8], size_hw: tuple[int, int], text: str) -> npt.NDArray[np.bool_]:
    if text not in RGB:
        return np.zeros(size_hw, np.bool_)
    distance = np.abs(pixels.astype(np.int16) - np.array(RGB[text], np.int16)).max(axis=-1)  # (S, S)
    side = pixels.shape[0]
    rows = (np.arange(size_hw[0]) * side) // size_hw[0]
    columns = (np.arange(size_hw[1]) * side) // size_hw[1]
    return distance[rows[:, None], columns[None, :]] < 100
