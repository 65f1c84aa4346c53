"""From image to mask to row, on a real S3 server and a real Postgres; and each way it can fail."""

from __future__ import annotations

import asyncio
import io
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sam3_runner.errors import (
    DeviceOutOfMemory,
    ImageTooLarge,
    InferenceFailed,
    InvalidPrompt,
    TooManyPrompts,
    UndecodableImage,
    UnsupportedImage,
)
from sam3_runner.images import ImageLimits, ModelImage, open_for_model
from sam3_runner.types import ItemError, SegmentItem, SegmentResult, TextPrompt
from storage import ForeignUrl, ImageUrls, ObjectNotFound, ObjectStore, ObjectTooLarge, StorageError
from storage.local import LocalStore
from storage.r2 import R2Store
from tasks.errors import InvalidTaskId, TaskConflict, TaskNotFound, TaskStoreUnavailable
from tasks.local import LocalTasks
from tasks.pipeline import MAX_INSTANCES_IN_ROW, STAGES, Job, Pipeline, runner_error
from tasks.store import TaskInputs, TaskRow, TaskStore
from tasks.supabase import RetryPolicy, SupabaseTasks
from tests.servers.postgres import running_postgres
from tests.servers.postgrest import PostgrestStandIn, insert_task, running_postgrest
from tests.servers.s3 import S3Server, s3_server
from tests.tasks.colour_runner import ColourRunner, failed

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
    found = levels == 255
    return float((found & truth).sum() / max(1, (found | truth).sum()))


def code_of(error: BaseException) -> tuple[str, str]:
    return type(error).__name__, f"told: {error}"


@dataclass(frozen=True)
class ThreadDecoder:
    """Decodes in a thread: what a pipeline does with an image is the same wherever it was decoded."""

    limits: ImageLimits

    async def open_for_model(self, data: bytes, input_size_px: int) -> ModelImage:
        return await asyncio.to_thread(open_for_model, data, input_size_px, self.limits)


@dataclass
class World:
    """A pipeline, the parts it was made of, and how rows and images get into them."""

    pipeline: Pipeline
    store: ObjectStore
    tasks: TaskStore
    runner: ColourRunner
    new_task_id: Callable[[], str]
    pool: ThreadPoolExecutor

    def job(self, **changes: Any) -> Job:
        job = Job(
            task_id=self.new_task_id(),
            user_id="user-1",
            image_url="uploads/picture.png",
            prompts=("red",),
            score_threshold=0.5,
            request_id="request-1",
        )
        return replace(job, **changes)

    def with_parts(self, **changes: Any) -> Pipeline:
        parts: dict[str, Any] = {
            "store": self.store,
            "tasks": self.tasks,
            "runner": self.runner,
            "urls": ImageUrls.for_r2(
                endpoint="http://127.0.0.1:9", bucket="s3-images", public_url=PUBLIC_URL
            ),
            "decoder": ThreadDecoder(ImageLimits()),
            "limits": ImageLimits(),
            "code_of": code_of,
            "codec_pool": self.pool,
            "fail_deadline_s": 30.0,
        }
        return Pipeline(**(parts | changes))

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
        outcome = await self.pipeline.run(job)
        assert (await self.row(job)).status == "done"
        assert iou(await self.mask(outcome.mask_key), box_mask(RED_BOX)) > 0.9


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def codec_pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2, thread_name_prefix="codec") as pool:
        yield pool


@pytest.fixture(scope="session")
def r2_store(s3: S3Server) -> Iterator[R2Store]:
    store = R2Store(
        s3.endpoint,
        s3.bucket,
        s3.access_key_id,
        s3.secret_access_key,
        public_url=PUBLIC_URL,
        connect_timeout_s=15,
        deadline_s=40,
        max_attempts=2,
    )
    yield store
    asyncio.run(store.aclose())


