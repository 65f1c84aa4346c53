"""How SupabaseTasks behaves when the network, Supabase or its keys do not."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
import uvloop

from tasks.errors import TaskNotFound, TaskRowRefused, TaskStoreTimeout, TaskStoreUnavailable
from tasks.store import TaskInputs, TaskResult
from tasks.supabase import (
    RETRIED_STATUSES,
    RetryPolicy,
    SupabaseTasks,
    auth_headers,
    map_httpx_error,
    retry_after_seconds,
)
from tests.servers.postgres import Postgres, free_port, running_postgres
from tests.servers.postgrest import (
    PostgrestStandIn,
    insert_task,
    make_jwt,
    read_task,
    refusing,
    running_postgrest,
)

# Tries follow quickly; what waits for a server waits as long as a busy machine may need.
FAST = RetryPolicy(
    attempts=3,
    deadline_s=40,
    connect_timeout_s=15,
    read_timeout_s=15,
    backoff_base_s=0.01,
    backoff_cap_s=0.05,
)
RESULT = TaskResult("https://masks.example/1.png", ("cat",), {"confidence": 0.5})


def inputs(task_id: str) -> TaskInputs:
    return TaskInputs(task_id, "user-1", "uploads/a.png", ("cat",), 0.5)


@pytest.fixture
async def store(stand_in: PostgrestStandIn) -> AsyncIterator[SupabaseTasks]:
    tasks = SupabaseTasks(stand_in.url, stand_in.secret_key, retry=FAST)
    yield tasks
    await tasks.aclose()


@pytest.fixture
def task(dsn: str) -> TaskInputs:
    return inputs(insert_task(dsn))


# Keys


async def test_a_new_key_goes_in_apikey_only(stand_in: PostgrestStandIn, task: TaskInputs) -> None:
    async with aclosing(SupabaseTasks(stand_in.url, stand_in.secret_key)) as tasks:
        await tasks.start(task)
    assert stand_in.seen[0].headers["apikey"] == stand_in.secret_key
    assert "authorization" not in stand_in.seen[0].headers


async def test_a_legacy_key_goes_in_apikey_and_authorization(
    stand_in: PostgrestStandIn, task: TaskInputs
) -> None:
    async with aclosing(SupabaseTasks(stand_in.url, stand_in.service_jwt)) as tasks:
        await tasks.start(task)
    assert stand_in.seen[0].headers["apikey"] == stand_in.service_jwt
    assert stand_in.seen[0].headers["authorization"] == f"Bearer {stand_in.service_jwt}"


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        pytest.param("", "empty", id="none"),
        pytest.param("sb_secret_with space", "spaces", id="space"),
        pytest.param("sb_secret_1\n", "spaces", id="newline"),
        pytest.param("sb_publishable_SECRETPART", "publishable key", id="publishable"),
        pytest.param(make_jwt({"role": "anon"}, "x" * 32), "anon key", id="anon JWT"),
    ],
)
def test_a_key_that_cannot_work_is_refused_at_once_and_not_shown(key: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        SupabaseTasks("https://project.supabase.co", key)
    assert not key or key.strip() not in str(caught.value)
    assert "SUPABASE_SERVICE_KEY" in str(caught.value)


@pytest.mark.parametrize("key", ["eyJub3QgYSBqd3Q", "eyJ.eyJ.x", "eyJhbGciOiJIUzI1NiJ9.e30.x"])
def test_an_opaque_legacy_key_is_left_to_supabase_to_judge(key: str) -> None:
    assert auth_headers(key) == {"apikey": key, "Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "url", ["", "project.supabase.co", "ftp://x", "https://", "file:///etc", "http://[", "https://u:p@h"]
)
def test_a_url_that_is_none_is_refused_by_name(url: str) -> None:
    with pytest.raises(ValueError, match="SUPABASE_URL"):
        SupabaseTasks(url, "sb_secret_1")


@pytest.mark.parametrize("suffix", ["", "/", "/rest/v1", "/rest/v1/"])
async def test_the_url_may_end_in_a_slash_or_in_the_api_path(
    stand_in: PostgrestStandIn, task: TaskInputs, suffix: str
) -> None:
    async with aclosing(SupabaseTasks(stand_in.url + suffix, stand_in.secret_key)) as tasks:
        await tasks.start(task)
    assert stand_in.seen[0].path == "/rest/v1/segmentation_results"


async def test_no_error_log_or_repr_shows_the_key(
    stand_in: PostgrestStandIn, task: TaskInputs, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for key in ("sb_secret_WRONGWRONG", make_jwt({"role": "service_role"}, "another secret" * 3)):
        async with aclosing(SupabaseTasks(stand_in.url, key, retry=FAST)) as tasks:
            stand_in.faults.fail(1, status=503, body=key.encode())
            with pytest.raises(
                TaskStoreUnavailable, match="refuses the service key; check SUPABASE_SERVICE_KEY"
            ) as caught:
                await tasks.start(task)
            shown = "\n".join([str(caught.value), repr(tasks), repr(tasks._retry), caplog.text])
            assert key not in shown


# Retries


@pytest.mark.parametrize("status", sorted(RETRIED_STATUSES))
async def test_a_passing_fault_is_tried_again(
    stand_in: PostgrestStandIn, store: SupabaseTasks, task: TaskInputs, dsn: str, status: int
) -> None:
    stand_in.faults.fail(2, status=status)
    await store.start(task)
    assert len(stand_in.seen) == 3
    assert read_task(dsn, task.task_id)["status"] == "processing"


@pytest.mark.parametrize("status", [400, 409, 413, 414, 415, 422])
async def test_what_is_refused_for_its_content_is_told_apart_and_not_tried_again(
    stand_in: PostgrestStandIn, store: SupabaseTasks, task: TaskInputs, status: int
) -> None:
    stand_in.faults.fail(1, status=status)
    with pytest.raises(TaskRowRefused, match=str(status)):
        await store.start(task)
    assert len(stand_in.seen) == 1


async def test_what_postgres_refuses_is_refused_whatever_it_is(
    store: SupabaseTasks, task: TaskInputs, dsn: str
) -> None:
    with refusing(dsn, task.task_id, "status <> 'processing'"), pytest.raises(TaskRowRefused, match="23514"):
        await store.start(task)
    await store.start(task)
    with pytest.raises(TaskRowRefused, match="22P05"):  # Postgres has no text with a NUL in it
        await store.fail(task, "X", "\x00")


@pytest.mark.parametrize("code", ["PGRST204", "42703", "42883"])
async def test_a_database_that_is_not_set_up_refuses_no_row(
    stand_in: PostgrestStandIn, store: SupabaseTasks, task: TaskInputs, code: str
) -> None:
    stand_in.faults.fail(1, status=400, body=f'{{"code": "{code}"}}'.encode())
    with pytest.raises(TaskStoreUnavailable, match=code):
        await store.start(task)


@pytest.mark.parametrize("status", [401, 403, 404, 405, 406, 412, 416, 500, 501])
async def test_any_other_status_is_final_and_ours_to_answer_for(
    stand_in: PostgrestStandIn, store: SupabaseTasks, task: TaskInputs, status: int
) -> None:
    stand_in.faults.fail(1, status=status)
    with pytest.raises(TaskStoreUnavailable, match=str(status)):
        await store.start(task)
    assert len(stand_in.seen) == 1


async def test_it_gives_up_after_as_many_tries_as_it_was_told(
    stand_in: PostgrestStandIn, store: SupabaseTasks, task: TaskInputs
) -> None:
    stand_in.faults.fail(10, status=503)
    with pytest.raises(TaskStoreUnavailable, match="503"):
        await store.start(task)
    assert len(stand_in.seen) == FAST.attempts


async def test_retry_after_is_waited_for(
    stand_in: PostgrestStandIn, store: SupabaseTasks, task: TaskInputs
) -> None:
    stand_in.faults.fail(1, status=429, headers={"Retry-After": "1"})
    await store.start(task)
    first, second = stand_in.seen
    assert second.at_s - first.at_s >= 1.0


async def test_a_retry_after_beyond_the_deadline_is_not_waited_for(
    stand_in: PostgrestStandIn, store: SupabaseTasks, task: TaskInputs
) -> None:
    stand_in.faults.fail(1, status=503, headers={"Retry-After": "3600"})
    began = time.monotonic()
    with pytest.raises(TaskStoreUnavailable):
        await store.start(task)
    assert time.monotonic() - began < FAST.deadline_s / 2
    assert len(stand_in.seen) == 1


def test_retry_after_is_read_as_seconds_or_as_a_date() -> None:
    soon = retry_after_seconds(format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True))
    assert soon is not None
    assert 25 < soon <= 30
    assert retry_after_seconds("7") == 7.0
    assert retry_after_seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    for nonsense in (None, "", "soon", "-3", "1e9", "nan", "9" * 40):
        assert retry_after_seconds(nonsense) is None


def test_pauses_grow_vary_and_have_an_upper_limit() -> None:
    policy = RetryPolicy(backoff_base_s=0.2, backoff_cap_s=1.0)
    for attempt, longest_s in [(1, 0.2), (2, 0.4), (3, 0.8), (4, 1.0), (9, 1.0)]:
        pauses = {policy.pause_s(attempt, None) for _ in range(50)}
        assert len(pauses) > 10
        assert all(longest_s / 2 <= pause <= longest_s for pause in pauses)
    assert policy.pause_s(1, 5.0) == 5.0


async def test_a_connection_that_is_cut_is_tried_again(
    stand_in: PostgrestStandIn, store: SupabaseTasks, task: TaskInputs, dsn: str
) -> None:
    stand_in.faults.hang_up(2)
    await store.start(task)
    assert read_task(dsn, task.task_id)["status"] == "processing"


async def test_a_retry_is_harmless_when_only_the_answer_was_lost(
    stand_in: PostgrestStandIn, store: SupabaseTasks, task: TaskInputs, dsn: str
) -> None:
    stand_in.faults.hang_up(1, after_work=True)
    await store.start(task)
    stand_in.faults.hang_up(1, after_work=True)
    await store.finish(task, RESULT)
    row = read_task(dsn, task.task_id)
    assert (row["status"], row["labels"]) == ("done", ["cat"])
    assert [request.method for request in stand_in.seen] == ["PATCH"] * 4
    failed = inputs(insert_task(dsn))
    stand_in.faults.hang_up(1, after_work=True)
    await store.fail(failed, "X", "y")
    assert read_task(dsn, failed.task_id)["status"] == "error"


async def test_a_server_that_always_hangs_up_is_unavailable(
    stand_in: PostgrestStandIn, store: SupabaseTasks, task: TaskInputs
) -> None:
    stand_in.faults.hang_up(10)
    with pytest.raises(TaskStoreUnavailable, match="could not be reached"):
        await store.start(task)


async def test_nobody_listening_is_unavailable(task: TaskInputs) -> None:
    async with aclosing(SupabaseTasks(f"http://127.0.0.1:{free_port()}", "sb_secret_1", retry=FAST)) as store:
        with pytest.raises(TaskStoreUnavailable, match="could not be reached"):
            await store.start(task)


@contextmanager
def resetting_server() -> Iterator[int]:
    """Takes connections and resets them at once; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reset_all() -> None:
            with suppress(OSError):  # closed: the end
                while True:
                    connection, _ = server.accept()
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.close()

        thread = threading.Thread(target=reset_all, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_connections_that_are_reset_at_once_are_unavailable_on_the_service_s_event_loop() -> None:
    """A busy loop sees the reset before the first use; on uvloop, anyio then finds no socket to ask."""

    async def ask_many(port: int) -> list[object]:
        url, once = f"http://127.0.0.1:{port}", RetryPolicy(attempts=1)
        async with aclosing(SupabaseTasks(url, "sb_secret_0123456789", retry=once)) as tasks:
            calls = [asyncio.create_task(tasks.get("1")) for _ in range(200)]
            while not all(call.done() for call in calls):
                time.sleep(0.001)  # busy: what a request's work does to the loop
                await asyncio.sleep(0)
            return await asyncio.gather(*calls, return_exceptions=True)

    with resetting_server() as port:
        outcomes = uvloop.run(ask_many(port))
    assert {type(outcome) for outcome in outcomes} == {TaskStoreUnavailable}


async def test_a_slow_answer_is_a_timeout(stand_in: PostgrestStandIn, task: TaskInputs) -> None:
    policy = RetryPolicy(
        attempts=2, deadline_s=40, connect_timeout_s=15, read_timeout_s=0.5, backoff_base_s=0.01
    )
    async with aclosing(SupabaseTasks(stand_in.url, stand_in.secret_key, retry=policy)) as store:
        stand_in.faults.delay(2, 10.0)
        with pytest.raises(TaskStoreTimeout):
            await store.start(task)
        async with asyncio.timeout(20):
            while len(stand_in.seen) < 2:
                await asyncio.sleep(0.01)


async def test_all_tries_together_end_at_the_deadline(stand_in: PostgrestStandIn, task: TaskInputs) -> None:
    policy = RetryPolicy(attempts=100, deadline_s=0.5, read_timeout_s=30, backoff_base_s=0.01)
    async with aclosing(SupabaseTasks(stand_in.url, stand_in.secret_key, retry=policy)) as store:
        stand_in.faults.delay(1, 20.0)
        began = time.monotonic()
        with pytest.raises(TaskStoreTimeout, match=r"within 0\.5 s"):
            await store.start(task)
        assert time.monotonic() - began < 15


async def test_a_cancelled_call_is_cancelled_at_once(
    stand_in: PostgrestStandIn, store: SupabaseTasks, task: TaskInputs
) -> None:
    stand_in.faults.fail(1, status=503, headers={"Retry-After": "30"})
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await store.start(task)
    assert time.monotonic() - began < 20


# Replies


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        pytest.param(b"<html>gateway</html>", {"Content-Type": "text/html"}, id="html"),
        pytest.param(b"", {}, id="nothing"),
        pytest.param(b'[{"id": "1"', {}, id="truncated"),
        pytest.param(b"{}", {}, id="an object"),
        pytest.param(b"null", {}, id="null"),
        pytest.param(b"[1]", {}, id="a list of numbers"),
        pytest.param(b"\xff\xfe\xff", {}, id="not UTF-8"),
        pytest.param(b"not gzip", {"Content-Encoding": "gzip"}, id="not the encoding it claims"),
    ],
)
async def test_a_reply_that_cannot_be_read_is_unavailable(
    stand_in: PostgrestStandIn, store: SupabaseTasks, task: TaskInputs, body: bytes, headers: dict[str, str]
) -> None:
    stand_in.faults.fail(1, status=200, body=body, headers=headers)
    with pytest.raises(TaskStoreUnavailable):
        await store.start(task)
    assert len(stand_in.seen) == 1


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(b'[{"id": "1"}]', id="columns missing"),
        pytest.param(
            b'[{"id":"1","status":"done","user_id":"u","source_image_url":"s","text_prompt":"t","mask_image_url":null,'
            b'"project_id":null,"labels":7,"metadata":{},"created_at":"2026-01-01","updated_at":"2026-01-01"}]',
            id="labels that are none",
        ),
        pytest.param(
            b'[{"id":"1","status":"done","user_id":"u","source_image_url":"s","text_prompt":"t","mask_image_url":null,'
            b'"project_id":null,"labels":[],"metadata":"text","created_at":"2026-01-01","updated_at":"2026-01-01"}]',
            id="metadata that is text",
        ),
        pytest.param(
            b'[{"id":"1","status":"done","user_id":"u","source_image_url":"s","text_prompt":"t","mask_image_url":null,'
            b'"project_id":null,"labels":[],"metadata":{},"created_at":"yesterday","updated_at":null}]',
            id="times that are none",
        ),
    ],
)
async def test_a_row_that_cannot_be_read_is_unavailable(
    stand_in: PostgrestStandIn, store: SupabaseTasks, row: bytes
) -> None:
    stand_in.faults.fail(1, status=200, body=row)
    with pytest.raises(TaskStoreUnavailable, match="columns"):
        await store.get("1")


