"""What every task store must do: over SQLite, a PostgREST dialect on a real Postgres, and @supabase/lite."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tasks.breaker import GuardedTasks
from tasks.errors import TaskConflict, TaskNotFound, TaskStoreUnavailable
from tasks.local import LocalTasks
from tasks.store import TaskInputs, TaskResult, TaskRow, TaskStore
from tasks.supabase import SupabaseTasks
from tests.servers.postgrest import insert_task

RESULT = TaskResult(
    mask_image_url="https://masks.example/masks/1.png",
    labels=("red circle", 'a "quoted", {braced} \\ 빨간 원'),
    metadata={
        "confidence": 0.875,
        "inference_time_ms": 12.5,
        "instances": [{"score": 0.875}],
        "nothing": None,
    },
)


@dataclass
class Backend:
    """One store, and how a row comes to be in it before anyone starts it."""

    store: TaskStore
    insert: Callable[[], str]
    makes_rows: bool

    def new_task(self, **changes: Any) -> TaskInputs:
        task = TaskInputs(
            task_id=self.insert(),
            user_id=str(uuid.uuid4()),
            image_url="uploads/image.png",
            prompts=("red circle", "blue square"),
            score_threshold=0.5,
            request_id="request-1",
        )
        return replace(task, **changes)


@pytest.fixture(params=["local", "guarded", "stand_in_secret_key", "stand_in_legacy_key", "supabase_lite"])
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Backend]:
    store: TaskStore
    if request.param in ("local", "guarded"):
        local = LocalTasks(tmp_path / "tasks.sqlite3")
        store = GuardedTasks(local) if request.param == "guarded" else local
        backend = Backend(store, lambda: str(uuid.uuid4()), makes_rows=True)
    else:
        is_lite, is_legacy = request.param == "supabase_lite", request.param == "stand_in_legacy_key"
        server = request.getfixturevalue("supabase_lite" if is_lite else "stand_in")
        store = SupabaseTasks(server.url, server.service_jwt if is_legacy else server.secret_key)
        backend = Backend(store, lambda: insert_task(server.dsn), makes_rows=False)
    yield backend
    await store.aclose()


async def row_of(backend: Backend, task: TaskInputs) -> TaskRow:
    row = await backend.store.get(task.task_id)
    assert row is not None
    return row


async def test_a_started_task_is_processing_and_knows_its_inputs(backend: Backend) -> None:
    task = backend.new_task()
    await backend.store.start(task)
    row = await row_of(backend, task)
    assert row.id == task.task_id
    assert row.status == "processing"
    assert row.metadata == {"inputs": task.fingerprint, "user_id": task.user_id, "request_id": "request-1"}
    assert row.mask_image_url is None
    assert row.labels == ()
    assert row.source_image_url == "uploads/image.png"


async def test_a_finished_task_has_all_of_its_result(backend: Backend) -> None:
    task = backend.new_task()
    await backend.store.start(task)
    await backend.store.finish(task, RESULT)
    row = await row_of(backend, task)
    assert row.status == "done"
    assert row.mask_image_url == RESULT.mask_image_url
    assert row.labels == RESULT.labels
    assert row.metadata == {**RESULT.metadata, **task.row_metadata()}


async def test_a_failed_task_says_why(backend: Backend) -> None:
    task = backend.new_task()
    await backend.store.start(task)
    await backend.store.fail(task, "IMAGE_NOT_FOUND", "there is no such image — 없음")
    row = await row_of(backend, task)
    assert row.status == "error"
    assert row.metadata["error"] == {"code": "IMAGE_NOT_FOUND", "message": "there is no such image — 없음"}
    assert row.metadata["inputs"] == task.fingerprint


async def test_a_task_may_fail_before_it_was_started(backend: Backend) -> None:
    task = backend.new_task()
    await backend.store.fail(task, "FOREIGN_URL", "not ours")
    assert (await row_of(backend, task)).status == "error"


async def test_a_failed_task_can_be_started_again_and_loses_its_error(backend: Backend) -> None:
    task = backend.new_task()
    await backend.store.start(task)
    await backend.store.fail(task, "X", "y")
    await backend.store.start(task)
    row = await row_of(backend, task)
    assert row.status == "processing"
    assert "error" not in row.metadata


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"prompts": ("red circle",)}, id="fewer prompts"),
        pytest.param({"prompts": ("blue square", "red circle")}, id="another order of prompts"),
        pytest.param({"score_threshold": 0.4}, id="another threshold"),
        pytest.param({"image_url": "uploads/other.png"}, id="another image"),
    ],
)
async def test_a_task_in_use_refuses_other_inputs_and_stays_as_it_is(
    backend: Backend, changes: dict[str, Any]
) -> None:
    task = backend.new_task()
    await backend.store.start(task)
    before = await row_of(backend, task)
    with pytest.raises(TaskConflict, match="another image, prompt or threshold"):
        await backend.store.start(replace(task, **changes))
    assert await row_of(backend, task) == before


async def test_inputs_are_the_same_when_only_url_signature_user_or_request_differ(backend: Backend) -> None:
    task = backend.new_task(image_url="https://r2.example/image.png?X-Amz-Signature=1", image_key="image.png")
    await backend.store.start(task)
    again = replace(
        task, image_url="https://r2.example/image.png?X-Amz-Signature=2", request_id="2", user_id="other"
    )
    await backend.store.start(again)
    assert (await row_of(backend, task)).metadata["request_id"] == "2"


async def test_a_done_task_stays_done_when_the_same_request_comes_again(backend: Backend) -> None:
    task = backend.new_task()
    await backend.store.start(task)
    await backend.store.finish(task, RESULT)
    done = await row_of(backend, task)
    await backend.store.start(task)
    assert await row_of(backend, task) == done
    await backend.store.fail(task, "LATE", "a failure of the repetition")
    assert await row_of(backend, task) == done
    await backend.store.finish(task, RESULT)
    assert (await row_of(backend, task)).status == "done"


async def test_a_done_task_refuses_other_inputs(backend: Backend) -> None:
    task = backend.new_task()
    await backend.store.start(task)
    await backend.store.finish(task, RESULT)
    with pytest.raises(TaskConflict):
        await backend.store.start(replace(task, score_threshold=0.9))
    assert (await row_of(backend, task)).status == "done"


async def test_finishing_with_other_inputs_than_the_row_has_is_a_conflict(backend: Backend) -> None:
    task = backend.new_task()
    await backend.store.start(task)
    with pytest.raises(TaskConflict):
        await backend.store.finish(replace(task, score_threshold=0.9), RESULT)
    assert (await row_of(backend, task)).status == "processing"


async def test_failing_with_other_inputs_leaves_the_row_as_it_is(backend: Backend) -> None:
    task = backend.new_task()
    await backend.store.start(task)
    await backend.store.fail(replace(task, score_threshold=0.9), "X", "y")
    assert (await row_of(backend, task)).status == "processing"


async def test_a_late_success_overrules_an_error(backend: Backend) -> None:
    task = backend.new_task()
    await backend.store.start(task)
    await backend.store.fail(task, "TIMED_OUT", "gave up too early")
    await backend.store.finish(task, RESULT)
    row = await row_of(backend, task)
    assert row.status == "done"
    assert "error" not in row.metadata


async def test_of_many_starts_with_different_inputs_exactly_one_wins(backend: Backend) -> None:
    task = backend.new_task()
    rivals = [replace(task, score_threshold=i / 10) for i in range(8)]
    outcomes = await asyncio.gather(*(backend.store.start(rival) for rival in rivals), return_exceptions=True)
    winners = [rival for rival, outcome in zip(rivals, outcomes, strict=True) if outcome is None]
    assert len(winners) == 1
    assert sum(isinstance(outcome, TaskConflict) for outcome in outcomes) == 7
    assert (await row_of(backend, task)).metadata["inputs"] == winners[0].fingerprint


async def test_many_tasks_at_once_do_not_mix(backend: Backend) -> None:
    tasks = [backend.new_task(score_threshold=i / 100) for i in range(10)]

    async def whole_life(task: TaskInputs) -> None:
        await backend.store.start(task)
        await backend.store.finish(
            task, replace(RESULT, mask_image_url=f"https://m.example/{task.task_id}.png")
        )

    await asyncio.gather(*(whole_life(task) for task in tasks))
    for task in tasks:
        row = await row_of(backend, task)
        assert row.status == "done"
        assert row.mask_image_url == f"https://m.example/{task.task_id}.png"
        assert row.metadata["inputs"] == task.fingerprint


async def test_a_task_without_a_row_is_not_found_or_gets_one(backend: Backend) -> None:
    task = backend.new_task(task_id=str(uuid.uuid4()))
    if backend.makes_rows:
        await backend.store.start(task)
        row = await row_of(backend, task)
        assert (row.user_id, row.text_prompt) == (task.user_id, "red circle, blue square")
    else:
        with pytest.raises(TaskNotFound, match=task.task_id):
            await backend.store.start(task)
        assert await backend.store.get(task.task_id) is None


async def test_a_task_that_was_never_started_cannot_be_finished(backend: Backend) -> None:
    with pytest.raises(TaskNotFound):
        await backend.store.finish(backend.new_task(task_id=str(uuid.uuid4())), RESULT)


async def test_failing_a_task_without_a_row_is_harmless(backend: Backend) -> None:
    task = backend.new_task(task_id=str(uuid.uuid4()))
    await backend.store.fail(task, "X", "y")
    row = await backend.store.get(task.task_id)
    assert (row is not None) == backend.makes_rows


@pytest.mark.parametrize("task_id", ["not-a-uuid", "a,b)", "1&status=eq.done", "*", "%", "빨강", ""])
async def test_an_id_that_no_row_can_have_is_not_found_and_harms_nothing(
    backend: Backend, task_id: str
) -> None:
    bystander = backend.new_task()
    await backend.store.start(bystander)
    assert await backend.store.get(task_id) is None
    if not backend.makes_rows:
        with pytest.raises(TaskNotFound):
            await backend.store.start(replace(bystander, task_id=task_id))
    assert (await row_of(backend, bystander)).status == "processing"


async def test_times_are_aware_and_updated_at_moves(backend: Backend) -> None:
    task = backend.new_task()
    await backend.store.start(task)
    first = await row_of(backend, task)
    await backend.store.finish(task, RESULT)
    second = await row_of(backend, task)
    assert first.created_at is not None
    assert first.updated_at is not None
    assert second.updated_at is not None
    assert second.created_at == first.created_at
    assert second.updated_at > first.updated_at
    assert abs(second.updated_at - datetime.now(UTC)) < timedelta(minutes=1)


async def test_a_closed_store_says_so_and_closes_twice(backend: Backend) -> None:
    await backend.store.aclose()
    await backend.store.aclose()
    with pytest.raises(TaskStoreUnavailable, match="closed"):
        await backend.store.get("x")