@pytest.fixture
async def world(
    r2_store: R2Store, stand_in: PostgrestStandIn, dsn: str, codec_pool: ThreadPoolExecutor
) -> AsyncIterator[World]:
    """As in production: R2 and Supabase."""
    async with aclosing(SupabaseTasks(stand_in.url, stand_in.secret_key, retry=FAST)) as tasks:
        made = await _world(r2_store, tasks, lambda: insert_task(dsn), codec_pool)
        yield made
        await made.pipeline.aclose()


@pytest.fixture
async def embedded(tmp_path: Path, codec_pool: ThreadPoolExecutor) -> AsyncIterator[World]:
    """As on a developer's machine: a directory and SQLite."""
    async with (
        aclosing(LocalStore(tmp_path / "files", "http://127.0.0.1:8000")) as store,
        aclosing(LocalTasks(tmp_path / "tasks.sqlite3")) as tasks,
    ):
        made = await _world(store, tasks, lambda: str(uuid.uuid4()), codec_pool)
        yield made
        await made.pipeline.aclose()


async def _world(
    store: ObjectStore, tasks: TaskStore, new_task_id: Callable[[], str], pool: ThreadPoolExecutor
) -> World:
    await store.put("uploads/picture.png", picture(), "image/png")
    runner = ColourRunner()
    world = World(None, store, tasks, runner, new_task_id, pool)  # type: ignore[arg-type]
    world.pipeline = world.with_parts()
    return world


@pytest.fixture(params=["world", "embedded"])
def any_world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(request.param)
    return found


# Success


async def test_one_prompt_gives_a_mask_a_row_and_an_outcome_that_agree(any_world: World) -> None:
    job = any_world.job()
    outcome = await any_world.pipeline.run(job)

    assert outcome.image_size_hw == SIZE_HW
    assert outcome.mask_key == f"masks/{job.task_id}.png"
    assert outcome.mask_url == any_world.store.public_url(outcome.mask_key)
    assert outcome.labels == ("red",)
    assert outcome.confidence == pytest.approx(0.9)
    assert outcome.batch_size == 3
    (prompt,) = outcome.prompts
    assert (prompt.mask_key, prompt.mask_url) == (outcome.mask_key, outcome.mask_url)
    assert iou(await any_world.mask(outcome.mask_key), box_mask(RED_BOX)) > 0.95

    row = await any_world.row(job)
    assert (row.status, row.mask_image_url, row.labels) == ("done", outcome.mask_url, ("red",))
    metadata = dict(row.metadata)
    (instance,) = metadata.pop("instances")
    assert instance["prompt"] == "red"
    assert instance["score"] == 0.9
    assert np.allclose(instance["box_xyxy_px"], RED_BOX, atol=2)
    assert abs(instance["area_px"] - 60 * 50) < 200
    assert metadata.pop("confidence") == outcome.confidence
    assert len(metadata.pop("inputs")) == 64
    assert metadata == {
        "inference_time_ms": outcome.inference_time_ms,
        "image_size": {"width": 200, "height": 120},
        "instance_count": 1,
        "model": {"name": "COLOUR", "version": "test"},
        "user_id": "user-1",
        "request_id": "request-1",
    }


async def test_a_batch_gives_a_mask_per_prompt_and_the_union_of_all(any_world: World) -> None:
    job = any_world.job(prompts=("blue", "green", "red"), is_batch=True)
    outcome = await any_world.pipeline.run(job)
    assert [prompt.prompt for prompt in outcome.prompts] == ["blue", "green", "red"]
    assert [prompt.mask_key for prompt in outcome.prompts] == [
        f"masks/{job.task_id}/{i}.png" for i in range(3)
    ]
    for prompt, boxes in zip(outcome.prompts, [(BLUE_BOX,), (), (RED_BOX,)], strict=True):
        png = await any_world.mask(prompt.mask_key)
        assert iou(png, box_mask(*boxes)) > 0.95 if boxes else iou(png, ~box_mask()) == 0.0
    assert outcome.mask_key == f"masks/{job.task_id}.png"
    assert iou(await any_world.mask(outcome.mask_key), box_mask(RED_BOX, BLUE_BOX)) > 0.95
    assert outcome.labels == ("blue", "red")
    assert [prompt.confidence for prompt in outcome.prompts] == pytest.approx([0.7, 0.0, 0.9])
    row = await any_world.row(job)
    assert (row.labels, row.mask_image_url) == (("blue", "red"), outcome.mask_url)
    assert [instance["prompt"] for instance in row.metadata["instances"]] == ["red", "blue"]  # best first
    assert len(any_world.runner.calls) == 1


