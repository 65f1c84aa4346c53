"""SAM3 as a plain Python object: images and prompts in, instances out. Knows no HTTP, no storage, no BentoML."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from sam3_runner.cache import LruCache
from sam3_runner.checkpoint import DEMO_CHECKPOINT, Checkpoint
from sam3_runner.clicks import check_points, clicks_to_tensors, to_segmentation
from sam3_runner.engine import MAX_ROWS, STATIC_SIZES, Answers, EncodedImages, Engine
from sam3_runner.errors import (
    DeviceOutOfMemory,
    InferenceFailed,
    InvalidInput,
    InvalidPrompt,
    RunnerError,
    UnsupportedPrompt,
)
from sam3_runner.exemplars import check_boxes, encode_exemplars
from sam3_runner.forward import TextFeatures
from sam3_runner.images import resize_for_model
from sam3_runner.selection import best_above, logit_shift, without_duplicates
from sam3_runner.text import MAX_PROMPTS, NO_CLICKS, PromptChecker
from sam3_runner.types import (
    Box,
    ItemError,
    ModelInfo,
    Point,
    Prompt,
    Segmentation,
    SegmentItem,
    SegmentResult,
    Selection,
)
from sam3_runner.upsample import masks_from_logits

# The last images asked about, each 58 MB in bfloat16 and twice that in float32 at full size (69 MB where clicks are
# answered): a second question about one of them skips the image encoder, which is most of the work.
IMAGE_CACHE_BYTES = {"cuda": 1 << 30, "cpu": 288 << 20}  # on a CPU two of the largest
TEXT_CACHE_BYTES = 64 << 20  # some thousand prompts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pair:
    """One prompt of one image of a batch, which one it is, and its features."""

    item: int
    number: int
    prompt: Prompt
    image: EncodedImages
    text: TextFeatures


class Segmenter:
    """A loaded SAM3. Holds no state of a request; one thread at a time.

    Args:
        engine: On its device.
        info: What is loaded.
        prompts: The checkpoint's tokenizer and limits.
    """

    def __init__(self, engine: Engine, info: ModelInfo, prompts: PromptChecker) -> None:
        self.info = info
        self._engine = engine
        self._prompts = prompts
        self._device = torch.device(info.device)
        self._images: LruCache[EncodedImages] = LruCache(IMAGE_CACHE_BYTES[self._device.type])
        self._texts: LruCache[TextFeatures] = LruCache(TEXT_CACHE_BYTES)

    @classmethod
    def from_checkpoint(
        cls,
        path: Path | str = DEMO_CHECKPOINT,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        max_prompts: int = MAX_PROMPTS,
    ) -> Segmenter:
        """Load SAM3, in any form that `Checkpoint.open` knows.

        Args:
            path: The file or directory; the demo checkpoint if not given.
            device: "cpu", "cuda" or "cuda:1".
            dtype: float32 or bfloat16; bfloat16 on a GPU and float32 on a CPU if not given.
            max_prompts: Prompts allowed for one image.
        Raises:
            CheckpointError: it is not there, or does not fit the model tensor by tensor.
        """
        device = torch.device(device)
        default = torch.bfloat16 if device.type == "cuda" else torch.float32
        dtype = dtype or default
        checkpoint = Checkpoint.open(path)
        prompts = PromptChecker.from_checkpoint(path, max_prompts)
        # Mapped from its file, on the host; the engine moves what it needs, and converts it there.
        model = checkpoint.load_model(torch.device("cpu"))
        clicks = checkpoint.load_click_model(torch.device("cpu"))
        models = [part for part in (model, clicks) if part is not None]
        parameters = sum(tensor.numel() for part in models for tensor in part.parameters())
        info = ModelInfo(
            model_name="SAM3",
            model_version=checkpoint.version,
            parameters=parameters,
            weights_size_gb=parameters * dtype.itemsize / 1e9,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            input_size_px=checkpoint.input_size_px,
            max_text_tokens=checkpoint.max_text_tokens,
        )
        engine = Engine(model, device, dtype, clicks)
        if device.type == "cuda":
            engine.accelerate()
        return cls(engine, info, prompts)

    @property
    def answers_clicks(self) -> bool:
        """Whether the checkpoint brought an interactive head; without one, prompts with points are refused."""
        return self._engine.clicks is not None

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that cannot be answered, without touching the device; see `PromptChecker.check`."""
        if any(prompt.text is None and not prompt.boxes and not prompt.points for prompt in prompts):
            raise InvalidPrompt("expected words, boxes, or clicks: the prompt has none of them")
        self._prompts.check(prompts)

    def warm_up(self) -> None:
        """Run every batch size once, so that no caller waits for lazy initialisation, compilation or recording."""
        size = self.info.input_size_px
        prompts = tuple(Prompt(f"warm up {number}") for number in range(MAX_ROWS))
        with_masks = [Prompt("warm up", selection=Selection(score_threshold=0.0))]
        if self.answers_clicks:
            with_masks.append(Prompt(points=(Point((0, 0)),), selection=Selection(score_threshold=0.0)))
        sizes = (
            STATIC_SIZES[::-1] if self._device.type == "cuda" else (1,)
        )  # the largest first: others fit into it
        for rows in sizes:
            pixels = [np.full((size, size, 3), rows, np.uint8) for _ in range(rows)]
            for batch in (
                [SegmentItem(image, (size, size), prompts[:1]) for image in pixels],
                [SegmentItem(pixels[0], (size, size), prompts[:rows])],
                [SegmentItem(pixels[0], (size, size), tuple(with_masks))],
            ):
                self._texts.clear()
                self._segment_all(batch)
        # After all that have none, so that those are compiled and recorded as if there were no others.
        marked = tuple(Prompt(boxes=(Box((0, 0, size / 2, size)),)) for _ in range(MAX_ROWS))
        for rows in sizes:
            pixels = [np.full((size, size, 3), rows, np.uint8) for _ in range(rows)]
            self._segment_all([SegmentItem(image, (size, size), marked[:1]) for image in pixels])
            self._segment_all([SegmentItem(pixels[0], (size, size), marked[:rows])])
        self._texts.clear()

    def segment(self, image: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[Segmentation]:
        """Find every instance of each prompt in one image; of clicks, the one object that they are on.

        Args:
            image: (H, W, 3) RGB, upright (EXIF applied), as the caller sent it.
            prompts: At least one, at most `max_prompts`; boxes and points in pixels.
        Returns:
            One per prompt, in order. `scores` (N,) in [0, 1], descending; `boxes_xyxy_px` (N, 4) float32 in original
            pixels, origin top left; `masks` N run-length masks of size H×W. N may be 0.
        Raises:
            InvalidPrompt: blank or longer than the text encoder reads, with a box that shows nothing of the image, with
                a click beside it, or with clicks and something else.
            TooManyPrompts: none, or more than `max_prompts`.
            UnsupportedPrompt: of a kind that the checkpoint cannot answer.
            DeviceOutOfMemory: nothing was computed; the segmenter stays usable.
        Source: SAM 3 (Meta, 2025), §3; scores as in its image processor.
        """
        height, width = image.shape[:2]
        self.check_prompts(prompts)
        check_boxes(prompts, (height, width))
        check_points(prompts, (height, width))
        pixels = resize_for_model(image, self.info.input_size_px)
        key = b"pixels" + hashlib.sha256(pixels.data).digest()
        item = SegmentItem(pixels, (height, width), tuple(prompts), key)
        with self._device_errors():
            return self._segment_all([item])[0]

    def segment_batch(self, items: Sequence[SegmentItem]) -> list[SegmentResult]:
        """Segment several images, each with its own prompts, together.

        Every image is encoded once and every distinct prompt once, and neither if it was lately; an item's answer
        does not depend on its neighbours.

        Returns:
            One result per item, in order. What is wrong with one item is its own `error`; the others get answers.
        """
        started = time.perf_counter()
        answers = self._segment_sound_ones(items)
        infer_ms = (time.perf_counter() - started) * 1000
        return [
            SegmentResult((), answer, infer_ms, len(items))
            if isinstance(answer, ItemError)
            else SegmentResult(tuple(answer), None, infer_ms, len(items))
            for answer in answers
        ]

    def _segment_sound_ones(self, items: Sequence[SegmentItem]) -> list[list[Segmentation] | ItemError]:
        answers: list[list[Segmentation] | ItemError] = [self._fault(item) or [] for item in items]
        sound = [index for index, answer in enumerate(answers) if not isinstance(answer, ItemError)]
        for index, answer in zip(sound, self._segment_or_halve([items[i] for i in sound]), strict=True):
            answers[index] = answer
        return answers

    def _fault(self, item: SegmentItem) -> ItemError | None:
        """What is wrong with an item, before the device sees it."""
        size = self.info.input_size_px
        if item.pixels.shape != (size, size, 3) or item.pixels.dtype != np.uint8:
            got = f"{item.pixels.dtype} {item.pixels.shape}"
            return ItemError(
                "InferenceFailed", f"expected uint8 pixels of shape {(size, size, 3)}, got {got}"
            )
        try:
            self.check_prompts(item.prompts)
            check_boxes(item.prompts, item.size_hw)
            check_points(item.prompts, item.size_hw)
        except InvalidInput as error:
            return ItemError(type(error).__name__, str(error))
        return None

    def _segment_or_halve(self, items: Sequence[SegmentItem]) -> Sequence[list[Segmentation] | ItemError]:
        """Segment items together; if that fails, in halves, until what fails stands alone."""
        if not items:
            return []
        try:
            with self._device_errors():
                return self._segment_all(items)
        except RunnerError as error:
            logger.warning("a batch of %d failed: %s", len(items), error)
            if len(items) == 1:
                return [ItemError(type(error).__name__, str(error))]
        half = len(items) // 2
        return [*self._segment_or_halve(items[:half]), *self._segment_or_halve(items[half:])]

    def _segment_all(self, items: Sequence[SegmentItem]) -> list[list[Segmentation]]:
        found: dict[tuple[int, int], Segmentation] = {}
        rows = self._engine.max_rows
        with torch.inference_mode():
            texts = self._encode_texts(
                [prompt for item in items for prompt in item.prompts if not prompt.points]
            )
            for start in range(0, len(items), rows):
                images = self._encode_images(items[start : start + rows])
                pairs = [
                    _Pair(start + row, number, prompt, image, texts[prompt.text])
                    for row, image in enumerate(images)
                    for number, prompt in enumerate(items[start + row].prompts)
                    if not prompt.points
                ]
                for has_boxes in (False, True):  # apart: boxes make every prompt of a pass longer
                    alike = [pair for pair in pairs if bool(pair.prompt.boxes) == has_boxes]
                    for first in range(0, len(alike), rows):
                        found |= self._answer(alike[first : first + rows], items)
                for row, image in enumerate(images):
                    clicked = self._answer_clicks(items[start + row], image)
                    found |= {(start + row, number): answer for number, answer in clicked.items()}
        return [
            [found[index, number] for number in range(len(item.prompts))] for index, item in enumerate(items)
        ]

    @contextlib.contextmanager
    def _device_errors(self) -> Iterator[None]:
        """Map what torch raises to the runner's errors."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self._images.clear()  # they may be what fills the device
            torch.cuda.empty_cache()
            raise DeviceOutOfMemory(
                "the device ran out of memory; send fewer or smaller images at once"
            ) from error
        except RunnerError:
            raise
        except Exception as error:
            raise InferenceFailed(f"the model failed: {type(error).__name__}") from error

    def _encode_images(self, items: Sequence[SegmentItem]) -> list[EncodedImages]:
        """One for each item; those that were asked about lately are not encoded again."""
        names = [row if item.key is None else item.key for row, item in enumerate(items)]
        encoded = {name: image for name in names if (image := self._images.get(name)) is not None}
        new = {name: item.pixels for name, item in zip(names, items, strict=True) if name not in encoded}
        if new:
            pixels = torch.from_numpy(np.stack(list(new.values()))).to(self._device)
            for name, image in zip(new, self._engine.encode_images(pixels).split(), strict=True):
                encoded[name] = image
                if isinstance(name, bytes):
                    self._images.put(name, image)
        return [encoded[name] for name in names]

    def _encode_texts(self, prompts: Sequence[Prompt]) -> dict[str | None, TextFeatures]:
        """The features of every distinct text; those that were asked lately are not encoded again."""
        distinct = {prompt.text: prompt for prompt in prompts}
        encoded = {text: features for text in distinct if (features := self._texts.get(text)) is not None}
        new = [prompt for text, prompt in distinct.items() if text not in encoded]
        for start in range(0, len(new), self._engine.max_rows):
            chunk = new[start : start + self._engine.max_rows]
            tokens = (torch.from_numpy(part).to(self._device) for part in self._prompts.encode(chunk))
            for prompt, features in zip(chunk, self._engine.encode_texts(*tokens).split(), strict=True):
                encoded[prompt.text] = features
                self._texts.put(prompt.text, features)
        return encoded

    def _answer(
        self, pairs: Sequence[_Pair], items: Sequence[SegmentItem]
    ) -> dict[tuple[int, int], Segmentation]:
        """Answer pairs, at most `max_rows` of the engine, of which all have boxes or none has: by item and number."""
        first = pairs[0].image
        is_one_image = all(pair.image is first for pair in pairs)
        images = first if is_one_image else EncodedImages.join([pair.image for pair in pairs])
        sizes_hw = [items[pair.item].size_hw for pair in pairs]
        boxes = None
        if pairs[0].prompt.boxes:
            exemplars = encode_exemplars([pair.prompt.boxes for pair in pairs], sizes_hw)
            on_device = (torch.from_numpy(part).to(self._device) for part in exemplars)
            boxes = self._engine.encode_boxes(images, *on_device)
        answers = self._engine.answer(images, TextFeatures.join([pair.text for pair in pairs]), boxes)
        decided = torch.cat([answers.scores[..., None], answers.boxes_cxcywh], dim=-1).cpu().numpy()
        return {
            (pair.item, pair.number): _keep(answers, decided[row], row, pair.prompt.selection, sizes_hw[row])
            for row, pair in enumerate(pairs)
        }

    def _answer_clicks(self, item: SegmentItem, image: EncodedImages) -> dict[int, Segmentation]:
        """What is found for the prompts of an item that are clicks, by their places among its prompts."""
        found = {}
        for number, prompt in enumerate(item.prompts):
            if prompt.points:
                image = self._prepare_clicks(item, image)
                found[number] = self._click(prompt, image, item.size_hw)
        return found

    def _prepare_clicks(self, item: SegmentItem, image: EncodedImages) -> EncodedImages:
        """The image, clickable; it is kept as that for the next click."""
        if image.clickable is None:
            image = self._engine.prepare_clicks(image)
            if item.key is not None:
                self._images.put(item.key, image)
        return image

    def _click(self, prompt: Prompt, image: EncodedImages, size_hw: tuple[int, int]) -> Segmentation:
        if self._engine.clicks is None or image.clickable is None:
            raise UnsupportedPrompt(NO_CLICKS)
        clicks = clicks_to_tensors(prompt.points, size_hw, self._device)
        answer = self._engine.clicks.answer(image.clickable, *clicks)
        return to_segmentation(answer, prompt.selection, size_hw)


def _keep(
    answers: Answers,
    decided: npt.NDArray[np.float32],
    row: int,
    selection: Selection,
    size_hw: tuple[int, int],
) -> Segmentation:
    """The instances of one pair that are selected, best first.

    `decided` (N, 5) holds the pair's scores and boxes, on the host.
    """
    scores, boxes = decided[:, 0], decided[:, 1:]
    kept = best_above(scores, selection)
    if selection.nms_iou is None:
        kept = kept[: selection.max_instances]
    if not len(kept):
        return Segmentation(scores[kept], boxes[kept], ())
    logits = answers.mask_logits(row, torch.from_numpy(kept).to(answers.scores.device))
    logits = logits - logit_shift(selection)
    if selection.nms_iou is not None:
        apart = without_duplicates(logits, selection.nms_iou)[: selection.max_instances]
        kept, logits = kept[apart], logits[torch.from_numpy(apart).to(logits.device)]
    return Segmentation(scores[kept], _to_xyxy_px(boxes[kept], size_hw), masks_from_logits(logits, size_hw))


def _to_xyxy_px(boxes_cxcywh: npt.NDArray[np.float32], size_hw: tuple[int, int]) -> npt.NDArray[np.float32]:
    """(N, 4) relative centre boxes to corners in pixels, clipped to the image."""
    centre, half = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:] / 2
    corners = np.concatenate([centre - half, centre + half], axis=1).clip(0, 1)
    height, width = size_hw
    return corners * np.array([width, height, width, height], np.float32)