@pytest.mark.parametrize("status", [204, 301, 307, 399])
async def test_a_status_that_nobody_asked_for_is_unavailable_and_no_redirect_is_followed(
    stand_in: PostgrestStandIn, store: SupabaseTasks, task: TaskInputs, status: int
) -> None:
    stand_in.faults.fail(1, status=status, body=b"", headers={"Location": f"{stand_in.url}/elsewhere"})
    with pytest.raises(TaskStoreUnavailable, match=str(status)):
        await store.start(task)
    assert len(stand_in.seen) == 1


async def test_a_task_that_is_gone_is_told_apart_in_two_calls(
    stand_in: PostgrestStandIn, store: SupabaseTasks
) -> None:
    with pytest.raises(TaskNotFound):
        await store.start(inputs(str(uuid.uuid4())))
    assert [request.method for request in stand_in.seen] == ["PATCH", "GET"]


async def test_a_row_that_appears_between_the_two_calls_is_started_after_all(
    stand_in: PostgrestStandIn, store: SupabaseTasks, task: TaskInputs, dsn: str
) -> None:
    stand_in.faults.fail(
        1, status=200, body=b"[]", method="PATCH"
    )  # what a PATCH before the insert would answer
    await store.start(task)
    assert read_task(dsn, task.task_id)["status"] == "processing"