async def test_a_batch_of_one_has_both_kinds_of_mask(embedded: World) -> None:
    outcome = await embedded.pipeline.run(embedded.job(is_batch=True))
    assert await embedded.mask(outcome.prompts[0].mask_key) == await embedded.mask(outcome.mask_key)


async def test_nothing_found_is_a_normal_result_with_an_empty_mask(any_world: World) -> None:
    job = any_world.job(prompts=("unicorn",))
    outcome = await any_world.pipeline.run(job)
    assert (outcome.labels, outcome.confidence) == ((), 0.0)
    assert iou(await any_world.mask(outcome.mask_key), ~box_mask()) == 0.0
    row = await any_world.row(job)
    assert (row.status, row.labels, row.metadata["instances"]) == ("done", (), [])
    assert row.metadata["confidence"] == 0.0


async def test_the_threshold_of_the_job_reaches_the_runner(embedded: World) -> None:
    outcome = await embedded.pipeline.run(embedded.job(prompts=("blue",), score_threshold=0.8))
    assert outcome.labels == ()
    assert embedded.runner.calls[0].score_threshold == 0.8


async def test_the_mask_fits_the_image_as_a_phone_shows_it(embedded: World) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise before it is shown
    await embedded.store.put("uploads/phone.jpg", picture("JPEG", exif=exif, quality=95), "image/jpeg")
    outcome = await embedded.pipeline.run(embedded.job(image_url="uploads/phone.jpg"))
    assert outcome.image_size_hw == (200, 120)
    upright = np.rot90(box_mask(RED_BOX), -1)
    assert iou(await embedded.mask(outcome.mask_key), upright) > 0.9


async def test_all_stages_are_timed(any_world: World) -> None:
    outcome = await any_world.pipeline.run(any_world.job(prompts=("red", "blue"), is_batch=True))
    assert tuple(outcome.stage_ms) == STAGES
    assert all(elapsed_ms > 0 for elapsed_ms in outcome.stage_ms.values())
    assert outcome.stage_ms["infer"] == 0.01


async def test_the_time_in_the_queue_is_what_the_call_took_beyond_the_model(embedded: World) -> None:
    async def wait() -> None:
        await asyncio.sleep(0.2)

    embedded.runner.before = wait
    outcome = await embedded.pipeline.run(embedded.job())
    assert 150 < outcome.stage_ms["queue"] < 5000


async def test_the_row_of_a_crowd_keeps_the_best_instances_and_counts_all(embedded: World) -> None:
    one = (await embedded.runner.segment(_item_with_red())).segmentations[0]
    count = MAX_INSTANCES_IN_ROW + 50
    crowd = replace(
        one,
        scores=np.linspace(0.99, 0.6, count, dtype=np.float32),
        boxes_xyxy_px=np.repeat(one.boxes_xyxy_px, count, axis=0),
        masks=one.masks * count,
    )
    embedded.runner.answer = SegmentResult((crowd,))
    job = embedded.job()
    outcome = await embedded.pipeline.run(job)
    assert len(outcome.prompts[0].segmentation.scores) == count
    metadata = (await embedded.row(job)).metadata
    assert metadata["instance_count"] == count
    scores = [instance["score"] for instance in metadata["instances"]]
    assert len(scores) == MAX_INSTANCES_IN_ROW
    assert scores == sorted(scores, reverse=True)


