"""SAM3 as a plain Python object: images and prompts in, instances out. Knows no HTTP, no storage, no BentoML."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import Sam3Model

from sam3_runner.checkpoint import DEMO_CHECKPOINT, Checkpoint
from sam3_runner.errors import DeviceOutOfMemory, InferenceFailed, InvalidInput, RunnerError
from sam3_runner.forward import ImageFeatures, LayerOutputs, TextFeatures, decode, encode_image, encode_text
from sam3_runner.images import resize_for_model
from sam3_runner.text import MAX_PROMPTS, PromptChecker
from sam3_runner.types import (
    ItemError,
    ModelInfo,
    Prompt,
    Segmentation,
    SegmentItem,
    SegmentResult,
    TextPrompt,
)
from sam3_runner.upsample import masks_from_logits

IMAGES_PER_PASS = 16  # more gain nothing on an H200 and cost memory: 1008² features are 60 MB an image
PAIRS_PER_PASS = 16  # (image, prompt) pairs decoded together

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pair:
    """One prompt of one image of a batch."""

    item: int
    prompt: Prompt


class Segmenter:
    """A loaded SAM3. Holds no state of a request; one thread at a time.

    Args:
        model: On its device, in evaluation mode.
        checkpoint: Where it came from.
        prompts: The checkpoint's tokenizer and limits.
        dtype: What the model computes in. Weights stay float32; below that, autocast decides per operation.
    """

    def __init__(
        self, model: Sam3Model, checkpoint: Checkpoint, prompts: PromptChecker, dtype: torch.dtype
    ) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._prompts = prompts
        self._dtype = dtype
        self._device = next(model.parameters()).device

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
        checkpoint = Checkpoint.open(path)
        prompts = PromptChecker.from_checkpoint(path, max_prompts)
        default = torch.bfloat16 if device.type == "cuda" else torch.float32
        return cls(checkpoint.load_model(device), checkpoint, prompts, dtype or default)

    @property
    def info(self) -> ModelInfo:
        """What is loaded, counted from the model itself."""
        tensors = list(self._model.parameters())
        return ModelInfo(
            model_name="SAM3",
            model_version=self._checkpoint.version,
            parameters=sum(tensor.numel() for tensor in tensors),
            weights_size_gb=sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e9,
            device=str(self._device),
            dtype=str(self._dtype).removeprefix("torch."),
            input_size_px=self._checkpoint.input_size_px,
            max_text_tokens=self._checkpoint.max_text_tokens,
        )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that cannot be answered, without touching the device; see `PromptChecker.check`."""
        self._prompts.check(prompts)

    def warm_up(self) -> None:
        """Run once on an empty image, so that the first caller does not wait for lazy initialisation."""
        size = self._checkpoint.input_size_px
        self.segment(np.zeros((size, size, 3), np.uint8), [TextPrompt("warm up")])

    def segment(
        self, image: npt.NDArray[np.uint8], prompts: Sequence[Prompt], score_threshold: float = 0.5
    ) -> list[Segmentation]:
        """Find every instance of each prompt in one image.

        Args:
            image: (H, W, 3) RGB, upright (EXIF applied), as the caller sent it.
            prompts: At least one, at most `max_prompts`.
            score_threshold: Instances scoring above this are kept, in [0, 1].
        Returns:
            One per prompt, in order. `scores` (N,) in [0, 1], descending; `boxes_xyxy_px` (N, 4) float32 in original
            pixels, origin top left; `masks` N run-length masks of size H×W. N may be 0.
        Raises:
            InvalidPrompt: blank or longer than the text encoder reads.
            TooManyPrompts: none, or more than `max_prompts`.
            DeviceOutOfMemory: nothing was computed; the segmenter stays usable.
        Source: SAM 3 (Meta, 2025), §3; scores as in its image processor.
        """
        self.check_prompts(prompts)
        pixels = resize_for_model(image, self._checkpoint.input_size_px)
        height, width = image.shape[:2]
        item = SegmentItem(pixels, (height, width), tuple(prompts), score_threshold)
        with _device_errors():
            return self._segment_all([item])[0]

    def segment_batch(self, items: Sequence[SegmentItem]) -> list[SegmentResult]:
        """Segment several images, each with its own prompts, together.

        Every image is encoded once and every distinct prompt once; an item's answer does not depend on its
        neighbours.

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
        size = self._checkpoint.input_size_px
        if item.pixels.shape != (size, size, 3) or item.pixels.dtype != np.uint8:
            got = f"{item.pixels.dtype} {item.pixels.shape}"
            return ItemError(
                "InferenceFailed", f"expected uint8 pixels of shape {(size, size, 3)}, got {got}"
            )
        try:
            self.check_prompts(item.prompts)
        except InvalidInput as error:
            return ItemError(type(error).__name__, str(error))
        return None

    def _segment_or_halve(self, items: Sequence[SegmentItem]) -> Sequence[list[Segmentation] | ItemError]:
        """Segment items together; if that fails, in halves, until what fails stands alone."""
        if not items:
            return []
        try:
            with _device_errors():
                return self._segment_all(items)
        except RunnerError as error:
            logger.warning("a batch of %d failed: %s", len(items), error)
            if len(items) == 1:
                return [ItemError(type(error).__name__, str(error))]
        half = len(items) // 2
        return [*self._segment_or_halve(items[:half]), *self._segment_or_halve(items[half:])]

    def _segment_all(self, items: Sequence[SegmentItem]) -> list[list[Segmentation]]:
        autocast = torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)
        found: list[list[Segmentation]] = []
        with torch.inference_mode(), autocast:
            for start in range(0, len(items), IMAGES_PER_PASS):
                found += self._segment_pass(items[start : start + IMAGES_PER_PASS])
        return found

    def _segment_pass(self, items: Sequence[SegmentItem]) -> list[list[Segmentation]]:
        pairs = [_Pair(index, prompt) for index, item in enumerate(items) for prompt in item.prompts]
        distinct = list(dict.fromkeys(pair.prompt for pair in pairs))
        images = encode_image(self._model, self._pixel_values(items))
        texts = self._encode_texts(distinct)
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        found: list[list[Segmentation]] = [[] for _ in items]
        for start in range(0, len(pairs), PAIRS_PER_PASS):
            chunk = pairs[start : start + PAIRS_PER_PASS]
            image_rows, text_rows = [pair.item for pair in chunk], [row_of[pair.prompt] for pair in chunk]
            outputs = self._decode(images, texts, image_rows, text_rows)
            for row, pair in enumerate(chunk):
                found[pair.item].append(_keep(outputs, row, items[pair.item]))
        return found

    def _pixel_values(self, items: Sequence[SegmentItem]) -> Tensor:
        """(I, 3, S, S) in [-1, 1] on the device; pixels travel there as bytes."""
        pixels = torch.from_numpy(np.stack([item.pixels for item in items])).to(self._device)
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0

    def _encode_texts(self, prompts: Sequence[Prompt]) -> TextFeatures:
        parts: list[TextFeatures] = []
        for start in range(0, len(prompts), self._prompts.max_prompts):
            tokens = self._prompts.encode(prompts[start : start + self._prompts.max_prompts])
            input_ids, attention_mask = (torch.from_numpy(part).to(self._device) for part in tokens)
            parts.append(encode_text(self._model, input_ids, attention_mask))
        return TextFeatures(
            torch.cat([part.tokens for part in parts]), torch.cat([part.is_token for part in parts])
        )

    def _decode(
        self, images: ImageFeatures, texts: TextFeatures, image_rows: list[int], text_rows: list[int]
    ) -> LayerOutputs:
        rows = (torch.tensor(index, device=self._device) for index in (image_rows, text_rows))
        image_index, text_index = rows
        return decode(self._model, images.select(image_index), texts.select(text_index))


def _keep(outputs: LayerOutputs, row: int, item: SegmentItem) -> Segmentation:
    """The instances of one pair that score above the item's threshold, best first."""
    scores = outputs.logits[-1, row].sigmoid() * outputs.presence_logits[-1, row].sigmoid()  # (N,)
    kept = torch.nonzero(scores > item.score_threshold)[:, 0]
    kept = kept[scores[kept].argsort(descending=True, stable=True)]
    height, width = item.size_hw
    boxes = _to_xyxy_px(outputs.boxes_cxcywh[-1, row, kept], height, width)
    embeddings, pixels = outputs.mask_embeddings[-1, row, kept], outputs.pixel_embeddings[row]
    logits = torch.einsum("nc,chw->nhw", embeddings, pixels)
    return Segmentation(
        scores[kept].cpu().numpy(), boxes.cpu().numpy(), masks_from_logits(logits, item.size_hw)
    )


def _to_xyxy_px(boxes_cxcywh: Tensor, height: int, width: int) -> Tensor:
    """(N, 4) relative centre boxes to corners in pixels, clipped to the image."""
    centre, half = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:] / 2
    corners = torch.cat([centre - half, centre + half], dim=1).clamp(0, 1)
    return corners * torch.tensor([width, height, width, height], device=corners.device)


@contextlib.contextmanager
def _device_errors() -> Iterator[None]:
    """Map what torch raises to the runner's errors."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise DeviceOutOfMemory(
            "the device ran out of memory; send fewer or smaller images at once"
        ) from error
    except RunnerError:
        raise
    except Exception as error:
        raise InferenceFailed(f"the model failed: {type(error).__name__}") from error
