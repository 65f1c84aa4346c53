"""The steps of one task, from image to mask to row.

    row → processing ─┐
                      ├─▶ segment ─▶│─▶ encode + upload, masks side by side ─▶ row → done
    download ─ decode ┘             │
                 compute            │                deliver

Between the two halves the result is complete: whoever keeps it need never compute it again. Who keeps it, tries steps
again and tells the row of a failure is `tasks.executor`.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol, TypeVar

import numpy as np

from sam3_runner import errors as runner_errors
from sam3_runner import rle
from sam3_runner.drawing import Found
from sam3_runner.images import ImageLimits, ModelImage, Region
from sam3_runner.masks import encode_png
from sam3_runner.outputs import KINDS, Order, make_outputs
from sam3_runner.types import (
    ItemError,
    ModelInfo,
    Prompt,
    RunLengthMask,
    Segmentation,
    SegmentItem,
    SegmentResult,
)
from storage import ObjectStore
from tasks.job import Job, in_crop, name_of
from tasks.keys import output_key, prompt_mask_key, union_mask_key
from tasks.store import TaskInputs, TaskResult, TaskStore

T = TypeVar("T")

STAGES: Final = ("download", "decode", "queue", "infer", "encode", "upload", "row_update")
# Supabase Realtime sends rows of at most 1 MB: this many instances of some 100 bytes stay far below it.
MAX_INSTANCES_IN_ROW: Final = 200
# Longer than the rows' own retries take: an update that outlives it will hardly arrive any more.
ROW_WRITE_WAIT_S: Final = 20.0


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """What the model found for one job: all that is needed to deliver it.

    Attributes:
        image_size_hw: Of the upright image.
        segmentations: One per prompt of the job, in order.
        model: What segmented it.
        batch_size: How many requests shared the model's batch.
        stage_ms: Milliseconds for each of `STAGES` so far.
    """

    image_size_hw: tuple[int, int]
    segmentations: tuple[Segmentation, ...]
    model: ModelInfo
    batch_size: int
    stage_ms: dict[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class PromptOutcome:
    """What one prompt found.

    Attributes:
        mask_key: Key of the union of its instances, a PNG of the image's own size.
        mask_url: Where others read that mask. None if it was not asked for.
    """

    prompt: Prompt
    mask_key: str
    mask_url: str | None
    segmentation: Segmentation

    @property
    def confidence(self) -> float:
        """The best instance's score, 0.0 if nothing was found."""
        return float(np.max(self.segmentation.scores, initial=0.0))

    @property
    def labels(self) -> tuple[str, ...]:
        """What it looked for, if it found anything."""
        return (name_of(self.prompt),) if len(self.segmentation.scores) else ()


@dataclass(frozen=True, slots=True, eq=False)
class JobOutcome:
    """What a whole job came to. The row says the same.

    Attributes:
        image_size_hw: Of the upright image.
        prompts: One per prompt of the job, in order.
        mask_key: Key of the union over all prompts.
        mask_url: Where others read that mask. None if it was not asked for.
        stage_ms: Milliseconds for each of `STAGES`. Stages overlap: the sum may exceed the time the job took.
            `encode` adds up the time of all masks; `upload` is from the first begin to the last end;
            `row_update` adds up both updates.
        model: What segmented it.
        batch_size: How many requests shared the model's batch.
        output_urls: Where others read the outputs beside the mask, by name.
        documents: Those of them that are JSON, as far as they are at hand; `document` makes the others.
    """

    image_size_hw: tuple[int, int]
    prompts: tuple[PromptOutcome, ...]
    mask_key: str
    mask_url: str | None
    stage_ms: dict[str, float]
    model: ModelInfo
    batch_size: int
    output_urls: dict[str, str] = field(default_factory=dict)
    documents: dict[str, bytes] = field(default_factory=dict)

    @property
    def confidence(self) -> float:
        """The best score over all prompts, 0.0 if nothing was found."""
        return max(prompt.confidence for prompt in self.prompts)

    @property
    def labels(self) -> tuple[str, ...]:
        """The prompts that found something, in order."""
        return tuple(label for prompt in self.prompts for label in prompt.labels)

    @property
    def inference_time_ms(self) -> float:
        """Time that the batch this image was in spent in the model."""
        return self.stage_ms["infer"]


