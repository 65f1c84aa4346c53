"""Accepted tasks end in the right row: once, tried again, joined, taken over, and each way they can fail."""

from __future__ import annotations

import asyncio
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from sam3_runner.errors import (
    DeviceOutOfMemory,
    ImageTooLarge,
    InferenceFailed,
    InvalidPrompt,
    TooManyPrompts,
    UndecodableImage,
    UnsupportedImage,
)
from sam3_runner.images import ImageLimits, Region
from sam3_runner.types import ItemError, SegmentResult
from storage import ForeignUrl, ObjectNotFound, ObjectTooLarge, StorageError
from tasks.errors import (
    BacklogFull,
    InvalidTaskId,
    JournalUnavailable,
    NotOurTask,
    TaskConflict,
    TaskFailed,
    TaskGaveUp,
    TaskNotFound,
    TaskRowRefused,
    WorkerStops,
)
from tasks.executor import COUNTED_FOR_S, MAX_ATTEMPTS, TaskExecutor
from tasks.job import Job, job_record
from tasks.journal import ACCEPTED, COMPUTED, DONE, ERROR, Journal
from tasks.journal_file import database_of
from tasks.pipeline import STAGES, runner_error
from tasks.store import TaskRow
from tests.servers.postgrest import PostgrestStandIn, refusing
from tests.servers.s3 import S3Server
from tests.tasks.colour_runner import failed
from tests.tasks.world import (
    FAST,
    RED_BOX,
    RunnerAway,
    RunnerDied,
    Watched,
    World,
    box_mask,
    code_of,
    iou,
    picture,
    words,
)


async def until(claim: Any, what: str) -> None:
    """Ask until it is true."""
    try:
        async with asyncio.timeout(60):
            while not await claim():
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"not within a minute: {what}")


async def until_status(world: World, job: Job, status: str) -> TaskRow:
    async def has_it() -> bool:
        row = await world.tasks.get(job.task_id)  # there may be none yet
        return row is not None and row.status == status

    await until(has_it, f"the row is {status}")
    return await world.row(job)


@asynccontextmanager
async def another_process(world: World, tmp_path: Path, **changes: Any) -> AsyncIterator[TaskExecutor]:
    """An executor with a journal of its own over the same files, as another worker has."""
    async with aclosing(Journal(tmp_path / "journal")) as journal:
        executor = world.executor(journal=journal, **changes)
        try:
            yield executor
        finally:
            await executor.aclose()


async def until_true(claim: Any) -> None:
    async def ask() -> bool:
        return bool(claim())

    await until(ask, "what the test waits for")


async def end(*callers: asyncio.Task[Any]) -> None:
    """Of callers of a process that died, whatever they heard."""
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)


async def die(world: World) -> None:
    """What a killed worker leaves: entries whose owner is gone."""
    await world.journal.aclose()


# Failures that do not pass


async def assert_fails(
    world: World, expected: type[BaseException], job: Job | None = None, executor: TaskExecutor | None = None
) -> TaskRow:
    """The job raises the error, its row says so, and the next job works."""
    job = job or world.job()
    with pytest.raises(expected) as caught:
        await world.run(job, executor or world.executor(passing=()))
    row = await world.row(job)
    assert row.status == "error"
    assert row.metadata["error"] == dict(zip(("code", "message"), code_of(caught.value), strict=True))
    assert row.metadata["request_id"] == job.request_id
    assert set(caught.value.__dict__["stage_ms"]) == set(STAGES)
    assert row.mask_image_url is None
    await world.assert_it_still_works()
    return row


async def test_an_image_that_is_not_there_fails(any_world: World) -> None:
    await assert_fails(any_world, ObjectNotFound, any_world.job(image_url="uploads/missing.png"))
    assert len(any_world.runner.calls) == 1  # that of the job that worked


async def test_an_image_url_that_is_not_ours_fails_and_nothing_is_downloaded(any_world: World) -> None:
    async def never() -> None:
        raise AssertionError("the store was asked")

    job = any_world.job(image_url="https://elsewhere.example/cat.png")
    executor = any_world.executor(passing=(), store=Watched(any_world.store, get=never))
    await assert_fails(any_world, ForeignUrl, job, executor)


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
    await assert_fails(any_world, expected, job, any_world.executor(passing=(), limits=limits))


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


async def test_a_task_that_is_not_there_is_not_found_before_the_gpu_works(world: World) -> None:
    for image_url in ("uploads/picture.png", "uploads/missing.png"):
        with pytest.raises(TaskNotFound):
            await world.run(world.job(task_id=str(uuid.uuid4()), image_url=image_url))
    assert world.runner.calls == []
    await world.assert_it_still_works()


