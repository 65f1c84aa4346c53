"""What one request asks for, and how that lies in the journal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from sam3_runner.errors import InvalidPrompt
from sam3_runner.images import Rectangle, Region
from sam3_runner.types import Box, Point, Prompt, Selection
from sam3_runner.wire import prompt_of

# Says what was found for a prompt without words.
NAMELESS: Final = "object"
DEFAULT_POLYGON_TOLERANCE_PX: Final = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """What one request asks for.

    Attributes:
        prompts: At least one; exactly one unless `is_batch`.
        is_batch: Masks go to `masks/{task_id}/{i}.png`, and their union to `masks/{task_id}.png`.
        region: The part of the image that the model sees; None: all of it.
        outputs: What is made of the instances, by name. None: the mask, and the run lengths in the answer.
        polygon_tolerance_px: How far polygons may be from the outlines that they simplify.
    """

    task_id: str
    user_id: str
    image_url: str
    prompts: tuple[Prompt, ...]
    request_id: str
    is_batch: bool = False
    region: Region | None = None
    outputs: tuple[str, ...] | None = None
    polygon_tolerance_px: float = DEFAULT_POLYGON_TOLERANCE_PX

    def __post_init__(self) -> None:
        if not self.prompts or (len(self.prompts) > 1 and not self.is_batch):
            raise ValueError(f"{len(self.prompts)} prompts in a job with is_batch={self.is_batch}")

    def makes(self, output: str) -> bool:
        """Whether something is wanted; the mask and the run lengths are unless others are named."""
        return output in (("mask", "rle") if self.outputs is None else self.outputs)

    @property
    def others(self) -> tuple[str, ...]:
        """The outputs beside the mask, in the order asked for."""
        return tuple(name for name in self.outputs or () if name != "mask")

    @property
    def question(self) -> str:
        """Whatever shapes the answer beside image, words and one score threshold; empty where nothing does."""
        first = self.prompts[0].selection
        plain = (Prompt(prompt.text, selection=Selection(first.score_threshold)) for prompt in self.prompts)
        if self.prompts == tuple(plain) and self.region is None and self.outputs is None:
            return ""
        record = job_record(self)
        parts = {name: record[name] for name in ("prompts", "region", "outputs", "polygon_tolerance_px")}
        return json.dumps(parts, sort_keys=True)


def name_of(prompt: Prompt) -> str:
    """What is found is called so."""
    return NAMELESS if prompt.text is None else prompt.text


def in_crop(prompt: Prompt, image_size_hw: tuple[int, int], crop_xyxy_px: Rectangle) -> Prompt:
    """A prompt as the runner takes it: in pixels of what the model sees.

    Boxes are cut off where it ends.

    Raises:
        InvalidPrompt: a box or a point lies outside of it.
    """
    if not prompt.boxes and not prompt.points:
        return prompt
    height, width = image_size_hw
    left, top, right, bottom = crop_xyxy_px

    def place(x: float, y: float, is_relative: bool) -> tuple[float, float]:
        return (x * width, y * height) if is_relative else (x, y)

    boxes = []
    for box in prompt.boxes:
        x0, y0 = place(*box.xyxy[:2], box.is_relative)
        x1, y1 = place(*box.xyxy[2:], box.is_relative)
        cut = (max(x0, left), max(y0, top), min(x1, right), min(y1, bottom))
        if cut[0] >= cut[2] or cut[1] >= cut[3]:
            raise _outside(f"box {list(box.xyxy)}", image_size_hw, crop_xyxy_px)
        boxes.append(Box((cut[0] - left, cut[1] - top, cut[2] - left, cut[3] - top), box.is_positive))
    points = []
    for point in prompt.points:
        x, y = place(*point.xy, point.is_relative)
        if not (left <= x <= right and top <= y <= bottom):
            raise _outside(f"point {list(point.xy)}", image_size_hw, crop_xyxy_px)
        points.append(Point((x - left, y - top), point.is_positive))
    return Prompt(prompt.text, tuple(boxes), tuple(points), prompt.selection)


def _outside(mark: str, image_size_hw: tuple[int, int], crop_xyxy_px: Rectangle) -> InvalidPrompt:
    height, width = image_size_hw
    seen = f"the image of {width}×{height} pixels"
    if crop_xyxy_px != (0, 0, width, height):
        seen = f"the region {list(crop_xyxy_px)} of {seen}"
    return InvalidPrompt(f"the {mark} lies outside {seen}: expected one inside, in the whole image's frame")


def job_record(job: Job) -> dict[str, Any]:
    """A job as JSON values."""
    return asdict(job)


def job_of(record: Mapping[str, Any]) -> Job:
    """The job of a record, also of one that was written when prompts were words alone.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    fields = dict(record)
    threshold = fields.pop("score_threshold", None)
    fields["prompts"] = tuple(
        Prompt(prompt, selection=Selection(threshold)) if isinstance(prompt, str) else prompt_of(prompt)
        for prompt in fields["prompts"]
    )
    region = fields.get("region")
    if region is not None:
        x0, y0, x1, y1 = map(float, region["xyxy"])
        fields["region"] = Region((x0, y0, x1, y1), region["is_relative"])
    if fields.get("outputs") is not None:
        fields["outputs"] = tuple(fields["outputs"])
    return Job(**fields)