class Runner(Protocol):
    """Where the model is: in this process or in another."""

    async def segment(self, item: SegmentItem) -> SegmentResult:
        """Segments one image; what is wrong with this item alone comes back as `error`."""
        ...

    async def info(self) -> ModelInfo:
        """What is loaded."""
        ...


class ImageDecoder(Protocol):
    """Where image files are decoded, and drawn on (see `sam3_runner.sandbox.ImageSandbox`)."""

    async def open_for_model(
        self, data: bytes, input_size_px: int, region: Region | None = None
    ) -> ModelImage:
        """The file as the model takes it. Raises `ImageError`, `InvalidRegion`."""
        ...

    async def make_outputs(
        self, order: Order, found: Found, size_hw: tuple[int, int], data: bytes
    ) -> dict[str, bytes]:
        """Files of what was found, by name. Raises `OutputTooLarge`, `ImageError`."""
        ...


class ImageKeys(Protocol):
    """Which image URLs are ours (see `storage.ImageUrls`)."""

    def key_of(self, image_url: str) -> str:
        """The object key behind a URL. Raises `storage.ForeignUrl`; never connects."""
        ...


class Attempt(Protocol):
    """How a step is carried out: announced, and tried again if what it needs is away."""

    async def __call__(self, step: str, call: Callable[[], Awaitable[T]]) -> T:
        """What the call gives; raises what it raises, once trying again is of no use."""
        ...


async def once(step: str, call: Callable[[], Awaitable[T]]) -> T:
    """The simplest `Attempt`."""
    return await call()