def _item_with_red() -> SegmentItem:
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[50:100, 50:100, 0] = 255
    return SegmentItem(pixels, SIZE_HW, (TextPrompt("red"),))


async def test_the_model_is_asked_for_its_facts_once(embedded: World) -> None:
    for _ in range(3):
        await embedded.pipeline.run(embedded.job())
    assert embedded.runner.info_calls == 1


async def test_many_jobs_at_once_do_not_mix(any_world: World) -> None:
    prompts = ["red", "blue", "green"] * 3
    jobs = [any_world.job(prompts=(prompt,)) for prompt in prompts]
    outcomes = await asyncio.gather(*(any_world.pipeline.run(job) for job in jobs))
    for job, outcome in zip(jobs, outcomes, strict=True):
        labels = () if job.prompts == ("green",) else job.prompts
        assert outcome.labels == labels
        row = await any_world.row(job)
        assert (row.status, row.labels) == ("done", labels)
        assert outcome.mask_key == f"masks/{job.task_id}.png"


async def test_the_same_request_twice_at_once_is_done_twice_and_agrees(any_world: World) -> None:
    job = any_world.job()
    first, second = await asyncio.gather(any_world.pipeline.run(job), any_world.pipeline.run(job))
    third = await any_world.pipeline.run(job)
    assert first.mask_url == second.mask_url == third.mask_url
    assert (await any_world.row(job)).status == "done"


async def test_of_different_requests_for_one_task_at_once_one_is_done(any_world: World) -> None:
    job = any_world.job()
    rivals = [replace(job, prompts=(prompt,)) for prompt in ("red", "blue", "green")]
    results = await asyncio.gather(*(any_world.pipeline.run(r) for r in rivals), return_exceptions=True)
    done = [(r, o) for r, o in zip(rivals, results, strict=True) if not isinstance(o, BaseException)]
    assert len(done) == 1
    assert sum(isinstance(result, TaskConflict) for result in results) == 2
    assert len(any_world.runner.calls) == 1
    row = await any_world.row(job)
    assert row.status == "done"
    assert row.labels == done[0][1].labels


# What overlaps


class _Watched:
    """A task store or object store with something of its own before each of some calls."""

    def __init__(self, inner: Any, **before: Callable[[], Awaitable[None]]) -> None:
        self._inner = inner
        self._before = before

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if name not in self._before:
            return method

        async def call(*arguments: Any) -> Any:
            await self._before[name]()
            return await method(*arguments)

        return call


async def test_the_row_is_claimed_while_the_image_is_downloaded(embedded: World) -> None:
    both_under_way = asyncio.Barrier(2)

    async def meet() -> None:
        async with asyncio.timeout(60):
            await both_under_way.wait()

    pipeline = embedded.with_parts(
        tasks=_Watched(embedded.tasks, start=meet), store=_Watched(embedded.store, get=meet)
    )
    await pipeline.run(embedded.job())


async def test_masks_are_uploaded_side_by_side(embedded: World) -> None:
    all_under_way = asyncio.Barrier(4)

    async def meet() -> None:
        async with asyncio.timeout(60):
            await all_under_way.wait()

    pipeline = embedded.with_parts(store=_Watched(embedded.store, put=meet))
    await pipeline.run(embedded.job(prompts=("red", "green", "blue"), is_batch=True))


async def test_no_more_masks_are_uploaded_at_once_than_allowed(embedded: World) -> None:
    running = most = 0

    async def count() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1

    pipeline = embedded.with_parts(store=_Watched(embedded.store, put=count), max_uploads=2)
    await pipeline.run(embedded.job(prompts=("red",) * 6, is_batch=True))
    assert most == 2


# Failures