async def test_a_missing_table_says_what_to_check(postgres: Postgres) -> None:
    with postgres.new_database(migrated=False) as empty, running_postgrest(empty) as server:
        async with aclosing(SupabaseTasks(server.url, server.secret_key, retry=FAST)) as store:
            with pytest.raises(TaskStoreUnavailable, match=r"404 \(PGRST205\).*migrations"):
                await store.get(str(uuid.uuid4()))


async def test_a_postgres_that_dies_is_unavailable_and_the_next_call_after_its_return_works() -> None:
    with (
        running_postgres() as postgres,
        postgres.new_database() as database,
        running_postgrest(database) as server,
    ):
        task = inputs(insert_task(database))
        async with aclosing(SupabaseTasks(server.url, server.secret_key, retry=FAST)) as store:
            await asyncio.to_thread(postgres.stop)
            with pytest.raises(TaskStoreUnavailable, match="503"):
                await store.start(task)
            await asyncio.to_thread(postgres.start)
            await store.start(task)
            assert read_task(database, task.task_id)["status"] == "processing"


# httpx


def test_every_error_that_httpx_has_is_mapped_or_known_not_to_come_from_a_request() -> None:
    exceptions = {
        name: cls
        for name in httpx.__all__
        if isinstance(cls := getattr(httpx, name), type) and issubclass(cls, Exception)
    }
    of_requests = {name: cls for name, cls in exceptions.items() if issubclass(cls, httpx.HTTPError)}
    assert exceptions.keys() - of_requests.keys() == {
        "CookieConflict",  # only from reading a cookie jar
        "InvalidURL",  # the constructor has parsed the URL already
        # only from streams
        "RequestNotRead",
        "ResponseNotRead",
        "StreamClosed",
        "StreamConsumed",
        "StreamError",
    }
    timeouts = {name for name in of_requests if "Timeout" in name}
    assert timeouts == {"TimeoutException", "ConnectTimeout", "ReadTimeout", "WriteTimeout", "PoolTimeout"}
    for name, cls in of_requests.items():
        error = cls.__new__(cls)
        expected = TaskStoreTimeout if name in timeouts else TaskStoreUnavailable
        assert type(map_httpx_error(error)) is expected