class Pipeline:
    """Does the steps of tasks; holds no state of any of them.

    Args:
        store: Images are read from it, masks are written to it.
        tasks: Rows.
        runner: The model.
        urls: Tells keys from image URLs.
        decoder: Opens image files.
        limits: Of image files.
        codec_pool: Threads that encode masks. Not shut down here.
        max_uploads: Masks of one job that are uploaded side by side.
    """

    def __init__(
        self,
        store: ObjectStore,
        tasks: TaskStore,
        runner: Runner,
        urls: ImageKeys,
        decoder: ImageDecoder,
        limits: ImageLimits,
        *,
        codec_pool: Executor,
        max_uploads: int = 8,
    ) -> None:
        self._store = store
        self._tasks = tasks
        self._runner = runner
        self._urls = urls
        self._decoder = decoder
        self._limits = limits
        self._codec_pool = codec_pool
        self._max_uploads = max_uploads
        self._model: ModelInfo | None = None

    def inputs_of(self, job: Job) -> TaskInputs:
        """What the job's row knows it by.

        Raises:
            InvalidTaskId: the id cannot be part of a key.
            ForeignUrl: the image is not in our storage.
        """
        union_mask_key(job.task_id)
        return inputs_of(job, self._urls.key_of(job.image_url))

    async def compute(self, work: Work, attempt: Attempt = once) -> Computed:
        """Claims the row, loads the image and segments it.

        Raises:
            TaskNotFound, TaskConflict: nothing was computed, and no row was touched.
            TaskError, StorageError, RunnerError: as the steps do.
        """
        image, model = await self._claim_and_load(work, attempt)
        result = await attempt("segment", lambda: self._segment(work, image))
        found = await self._in_pool(_in_whole_image, result.segmentations, image)
        return Computed(image.size_hw, found, model, result.batch_size, dict(work.clock.stage_ms))

    async def deliver(self, work: Work, computed: Computed, attempt: Attempt = once) -> JobOutcome:
        """Uploads the masks and makes the row `done`.

        Raises:
            TaskNotFound, TaskConflict: the row is gone, or has been taken over.
            TaskError, StorageError: as the steps do.
        """
        await attempt("upload", lambda: self._save_masks(work, computed))
        made = await self._make_outputs(work, computed, attempt)
        outcome = replace(
            self.outcome(work.job, computed, work.clock.stage_ms),
            documents={name: data for name, data in made.items() if KINDS[name].is_document},
        )
        result = _row_result(outcome)
        await attempt("finish", lambda: work.write_row(self._tasks.finish(work.inputs, result)))
        return outcome

    async def confirm(self, work: Work, outcome: JobOutcome) -> None:
        """Makes the row of a finished task `done` once more, if somebody reset it."""
        await self._tasks.start(work.inputs)
        await self._tasks.finish(work.inputs, _row_result(outcome))

    async def tell_failure(self, work: Work, code: str, message: str, attempt: Attempt = once) -> None:
        """Makes the row `error`, after an update of it that may still be under way: that could overtake ours."""
        await work.end_row_write()
        await attempt("fail", lambda: self._tasks.fail(work.inputs, code, message))

    def outcome(self, job: Job, computed: Computed, stage_ms: dict[str, float]) -> JobOutcome:
        """What a job came to, given what was computed."""
        url_of = self._store.public_url if job.makes("mask") else _no_url
        mask_key, keys = union_mask_key(job.task_id), prompt_mask_keys(job)
        return JobOutcome(
            image_size_hw=computed.image_size_hw,
            prompts=tuple(
                PromptOutcome(prompt, key, url_of(key), found)
                for prompt, key, found in zip(job.prompts, keys, computed.segmentations, strict=True)
            ),
            mask_key=mask_key,
            mask_url=url_of(mask_key),
            stage_ms=stage_ms,
            model=computed.model,
            batch_size=computed.batch_size,
            output_urls={
                name: self._store.public_url(output_key(job.task_id, KINDS[name].suffix))
                for name in job.others
            },
        )

    async def _claim_and_load(self, work: Work, attempt: Attempt) -> tuple[ModelImage, ModelInfo]:
        """The row to `processing` beside the download; what the row says comes first, if both fail."""
        claim = asyncio.create_task(attempt("claim", lambda: work.write_row(self._tasks.start(work.inputs))))
        load = asyncio.create_task(self._load(work, attempt))
        try:
            await claim
            return await load
        except BaseException:
            claim.cancel()
            load.cancel()
            await asyncio.gather(claim, load, return_exceptions=True)
            raise

    async def _load(self, work: Work, attempt: Attempt) -> tuple[ModelImage, ModelInfo]:
        data, model = await _together(
            attempt("download", lambda: self._download(work)), attempt("model", self._model_info)
        )
        with work.clock.timed("decode"):
            image = await attempt(
                "decode", lambda: self._decoder.open_for_model(data, model.input_size_px, work.job.region)
            )
        return image, model

    async def _download(self, work: Work) -> bytes:
        with work.clock.timed("download"):
            return await self._store.get(work.inputs.image_key, self._limits.max_bytes)

    async def _model_info(self) -> ModelInfo:
        if self._model is None:
            self._model = await self._runner.info()
        return self._model

    async def _segment(self, work: Work, image: ModelImage) -> SegmentResult:
        left, top, right, bottom = image.crop_xyxy_px
        prompts = tuple(in_crop(prompt, image.size_hw, image.crop_xyxy_px) for prompt in work.job.prompts)
        item = SegmentItem(image.pixels, (bottom - top, right - left), prompts, key=image.content_hash)
        began = time.perf_counter()
        result = await self._runner.segment(item)
        call_ms = (time.perf_counter() - began) * 1000
        if result.error is not None:
            raise runner_error(result.error)
        if len(result.segmentations) != len(prompts):
            raise runner_errors.InferenceFailed(
                f"the runner answered {len(result.segmentations)} of {len(prompts)} prompts"
            )
        work.clock.add("infer", result.infer_ms)
        work.clock.add("queue", max(0.0, call_ms - result.infer_ms))
        return result

    async def _save_masks(self, work: Work, computed: Computed) -> None:
        """Encodes and uploads masks side by side: that of the task and, in a batch, those of the prompts."""
        if not work.job.makes("mask"):
            return
        found = computed.segmentations
        masks_of = {union_mask_key(work.job.task_id): [mask for one in found for mask in one.masks]}
        if work.job.is_batch:
            keys = prompt_mask_keys(work.job)
            masks_of |= {key: list(one.masks) for key, one in zip(keys, found, strict=True)}
        places = asyncio.Semaphore(self._max_uploads)
        size_hw = computed.image_size_hw
        saves = [self._save_mask(work, key, masks, size_hw, places) for key, masks in masks_of.items()]
        await _together(*saves)

    async def _save_mask(
        self,
        work: Work,
        key: str,
        masks: list[RunLengthMask],
        size_hw: tuple[int, int],
        places: asyncio.Semaphore,
    ) -> None:
        async with places:
            png, encode_ms = await self._in_pool(_encode_union, masks, size_hw)
            work.clock.add("encode", encode_ms)
            with work.clock.spanned("upload"):
                await self._store.put(key, png, "image/png")

    async def _make_outputs(self, work: Work, computed: Computed, attempt: Attempt) -> dict[str, bytes]:
        """Makes and stores what was asked for beside the mask; the photo is read again if it is drawn on."""
        if not work.job.others:
            return {}
        order = order_of(work.job)
        photo = await attempt("download", lambda: self._download(work)) if order.needs_pixels else b""
        found = [
            (name_of(prompt), one)
            for prompt, one in zip(work.job.prompts, computed.segmentations, strict=True)
        ]
        with work.clock.timed("encode"):
            made = await attempt(
                "draw", lambda: self._decoder.make_outputs(order, found, computed.image_size_hw, photo)
            )
        await attempt("upload", lambda: self._save_outputs(work, made))
        return made

    async def _save_outputs(self, work: Work, made: dict[str, bytes]) -> None:
        with work.clock.spanned("upload"):
            await _together(
                *(
                    self._store.put(
                        output_key(work.job.task_id, KINDS[name].suffix), data, KINDS[name].media_type
                    )
                    for name, data in made.items()
                )
            )

    async def _in_pool(self, call: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._codec_pool, call, *arguments)