async def assert_fails(
    world: World, expected: type[BaseException], job: Job | None = None, pipeline: Pipeline | None = None
) -> TaskRow:
    """The job raises the error, its row says so, and the next job works."""
    job = job or world.job()
    with pytest.raises(expected) as caught:
        await (pipeline or world.pipeline).run(job)
    row = await world.row(job)
    assert row.status == "error"
    assert row.metadata["error"] == dict(zip(("code", "message"), code_of(caught.value), strict=True))
    assert row.metadata["request_id"] == job.request_id
    assert set(caught.value.__dict__["stage_ms"]) == set(STAGES)
    assert row.mask_image_url is None
    await world.assert_it_still_works()
    return row


async def until_not_processing(world: World, job: Job) -> TaskRow:
    """The row, once the background has written it."""
    async with asyncio.timeout(60):
        while (row := await world.row(job)).status == "processing":
            await asyncio.sleep(0.05)
    assert row.status == "error"
    return row


async def test_an_image_that_is_not_there_fails(any_world: World) -> None:
    await assert_fails(any_world, ObjectNotFound, any_world.job(image_url="uploads/missing.png"))
    assert len(any_world.runner.calls) == 1  # that of the job that worked


async def test_an_image_url_that_is_not_ours_fails_and_nothing_is_downloaded(any_world: World) -> None:
    async def never() -> None:
        raise AssertionError("the store was asked")

    job = any_world.job(image_url="https://elsewhere.example/cat.png")
    pipeline = any_world.with_parts(store=_Watched(any_world.store, get=never))
    await assert_fails(any_world, ForeignUrl, job, pipeline)


@pytest.mark.parametrize(
    ("data", "limits", "expected"),
    [
        pytest.param(b"this is no image" * 10, ImageLimits(), UnsupportedImage, id="text"),
        pytest.param(b"", ImageLimits(), UndecodableImage, id="nothing"),
        pytest.param(picture()[:200], ImageLimits(), UndecodableImage, id="truncated"),
        pytest.param(picture(), ImageLimits(max_pixels=100), ImageTooLarge, id="too many pixels"),
        pytest.param(picture(), ImageLimits(max_bytes=100), ObjectTooLarge, id="too many bytes"),
    ],
)
async def test_an_image_that_cannot_be_used_fails(
    any_world: World, data: bytes, limits: ImageLimits, expected: type[Exception]
) -> None:
    await any_world.store.put("uploads/bad.png", data, "image/png")
    job = any_world.job(image_url="uploads/bad.png")
    await assert_fails(
        any_world, expected, job, any_world.with_parts(limits=limits, decoder=ThreadDecoder(limits))
    )


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(failed("DeviceOutOfMemory", "full"), DeviceOutOfMemory, id="out of memory"),
        pytest.param(failed("InvalidPrompt", "blank"), InvalidPrompt, id="prompt"),
        pytest.param(failed("SomethingNew", "?"), InferenceFailed, id="unknown code"),
        pytest.param(SegmentResult(()), InferenceFailed, id="too few answers"),
    ],
)
async def test_an_error_of_the_runner_that_came_as_data_fails(
    any_world: World, answer: SegmentResult, expected: type[Exception]
) -> None:
    any_world.runner.answer = answer
    await assert_fails(any_world, expected)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("DeviceOutOfMemory", DeviceOutOfMemory),
        ("DEVICE_OUT_OF_MEMORY", DeviceOutOfMemory),
        ("TOO_MANY_PROMPTS", TooManyPrompts),
        ("InferenceFailed", InferenceFailed),
        ("", InferenceFailed),
    ],
)
def test_codes_of_the_runner_name_its_errors(code: str, expected: type[Exception]) -> None:
    error = runner_error(ItemError(code, "why"))
    assert type(error) is expected
    assert str(error) == "why"


async def test_a_runner_that_is_gone_fails(any_world: World) -> None:
    async def gone() -> None:
        raise ConnectionError("the runner's process is gone")

    any_world.runner.before = gone
    await assert_fails(any_world, ConnectionError)


