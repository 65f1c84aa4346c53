"""Task rows in a SQLite file: the embedded default, for one machine and any number of processes on it."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from tasks.errors import TaskStoreTimeout, TaskStoreUnavailable
from tasks.store import (
    DONE,
    ERROR,
    PROCESSING,
    TaskInputs,
    TaskResult,
    TaskRow,
    done_metadata,
    error_metadata,
    is_taken,
    processing_metadata,
    task_conflict,
    task_not_found,
)

T = TypeVar("T")

SCHEMA: Final = """
create table if not exists segmentation_results (
    id text primary key,
    project_id text,
    user_id text not null,
    source_image_url text not null,
    mask_image_url text,
    text_prompt text not null,
    status text not null check (status in ('pending', 'processing', 'done', 'error')),
    labels text not null default '[]' check (json_valid(labels)),
    metadata text not null default '{}' check (json_valid(metadata)),
    created_at text not null,
    updated_at text not null
)
"""
# The guards of `tasks/supabase.py`: a row that is done, or was started with other inputs, is left alone.
STARTABLE: Final = """
    status in ('pending', 'processing', 'error')
    and coalesce(json_extract(metadata, '$.inputs'), :inputs) = :inputs
"""
FINISHABLE: Final = """
    status in ('processing', 'done', 'error') and json_extract(metadata, '$.inputs') = :inputs
"""


class LocalTasks:
    """A `TaskStore` in one SQLite file, which makes a row when a task that it does not know is started.

    One connection, used by one thread of its own; other processes open theirs, and SQLite's lock orders them.

    Args:
        path: The file; it and its directory are made if they are missing.
        busy_timeout_s: How long a call waits for another process's write.

    Raises:
        TaskStoreUnavailable: the file cannot be opened, or is not a SQLite file.
    """

    def __init__(self, path: Path, *, busy_timeout_s: float = 10.0) -> None:
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="local-tasks")
        try:
            self._connection = self._thread.submit(self._open).result()
        except BaseException:
            self._thread.shutdown(wait=False)
            raise
        self._is_closed = False

    async def start(self, task: TaskInputs) -> None:
        """See `TaskStore.start`; an unknown task gets its row here."""
        await self._in_thread(lambda: self._start(task))

    async def finish(self, task: TaskInputs, result: TaskResult) -> None:
        """See `TaskStore.finish`."""
        await self._in_thread(lambda: self._finish(task, result))

    async def fail(self, task: TaskInputs, code: str, message: str) -> None:
        """See `TaskStore.fail`; a task that failed before it was started gets its row here."""
        await self._in_thread(lambda: self._fail(task, code, message))

    async def get(self, task_id: str) -> TaskRow | None:
        """See `TaskStore.get`."""
        return await self._in_thread(lambda: self._get(task_id))

    async def aclose(self) -> None:
        """Waits for the call that is running and closes the file."""
        if not self._is_closed:
            self._is_closed = True
            await asyncio.get_running_loop().run_in_executor(self._thread, self._connection.close)
            self._thread.shutdown(wait=False)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        if self._is_closed:
            raise TaskStoreUnavailable("the store of the local tasks is closed")
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _start(self, task: TaskInputs) -> None:
        values = {"status": PROCESSING, "metadata": processing_metadata(task)}
        with self._transaction():
            if self._update(task, STARTABLE, values) or self._insert_if_missing(task, values):
                return
            row = self._get(task.task_id)
            if row is None or is_taken(row, task):
                raise task_not_found(task) if row is None else task_conflict(row, task)

    def _finish(self, task: TaskInputs, result: TaskResult) -> None:
        values = {
            "status": DONE,
            "mask_image_url": result.mask_image_url,
            "labels": list(result.labels),
            "metadata": done_metadata(task, result),
        }
        with self._transaction():
            if not self._update(task, FINISHABLE, values):
                row = self._get(task.task_id)
                raise task_not_found(task) if row is None else task_conflict(row, task)

    def _fail(self, task: TaskInputs, code: str, message: str) -> None:
        values = {"status": ERROR, "metadata": error_metadata(task, code, message)}
        with self._transaction():
            if not self._update(task, STARTABLE, values):
                self._insert_if_missing(task, values)

    def _get(self, task_id: str) -> TaskRow | None:
        with _mapped_errors():
            query = "select * from segmentation_results where id = ?"
            row = self._connection.execute(query, (task_id,)).fetchone()
        return None if row is None else _parse_row(row)

    def _update(self, task: TaskInputs, guard: str, values: dict[str, Any]) -> bool:
        columns = _columns({**values, "updated_at": _now()})
        assignments = ", ".join(f"{name} = :{name}" for name in columns)
        statement = f"update segmentation_results set {assignments} where id = :id and {guard}"
        bound = {**columns, "id": task.task_id, "inputs": task.fingerprint}
        return self._connection.execute(statement, bound).rowcount > 0

    def _insert_if_missing(self, task: TaskInputs, values: dict[str, Any]) -> bool:
        now = _now()
        columns = _columns(
            {
                **values,
                "id": task.task_id,
                "user_id": task.user_id,
                "source_image_url": task.image_url,
                "text_prompt": ", ".join(task.prompts),
                "created_at": now,
                "updated_at": now,
            }
        )
        names, marks = ", ".join(columns), ", ".join(f":{name}" for name in columns)
        statement = f"insert into segmentation_results ({names}) values ({marks}) on conflict (id) do nothing"
        return self._connection.execute(statement, columns).rowcount > 0

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Takes the write lock at once, so that what is read and what is written belong together."""
        with _mapped_errors():
            self._connection.execute("begin immediate")
            try:
                yield
                self._connection.execute("commit")
            except BaseException:
                if self._connection.in_transaction:  # a full disk makes SQLite roll back by itself
                    self._connection.execute("rollback")
                raise

    def _open(self) -> sqlite3.Connection:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TaskStoreUnavailable(
                f"the directory of the local tasks cannot be made: {error.strerror}"
            ) from error
        with _mapped_errors():
            connection = sqlite3.connect(self._path, timeout=self._busy_timeout_s, isolation_level=None)
            try:
                connection.row_factory = sqlite3.Row
                _set_wal(connection, self._busy_timeout_s)
                connection.execute(
                    "pragma synchronous = full"
                )  # with WAL: whole after a crash of the process
                connection.execute(SCHEMA)
            except BaseException:
                connection.close()
                raise
            return connection


