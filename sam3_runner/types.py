"""What goes into the runner and what comes out: prompts, run-length masks, batch items.

Coordinates: pixels of the upright original image, origin at its top-left corner, x to the right, y down.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A concept named in words; SAM3 finds every instance of it."""

    text: str


# Boxes and points join this union when the runner learns them; callers already pass `Prompt` objects.
Prompt = TextPrompt


@dataclass(frozen=True, slots=True, eq=False)
class RunLengthMask:
    """A binary mask as COCO run lengths.

    Attributes:
        size_hw: Height and width of the mask in pixels.
        counts: (R,) uint32. Lengths of alternating runs of 0 and 1 in column-major order (down each column,
            columns left to right); the first run counts zeros and may be 0 long. They add up to H·W.
    """

    size_hw: tuple[int, int]
    counts: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, eq=False)
class Segmentation:
    """Every instance found for one prompt, best first. N may be 0.

    Attributes:
        scores: (N,) float32 in [0, 1], descending: sigmoid(class logit) · sigmoid(presence logit).
        boxes_xyxy_px: (N, 4) float32, clipped to the image.
        masks: N run-length masks of the original image's size.
    """

    scores: npt.NDArray[np.float32]
    boxes_xyxy_px: npt.NDArray[np.float32]
    masks: tuple[RunLengthMask, ...]


@dataclass(frozen=True, slots=True, eq=False)
class SegmentItem:
    """One item of a runner batch: one image, all its prompts, and how to answer.

    Attributes:
        pixels: (S, S, 3) uint8 RGB, already resized to the model's input (see `images.resize_for_model`).
        size_hw: The upright original's height and width; masks and boxes come back in this frame.
        prompts: At least one.
        score_threshold: Instances scoring above this are kept, in [0, 1].
        key: Names the pixels: equal keys must mean equal pixels, whoever sent them (a cryptographic hash). With one,
            the encoded image is kept for the next question. None: it is not.
    """

    pixels: npt.NDArray[np.uint8]
    size_hw: tuple[int, int]
    prompts: tuple[Prompt, ...]
    score_threshold: float = 0.5
    key: bytes | None = None


@dataclass(frozen=True, slots=True)
class ItemError:
    """Why one item of a batch failed. Travels as data, so that its neighbours still get their answers."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, eq=False)
class SegmentResult:
    """The answer to one item: one segmentation per prompt, in order, or an error.

    Attributes:
        segmentations: Empty when `error` is set.
        infer_ms: Time the whole batch spent in the model.
        batch_size: How many items shared that batch.
    """

    segmentations: tuple[Segmentation, ...] = ()
    error: ItemError | None = None
    infer_ms: float = 0.0
    batch_size: int = 1


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is loaded, counted from the loaded model itself."""

    model_name: str
    model_version: str
    parameters: int
    weights_size_gb: float
    device: str
    dtype: str
    input_size_px: int
    max_text_tokens: int
    extra: dict[str, str] = field(default_factory=dict)
