"""What is particular to the SQLite store: files, several processes, crashes."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.errors import TaskStoreTimeout, TaskStoreUnavailable
from tasks.local import LocalTasks
from tasks.store import TaskInputs, TaskResult

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import asyncio, sys
from pathlib import Path
from tasks.errors import TaskConflict
from tasks.local import LocalTasks
from tasks.store import TaskInputs, TaskResult

async def main(path, number):
    store = LocalTasks(Path(path))
    sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
    try:
        await store.start(TaskInputs("shared", "u", "a.png", ("cat",), number / 100))
        print("won")
    except TaskConflict:
        print("lost")
    async def life(i):
        task = TaskInputs(f"{number}-{i}", "u", "a.png", ("cat",), 0.5)
        await store.start(task)
        await store.finish(task, TaskResult("m", ("cat",), {"n": number}))
    await asyncio.gather(*(life(i) for i in range(20)))
    await store.aclose()

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def inputs(task_id: str = "task-1") -> TaskInputs:
    return TaskInputs(task_id, "user-1", "uploads/a.png", ("cat", "dog"), 0.5, request_id="r")


async def test_rows_survive_closing_and_opening_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "directory" / "tasks.sqlite3"
    store = LocalTasks(path)
    await store.start(inputs())
    await store.finish(inputs(), TaskResult("mask", ("cat",), {"n": 1}))
    await store.aclose()
    store = LocalTasks(path)
    row = await store.get("task-1")
    assert row is not None
    assert (row.status, row.labels, row.text_prompt) == ("done", ("cat",), "cat, dog")
    await store.aclose()


def test_several_processes_share_one_file_and_one_of_them_wins_a_task(tmp_path: Path) -> None:
    path = tmp_path / "tasks.sqlite3"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path), str(number)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    outputs = [worker.communicate("go\n", timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 3, outputs
    assert sorted(out.strip() for out, _ in outputs) == ["lost", "lost", "won"]
    with sqlite3.connect(path) as connection:
        statuses = connection.execute(
            "select status, count(*) from segmentation_results group by 1"
        ).fetchall()
    connection.close()
    assert dict(statuses) == {"done": 60, "processing": 1}


def test_a_process_killed_inside_a_transaction_leaves_the_rows_usable(tmp_path: Path) -> None:
    path = tmp_path / "tasks.sqlite3"
    killed = (
        "import os, signal, sys; from pathlib import Path; from tasks.local import LocalTasks\n"
        "store = LocalTasks(Path(sys.argv[1]))\n"
        "def die():\n"
        "    store._connection.execute('begin immediate')\n"
        "    store._connection.execute(\"insert into segmentation_results select 'half', null, 'u', 's',"
        " null, 't', 'pending', '[]', '{}', 'c', 'u'\")\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "store._thread.submit(die).result()\n"
    )
    finished = subprocess.run([sys.executable, "-c", killed, str(path)], cwd=ROOT, timeout=120, check=False)
    assert finished.returncode == -signal.SIGKILL

    async def look() -> None:
        store = LocalTasks(path)
        assert await store.get("half") is None
        await store.start(inputs())
        await store.aclose()

    asyncio.run(look())


async def test_a_lock_that_is_never_let_go_is_a_timeout(tmp_path: Path) -> None:
    path = tmp_path / "tasks.sqlite3"
    store = LocalTasks(path, busy_timeout_s=0.1)
    await store.start(inputs())
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("begin immediate")
    with pytest.raises(TaskStoreTimeout, match="locked"):
        await store.fail(inputs(), "X", "y")
    row = await store.get("task-1")  # readers are not in the way of a writer
    assert row is not None
    assert row.status == "processing"
    other.execute("rollback")
    other.close()
    await store.fail(inputs(), "X", "y")
    await store.aclose()


async def test_a_disk_that_is_full_fails_the_call_and_the_next_one_works_once_there_is_room(
    tmp_path: Path,
) -> None:
    path = tmp_path / "tasks.sqlite3"
    store = LocalTasks(path)
    await store.start(inputs())
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    log_bytes = (tmp_path / "tasks.sqlite3-wal").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (log_bytes + 1000, limits[1]))
    try:
        with pytest.raises(TaskStoreUnavailable) as caught:
            await store.finish(inputs(), TaskResult("mask", ("cat",), {"long": "x" * 100_000}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(tmp_path) not in str(caught.value)
    row = await store.get("task-1")
    assert row is not None
    assert row.status == "processing"
    await store.finish(inputs(), TaskResult("mask", ("cat",), {}))
    await store.aclose()


def test_a_file_that_is_no_database_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "tasks.sqlite3"
    path.write_bytes(b"this is not SQLite" * 100)
    with pytest.raises(TaskStoreUnavailable, match="SQLITE_NOTADB"):
        LocalTasks(path)


def test_a_place_that_cannot_be_written_is_refused_without_naming_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TaskStoreUnavailable) as caught:
        LocalTasks(tmp_path / "file" / "tasks.sqlite3")
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(TaskStoreUnavailable) as caught:
        LocalTasks(tmp_path)  # a directory
    assert str(tmp_path) not in str(caught.value)


async def test_a_row_that_others_spoilt_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "tasks.sqlite3"
    store = LocalTasks(path)
    await store.start(inputs())
    with sqlite3.connect(path) as connection:
        connection.execute("update segmentation_results set created_at = 'yesterday'")
    connection.close()
    with pytest.raises(TaskStoreUnavailable, match="columns"):
        await store.get("task-1")
    await store.aclose()


async def test_calls_from_many_coroutines_take_their_turn(tmp_path: Path) -> None:
    store = LocalTasks(tmp_path / "tasks.sqlite3")
    await asyncio.gather(*(store.start(inputs(f"t{i}")) for i in range(200)))
    assert os.path.exists(tmp_path / "tasks.sqlite3-wal")
    rows = await asyncio.gather(*(store.get(f"t{i}") for i in range(200)))
    assert all(row is not None and row.status == "processing" for row in rows)
    await store.aclose()