@contextmanager
def _mapped_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise TaskStoreTimeout("another process kept the local task store locked") from error
        raise TaskStoreUnavailable(f"the local task store failed ({_name_of(error)})") from error
    except sqlite3.Error as error:
        raise TaskStoreUnavailable(f"the local task store failed ({_name_of(error)})") from error


def _name_of(error: sqlite3.Error) -> str:
    return getattr(error, "sqlite_errorname", None) or type(error).__name__


def _set_wal(connection: sqlite3.Connection, timeout_s: float) -> None:
    """Switches to write-ahead logging. SQLite does not wait for its lock here, so that we do."""
    ends_at = time.monotonic() + timeout_s
    while True:
        try:
            connection.execute("pragma journal_mode = wal")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > ends_at:
                raise
            time.sleep(0.01)


def _columns(values: dict[str, Any]) -> dict[str, Any]:
    """Lists and objects as JSON text, the rest as it is."""
    return {
        name: json.dumps(value, allow_nan=False, ensure_ascii=False)
        if isinstance(value, list | dict)
        else value
        for name, value in values.items()
    }


def _parse_row(row: sqlite3.Row) -> TaskRow:
    try:
        return TaskRow(
            id=row["id"],
            status=row["status"],
            user_id=row["user_id"],
            source_image_url=row["source_image_url"],
            text_prompt=row["text_prompt"],
            mask_image_url=row["mask_image_url"],
            project_id=row["project_id"],
            labels=tuple(json.loads(row["labels"])),
            metadata=json.loads(row["metadata"]),
            created_at=datetime.fromisoformat(row["created_at"]),
            updated_at=datetime.fromisoformat(row["updated_at"]),
        )
    except (IndexError, TypeError, ValueError) as error:
        raise TaskStoreUnavailable(
            "a row of the local task store does not have the columns expected"
        ) from error


def _now() -> str:
    return datetime.now(UTC).isoformat()