async def test_a_task_in_use_with_other_inputs_is_a_conflict_and_keeps_its_row(any_world: World) -> None:
    job = any_world.job()
    await any_world.run(job)
    before = await any_world.row(job)
    others: list[dict[str, Any]] = [
        {"prompts": words("blue")},
        {"prompts": words("red", score_threshold=0.9)},
        {"prompts": words("red", max_instances=1)},
        {"region": Region((0, 0, 20, 20))},
        {"outputs": ("mask",)},
        {"image_url": "uploads/missing.png"},
    ]
    for changes in others:
        with pytest.raises(TaskConflict):
            await any_world.run(replace(job, **changes))
    with pytest.raises(ForeignUrl):
        await any_world.run(replace(job, image_url="https://elsewhere.example/x.png"))
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
        await world.run(world.job(task_id=task_id))
    assert stand_in.seen == []
    assert world.runner.calls == []


@pytest.mark.parametrize("changes", [{"prompts": ()}, {"prompts": words("red", "blue"), "is_batch": False}])
def test_a_job_without_a_prompt_or_with_too_many_for_one_is_a_mistake_of_ours(
    changes: dict[str, Any],
) -> None:
    arguments: dict[str, Any] = {
        "task_id": "t",
        "user_id": "u",
        "image_url": "i",
        "prompts": words("red"),
        "request_id": "r",
    }
    with pytest.raises(ValueError, match="prompts"):
        Job(**(arguments | changes))


async def test_a_row_update_whose_answer_is_lost_is_no_failure(
    world: World, stand_in: PostgrestStandIn
) -> None:
    stand_in.faults.hang_up(1, after_work=True)
    job = world.job()
    await world.run(job)
    assert (await world.row(job)).status == "done"


async def test_a_failed_download_waits_for_the_claim_so_that_the_error_comes_last(
    world: World, stand_in: PostgrestStandIn
) -> None:
    stand_in.faults.delay(1, 0.5, method="PATCH")
    await assert_fails(world, ObjectNotFound, world.job(image_url="uploads/missing.png"))