async def test_a_runner_that_does_not_know_its_model_yet_fails_and_is_asked_again(any_world: World) -> None:
    any_world.runner.info_error = ConnectionError("not ready")
    job = any_world.job()
    with pytest.raises(ConnectionError):
        await any_world.pipeline.run(job)
    any_world.runner.info_error = None
    assert (await any_world.row(job)).status == "error"
    await any_world.pipeline.run(job)
    assert (await any_world.row(job)).status == "done"


async def test_storage_that_is_down_fails_and_works_again_once_it_is_back(world: World, s3: S3Server) -> None:
    s3.kill()
    try:
        job = world.job()
        with pytest.raises(StorageError):
            await world.pipeline.run(job)
        assert (await world.row(job)).status == "error"
        assert world.runner.calls == []
    finally:
        s3.start()
    await world.assert_it_still_works()
    await world.pipeline.run(job)
    assert (await world.row(job)).status == "done"


async def test_storage_that_goes_down_before_the_upload_fails(world: World, s3: S3Server) -> None:
    async def kill() -> None:
        await asyncio.to_thread(s3.kill)

    world.runner.before = kill
    job = world.job(prompts=("red", "blue"), is_batch=True)
    try:
        with pytest.raises(StorageError):
            await world.pipeline.run(job)
    finally:
        s3.start()
    row = await world.row(job)
    assert (row.status, row.mask_image_url) == ("error", None)
    assert row.metadata["error"]["code"].startswith("Storage")
    await world.assert_it_still_works()


async def test_a_task_that_is_not_there_is_not_found_before_the_gpu_works(world: World) -> None:
    for image_url in ("uploads/picture.png", "uploads/missing.png"):
        with pytest.raises(TaskNotFound):
            await world.pipeline.run(world.job(task_id=str(uuid.uuid4()), image_url=image_url))
    assert world.runner.calls == []
    await world.assert_it_still_works()


async def test_a_task_in_use_with_other_inputs_is_a_conflict_and_keeps_its_row(any_world: World) -> None:
    job = any_world.job()
    await any_world.pipeline.run(job)
    before = await any_world.row(job)
    for changes in ({"prompts": ("blue",)}, {"score_threshold": 0.9}, {"image_url": "uploads/missing.png"}):
        with pytest.raises(TaskConflict):
            await any_world.pipeline.run(replace(job, **changes))
    with pytest.raises(ForeignUrl):
        await any_world.pipeline.run(replace(job, image_url="https://elsewhere.example/x.png"))
    assert await any_world.row(job) == before
    assert len(any_world.runner.calls) == 1
    await any_world.assert_it_still_works()


@pytest.mark.parametrize(
    "task_id", ["", "..", "../x", "a/b", "a.b", "-a", "a b", "a\n", "빨강", "a" * 129, "a\x00", "%2e"]
)
async def test_a_task_id_that_is_no_part_of_a_key_touches_nothing(
    world: World, stand_in: PostgrestStandIn, task_id: str
) -> None:
    with pytest.raises(InvalidTaskId):
        await world.pipeline.run(world.job(task_id=task_id))
    assert stand_in.seen == []
    assert world.runner.calls == []


@pytest.mark.parametrize("changes", [{"prompts": ()}, {"prompts": ("red", "blue"), "is_batch": False}])
def test_a_job_without_a_prompt_or_with_too_many_for_one_is_a_mistake_of_ours(
    changes: dict[str, Any],
) -> None:
    arguments: dict[str, Any] = {
        "task_id": "t",
        "user_id": "u",
        "image_url": "i",
        "prompts": ("red",),
        "score_threshold": 0.5,
        "request_id": "r",
    }
    with pytest.raises(ValueError, match="prompts"):
        Job(**(arguments | changes))


async def test_a_row_that_cannot_be_claimed_fails_before_the_gpu_works(
    world: World, stand_in: PostgrestStandIn
) -> None:
    stand_in.faults.fail(FAST.attempts, status=503)
    await assert_fails(world, TaskStoreUnavailable)
    assert len(world.runner.calls) == 1