class Work:
    """What changes while one job runs: the write of its row that is under way, and its clock.

    Args:
        job: What was asked for.
        inputs: What its row knows it by.
    """

    def __init__(self, job: Job, inputs: TaskInputs) -> None:
        self.job = job
        self.inputs = inputs
        self.clock = Clock()
        self._row_write: asyncio.Task[None] | None = None

    async def write_row(self, write: Coroutine[Any, Any, None]) -> None:
        """An update of the row, which goes on when its waiter is cancelled."""

        async def timed() -> None:
            with self.clock.timed("row_update"):
                await write

        self._row_write = asyncio.create_task(timed())
        await asyncio.shield(self._row_write)

    def follow(self, earlier: Work) -> None:
        """Take over an update of the same row that may still be under way."""
        self._row_write = earlier._row_write

    async def end_row_write(self) -> None:
        """Waits for an update that nobody waits for any more; one that takes too long is cancelled."""
        if self._row_write is not None:
            await asyncio.wait({self._row_write}, timeout=ROW_WRITE_WAIT_S)
            self._row_write.cancel()
            await asyncio.gather(self._row_write, return_exceptions=True)


@dataclass(slots=True)
class Clock:
    """Milliseconds per stage of one job."""

    stage_ms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    first_begin_s: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, elapsed_ms: float) -> None:
        """Add time to a stage."""
        self.stage_ms[stage] += elapsed_ms

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time of the block to the stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, (time.perf_counter() - began) * 1000)

    @contextmanager
    def spanned(self, stage: str) -> Iterator[None]:
        """Makes the stage last from the first block's begin to the last one's end."""
        began = self.first_begin_s.setdefault(stage, time.perf_counter())
        try:
            yield
        finally:
            self.stage_ms[stage] = (time.perf_counter() - began) * 1000


def runner_error(error: ItemError) -> runner_errors.RunnerError:
    """The runner's error that came as data; one that has no name here is `InferenceFailed`."""
    named = {_plain(cls.__name__): cls for cls in _subclasses(runner_errors.RunnerError)}
    return named.get(_plain(error.code), runner_errors.InferenceFailed)(error.message)