async def test_the_error_is_raised_though_its_row_cannot_be_written_yet_and_the_row_follows(
    world: World, stand_in: PostgrestStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def spoil() -> None:
        stand_in.faults.fail(3 * FAST.attempts, status=502, method="PATCH")
        raise ConnectionError("the first error")

    monkeypatch.setattr("tasks.executor.TELL_WAIT_S", 0.05)
    world.runner.before = spoil
    job = world.job()
    with pytest.raises(ConnectionError, match="the first error"):
        await world.run(job)
    row = await until_status(world, job, "error")
    assert row.metadata["error"]["code"] == "ConnectionError"
    assert "fail" in world.counts.retries
    await world.assert_it_still_works()


# Rows that refuse for good


async def test_a_row_that_refuses_the_result_says_so_and_the_task_is_not_tried_for_ever(
    world: World, dsn: str
) -> None:
    job = world.job()
    with refusing(dsn, job.task_id, "status <> 'done'"):
        with pytest.raises(TaskRowRefused):
            await world.run(job)
        row = await world.row(job)
        assert (row.status, row.metadata["error"]["code"]) == ("error", "TaskRowRefused")
        await until_done_in(world.journal, job, ERROR)
    assert world.counts.retries == []
    assert (await world.run(job)).labels == ("red",)  # asked for again, when the table has changed


async def test_a_row_that_refuses_everything_ends_in_the_journal_and_the_log_says_why(
    world: World, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = world.job()
    with refusing(dsn, job.task_id, "status = 'pending'"):
        await world.executor().submit(job)
        await until_done_in(world.journal, job, ERROR)
        assert (await world.row(job)).status == "pending"
    (said,) = [record for record in caplog.records if record.message == "the row takes no error"]
    assert said.__dict__["task_id"] == job.task_id
    assert "23514" in said.__dict__["reason"]
    assert world.runner.calls == []
    await world.assert_it_still_works()


# Failures that pass


async def test_storage_that_is_down_is_waited_for(world: World, s3: S3Server) -> None:
    s3.kill()
    job = world.job()
    running = asyncio.create_task(world.run(job))
    await until_true(lambda: "download" in world.counts.retries)
    assert not running.done()
    await asyncio.to_thread(s3.start)
    assert (await running).labels == ("red",)
    assert (await world.row(job)).status == "done"


async def test_storage_that_stays_down_is_an_error_at_the_deadline(world: World, s3: S3Server) -> None:
    s3.kill()
    try:
        job = world.job()
        with pytest.raises(StorageError):
            await world.run(job, timeout_s=1.0)
        row = await world.row(job)
        assert row.status == "error"
        assert row.metadata["error"]["code"].startswith("Storage")
        assert world.runner.calls == []
    finally:
        s3.start()
    await world.assert_it_still_works()


async def test_rows_that_cannot_be_claimed_yet_are_waited_for_before_the_gpu_works(
    world: World, stand_in: PostgrestStandIn
) -> None:
    stand_in.faults.fail(3 * FAST.attempts, status=503)
    job = world.job()
    await world.run(job)
    assert world.counts.retries == ["claim"] * 3
    assert len(world.runner.calls) == 1
    assert (await world.row(job)).status == "done"


async def test_storage_that_goes_down_before_the_upload_costs_no_second_computation(
    world: World, s3: S3Server
) -> None:
    async def kill() -> None:
        await asyncio.to_thread(s3.kill)

    world.runner.before = kill
    job = world.job(prompts=words("red", "blue"), is_batch=True)
    running = asyncio.create_task(world.run(job))
    await until_true(lambda: "upload" in world.counts.retries)
    await asyncio.to_thread(s3.start)
    outcome = await running
    assert (await world.row(job)).status == "done"
    assert iou(await world.mask(outcome.prompts[0].mask_key), box_mask(RED_BOX)) > 0.9
    assert len(world.runner.calls) == 1


async def test_a_result_whose_row_cannot_be_written_is_delivered_later_and_never_computed_again(
    world: World, stand_in: PostgrestStandIn
) -> None:
    async def spoil() -> None:
        stand_in.faults.fail(1000, status=502, method="PATCH")

    world.runner.before = spoil
    job = world.job()
    executor = world.executor()
    with pytest.raises(TimeoutError):
        await world.run(job, executor, timeout_s=1.0)
    assert (await world.row(job)).status == "processing"
    assert (await executor.look(job.task_id)).status == "processing"
    stand_in.reset()
    row = await until_status(world, job, "done")
    assert row.labels == ("red",)
    assert len(world.runner.calls) == 1


async def test_a_runner_that_is_away_is_waited_for_and_that_is_no_attempt(embedded: World) -> None:
    embedded.runner.info_error = RunnerAway("not ready")

    async def away() -> None:
        if len(embedded.runner.calls) < 6:
            raise RunnerAway("not ready")

    embedded.runner.before = away
    job = embedded.job()
    executor = embedded.executor()
    running = asyncio.create_task(embedded.run(job, executor))
    await until_true(lambda: "model" in embedded.counts.retries)
    embedded.runner.info_error = None
    await running
    assert embedded.counts.retries.count("segment") == 5
    assert (await executor.look(job.task_id)).attempts == 1


# Once


async def test_the_same_request_at_once_is_one_task(any_world: World) -> None:
    job = any_world.job()
    first, second = await asyncio.gather(any_world.run(job), any_world.run(job))
    assert first.mask_url == second.mask_url
    assert len(any_world.runner.calls) == 1
    assert (await any_world.row(job)).status == "done"


async def test_what_is_done_is_answered_from_the_journal(any_world: World) -> None:
    job = any_world.job(prompts=words("red", "blue"), is_batch=True)
    first = await any_world.run(job)
    again = await any_world.run(job)
    assert len(any_world.runner.calls) == 1
    assert (again.mask_url, again.labels, again.image_size_hw) == (
        first.mask_url,
        first.labels,
        first.image_size_hw,
    )
    for one, other in zip(first.prompts, again.prompts, strict=True):
        assert one.segmentation.scores.tolist() == other.segmentation.scores.tolist()
        assert one.segmentation.boxes_xyxy_px.tolist() == other.segmentation.boxes_xyxy_px.tolist()
        for mask, same in zip(one.segmentation.masks, other.segmentation.masks, strict=True):
            assert mask.counts.tolist() == same.counts.tolist()


async def test_the_same_request_in_another_process_waits_for_the_first(
    embedded: World, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    embedded.runner.before = gate.wait  # type: ignore[assignment]
    job = embedded.job()
    async with another_process(embedded, tmp_path) as other:
        first = asyncio.create_task(embedded.run(job, embedded.executor()))
        await until_true(lambda: len(embedded.runner.calls) == 1)
        second = asyncio.create_task(embedded.run(job, other))
        await asyncio.sleep(0.1)
        assert not second.done()
        gate.set()
        assert (await first).mask_url == (await second).mask_url
    assert len(embedded.runner.calls) == 1


async def test_a_task_that_failed_is_tried_again_when_it_is_asked_for_again(any_world: World) -> None:
    any_world.runner.answer = failed("InferenceFailed", "no")
    job = any_world.job()
    with pytest.raises(InferenceFailed):
        await any_world.run(job)
    any_world.runner.answer = None
    assert (await any_world.run(job)).labels == ("red",)
    assert (await any_world.row(job)).status == "done"


async def test_a_batch_of_one_is_not_the_same_as_a_single_prompt(embedded: World) -> None:
    job = embedded.job()
    await embedded.run(job)
    with pytest.raises(TaskConflict):
        await embedded.run(replace(job, is_batch=True))


# Waiting, and not waiting


async def test_a_submitted_task_is_done_without_anyone_waiting(any_world: World) -> None:
    executor = any_world.executor()
    job = any_world.job()
    await executor.submit(job)
    assert (await executor.look(job.task_id)).status == "processing"
    await until_status(any_world, job, "done")

    async def is_done() -> bool:
        return (await executor.look(job.task_id)).status == "done"

    await until(is_done, "the journal says so too")
    view = await executor.look(job.task_id)
    assert (view.stage, view.attempts, view.error) == ("done", 1, None)
    assert view.outcome is not None and view.outcome.labels == ("red",)


async def test_of_many_submitted_tasks_only_so_many_compute_at_once(embedded: World) -> None:
    running = most = 0
    gate = asyncio.Event()

    async def count() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await gate.wait()
        running -= 1

    embedded.runner.before = count
    executor = embedded.executor(max_running=2)
    jobs = [embedded.job() for _ in range(8)]
    for job in jobs:
        await executor.submit(job)
    await until_true(lambda: running == 2)
    gate.set()
    for job in jobs:
        await until_status(embedded, job, "done")
    assert most == 2


async def test_a_backlog_that_is_full_takes_nothing_more_and_joins_what_it_has(embedded: World) -> None:
    gate = asyncio.Event()
    embedded.runner.before = gate.wait  # type: ignore[assignment]
    executor = embedded.executor(max_unfinished=2)
    jobs = [embedded.job() for _ in range(3)]
    await executor.require_room()
    for job in jobs[:2]:
        await executor.submit(job)
    with pytest.raises(BacklogFull):
        await executor.submit(jobs[2])
    await asyncio.sleep(COUNTED_FOR_S)
    with pytest.raises(BacklogFull):
        await executor.require_room()
    await executor.submit(jobs[0])
    gate.set()
    for job in jobs[:2]:
        await until_status(embedded, job, "done")


async def forever() -> None:
    await asyncio.Event().wait()


async def test_a_task_without_a_result_when_its_caller_gives_up_is_an_error(any_world: World) -> None:
    any_world.runner.before = forever
    job = any_world.job()
    with pytest.raises(TimeoutError):
        await any_world.run(job, timeout_s=0.5)
    row = await any_world.row(job)
    assert (row.status, row.metadata["error"]["code"]) == ("error", "TimeoutError")
    await any_world.assert_it_still_works()


async def test_a_task_that_somebody_else_wants_goes_on_when_its_caller_gives_up(embedded: World) -> None:
    gate = asyncio.Event()
    embedded.runner.before = gate.wait  # type: ignore[assignment]
    executor, job = embedded.executor(), embedded.job()
    await executor.submit(job)
    with pytest.raises(TimeoutError):
        await embedded.run(job, executor, timeout_s=0.2)
    gate.set()
    await until_status(embedded, job, "done")


async def test_a_task_whose_caller_hung_up_goes_on(embedded: World) -> None:
    gate = asyncio.Event()
    embedded.runner.before = gate.wait  # type: ignore[assignment]
    executor, job = embedded.executor(), embedded.job()

    async def is_gone() -> bool:
        return True

    with pytest.raises(TimeoutError):
        await executor.run(job, timeout_s=0.2, is_caller_gone=is_gone)
    assert (await embedded.row(job)).status == "processing"
    gate.set()
    await until_status(embedded, job, "done")


async def test_a_caller_who_is_cancelled_changes_nothing(embedded: World) -> None:
    gate = asyncio.Event()
    embedded.runner.before = gate.wait  # type: ignore[assignment]
    job = embedded.job()
    waiting = asyncio.create_task(embedded.run(job))
    await until_true(lambda: len(embedded.runner.calls) == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.set()
    await until_status(embedded, job, "done")


async def test_a_submitted_task_that_takes_too_long_is_an_error(embedded: World) -> None:
    embedded.runner.before = forever
    job = embedded.job()
    await embedded.executor(deadline_s=0.3).submit(job)
    row = await until_status(embedded, job, "error")
    assert row.metadata["error"]["code"] == "TimeoutError"


async def test_a_refused_job_leaves_an_error_row_and_one_with_other_inputs_alone(any_world: World) -> None:
    executor, job = any_world.executor(), any_world.job()
    await executor.refuse(job, InvalidPrompt("blank"))
    row = await any_world.row(job)
    assert (row.status, row.metadata["error"]["code"]) == ("error", "InvalidPrompt")
    done = any_world.job()
    await any_world.run(done, executor)
    await executor.refuse(replace(done, prompts=words("<|")), InvalidPrompt("special"))
    assert (await any_world.row(done)).status == "done"


# Crashes


async def test_a_task_of_a_dead_process_is_taken_over_and_done(any_world: World, tmp_path: Path) -> None:
    any_world.runner.before = forever
    job = any_world.job()
    first = any_world.executor()
    waiting = asyncio.create_task(any_world.run(job, first))
    await until_true(lambda: len(any_world.runner.calls) == 1)
    await die(any_world)
    any_world.runner.before = None
    async with another_process(any_world, tmp_path) as other:
        other.start()
        await until_status(any_world, job, "done")
        assert (await other.look(job.task_id)).attempts == 2
    assert any_world.counts.takeovers == 1
    await end(waiting)


async def test_a_computed_task_of_a_dead_process_is_delivered_and_not_computed_again(
    embedded: World, tmp_path: Path
) -> None:
    job = embedded.job()
    first = embedded.executor(store=Watched(embedded.store, put=forever))
    waiting = asyncio.create_task(embedded.run(job, first))

    async def is_computed() -> bool:
        entry = await embedded.journal.get(job.task_id)
        return entry is not None and entry.state == COMPUTED

    await until(is_computed, "its result is stored")
    await die(embedded)
    async with another_process(embedded, tmp_path) as other:
        other.start()
        row = await until_status(embedded, job, "done")
    assert row.labels == ("red",)
    assert row.metadata["inference_time_ms"] == 0.01
    assert len(embedded.runner.calls) == 1
    await end(waiting)


async def test_a_failure_that_a_dead_process_did_not_tell_is_told(embedded: World, tmp_path: Path) -> None:
    job = embedded.job(image_url="uploads/missing.png")
    first = embedded.executor(tasks=Watched(embedded.tasks, fail=forever))
    waiting = asyncio.create_task(embedded.run(job, first))

    async def is_failed() -> bool:
        entry = await embedded.journal.get(job.task_id)
        return entry is not None and entry.error is not None

    await until(is_failed, "its error is stored")
    await die(embedded)
    async with another_process(embedded, tmp_path) as other:
        other.start()
        row = await until_status(embedded, job, "error")
        assert row.metadata["error"]["code"] == "ObjectNotFound"
        with pytest.raises(ObjectNotFound):  # asked for again, it is tried again
            await embedded.run(job, other)
    await end(waiting)


async def test_a_task_that_kills_each_process_is_given_up(embedded: World, tmp_path: Path) -> None:
    embedded.runner.before = forever
    job = embedded.job()
    entry, _ = await embedded.journal.accept(
        job.task_id,
        "other",
        {},
        deadline_s=60,
        max_unfinished=10,
        begins=True,
    )
    assert entry.state == ACCEPTED
    await embedded.journal.fail(entry, "x", "y")
    await embedded.journal.finish(entry)
    poison = embedded.job()
    waiting = [asyncio.create_task(embedded.run(poison, embedded.executor()))]
    await until_true(lambda: len(embedded.runner.calls) == 1)
    await die(embedded)
    for life in range(2, MAX_ATTEMPTS + 1):
        journal = Journal(tmp_path / "journal")
        executor = embedded.executor(journal=journal)
        executor.start()
        calls = len(embedded.runner.calls)
        await until_true(lambda calls=calls: len(embedded.runner.calls) == calls + 1)
        found = await journal.get(poison.task_id)
        assert found is not None and found.attempts == life
        await journal.aclose()
    async with another_process(embedded, tmp_path) as last:
        last.start()
        row = await until_status(embedded, poison, "error")
        assert row.metadata["error"]["code"] == "TaskGaveUp"
    assert len(embedded.runner.calls) == MAX_ATTEMPTS
    await end(*waiting)


async def test_a_task_in_which_the_model_dies_each_time_is_given_up_and_its_neighbours_are_done(
    embedded: World,
) -> None:
    inside: set[str] = set()
    together: list[set[str]] = []

    async def die_of_blue() -> None:
        prompt = str(embedded.runner.calls[-1].prompts[0].text)
        inside.add(prompt)
        together.append(set(inside))
        await asyncio.sleep(0.05)
        died = "blue" in inside
        await asyncio.sleep(0.01)
        inside.discard(prompt)
        if died:
            raise RunnerDied("gone")

    embedded.runner.before = die_of_blue
    poison, *others = [embedded.job(prompts=words(prompt)) for prompt in ("blue", "red", "green")]
    results = await asyncio.gather(*(embedded.run(job) for job in (poison, *others)), return_exceptions=True)
    assert isinstance(results[0], TaskGaveUp)
    assert [(await embedded.row(job)).status for job in (poison, *others)] == ["error", "done", "done"]
    assert together[0] != {"blue"} or len(together) > 3  # they did share it the first time


async def test_whoever_stops_leaves_what_waits_to_the_next(embedded: World, tmp_path: Path) -> None:
    gate = asyncio.Event()
    embedded.runner.before = gate.wait  # type: ignore[assignment]
    executor = embedded.executor(max_running=1)
    jobs = [embedded.job() for _ in range(3)]
    for job in jobs:
        await executor.submit(job)
    await until_true(lambda: len(embedded.runner.calls) == 1)
    draining = asyncio.create_task(executor.drain(60.0))
    await asyncio.sleep(0.05)
    with pytest.raises(WorkerStops):
        await executor.submit(embedded.job())
    gate.set()
    await draining
    assert (await embedded.row(jobs[0])).status == "done"
    async with another_process(embedded, tmp_path) as other:
        other.start()  # though the first journal is still open: it let go of them
        for job in jobs:
            await until_status(embedded, job, "done")
    assert len(embedded.runner.calls) == 3


async def test_what_does_not_end_in_the_grace_period_goes_on_elsewhere(
    embedded: World, tmp_path: Path
) -> None:
    embedded.runner.before = forever
    executor, job = embedded.executor(), embedded.job()
    waiting = asyncio.create_task(embedded.run(job, executor))
    await until_true(lambda: len(embedded.runner.calls) == 1)
    await executor.drain(0.1)
    with pytest.raises(WorkerStops):
        await waiting
    embedded.runner.before = None
    async with another_process(embedded, tmp_path) as other:
        other.start()
        await until_status(embedded, job, "done")


async def test_a_task_that_is_taken_over_has_the_time_that_it_had_left(
    embedded: World, tmp_path: Path
) -> None:
    job = embedded.job()
    embedded.runner.before = forever
    await embedded.executor(max_running=0).submit(job)  # it waits for its turn
    await die(embedded)
    with sqlite3.connect(database_of(tmp_path / "journal")) as connection:
        long_ago = "update entries set accepted_at = accepted_at - 59, deadline_at = deadline_at - 59"
        connection.execute(long_ago)
    connection.close()
    began_s = time.monotonic()
    async with another_process(embedded, tmp_path) as other:
        other.start()
        row = await until_status(embedded, job, "error")
    assert row.metadata["error"]["code"] == "TimeoutError"
    assert time.monotonic() - began_s < 30  # of the 60 it had 1 left


# What the disk holds before something else happens


async def test_the_image_is_loaded_while_a_task_is_accepted_and_nothing_else_happens(
    embedded: World,
) -> None:
    gate, loaded = asyncio.Event(), asyncio.Event()

    async def accept_late() -> None:
        await gate.wait()

    async def note() -> None:
        loaded.set()

    late: Any = Watched(embedded.journal, accept=accept_late)
    job = embedded.job()
    executor = embedded.executor(journal=late, store=Watched(embedded.store, get=note))
    running = asyncio.create_task(embedded.run(job, executor))
    await asyncio.wait_for(loaded.wait(), 60)
    await asyncio.sleep(0.2)
    assert await embedded.tasks.get(job.task_id) is None
    assert embedded.runner.calls == []
    gate.set()
    assert (await running).labels == ("red",)
    assert (await executor.look(job.task_id)).attempts == 1


@pytest.mark.parametrize("image", ["picture", "missing"])
async def test_a_task_that_is_not_accepted_leaves_nothing_behind(embedded: World, image: str) -> None:
    loaded = asyncio.Event()

    async def note() -> None:
        loaded.set()

    async def refuse() -> None:
        await asyncio.wait_for(loaded.wait(), 60)
        await asyncio.sleep(0.05)
        raise JournalUnavailable("no space is left on the journal's disk")

    full: Any = Watched(embedded.journal, accept=refuse)
    job = embedded.job(image_url=f"uploads/{image}.png")
    before = asyncio.all_tasks()
    executor = embedded.executor(journal=full, store=Watched(embedded.store, get=note))
    with pytest.raises(JournalUnavailable):
        await embedded.run(job, executor)
    await until_true(lambda: asyncio.all_tasks() <= before)
    assert await embedded.tasks.get(job.task_id) is None
    assert embedded.counts.ends == []
    assert embedded.runner.calls == []


async def test_masks_are_uploaded_while_the_result_is_stored_and_the_row_waits_for_both(
    embedded: World,
) -> None:
    gate, uploaded = asyncio.Event(), asyncio.Event()

    async def store_late() -> None:
        await gate.wait()

    class Uploaded(Watched):
        async def put(self, *arguments: Any) -> None:
            await embedded.store.put(*arguments)
            uploaded.set()

    late: Any = Watched(embedded.journal, compute=store_late)
    job = embedded.job()
    store: Any = Uploaded(embedded.store)
    running = asyncio.create_task(embedded.run(job, embedded.executor(journal=late, store=store)))
    await asyncio.wait_for(uploaded.wait(), 60)
    await asyncio.sleep(0.2)
    assert (await embedded.row(job)).status == "processing"
    gate.set()
    await running
    assert (await embedded.row(job)).status == "done"


async def test_a_result_of_a_task_that_is_another_s_by_now_is_not_delivered(embedded: World) -> None:
    async def lose() -> None:
        entry = await embedded.journal.get(job.task_id)
        assert entry is not None
        await embedded.journal.release([entry])

    job = embedded.job()
    embedded.runner.before = lose
    with pytest.raises(NotOurTask):
        await embedded.run(job)
    assert (await embedded.row(job)).status == "processing"


async def test_the_stages_of_every_task_are_told_once(embedded: World, tmp_path: Path) -> None:
    job = embedded.job()
    first = embedded.executor(store=Watched(embedded.store, put=forever))
    await first.submit(job)

    async def is_computed() -> bool:
        entry = await embedded.journal.get(job.task_id)
        return entry is not None and entry.state == COMPUTED

    await until(is_computed, "its result is stored")
    await die(embedded)
    assert embedded.counts.stages == []
    async with another_process(embedded, tmp_path) as other:
        other.start()
        await until_status(embedded, job, "done")
        await until_true(lambda: embedded.counts.ends == ["done"])
        await embedded.run(job, other)  # answered from the record
        (told,) = embedded.counts.stages
        assert all(told[stage] > 0 for stage in ("download", "infer", "encode", "upload", "row_update"))
        with pytest.raises(ObjectNotFound):
            await embedded.run(embedded.job(image_url="uploads/missing.png"), other)
        await until_true(lambda: embedded.counts.ends == ["done", "error"])
        assert embedded.counts.stages[1]["download"] > 0 == embedded.counts.stages[1]["infer"]


# A journal that fails in between


class FlakyJournal:
    """A journal of which some calls fail, so many times, as on a disk that is full for a moment."""

    def __init__(self, journal: Journal, **fails: int) -> None:
        self._journal = journal
        self.fails = fails

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._journal, name)
        if name not in self.fails:
            return method

        async def call(*arguments: Any, **named: Any) -> Any:
            if self.fails[name] > 0:
                self.fails[name] -= 1
                raise JournalUnavailable("no space is left on the journal's disk")
            return await method(*arguments, **named)

        return call


async def until_done_in(journal: Journal, job: Job, state: str) -> None:
    async def is_so() -> bool:
        entry = await journal.get(job.task_id)
        return entry is not None and entry.state == state

    await until(is_so, f"the journal says {state}")


@pytest.mark.parametrize("write", ["compute", "finish", "begin"])
async def test_a_journal_that_fails_for_a_moment_costs_nothing(embedded: World, write: str) -> None:
    flaky: Any = FlakyJournal(embedded.journal, **{write: 2})
    job = embedded.job()
    await embedded.executor(journal=flaky).submit(job)
    await until_status(embedded, job, "done")
    await until_done_in(embedded.journal, job, DONE)
    assert len(embedded.runner.calls) == 1
    assert flaky.fails[write] == 0


async def test_a_failure_that_cannot_be_journalled_is_told_and_journalled_later(embedded: World) -> None:
    flaky: Any = FlakyJournal(embedded.journal, fail=2)
    job = embedded.job(image_url="uploads/missing.png")
    with pytest.raises(ObjectNotFound):
        await embedded.run(job, embedded.executor(journal=flaky))
    assert (await embedded.row(job)).status == "error"
    await until_done_in(embedded.journal, job, ERROR)


@pytest.mark.parametrize("is_journal_flaky", [False, True], ids=["sound journal", "flaky journal"])
async def test_one_record_that_cannot_be_read_strands_no_other(
    embedded: World, tmp_path: Path, is_journal_flaky: bool
) -> None:
    bad = {"bad-1": {}, "bad-2": {**job_record(embedded.job()), "task_id": "../x"}}
    for task_id, record in bad.items():
        await embedded.journal.accept(task_id, "f", record, deadline_s=60, max_unfinished=10, begins=False)
    embedded.runner.before = forever
    job = embedded.job()
    await embedded.executor().submit(job)
    await until_true(lambda: len(embedded.runner.calls) == 1)
    await die(embedded)
    embedded.runner.before = None
    async with aclosing(Journal(tmp_path / "journal")) as journal:
        # At first not even the journal takes what is said about the first of them.
        flaky: Any = FlakyJournal(journal, fail=1, release=1) if is_journal_flaky else journal
        other = embedded.executor(journal=flaky)
        other.start()
        await until_status(embedded, job, "done")
        for task_id in list(bad)[is_journal_flaky:]:
            await until_done_in(journal, replace(job, task_id=task_id), ERROR)
        await other.aclose()


async def test_what_another_process_promised_with_202_is_not_given_up_with_its_first_caller(
    embedded: World, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    embedded.runner.before = gate.wait  # type: ignore[assignment]
    job = embedded.job()
    async with another_process(embedded, tmp_path) as other:
        waiting = asyncio.create_task(embedded.run(job, embedded.executor(), timeout_s=1.0))
        await until_true(lambda: len(embedded.runner.calls) == 1)
        await other.submit(job)
        with pytest.raises(TimeoutError):
            await waiting
        gate.set()
        await until_status(embedded, job, "done")


async def test_a_row_that_was_reset_is_written_again_when_its_task_is_asked_for(
    world: World, dsn: str
) -> None:
    executor, job = world.executor(), world.job()
    await world.run(job, executor)
    for ask in (lambda: world.run(job, executor), lambda: executor.submit(job)):
        with psycopg.connect(dsn, autocommit=True) as connection:
            reset = "update segmentation_results set status = 'pending', metadata = '{}' where id = %s"
            connection.execute(reset, (job.task_id,))
        await ask()
        assert (await world.row(job)).status == "done"
    assert len(world.runner.calls) == 1


async def test_a_gentle_stop_is_no_attempt(embedded: World, tmp_path: Path) -> None:
    embedded.runner.before = forever
    job = embedded.job()
    await embedded.executor().submit(job)
    await until_true(lambda: len(embedded.runner.calls) == 1)
    await embedded.executors[0].aclose()
    for life in range(2, MAX_ATTEMPTS + 2):
        async with another_process(embedded, tmp_path) as other:
            other.start()
            await until_true(lambda life=life: len(embedded.runner.calls) == life)
    embedded.runner.before = None
    async with another_process(embedded, tmp_path) as last:
        last.start()
        await until_status(embedded, job, "done")


async def test_an_unknown_task_is_not_found(embedded: World) -> None:
    with pytest.raises(TaskNotFound):
        await embedded.executor().look("nobody")


async def test_an_error_of_another_process_is_told_with_its_code(embedded: World, tmp_path: Path) -> None:
    gate = asyncio.Event()
    embedded.runner.before = gate.wait  # type: ignore[assignment]
    embedded.runner.answer = failed("InferenceFailed", "no")
    job = embedded.job()
    async with another_process(embedded, tmp_path) as other:
        first = asyncio.create_task(embedded.run(job, embedded.executor()))
        await until_true(lambda: len(embedded.runner.calls) == 1)
        second = asyncio.create_task(embedded.run(job, other))
        await asyncio.sleep(0.1)
        gate.set()
        with pytest.raises(InferenceFailed):
            await first
        with pytest.raises(TaskFailed) as caught:
            await second
        assert caught.value.code == "InferenceFailed"
