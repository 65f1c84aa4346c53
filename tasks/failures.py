"""Sees to it that a job that failed leaves an `error` row, also when the store of the rows is what failed."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine
from typing import Any

from tasks.errors import TaskError
from tasks.store import TaskInputs, TaskStore

_log = logging.getLogger(__name__)


class ErrorRows:
    """Writes error rows: once before the caller is answered and, if that fails, in the background.

    Args:
        tasks: The rows.
        deadline_s: How long a caller waits for the row.
        patience_s: How long the background goes on trying, per row.
        first_pause_s: Before the first try in the background; doubles with each try.
        max_pause_s: No pause is longer.
        max_waiting: Rows that the background holds at once; any more are given up, and logged.
    """

    def __init__(
        self,
        tasks: TaskStore,
        *,
        deadline_s: float = 5.0,
        patience_s: float = 600.0,
        first_pause_s: float = 1.0,
        max_pause_s: float = 15.0,
        max_waiting: int = 1000,
    ) -> None:
        self._tasks = tasks
        self._deadline_s = deadline_s
        self._patience_s = patience_s
        self._first_pause_s = first_pause_s
        self._max_pause_s = max_pause_s
        self._max_waiting = max_waiting
        self._waiting: set[asyncio.Task[None]] = set()
        self._writing: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()

    async def write(
        self, task: TaskInputs, code: str, message: str, *, after: asyncio.Task[None] | None
    ) -> None:
        """Writes one error row; returns at the deadline at the latest, and raises nothing of its own.

        Goes on when its caller is cancelled.

        Args:
            task: Whose row it is.
            code: For programs.
            message: For people.
            after: An update of the same row that may still be under way. It is waited for, because it could
                arrive after ours and leave the row `processing`; one that outlives the deadline is cancelled.
        """
        await asyncio.shield(self._spawn(self._writing, self._write(task, code, message, after)))

    async def aclose(self) -> None:
        """Waits for the rows that callers wait for, and gives each row in the background one last try."""
        self._closing.set()
        if under_way := self._writing | self._waiting:
            await asyncio.wait(under_way, timeout=2 * self._deadline_s)
        for task in list(self._writing | self._waiting):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _write(
        self, task: TaskInputs, code: str, message: str, after: asyncio.Task[None] | None
    ) -> None:
        try:
            async with asyncio.timeout(self._deadline_s):
                if after is not None:
                    await asyncio.wait({after})
                await self._tasks.fail(task, code, message)
        except Exception as error:  # whatever it is, it must not hide the error that the row is about
            if not isinstance(error, TaskError | TimeoutError) or len(self._waiting) >= self._max_waiting:
                _report("the error row could not be written", task, code, error)
                return
            _report("the error row could not be written yet", task, code, error)
            self._spawn(self._waiting, self._keep_trying(task, code, message))
        finally:
            if after is not None:
                after.cancel()
                await asyncio.gather(after, return_exceptions=True)

    async def _keep_trying(self, task: TaskInputs, code: str, message: str) -> None:
        ends_at = asyncio.get_running_loop().time() + self._patience_s
        pause_s = self._first_pause_s
        while True:
            await self._pause(pause_s * random.uniform(0.5, 1.0))
            is_last = self._closing.is_set() or asyncio.get_running_loop().time() >= ends_at
            pause_s = min(2 * pause_s, self._max_pause_s)
            try:
                async with asyncio.timeout(self._deadline_s):
                    if await self._is_still_ours(task):
                        await self._tasks.fail(task, code, message)
                return
            except (TaskError, TimeoutError) as error:
                if is_last:
                    _report("the error row could not be written", task, code, error)
                    return

    async def _is_still_ours(self, task: TaskInputs) -> bool:
        """False if the same inputs were sent again meanwhile: that request now says what the row is."""
        row = await self._tasks.get(task.task_id)
        return row is None or row.metadata.get("request_id") in (None, task.request_id)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            return

    @staticmethod
    def _spawn(among: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        among.add(task)  # the event loop itself holds tasks only weakly
        task.add_done_callback(among.discard)
        return task


def _report(what: str, task: TaskInputs, code: str, error: BaseException) -> None:
    _log.error(what, extra={"task_id": task.task_id, "code": code, "reason": type(error).__name__})
