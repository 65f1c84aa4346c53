"""One thread that puts all calls waiting at a moment into one transaction, because a commit waits for the disk."""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from tasks.errors import JournalUnavailable
from tasks.journal_file import BUSY_TIMEOUT_S, connect, mapped_errors
from tasks.owners import Turns

T = TypeVar("T")

_log = logging.getLogger(__name__)

MAX_CALLS: Final = 256  # in one transaction
LAZY_S: Final = 0.5  # what need not be durable waits so long for a transaction to come along
# Pages in the log are brought into the file when so many bytes were written (about), and at the latter at once.
# The more are waiting, the more often a page was written twice and is brought once.
IDLE_CHECKPOINT_BYTES: Final = 4 * 2**20
BUSY_CHECKPOINT_BYTES: Final = 16 * 2**20
_CALL_BYTES: Final = 4 * 4096  # about what one call writes: a page each of the table and its indexes


class Transaction:
    """What the calls of one transaction share.

    Attributes:
        connection: In the transaction.
        now: Unix time, seconds.
        written_bytes: Of blobs; a call that writes some adds them.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.now = time.time()
        self.written_bytes = 0
        self._unfinished: int | None = None

    @property
    def unfinished(self) -> int:
        """Entries without an end; counted once, then kept by the calls that change it, as their last deed."""
        if self._unfinished is None:
            query = "select count(*) from entries where state in ('accepted', 'computed', 'failed')"
            self._unfinished = int(self.connection.execute(query).fetchone()[0])
        return self._unfinished

    def add_unfinished(self, change: int) -> None:
        """A call has added an unfinished entry, or finished one."""
        if self._unfinished is not None:
            self._unfinished += change


Work = Callable[[Transaction], T]


@dataclass(slots=True, eq=False)
class _Call:
    work: Work[Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    value: Any = None
    error: BaseException | None = None

    def settle(self) -> None:
        """In the thread of its own event loop."""
        if self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.value)
        else:
            self.future.set_exception(self.error)


@dataclass(slots=True)
class _Waiting:
    calls: list[_Call] = field(default_factory=list)
    is_last: bool = False


class GroupCommit:
    """Runs calls in transactions, in the order in which they come.

    A call's future has its result once the transaction is on the disk. A call that raises fails alone; a
    transaction that cannot be written fails all its calls, and the next one is tried anew.

    Args:
        file: The journal's file.
        lock: Taken around all that writes; orders the processes. Held while this is made.

    Attributes:
        failure: What a transaction failed with; stays until somebody has seen that the disk takes writes again.

    Raises:
        JournalUnavailable: the file cannot be opened.
    """

    def __init__(self, file: Path, lock: Turns) -> None:
        self._file = file
        self._lock = lock
        with mapped_errors():
            self._connection: sqlite3.Connection | None = connect(file)
        # True: the end; False: look at what is lazy
        self._queue: queue.SimpleQueue[_Call | bool] = queue.SimpleQueue()
        self._lazy: dict[object, Work[None]] = {}
        self._lazy_since = 0.0
        self._since_checkpoint_bytes = 0
        self.failure: JournalUnavailable | None = None
        self._is_closed = False
        self._entrance = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def submit(self, work: Work[T]) -> asyncio.Future[T]:
        """Put a call into the next transaction.

        Raises:
            JournalUnavailable: closed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._put(_Call(work, loop, future))
        return future

    def submit_lazily(self, key: object, work: Work[None]) -> None:
        """Put a call into the next transaction there is, or one of its own in `LAZY_S`; it may get lost.

        Args:
            key: A later call with the same key takes the place of one that is still waiting.
            work: What it raises is logged.
        """
        with self._entrance:
            if self._is_closed:
                return
            is_first = not self._lazy
            self._lazy[key] = work
            if is_first:
                self._lazy_since = time.monotonic()
                # Not the thread: it would be woken for each step of each task, to find that it has time.
                asyncio.get_running_loop().call_later(LAZY_S, self._wake_if_due)

    async def aclose(self) -> None:
        """Ends all calls that wait, and closes the file."""
        with suppress(JournalUnavailable):
            self._put(True)
        await asyncio.to_thread(self._thread.join)

    def _wake_if_due(self) -> None:
        with self._entrance:
            if self._lazy and self._is_lazy_due():
                self._queue.put(False)

    def _is_lazy_due(self) -> bool:
        return time.monotonic() >= self._lazy_since + LAZY_S

    def _put(self, item: _Call | bool) -> None:
        with self._entrance:
            if self._is_closed:
                raise JournalUnavailable("the journal is closed")
            self._is_closed = item is True
            self._queue.put(item)

    def _run(self) -> None:
        while True:
            waiting = self._wait()
            lazy = self._take_lazy(is_due=bool(waiting.calls) or waiting.is_last)
            if waiting.calls or lazy:
                self._commit(waiting.calls, lazy)
            if waiting.is_last:
                self._close()
                return
            self._checkpoint_if_due()

    def _wait(self) -> _Waiting:
        """For calls, for the end, or to be told that what is lazy is due."""
        waiting = _Waiting()
        try:
            item = self._queue.get()
            while True:
                if isinstance(item, _Call):
                    waiting.calls.append(item)
                elif item:
                    waiting.is_last = True
                if len(waiting.calls) >= MAX_CALLS:
                    return waiting
                item = self._queue.get_nowait()
        except queue.Empty:
            return waiting

    def _take_lazy(self, *, is_due: bool) -> list[Work[None]]:
        with self._entrance:
            if not self._lazy or not (is_due or self._is_lazy_due()):
                return []
            taken, self._lazy = [*self._lazy.values()], {}
            return taken

    def _commit(self, calls: Sequence[_Call], lazy: Sequence[Work[None]]) -> None:
        try:
            with mapped_errors(), self._lock.held(BUSY_TIMEOUT_S):
                self._transact(calls, lazy)
        except JournalUnavailable as error:
            self.failure = error
            for call in calls:
                call.error = JournalUnavailable(str(error))
                call.error.__cause__ = error.__cause__
            if not calls:
                _log.warning("stages were not written to the journal: %s", error)
        except Exception as error:  # a bug must not end the thread that every task waits for
            _log.exception("the journal's thread failed")
            self.failure = JournalUnavailable(f"the journal's thread failed ({type(error).__name__})")
            for call in calls:
                call.error = JournalUnavailable(str(self.failure))
        _settle_all(calls)

    def _transact(self, calls: Sequence[_Call], lazy: Sequence[Work[None]]) -> None:
        if self._connection is None:
            self._connection = connect(self._file)
        connection = self._connection
        try:
            connection.execute("begin immediate")
            transaction = Transaction(connection)
            for work in lazy:
                _, error = _attempt(transaction, work)
                if error is not None:
                    _log.warning("a stage was not written to the journal: %s", error)
            for call in calls:
                call.value, call.error = _attempt(transaction, call.work)
            connection.execute("commit")
        except BaseException:
            # A new connection asks the file anew what is in it; this one may not know.
            self._connection = None
            with suppress(sqlite3.Error):
                if connection.in_transaction:
                    connection.execute("rollback")
            with suppress(sqlite3.Error):
                connection.close()
            raise
        self._since_checkpoint_bytes += transaction.written_bytes + len(calls) * _CALL_BYTES

    def _checkpoint_if_due(self) -> None:
        is_idle = self._queue.empty()
        due_bytes = IDLE_CHECKPOINT_BYTES if is_idle else BUSY_CHECKPOINT_BYTES
        if self._since_checkpoint_bytes < due_bytes or self._connection is None:
            return
        self._since_checkpoint_bytes = 0
        try:
            with mapped_errors(), self._lock.held(BUSY_TIMEOUT_S):
                self._connection.execute("pragma wal_checkpoint(passive)").fetchall()
        except JournalUnavailable as error:  # the log grows until one succeeds, and holds everything
            _log.warning("the journal's log could not be brought into its file: %s", error)

    def _close(self) -> None:
        if self._connection is not None:
            with suppress(JournalUnavailable), mapped_errors(), self._lock.held(BUSY_TIMEOUT_S):
                self._connection.close()


def _attempt(transaction: Transaction, work: Work[T]) -> tuple[T | None, BaseException | None]:
    """One call between savepoints: if it fails, nothing of it stays; if SQLite gives all up, so do we."""
    connection = transaction.connection
    connection.execute("savepoint call")
    try:
        with mapped_errors():
            value = work(transaction)
    except Exception as error:
        if not connection.in_transaction:
            raise
        connection.execute("rollback to call")
        connection.execute("release call")
        return None, error
    connection.execute("release call")
    return value, None


def _settle_all(calls: Sequence[_Call]) -> None:
    loops: dict[asyncio.AbstractEventLoop, list[_Call]] = {}
    for call in calls:
        loops.setdefault(call.loop, []).append(call)
    for loop, of_loop in loops.items():
        with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            loop.call_soon_threadsafe(_settle_each, of_loop)


def _settle_each(calls: Sequence[_Call]) -> None:
    for call in calls:
        call.settle()
