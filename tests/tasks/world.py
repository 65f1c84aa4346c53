"""What a pipeline and its executor are made of in tests: a picture, stores, rows, a runner and a journal."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from sam3_runner.drawing import Found
from sam3_runner.images import ImageLimits, ModelImage, Region, open_for_model, open_image
from sam3_runner.outputs import Order, make_outputs
from sam3_runner.types import Prompt, Selection
from storage import ImageUrls, ObjectStore
from storage.errors import StorageTimeout, StorageUnavailable
from tasks.errors import TaskStoreTimeout, TaskStoreUnavailable
from tasks.executor import RetryRules, TaskExecutor
from tasks.job import Job
from tasks.journal import Journal
from tasks.pipeline import JobOutcome, Pipeline
from tasks.store import TaskRow, TaskStore
from tasks.supabase import RetryPolicy
from tests.tasks.colour_runner import ColourRunner

# Tries follow quickly; what waits for a server waits as long as a busy machine may need.
FAST = RetryPolicy(
    attempts=2,
    deadline_s=40,
    connect_timeout_s=15,
    read_timeout_s=15,
    backoff_base_s=0.01,
    backoff_cap_s=0.02,
)
PUBLIC_URL = "https://images.example.com"
SIZE_HW = (120, 200)
RED_BOX = (20, 10, 80, 60)  # x0, y0, x1, y1
BLUE_BOX = (110, 50, 190, 110)


def picture(kind: str = "PNG", **options: Any) -> bytes:
    """Grey, with a red and a blue rectangle that do not overlap."""
    image = Image.new("RGB", (SIZE_HW[1], SIZE_HW[0]), (128, 128, 128))
    image.paste((255, 0, 0), RED_BOX)
    image.paste((0, 0, 255), BLUE_BOX)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def box_mask(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros(SIZE_HW, bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def iou(png: bytes, truth: np.ndarray) -> float:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        levels = np.asarray(image.convert("L"))
    assert levels.shape == truth.shape
    assert set(np.unique(levels)) <= {0, 255}
    return iou_of(levels == 255, truth)


def iou_of(found: np.ndarray, truth: np.ndarray) -> float:
    return float((found & truth).sum() / max(1, (found | truth).sum()))


def words(*texts: str, **selection: Any) -> tuple[Prompt, ...]:
    return tuple(Prompt(text, selection=Selection(**selection)) for text in texts)


def code_of(error: BaseException) -> tuple[str, str]:
    return type(error).__name__, f"told: {error}"


@dataclass(frozen=True)
class ThreadDecoder:
    """Decodes in a thread: what a pipeline does with an image is the same wherever it was decoded."""

    limits: ImageLimits

    async def open_for_model(
        self, data: bytes, input_size_px: int, region: Region | None = None
    ) -> ModelImage:
        return await asyncio.to_thread(open_for_model, data, input_size_px, self.limits, region)

    async def make_outputs(
        self, order: Order, found: Found, size_hw: tuple[int, int], data: bytes
    ) -> dict[str, bytes]:
        pixels = open_image(data, self.limits) if order.needs_pixels else None
        return await asyncio.to_thread(make_outputs, order, found, size_hw, pixels)


class RunnerDied(Exception):
    """The runner's process went away with a task in it."""


class RunnerAway(Exception):
    """The runner's process is not there."""


PASSING = (StorageUnavailable, StorageTimeout, TaskStoreUnavailable, TaskStoreTimeout, RunnerAway, RunnerDied)


@dataclass
class Counts:
    """A `TaskObserver` that remembers."""

    retries: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    stages: list[Mapping[str, float]] = field(default_factory=list)
    takeovers: int = 0

    def retried(self, step: str) -> None:
        self.retries.append(step)

    def ended(self, outcome: str, stage_ms: Mapping[str, float]) -> None:
        self.ends.append(outcome)
        self.stages.append(dict(stage_ms))

    def taken_over(self) -> None:
        self.takeovers += 1


async def never_gone() -> bool:
    return False


@dataclass
class World:
    """Parts that executors are made of, and how rows and images get into them."""

    store: ObjectStore
    tasks: TaskStore
    runner: ColourRunner
    new_task_id: Callable[[], str]
    pool: ThreadPoolExecutor
    journal: Journal
    counts: Counts = field(default_factory=Counts)
    executors: list[TaskExecutor] = field(default_factory=list)

    def job(self, **changes: Any) -> Job:
        job = Job(
            task_id=self.new_task_id(),
            user_id="user-1",
            image_url="uploads/picture.png",
            prompts=words("red"),
            request_id="request-1",
        )
        return replace(job, **changes)

    def executor(
        self,
        *,
        passing: tuple[type[Exception], ...] = PASSING,
        journal: Journal | None = None,
        **changes: Any,
    ) -> TaskExecutor:
        """A new executor over these parts, or others.

        Args:
            passing: What is tried again while computing.
            journal: Instead of the world's own.
            changes: Parts of the pipeline, or arguments of the executor.
        """
        of_executor = {"deadline_s": 60.0, "max_unfinished": 100, "max_running": 4}
        arguments = {name: changes.pop(name, value) for name, value in of_executor.items()}
        parts: dict[str, Any] = {
            "store": self.store,
            "tasks": self.tasks,
            "runner": self.runner,
            "urls": ImageUrls.for_r2(
                endpoint="http://127.0.0.1:9", bucket="s3-images", public_url=PUBLIC_URL
            ),
            "decoder": ThreadDecoder(changes.get("limits", ImageLimits())),
            "limits": ImageLimits(),
            "codec_pool": self.pool,
        }
        pipeline = Pipeline(**(parts | changes))
        rules = RetryRules(passing, (RunnerDied,), pause, first_pause_s=0.02, max_pause_s=0.2)
        made = TaskExecutor(
            journal or self.journal, pipeline, rules, code_of=code_of, observer=self.counts, **arguments
        )
        self.executors.append(made)
        return made

    async def run(
        self, job: Job, executor: TaskExecutor | None = None, timeout_s: float = 60.0
    ) -> JobOutcome:
        """As a caller that waits."""
        chosen = executor or (self.executors[0] if self.executors else self.executor())
        return await chosen.run(job, timeout_s=timeout_s, is_caller_gone=never_gone)

    async def row(self, job: Job) -> TaskRow:
        row = await self.tasks.get(job.task_id)
        assert row is not None
        return row

    async def mask(self, key: str) -> bytes:
        return await self.store.get(key, 10_000_000)

    async def assert_it_still_works(self) -> None:
        """The next job, right after whatever happened."""
        self.runner.before = self.runner.answer = None
        job = self.job()
        outcome = await self.run(job, self.executor())
        assert (await self.row(job)).status == "done"
        assert iou(await self.mask(outcome.mask_key), box_mask(RED_BOX)) > 0.9

    async def aclose(self) -> None:
        for executor in self.executors:
            await executor.aclose()
        await self.journal.aclose()


async def pause(error: BaseException, seconds: float) -> None:
    await asyncio.sleep(seconds)


class Watched:
    """A task store or object store with something of its own before each of some calls."""

    def __init__(self, inner: Any, **before: Callable[[], Awaitable[None]]) -> None:
        self._inner = inner
        self._before = before

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if name not in self._before:
            return method

        async def call(*arguments: Any, **named: Any) -> Any:
            await self._before[name]()
            return await method(*arguments, **named)

        return call
