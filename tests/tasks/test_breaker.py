"""The breakers before real servers that fail, hang, refuse, die and come back."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

import pytest

from storage import ObjectNotFound, StorageRefused, StorageTimeout, StorageUnavailable
from storage.local import LocalStore
from storage.r2 import R2Store
from tasks import breaker as breakers
from tasks.breaker import FAILURES_TO_OPEN, CircuitBreaker, GuardedStore, GuardedTasks
from tasks.errors import TaskConflict, TaskNotFound, TaskRowRefused, TaskStoreTimeout, TaskStoreUnavailable
from tasks.store import TaskInputs
from tasks.supabase import RetryPolicy, SupabaseTasks
from tests.conftest import free_port
from tests.servers.postgrest import PostgrestStandIn, insert_task
from tests.servers.s3 import s3_server
from tests.storage import failing_server as server_that
from tests.storage.failing_server import FailingServer, failing_server

ONE_TRY = RetryPolicy(attempts=1, deadline_s=30, connect_timeout_s=15, read_timeout_s=15)


class Pauses(TypedDict):
    """Of a breaker."""

    first_pause_s: float
    max_pause_s: float


SOON: Pauses = {"first_pause_s": 0.05, "max_pause_s": 0.2}
# No call is let through again within a test.
NOT_AGAIN: Pauses = {"first_pause_s": 600.0, "max_pause_s": 600.0}


@asynccontextmanager
async def guarded_r2(server: FailingServer, *, pauses: Pauses, **options: Any) -> AsyncIterator[GuardedStore]:
    """R2 without retries of its own."""
    store = R2Store(server.endpoint, "s3-images", "key", "secret", **{"max_attempts": 1, **options})
    guarded = GuardedStore(store, **pauses)
    try:
        yield guarded
    finally:
        server.stopping.set()  # or closing the store would wait for an answer
        await guarded.aclose()


@asynccontextmanager
async def guarded_supabase(
    url: str, key: str, *, pauses: Pauses, retry: RetryPolicy = ONE_TRY
) -> AsyncIterator[GuardedTasks]:
    guarded = GuardedTasks(SupabaseTasks(url, key, retry=retry), **pauses)
    try:
        yield guarded
    finally:
        await guarded.aclose()


async def get(store: GuardedStore) -> bytes:
    return await store.get("uploads/a.png", max_bytes=1000)


async def fail_until_open(store: GuardedStore, error: type[Exception]) -> None:
    for _ in range(FAILURES_TO_OPEN):
        assert not store.breaker.is_open
        with pytest.raises(error):
            await get(store)
    assert store.breaker.is_open


async def until(is_so: Callable[[], bool], deadline_s: float = 30.0) -> None:
    async with asyncio.timeout(deadline_s):
        while not is_so():
            await asyncio.sleep(0.005)


async def is_refused_at_once(store: GuardedStore) -> bool:
    began = time.monotonic()
    with pytest.raises(
        StorageUnavailable, match=r"^not tried: object storage has been failing since 20\d\d-"
    ):
        await get(store)
    return time.monotonic() - began < 0.5


# Object storage


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        pytest.param(server_that.s3_error(503, "SlowDown"), StorageUnavailable, id="503"),
        pytest.param(server_that.hang_up, StorageUnavailable, id="hang-up"),
        pytest.param(server_that.never_answer, StorageTimeout, id="silence"),
        pytest.param(server_that.s3_error(403, "InvalidAccessKeyId"), StorageRefused, id="refused key"),
    ],
)
async def test_a_few_failures_in_a_row_open_it_and_then_nothing_is_sent(
    behaviour: server_that.Behaviour, error: type[Exception]
) -> None:
    before = datetime.now(UTC)
    with failing_server(behaviour) as server:
        async with guarded_r2(server, pauses=NOT_AGAIN, read_timeout_s=0.2) as store:
            await fail_until_open(store, error)
            n_sent = len(server.requests)
            for _ in range(20):
                assert await is_refused_at_once(store)
            assert len(server.requests) == n_sent
            assert store.breaker.last_failure is error
            assert store.breaker.since is not None and before <= store.breaker.since <= datetime.now(UTC)


async def test_a_refusal_shows_no_host_and_no_port() -> None:
    with failing_server(server_that.hang_up) as server:
        async with guarded_r2(server, pauses=NOT_AGAIN) as store:
            await fail_until_open(store, StorageUnavailable)
            with pytest.raises(StorageUnavailable) as caught:
                await get(store)
            assert "127.0.0.1" not in str(caught.value) and server.endpoint[-5:] not in str(caught.value)


async def test_a_failure_between_answers_does_not_open_it() -> None:
    failure, missing = server_that.s3_error(503, "SlowDown"), server_that.s3_error(404, "NoSuchKey")
    with failing_server(
        failure, failure, missing, failure, failure, server_that.succeed(b"1"), failure
    ) as server:
        async with guarded_r2(server, pauses=NOT_AGAIN) as store:
            outcomes = [await asyncio.gather(get(store), return_exceptions=True) for _ in range(7)]
            assert [type(outcome) for (outcome,) in outcomes] == [
                *[StorageUnavailable] * 2,
                ObjectNotFound,
                *[StorageUnavailable] * 2,
                bytes,
                StorageUnavailable,
            ]
            assert not store.breaker.is_open
            assert (store.breaker.since, store.breaker.last_failure) == (None, None)


async def test_answers_that_nobody_likes_never_open_it() -> None:
    with failing_server(server_that.s3_error(404, "NoSuchKey")) as server:
        async with guarded_r2(server, pauses=NOT_AGAIN) as store:
            for _ in range(3 * FAILURES_TO_OPEN):
                with pytest.raises(ObjectNotFound):
                    await get(store)
            assert not store.breaker.is_open


async def test_a_server_that_is_killed_opens_it_at_once_and_it_closes_when_the_server_is_back(
    tmp_path: Path,
) -> None:
    with s3_server(tmp_path) as server:
        real = R2Store(
            server.endpoint, server.bucket, server.access_key_id, server.secret_access_key, max_attempts=1
        )
        seen: list[bool] = []
        store = GuardedStore(real, on_change=seen.append, **SOON)
        await store.put("uploads/a.png", b"1", "image/png")
        await asyncio.to_thread(server.kill)
        # The first may find the pooled connection cut, which is not yet clear; a refused one is.
        for _ in range(2):
            with suppress(StorageUnavailable):
                await get(store)
        assert seen == [False]

        await asyncio.to_thread(server.start)
        async with asyncio.timeout(30):
            while True:
                with suppress(StorageUnavailable):
                    assert await get(store) == b"1"
                    break
                await asyncio.sleep(0.01)
        assert seen == [False, True]
        await store.aclose()


async def test_of_many_calls_one_is_let_through_to_see_and_it_lets_the_others_in() -> None:
    with failing_server(*[server_that.s3_error(503, "SlowDown")] * 3, server_that.succeed(b"1")) as server:
        async with guarded_r2(server, pauses=SOON) as store:
            await fail_until_open(store, StorageUnavailable)
            await asyncio.sleep(SOON["first_pause_s"])
            outcomes = await asyncio.gather(*(get(store) for _ in range(20)), return_exceptions=True)
            assert outcomes.count(b"1") == 1
            assert len(server.requests) == FAILURES_TO_OPEN + 1
            assert await asyncio.gather(*(get(store) for _ in range(20))) == [b"1"] * 20


async def test_a_call_that_is_cancelled_while_it_looks_lets_the_next_one_look() -> None:
    failure = server_that.s3_error(503, "SlowDown")
    with failing_server(
        failure, failure, failure, server_that.never_answer, server_that.succeed(b"1")
    ) as server:
        async with guarded_r2(server, pauses=SOON) as store:
            await fail_until_open(store, StorageUnavailable)
            await asyncio.sleep(SOON["first_pause_s"])
            looking = asyncio.create_task(get(store))
            await until(lambda: len(server.requests) == FAILURES_TO_OPEN + 1)
            assert await is_refused_at_once(store)
            looking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await looking
            assert store.breaker.is_open
            assert await get(store) == b"1"
            assert not store.breaker.is_open


async def test_the_pauses_between_looks_grow() -> None:
    with failing_server(server_that.s3_error(503, "SlowDown")) as server:
        async with guarded_r2(server, pauses={"first_pause_s": 0.04, "max_pause_s": 0.32}) as store:
            await fail_until_open(store, StorageUnavailable)
            looked_at_s = [time.monotonic()]
            async with asyncio.timeout(30):
                while len(looked_at_s) < 8:
                    n_sent = len(server.requests)
                    with suppress(StorageUnavailable):
                        await get(store)
                    if len(server.requests) > n_sent:
                        looked_at_s.append(time.monotonic())
                    await asyncio.sleep(0.002)
    pauses = [after - before for before, after in itertools.pairwise(looked_at_s)]
    for pause_s, shortest_s in zip(pauses, [0.02, 0.04, 0.08, 0.16, 0.16, 0.16, 0.16], strict=True):
        assert pause_s >= shortest_s * 0.99
    assert len({round(pause_s, 4) for pause_s in pauses[3:]}) > 1  # drawn


async def test_calls_from_before_an_outage_have_no_say_after_it() -> None:
    """Ten calls hang when three failures open it; it closes; then the ten time out."""
    failure = server_that.s3_error(503, "SlowDown")
    script = [*[server_that.never_answer] * 10, failure, failure, failure, server_that.succeed(b"1")]
    with failing_server(*script) as server:
        async with guarded_r2(server, pauses=SOON, read_timeout_s=1.5) as store:
            hanging = [asyncio.create_task(get(store)) for _ in range(10)]
            await until(lambda: len(server.requests) == 10)
            await fail_until_open(store, StorageUnavailable)
            await asyncio.sleep(SOON["first_pause_s"])
            assert await get(store) == b"1"
            assert {type(each) for each in await asyncio.gather(*hanging, return_exceptions=True)} == {
                StorageTimeout
            }
            assert not store.breaker.is_open


async def test_a_local_directory_is_guarded_too(tmp_path: Path) -> None:
    store = GuardedStore(LocalStore(tmp_path / "files", "http://test"))
    await store.put("uploads/a.png", b"1", "image/png")
    assert await get(store) == b"1"
    assert await store.exists("uploads/a.png") and not await store.exists(breakers.PROBE_KEY)
    assert store.public_url("uploads/a.png") == "http://test/files/uploads/a.png"
    await store.aclose()
    await store.aclose()


# Rows


def inputs(task_id: str) -> TaskInputs:
    return TaskInputs(task_id, "user-1", "uploads/a.png", ("cat",), 0.5)


async def test_rows_that_cannot_be_reached_are_not_asked_for_and_come_back(
    stand_in: PostgrestStandIn, dsn: str
) -> None:
    task = inputs(insert_task(dsn))
    async with guarded_supabase(stand_in.url, stand_in.secret_key, pauses=SOON) as tasks:
        stand_in.faults.fail(FAILURES_TO_OPEN, status=503)
        for call in (tasks.start(task), tasks.get(task.task_id), tasks.fail(task, "X", "y")):
            with pytest.raises(TaskStoreUnavailable, match="503"):
                await call
        assert tasks.breaker.is_open
        with pytest.raises(
            TaskStoreUnavailable, match="not tried: the store of the rows has been failing since"
        ):
            await tasks.start(task)
        assert len(stand_in.seen) == FAILURES_TO_OPEN
        await asyncio.sleep(SOON["first_pause_s"])
        await tasks.start(task)
        assert not tasks.breaker.is_open


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        pytest.param(lambda faults: faults.hang_up(3), TaskStoreUnavailable, id="hang-up"),
        pytest.param(lambda faults: faults.delay(3, 2.0), TaskStoreTimeout, id="silence"),
        pytest.param(lambda faults: faults.fail(3, status=500), TaskStoreUnavailable, id="500"),
    ],
)
async def test_three_failures_of_any_kind_open_it(
    stand_in: PostgrestStandIn, fault: Callable[[Any], None], error: type[Exception]
) -> None:
    fault(stand_in.faults)
    policy = RetryPolicy(attempts=1, connect_timeout_s=15, read_timeout_s=0.3)
    async with guarded_supabase(stand_in.url, stand_in.secret_key, pauses=NOT_AGAIN, retry=policy) as tasks:
        outcomes = [
            await asyncio.gather(tasks.get(str(uuid.uuid4())), return_exceptions=True) for _ in range(3)
        ]
        assert [type(outcome) for (outcome,) in outcomes] == [error] * 3
        assert tasks.breaker.is_open and tasks.breaker.last_failure is error


async def test_a_key_that_is_refused_is_not_hammered(stand_in: PostgrestStandIn) -> None:
    async with guarded_supabase(stand_in.url, "sb_secret_WRONGWRONG", pauses=NOT_AGAIN) as tasks:
        for _ in range(20):
            with pytest.raises(TaskStoreUnavailable):
                await tasks.get(str(uuid.uuid4()))
    assert len(stand_in.seen) == FAILURES_TO_OPEN


async def test_nobody_listening_opens_it_at_once() -> None:
    async with guarded_supabase(f"http://127.0.0.1:{free_port()}", "sb_secret_1", pauses=NOT_AGAIN) as tasks:
        with pytest.raises(TaskStoreUnavailable, match="could not be reached"):
            await tasks.get("1")
        assert tasks.breaker.is_open


async def test_a_host_that_does_not_resolve_opens_it_at_once() -> None:
    async with guarded_supabase("http://no-such-host.invalid", "sb_secret_1", pauses=NOT_AGAIN) as tasks:
        with pytest.raises(TaskStoreUnavailable, match="could not be reached"):
            await tasks.get("1")
        assert tasks.breaker.is_open


async def test_conflicts_and_missing_rows_are_answers(stand_in: PostgrestStandIn, dsn: str) -> None:
    mine = inputs(insert_task(dsn))
    async with guarded_supabase(stand_in.url, stand_in.secret_key, pauses=NOT_AGAIN) as tasks:
        await tasks.start(mine)
        others = TaskInputs(mine.task_id, "user-1", "uploads/b.png", ("cat",), 0.5)
        answers = [(others, TaskConflict), (inputs(str(uuid.uuid4())), TaskNotFound)]
        for task, answer in answers * FAILURES_TO_OPEN:
            for _ in range(FAILURES_TO_OPEN - 1):
                stand_in.faults.fail(1, status=503)
                with pytest.raises(TaskStoreUnavailable):
                    await tasks.get(mine.task_id)
            with pytest.raises(answer):
                await tasks.start(task)
        assert not tasks.breaker.is_open


async def test_a_row_that_is_refused_is_an_answer(stand_in: PostgrestStandIn, dsn: str) -> None:
    task = inputs(insert_task(dsn))
    async with guarded_supabase(stand_in.url, stand_in.secret_key, pauses=NOT_AGAIN) as tasks:
        for _ in range(FAILURES_TO_OPEN - 1):
            stand_in.faults.fail(1, status=503)
            with pytest.raises(TaskStoreUnavailable):
                await tasks.get(task.task_id)
        for _ in range(FAILURES_TO_OPEN):
            stand_in.faults.fail(1, status=413)
            with pytest.raises(TaskRowRefused):
                await tasks.start(task)
        await tasks.start(task)
        assert not tasks.breaker.is_open


@pytest.mark.parametrize(
    ("told", "pause_s"), [("2", 2.0), ("3600", breakers.MAX_TOLD_PAUSE_S), ("soon", 0.0)]
)
async def test_a_store_that_says_how_long_to_wait_is_left_alone_for_so_long(
    stand_in: PostgrestStandIn, told: str, pause_s: float
) -> None:
    stand_in.faults.fail(3, status=503, headers={"Retry-After": told})
    async with guarded_supabase(stand_in.url, stand_in.secret_key, pauses=SOON) as tasks:
        for _ in range(3):
            with pytest.raises(TaskStoreUnavailable):
                await tasks.get(str(uuid.uuid4()))
        left_s = tasks.breaker._seconds_to_probe(breakers.IDLE_S)
    assert pause_s - 0.2 < left_s <= max(pause_s, SOON["first_pause_s"])


async def test_object_storage_that_says_how_long_to_wait_is_left_alone_for_so_long() -> None:
    busy = server_that.answer(503, b"", {"Retry-After": "7"})
    with failing_server(busy) as server:
        async with guarded_r2(server, pauses=SOON, max_attempts=3) as store:
            await fail_until_open(store, StorageUnavailable)
            assert 6.5 < store.breaker._seconds_to_probe(breakers.IDLE_S) <= 7.0
    assert len(server.requests) == FAILURES_TO_OPEN  # the client's own retries would come too early


# Waiting for the end of an outage


async def test_who_waits_is_woken_when_the_outage_ends() -> None:
    with failing_server(*[server_that.s3_error(503, "SlowDown")] * 3, server_that.succeed(b"1")) as server:
        async with guarded_r2(server, pauses=SOON) as store:
            await fail_until_open(store, StorageUnavailable)
            began = time.monotonic()
            waiting = [asyncio.create_task(store.breaker.pause(600)) for _ in range(50)]
            await asyncio.sleep(SOON["first_pause_s"])
            assert await get(store) == b"1"
            await asyncio.gather(*waiting)
            assert time.monotonic() - began < 10
            assert not store.breaker._sleepers


async def test_a_pause_without_an_outage_and_one_in_a_longer_outage_are_slept_out() -> None:
    with failing_server(server_that.s3_error(503, "SlowDown")) as server:
        async with guarded_r2(server, pauses=NOT_AGAIN) as store:
            for _ in range(2):
                began = time.monotonic()
                await store.breaker.pause(0.1)
                assert 0.099 <= time.monotonic() - began < 5
                if not store.breaker.is_open:
                    await fail_until_open(store, StorageUnavailable)


async def test_a_pause_can_be_cancelled() -> None:
    breaker = _a_breaker()
    waiting = asyncio.create_task(breaker.pause(600))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not breaker._sleepers


async def test_an_outage_without_traffic_is_noticed_and_so_is_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(breakers, "IDLE_S", 0.05)
    failure = server_that.s3_error(503, "SlowDown")
    with failing_server(server_that.s3_error(404, "NoSuchKey")) as server:
        async with guarded_r2(server, pauses=SOON) as store:
            store.watch()
            await until(lambda: len(server.requests) >= 2)
            assert not store.breaker.is_open
            server.behaviours[:] = [failure]
            await until(lambda: store.breaker.is_open)
            server.behaviours[:] = [server_that.s3_error(404, "NoSuchKey")]
            await until(lambda: not store.breaker.is_open)
    assert {request.method for request in server.requests} == {"HEAD"}


async def test_an_outage_that_traffic_noticed_ends_without_traffic() -> None:
    missing = server_that.s3_error(404, "NoSuchKey")
    with failing_server(missing) as server:
        async with guarded_r2(server, pauses=SOON) as store:
            store.watch()
            await until(lambda: len(server.requests) == 1)
            server.behaviours[:] = [server_that.s3_error(503, "SlowDown")]
            await fail_until_open(store, StorageUnavailable)
            server.behaviours[:] = [missing]
            await until(lambda: not store.breaker.is_open, breakers.IDLE_S / 3)


async def test_calls_make_looks_of_our_own_unnecessary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakers, "IDLE_S", 0.4)
    with failing_server(server_that.succeed(b"1")) as server:
        async with guarded_r2(server, pauses=SOON) as store:
            await get(store)
            store.watch()
            for _ in range(20):
                await get(store)
                await asyncio.sleep(0.02)
    assert "HEAD" not in {request.method for request in server.requests}


# The breaker itself


class Down(Exception):
    """Of no library."""


def _a_breaker(first_pause_s: float = 600, max_pause_s: float = 600) -> CircuitBreaker:
    return CircuitBreaker(
        "it",
        failures=(Down,),
        answers=(KeyError,),
        refusal=Down,
        first_pause_s=first_pause_s,
        max_pause_s=max_pause_s,
        on_change=lambda is_up: None,
    )


async def test_a_bug_of_ours_says_nothing_about_the_dependency() -> None:
    breaker = _a_breaker()
    for error in [Down, Down, ZeroDivisionError, ZeroDivisionError, Down]:
        with pytest.raises(error), breaker.attempt():
            raise error
    assert breaker.is_open


async def test_a_look_that_fails_in_a_way_of_its_own_does_not_keep_the_event_loop_busy() -> None:
    n_looks = 0

    async def look() -> None:
        nonlocal n_looks
        n_looks += 1
        raise ZeroDivisionError

    breaker = _a_breaker(**SOON)
    for _ in range(FAILURES_TO_OPEN):
        with suppress(Down), breaker.attempt():
            raise Down
    watching = asyncio.create_task(breaker.watch(look))
    await asyncio.sleep(0.5)
    watching.cancel()
    assert 1 <= n_looks <= 11
    await asyncio.gather(watching, return_exceptions=True)


def test_a_call_costs_next_to_nothing_while_all_is_well() -> None:
    breaker, n = _a_breaker(), 2_000

    def seconds() -> float:
        began = time.perf_counter()
        for _ in range(n):
            with breaker.attempt():
                pass
        return time.perf_counter() - began

    assert min(seconds() for _ in range(10)) / n < 20e-6