def _subclasses(cls: type[runner_errors.RunnerError]) -> Iterator[type[runner_errors.RunnerError]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _plain(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower())


def inputs_of(job: Job, image_key: str = "") -> TaskInputs:
    """The job's inputs; without a key, those of a job whose image is not ours."""
    return TaskInputs(
        task_id=job.task_id,
        user_id=job.user_id,
        image_url=job.image_url,
        image_key=image_key,
        prompts=tuple(map(name_of, job.prompts)),
        score_threshold=job.prompts[0].selection.score_threshold,
        question=job.question,
        request_id=job.request_id,
    )


def _no_url(key: str) -> None:
    """Of what is not made."""


def prompt_mask_keys(job: Job) -> list[str]:
    """The key of each prompt's mask; that of the task where there is but one."""
    if not job.is_batch:
        return [union_mask_key(job.task_id)]
    return [prompt_mask_key(job.task_id, index) for index in range(len(job.prompts))]


def _in_whole_image(found: Sequence[Segmentation], image: ModelImage) -> tuple[Segmentation, ...]:
    """What was found in the part that the model saw, in the frame of the whole image."""
    left, top, right, bottom = image.crop_xyxy_px
    if (bottom - top, right - left) == image.size_hw:
        return tuple(found)
    return tuple(
        Segmentation(
            one.scores,
            one.boxes_xyxy_px + np.array([left, top, left, top], np.float32),
            tuple(rle.pasted(mask, (top, left), image.size_hw) for mask in one.masks),
        )
        for one in found
    )


def order_of(job: Job, names: tuple[str, ...] | None = None) -> Order:
    """What is to be made for a job: all outputs beside the mask, or some of them."""
    file_name = job.image_url.partition("?")[0].rsplit("/", 1)[-1]
    return Order(job.others if names is None else names, job.polygon_tolerance_px, file_name)


def document(job: Job, outcome: JobOutcome, name: str) -> bytes:
    """An output that is JSON: as it was made, or made again, which takes milliseconds of CPU."""
    if name not in outcome.documents:
        found = [(name_of(prompt.prompt), prompt.segmentation) for prompt in outcome.prompts]
        return make_outputs(order_of(job, (name,)), found, outcome.image_size_hw)[name]
    return outcome.documents[name]


def _encode_union(masks: Sequence[RunLengthMask], size_hw: tuple[int, int]) -> tuple[bytes, float]:
    """The union as PNG, and the milliseconds that it took."""
    began = time.perf_counter()
    png = encode_png(rle.union_rle(masks, size_hw))
    return png, (time.perf_counter() - began) * 1000


def _row_result(outcome: JobOutcome) -> TaskResult:
    height, width = outcome.image_size_hw
    found = sorted(_instances(outcome.prompts), key=lambda instance: -instance["score"])
    return TaskResult(
        mask_image_url=outcome.mask_url,
        labels=outcome.labels,
        metadata={
            "inference_time_ms": round(outcome.inference_time_ms, 3),
            "confidence": outcome.confidence,
            "image_size": {"width": width, "height": height},
            "instance_count": len(found),
            "instances": found[:MAX_INSTANCES_IN_ROW],
            "model": {"name": outcome.model.model_name, "version": outcome.model.model_version},
        },
    )


def _instances(prompts: Iterable[PromptOutcome]) -> Iterator[dict[str, Any]]:
    for outcome in prompts:
        found = outcome.segmentation
        for score, box, mask in zip(found.scores, found.boxes_xyxy_px, found.masks, strict=True):
            yield {
                "prompt": name_of(outcome.prompt),
                "score": round(float(score), 4),
                "box_xyxy_px": [round(float(edge), 1) for edge in box],
                "area_px": int(rle.area_px(mask)),
            }


async def _together(*coroutines: Coroutine[Any, Any, Any]) -> tuple[Any, ...]:
    """Results of all, in order. The first failure cancels the others and is raised as it is."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return tuple(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