async def test_a_row_that_cannot_be_finished_fails(world: World, stand_in: PostgrestStandIn) -> None:
    async def spoil() -> None:
        stand_in.faults.fail(FAST.attempts, status=502)

    world.runner.before = spoil
    await assert_fails(world, TaskStoreUnavailable)


async def test_a_row_update_whose_answer_is_lost_is_no_failure(
    world: World, stand_in: PostgrestStandIn
) -> None:
    stand_in.faults.hang_up(1, after_work=True)
    job = world.job()
    await world.pipeline.run(job)
    assert (await world.row(job)).status == "done"


async def test_the_first_error_is_raised_and_the_row_follows_if_it_cannot_be_written_at_once(
    world: World, stand_in: PostgrestStandIn, caplog: pytest.LogCaptureFixture
) -> None:
    async def spoil() -> None:
        stand_in.faults.fail(FAST.attempts, status=502)
        raise ConnectionError("the first error")

    world.runner.before = spoil
    job = world.job()
    with pytest.raises(ConnectionError, match="the first error"):
        await world.pipeline.run(job)
    assert "the error row could not be written yet" in caplog.text
    assert "Traceback" not in caplog.text
    assert (await until_not_processing(world, job)).metadata["error"]["code"] == "ConnectionError"
    await world.assert_it_still_works()


async def test_a_request_that_came_again_keeps_its_row_from_the_late_error_of_the_first(
    world: World, stand_in: PostgrestStandIn
) -> None:
    async def spoil() -> None:
        stand_in.faults.fail(FAST.attempts, status=502)
        raise ConnectionError("the first error")

    world.runner.before = spoil
    job = world.job()
    with pytest.raises(ConnectionError):
        await world.pipeline.run(job)
    again = TaskInputs(
        job.task_id, job.user_id, job.image_url, job.prompts, job.score_threshold, "request-2", job.image_url
    )
    await world.tasks.start(again)
    await world.pipeline.aclose()
    row = await world.row(job)
    assert (row.status, row.metadata["request_id"]) == ("processing", "request-2")


async def test_closing_gives_rows_in_the_background_one_last_try(
    world: World, stand_in: PostgrestStandIn
) -> None:
    async def spoil() -> None:
        stand_in.faults.fail(FAST.attempts, status=502)
        raise ConnectionError("the first error")

    world.runner.before = spoil
    job = world.job()
    with pytest.raises(ConnectionError):
        await world.pipeline.run(job)
    await world.pipeline.aclose()
    assert (await world.row(job)).status == "error"


async def test_an_error_row_that_takes_forever_holds_nobody_up(
    world: World, stand_in: PostgrestStandIn
) -> None:
    async def spoil() -> None:
        stand_in.faults.delay(1, 30)
        raise ConnectionError("the first error")

    world.runner.before = spoil
    job = world.job()
    pipeline = world.with_parts(fail_deadline_s=0.5)
    began = asyncio.get_running_loop().time()
    with pytest.raises(ConnectionError):
        await pipeline.run(job)
    assert asyncio.get_running_loop().time() - began < 20
    await until_not_processing(world, job)
    await pipeline.aclose()


