"""What goes into the runner and what comes out: prompts, run-length masks, batch items.

Coordinates: pixels of the upright original image, origin at its top-left corner, x to the right, y down.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

DEFAULT_SCORE_THRESHOLD = 0.5
DEFAULT_MASK_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class Box:
    """An exemplar: "like this one", or "not like this one".

    Attributes:
        xyxy: Left, top, right and bottom edge.
        is_positive: Whether what is wanted is like it.
        is_relative: In shares of the image's width and height, not in pixels. The runner takes pixels alone.
    """

    xyxy: tuple[float, float, float, float]
    is_positive: bool = True
    is_relative: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """A click on an object, or beside it. Attributes as of `Box`."""

    xy: tuple[float, float]
    is_positive: bool = True
    is_relative: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """Which of the instances found are kept.

    Attributes:
        score_threshold: Those scoring above it, in [0, 1].
        mask_threshold: The probability above which a pixel belongs to a mask, between 0 and 1.
        max_instances: So many of the best at most; None: all.
        nms_iou: None whose mask overlaps a better one's by more than this, in [0, 1]; None: whatever they overlap.
    """

    score_threshold: float = DEFAULT_SCORE_THRESHOLD
    mask_threshold: float = DEFAULT_MASK_THRESHOLD
    max_instances: int | None = None
    nms_iou: float | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to look for: every instance of a concept, told in words, by exemplars, or both; or one object, by clicks.

    Attributes:
        text: The concept in words. None: it is what the boxes show.
        boxes: Exemplars.
        points: Clicks on one object; they stand alone.
        selection: Which of what is found is kept.
    """

    text: str | None = None
    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()
    selection: Selection = Selection()


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
        scores: (N,) float32 in [0, 1], descending: sigmoid(class logit) · sigmoid(presence logit). Of clicks, the
            overlap with the object that the model foresees for its mask.
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
        prompts: At least one; boxes and points in pixels of the upright original.
        key: Names the pixels: equal keys must mean equal pixels, whoever sent them (a cryptographic hash). With one,
            the encoded image is kept for the next question. None: it is not.
    """

    pixels: npt.NDArray[np.uint8]
    size_hw: tuple[int, int]
    prompts: tuple[Prompt, ...]
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