async def test_after_its_patience_is_over_an_error_row_is_given_up_and_reported(
    world: World, stand_in: PostgrestStandIn, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in.faults.fail(1000, status=503)
    pipeline = world.with_parts(fail_patience_s=0.0)
    with pytest.raises(TaskStoreUnavailable):
        await pipeline.run(world.job())
    async with asyncio.timeout(60):
        while "the error row could not be written" not in [record.message for record in caplog.records]:
            await asyncio.sleep(0.02)
    await pipeline.aclose()


async def test_a_postgres_killed_while_the_gpu_works_gives_its_error_and_later_the_row_and_the_next_job_works(
    world: World,
) -> None:
    with (
        running_postgres() as postgres,
        postgres.new_database() as database,
        running_postgrest(database) as server,
    ):
        async with aclosing(SupabaseTasks(server.url, server.secret_key, retry=FAST)) as tasks:
            own = replace(world, tasks=tasks, new_task_id=lambda: insert_task(database))
            own.pipeline = own.with_parts(fail_deadline_s=1.0)

            async def kill() -> None:
                await asyncio.to_thread(postgres.stop)

            own.runner.before = kill
            job = own.job()
            with pytest.raises(TaskStoreUnavailable):
                await own.pipeline.run(job)
            await asyncio.to_thread(postgres.start)
            assert (await until_not_processing(own, job)).metadata["error"]["code"] == "TaskStoreUnavailable"
            await own.assert_it_still_works()
            await own.pipeline.aclose()


# Giving up


async def test_a_job_that_takes_too_long_fails_as_a_timeout(any_world: World) -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    any_world.runner.before = forever
    row = await assert_fails(any_world, TimeoutError, pipeline=any_world.with_parts(timeout_s=1.0))
    assert row.metadata["error"]["code"] == "TimeoutError"


@pytest.mark.parametrize("stage", ["download", "segment", "upload"])
async def test_a_job_that_is_cancelled_leaves_an_error_row(any_world: World, stage: str) -> None:
    reached = asyncio.Event()

    async def stop_here() -> None:
        reached.set()
        await asyncio.Event().wait()

    store: Any = any_world.store
    if stage == "segment":
        any_world.runner.before = stop_here
    else:
        store = _Watched(store, **{{"download": "get", "upload": "put"}[stage]: stop_here})
    job = any_world.job()
    running = asyncio.create_task(any_world.with_parts(store=store).run(job))
    async with asyncio.timeout(60):
        await reached.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    row = await any_world.row(job)
    assert row.status == "error"
    assert row.metadata["error"]["code"] == "CancelledError"
    await any_world.assert_it_still_works()


async def test_a_claim_under_way_when_the_job_is_cancelled_does_not_overtake_the_error(
    world: World, stand_in: PostgrestStandIn
) -> None:
    stand_in.faults.delay(1, 2.0, method="PATCH")
    job = world.job()
    running = asyncio.create_task(world.pipeline.run(job))
    async with asyncio.timeout(60):
        while not stand_in.seen:
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert (await world.row(job)).status == "error"
    assert world.runner.calls == []


async def test_a_failed_download_waits_for_the_claim_so_that_the_error_comes_last(
    world: World, stand_in: PostgrestStandIn
) -> None:
    stand_in.faults.delay(1, 0.5, method="PATCH")
    await assert_fails(world, ObjectNotFound, world.job(image_url="uploads/missing.png"))


async def test_a_job_cancelled_while_its_row_is_finished_is_done(
    world: World, stand_in: PostgrestStandIn
) -> None:
    async def slow_from_now_on() -> None:
        stand_in.reset()
        stand_in.faults.delay(1, 2.0, method="PATCH")

    world.runner.before = slow_from_now_on
    job = world.job()
    running = asyncio.create_task(world.pipeline.run(job))
    async with asyncio.timeout(60):
        while not (world.runner.calls and stand_in.seen):  # all that is left is the row
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert (await world.row(job)).status == "done"


async def test_a_job_cancelled_twice_still_leaves_an_error_row(
    world: World, stand_in: PostgrestStandIn
) -> None:
    reached = asyncio.Event()

    async def stop_here() -> None:
        stand_in.faults.delay(1, 0.5, method="PATCH")
        stand_in.seen.clear()
        reached.set()
        await asyncio.Event().wait()

    world.runner.before = stop_here
    job = world.job()
    running = asyncio.create_task(world.pipeline.run(job))
    async with asyncio.timeout(60):
        await reached.wait()
        running.cancel()
        while not stand_in.seen:  # the error row is being written
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await world.pipeline.aclose()
    assert (await world.row(job)).status == "error"


async def test_closing_an_idle_pipeline_is_nothing(embedded: World) -> None:
    await embedded.pipeline.aclose()
