"""The durable journal: what was accepted is on this host's disk until it has ended.

    accepted ──▶ computed ──▶ done          computed: the result is stored, and still to be delivered
        └───────────┴──────▶ failed ──▶ error    failed: the error is known, and still to be told

One SQLite file for all processes of the service. Each entry belongs to one process, its owner; when that one is dead,
or lets go of it, another takes it over. Every write names the entry's owner and its run, so that one that comes late
hits nothing.
"""

from __future__ import annotations

import asyncio
import enum
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final, TypeVar

from tasks.errors import BacklogFull, JournalTooNew, JournalUnavailable, TaskConflict
from tasks.group_commit import GroupCommit, Transaction
from tasks.journal_file import DAMAGED, FORMAT, connect_reader, database_of, mapped_errors, prepared
from tasks.owners import Owners, Turns

T = TypeVar("T")

_log = logging.getLogger(__name__)

ACCEPTED: Final = "accepted"
COMPUTED: Final = "computed"
FAILED: Final = "failed"
DONE: Final = "done"
ERROR: Final = "error"
UNFINISHED: Final = (ACCEPTED, COMPUTED, FAILED)

FIRST_STAGE: Final = "accepted"
TAKEN_AT_ONCE: Final = 64  # so that other processes get some, too
PRUNED_AT_ONCE: Final = 200  # entries in one transaction
FREED_AT_ONCE: Final = 256  # pages in one transaction: 1 MB
PROBE_BYTES: Final = 1 << 18  # some tasks and their results

_COLUMNS: Final = (
    "task_id, fingerprint, job, state, stage, attempts, owner, run, is_wanted, error_code, error_message, "
    "accepted_at, deadline_at, updated_at"
)
_NAMES: Final = _COLUMNS.split(", ")
_PUT: Final = f"""
    insert into entries ({_COLUMNS}) values ({", ".join("?" * len(_NAMES))})
    on conflict (task_id) do update set {", ".join(f"{name} = excluded.{name}" for name in _NAMES[1:])}
"""
_IS_UNFINISHED: Final = "state in ('accepted', 'computed', 'failed')"  # in the words of the index
_IS_OURS: Final = "task_id = :task_id and owner = :owner and run = :run"
_IS_OWNERLESS: Final = (
    f"{_IS_UNFINISHED} and (owner is null or owner in (select value from json_each(:dead)))"
)
_DAMAGED_ENTRY: Final = (
    "INTERNAL_ERROR",
    "The record of this task was damaged on the disk. Send the task again.",
)


class Verdict(enum.Enum):
    """What `Journal.accept` found."""

    NEW = "new"
    JOINED = "joined"
    RECORDED = "recorded"
    AGAIN = "again"


@dataclass(frozen=True, slots=True)
class Entry:
    """One task as it was when it was read.

    Attributes:
        task_id: The key.
        fingerprint: Of its inputs: whoever sends the same task again sends the same.
        job: What is needed to run it; JSON values that the journal does not look into.
        state: ACCEPTED, COMPUTED, FAILED, DONE or ERROR.
        stage: How far the run got, for people; may lag behind by half a second, or a crash.
        attempts: Runs begun.
        owner: The process whose it is; None is nobody.
        run: Grows whenever the entry changes hands or is run again.
        is_wanted: Somebody who does not wait for it was told that it was accepted.
        error: Code and message, in FAILED and ERROR.
        accepted_at: Unix time, seconds; as are the others. Of the latest acceptance.
        deadline_at: When a run without a result is given up. Moves by the time in which nobody carried the entry.
        updated_at: Of the latest write.
    """

    task_id: str
    fingerprint: str
    job: Mapping[str, Any]
    state: str
    stage: str
    attempts: int
    owner: str | None
    run: int
    is_wanted: bool
    error: tuple[str, str] | None
    accepted_at: float
    deadline_at: float
    updated_at: float

    @property
    def is_unfinished(self) -> bool:
        """Whether there is still something to do: run it, deliver its result, or tell its error."""
        return self.state in UNFINISHED


class Journal:
    """The journal in one directory, as one process of several sees it. Use from one event loop or many.

    What a call has written is on the disk when it returns. Calls that wait at the same moment share a transaction.
    A caller that is cancelled changes nothing: the write is done all the same, and an entry that would be ours
    without anybody knowing goes back to nobody, for the next `take_over`.

    Each method raises `JournalUnavailable` when the disk is full, the files are damaged or gone, another process
    has held the lock for ten seconds, or the journal is closed; nothing was written then, and a later call may work.

    Args:
        directory: Made if it is missing. On a local disk, with all its processes under one kernel.
        retention_s: How long finished entries are kept.

    Raises:
        JournalTooNew: a newer version wrote it. What else is wrong now may be right later: every call tries anew.
    """

    def __init__(self, directory: Path, *, retention_s: float = 86_400.0) -> None:
        self._directory = directory
        self._retention_s = retention_s
        self._reader = _Reader(database_of(directory))
        self._letting_go: set[asyncio.Task[None]] = set()
        self._held: _Held | None = None
        self._opening = threading.Lock()
        self._is_closed = False
        try:
            self._open()
        except JournalTooNew:
            raise
        except JournalUnavailable as error:
            _log.error("the journal cannot be opened yet: no task is accepted: %s", error)

    @property
    def owner(self) -> str:
        """This process's name, as no other has it or ever had; empty until the journal is open.

        Others see it as dead once the journal is closed, or the process ended.
        """
        return "" if self._held is None else self._held.owners.ours

    @property
    def is_writable(self) -> bool:
        """Whether this process could open the journal, and no write failed since `probe` last found room."""
        return self._held is not None and self._held.writer.failure is None

    async def probe(self) -> None:
        """After a write that failed, see whether there is room again, for more than the few bytes of a small one."""
        if self._held is None or self._held.writer.failure is None:
            return
        with suppress(JournalUnavailable):
            await asyncio.to_thread(self._find_room)
            await self._write(_write_a_page)
            self._held.writer.failure = None

    async def accept(
        self,
        task_id: str,
        fingerprint: str,
        job: Mapping[str, Any],
        *,
        deadline_s: float,
        max_unfinished: int,
        begins: bool,
    ) -> tuple[Entry, Verdict]:
        """Take a task in, or find it.

        Args:
            task_id: The key.
            fingerprint: Of the inputs.
            job: JSON values.
            deadline_s: From now.
            max_unfinished: So many unfinished entries at most, of all processes.
            begins: Whether its first attempt begins at once, and counts, while somebody waits for it.

        Returns:
            The entry, and what it is:
            NEW: it was not known, and is ours now.
            JOINED: it is ACCEPTED or COMPUTED already, with the same inputs; untouched, and not always ours.
            RECORDED: it is DONE, with the same inputs; untouched.
            AGAIN: it had failed, with the same inputs; ACCEPTED anew, ours now, without its error. Whoever was
                about to tell the error will find that the entry is no longer his.

        Raises:
            TaskConflict: the id is in use with other inputs.
            BacklogFull: it would be NEW or AGAIN, and there are too many already.
        """
        text = json.dumps(job, allow_nan=False)

        def work(transaction: Transaction) -> tuple[Entry, Verdict]:
            found = _find(transaction.connection, task_id)
            if found is not None:
                if found.fingerprint != fingerprint:
                    raise TaskConflict(f"task_id {task_id!r} is in use with other inputs")
                if found.state in (ACCEPTED, COMPUTED):
                    if not begins and not found.is_wanted:
                        bound = {"task_id": task_id}
                        transaction.connection.execute(
                            "update entries set is_wanted = 1 where task_id = :task_id", bound
                        )
                    return found, Verdict.JOINED
                if found.state == DONE:
                    return found, Verdict.RECORDED
            if transaction.unfinished >= max_unfinished:
                raise BacklogFull(
                    f"{transaction.unfinished} accepted tasks wait here already, of {max_unfinished} at most: "
                    f"wait as long as Retry-After says"
                )
            now = transaction.now
            entry = Entry(
                task_id=task_id,
                fingerprint=fingerprint,
                job=job,
                state=ACCEPTED,
                stage=FIRST_STAGE,
                attempts=int(begins),
                owner=self.owner,
                run=1 if found is None else found.run + 1,
                is_wanted=not begins,
                error=None,
                accepted_at=now,
                deadline_at=now + deadline_s,
                updated_at=now,
            )
            _put(transaction.connection, entry, text)
            if found is None or not found.is_unfinished:
                transaction.add_unfinished(1)
            return entry, Verdict.NEW if found is None else Verdict.AGAIN

        def orphans(outcome: tuple[Entry, Verdict]) -> list[Entry]:
            return [outcome[0]] if outcome[1] in (Verdict.NEW, Verdict.AGAIN) else []

        return await self._write(work, orphans)

    async def begin(self, entry: Entry) -> bool:
        """Count an attempt, before the part of a run that a process may not survive."""
        bound = self._bound(entry)
        return await self._write(
            lambda transaction: _change(transaction, bound, "attempts = attempts + 1", _IS_UNFINISHED)
        )

    async def reach(self, entry: Entry, stage: str) -> None:
        """Say how far the run got. Returns at once; written with the next commit, or in half a second, or lost."""
        bound = self._bound(entry, stage=stage)

        def work(transaction: Transaction) -> None:
            statement = (
                f"update entries set stage = :stage, updated_at = :now where {_IS_OURS} and {_IS_UNFINISHED}"
            )
            transaction.connection.execute(statement, {**bound, "now": transaction.now})

        if self._held is not None:
            self._held.writer.submit_lazily((entry.task_id, entry.run), work)

    async def compute(self, entry: Entry, result: bytes) -> bool:
        """ACCEPTED → COMPUTED, with the result.

        Returns:
            False when the entry is no longer ours, or not in that state; nothing was written then. So do the others.
        """
        bound = self._bound(entry, result=result)

        def work(transaction: Transaction) -> bool:
            if not _change(transaction, bound, "state = 'computed'", "state = 'accepted'"):
                return False
            statement = (
                "insert or replace into results select id, :result from entries where task_id = :task_id"
            )
            transaction.connection.execute(statement, bound)
            transaction.written_bytes += len(result)
            return True

        return await self._write(work)

    async def fail(self, entry: Entry, code: str, message: str) -> bool:
        """ACCEPTED or COMPUTED → FAILED, with the error; a result is dropped."""
        bound = self._bound(entry, code=code, message=message)

        def work(transaction: Transaction) -> bool:
            changes = "state = 'failed', error_code = :code, error_message = :message"
            if not _change(transaction, bound, changes, "state in ('accepted', 'computed')"):
                return False
            _drop_result(transaction.connection, entry.task_id)
            return True

        return await self._write(work)

    async def finish(self, entry: Entry) -> bool:
        """COMPUTED → DONE, FAILED → ERROR."""
        bound = self._bound(entry)

        def work(transaction: Transaction) -> bool:
            changes = "state = case state when 'computed' then 'done' else 'error' end"
            if not _change(transaction, bound, changes, "state in ('computed', 'failed')"):
                return False
            transaction.add_unfinished(-1)
            return True

        return await self._write(work)

    async def release(self, entries: Iterable[Entry], *, uncounted: bool = False) -> None:
        """Let go of unfinished entries, for another process or a later `take_over`; those not ours stay.

        Args:
            entries: Of ours.
            uncounted: Whether the attempt that was begun does not count: nothing died of it.
        """
        changes = "owner = null, attempts = max(0, attempts - 1)" if uncounted else "owner = null"
        all_bound = [self._bound(entry) for entry in entries]

        def work(transaction: Transaction) -> None:
            for bound in all_bound:
                _change(transaction, bound, changes, _IS_UNFINISHED)

        await self._write(work)

    async def take_over(self) -> list[Entry]:
        """Make unfinished entries ours that are nobody's or a dead process's; no other process gets the same.

        Costs no commit when there are none, so that it can be asked every second.

        The deadline of each moves by the time since the last that its owner wrote about any of its own: so long,
        at most, nobody carried it.

        Returns:
            Oldest first, `TAKEN_AT_ONCE` at most. One that is damaged beyond reading ends as ERROR, and is logged.
        """
        held = await self._opened()
        owners = await self._reader.call(_owners_of_unfinished)
        with mapped_errors():
            dead = [name for name in owners if name is not None and held.owners.is_dead(name)]
        if not dead and None not in owners:
            return []
        bound = {"owner": self.owner, "dead": json.dumps(dead)}

        def work(transaction: Transaction) -> list[Entry]:
            connection = transaction.connection
            last_words = f"select owner, max(updated_at) from entries where {_IS_OWNERLESS} group by owner"
            seen = {name: at for name, at in connection.execute(last_words, bound) if name is not None}
            statement = f"""
                update entries set owner = :owner, run = run + 1, updated_at = :now, deadline_at = deadline_at
                    + max(0.0, :now - coalesce((select value from json_each(:seen) where key = owner), updated_at))
                where id in (select id from entries where {_IS_OWNERLESS} order by accepted_at limit {TAKEN_AT_ONCE})
                returning {_COLUMNS}
            """
            values = {**bound, "now": transaction.now, "seen": json.dumps(seen)}
            rows = connection.execute(statement, values).fetchall()
            held.owners.remove_the_dead()
            return sorted(_readable(transaction, rows), key=lambda entry: entry.accepted_at)

        return await self._write(work, orphans=list)

    async def get(self, task_id: str) -> Entry | None:
        """The entry as it is, whoever's it is; None when there is none, or it was pruned."""
        return await self._reader.call(lambda connection: _find(connection, task_id))

    async def result_of(self, task_id: str) -> bytes | None:
        """What was given to `compute`; None when the entry is not COMPUTED or DONE."""

        def read(connection: sqlite3.Connection) -> bytes | None:
            query = "select result from results where entry_id = (select id from entries where task_id = ?)"
            row = connection.execute(query, (task_id,)).fetchone()
            return None if row is None else bytes(row[0])

        return await self._reader.call(read)

    async def counts(self) -> dict[str, int]:
        """How many unfinished entries of all processes there are, by state; all three are there."""

        def read(connection: sqlite3.Connection) -> dict[str, int]:
            query = f"select state, count(*) from entries where {_IS_UNFINISHED} group by state"
            return dict.fromkeys(UNFINISHED, 0) | dict(connection.execute(query).fetchall())

        return await self._reader.call(read)

    async def prune(self) -> int:
        """Remove the finished entries older than `retention_s` and give the space back, in small transactions.

        Returns:
            How many were removed.
        """
        removed = 0
        while some := await self._write(self._prune_some):
            removed += some
        while await self._write(_free_some):
            pass
        return removed

    async def aclose(self) -> None:
        """Ends what waits and closes the files. Unfinished entries of ours are a dead process's from here on."""
        if self._is_closed:
            return
        self._is_closed = True
        await asyncio.gather(*self._letting_go, return_exceptions=True)
        await self._reader.aclose()
        if self._held is not None:
            await self._held.writer.aclose()
            self._held.owners.close()
            self._held.lock.close()

    async def _opened(self) -> _Held:
        """What an open journal holds; opens it if that was not possible before."""
        if self._held is not None:
            return self._held
        return await asyncio.to_thread(self._open)

    def _open(self) -> _Held:
        with self._opening:
            if self._is_closed:
                raise JournalUnavailable("the journal is closed")
            if self._held is not None:
                return self._held
            with mapped_errors(), prepared(self._directory) as lock:
                owners = Owners(self._directory / "owners")
                try:
                    owners.remove_the_dead()
                    writer = GroupCommit(database_of(self._directory), lock)
                except BaseException:
                    owners.close()
                    raise
                self._held = _Held(lock, owners, writer)
            return self._held

    def _find_room(self) -> None:
        with mapped_errors(), TemporaryFile(dir=self._directory) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())

    def _prune_some(self, transaction: Transaction) -> int:
        connection = transaction.connection
        query = "select id from entries where state in ('done', 'error') and updated_at < ? order by updated_at limit ?"
        bound = (transaction.now - self._retention_s, PRUNED_AT_ONCE)
        ids = connection.execute(query, bound).fetchall()
        connection.executemany("delete from results where entry_id = ?", ids)
        connection.executemany("delete from entries where id = ?", ids)
        return len(ids)

    def _bound(self, entry: Entry, **more: object) -> dict[str, object]:
        return {"task_id": entry.task_id, "owner": self.owner, "run": entry.run, **more}

    async def _write(
        self,
        work: Callable[[Transaction], T],
        orphans: Callable[[T], list[Entry]] | None = None,
    ) -> T:
        """One call in the next transaction.

        Args:
            work: In the writer's thread.
            orphans: Of its outcome: what to let go of again if the caller is gone by then.
        """
        future = (await self._opened()).writer.submit(work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(lambda ended: self._let_go(ended, orphans))
            raise

    def _let_go(self, ended: asyncio.Future[T], orphans: Callable[[T], list[Entry]] | None) -> None:
        if ended.cancelled() or ended.exception() is not None or orphans is None:
            return
        if entries := orphans(ended.result()):
            task = asyncio.get_running_loop().create_task(self._release_quietly(entries))
            self._letting_go.add(task)
            task.add_done_callback(self._letting_go.discard)

    async def _release_quietly(self, entries: list[Entry]) -> None:
        try:
            await self.release(entries)
        except JournalUnavailable as error:
            _log.warning("%d entries wait for the end of this process: %s", len(entries), error)


@dataclass(frozen=True, slots=True)
class _Held:
    """What an open journal holds."""

    lock: Turns
    owners: Owners
    writer: GroupCommit


class _Reader:
    """One connection that reads, in a thread of its own; made anew after an error."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal-reader")
        self._is_closed = False

    async def call(self, read: Callable[[sqlite3.Connection], T]) -> T:
        if self._is_closed:
            raise JournalUnavailable("the journal is closed")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._read, read)

    async def aclose(self) -> None:
        self._is_closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)

    def _read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        with mapped_errors():
            if self._connection is None:
                self._connection = connect_reader(self._file)
            try:
                return read(self._connection)
            except sqlite3.Error:
                self._close()
                raise

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()


def _find(connection: sqlite3.Connection, task_id: str) -> Entry | None:
    row = connection.execute(f"select {_COLUMNS} from entries where task_id = ?", (task_id,)).fetchone()
    return None if row is None else _parse(row)


def _parse(row: tuple[Any, ...]) -> Entry:
    """Raises JournalUnavailable where the bytes of a row have changed on the disk."""
    task_id, fingerprint, job, state, stage, attempts, owner, run, is_wanted, code, message, *times = row
    try:
        return Entry(
            task_id=task_id,
            fingerprint=fingerprint,
            job=json.loads(job),
            state=state,
            stage=stage,
            attempts=int(attempts),
            owner=owner,
            run=int(run),
            is_wanted=bool(is_wanted),
            error=None if code is None else (code, message or ""),
            accepted_at=float(times[0]),
            deadline_at=float(times[1]),
            updated_at=float(times[2]),
        )
    except (TypeError, ValueError) as error:
        raise JournalUnavailable(DAMAGED) from error


def _readable(transaction: Transaction, rows: Iterable[tuple[Any, ...]]) -> list[Entry]:
    entries = []
    for row in rows:
        try:
            entries.append(_parse(row))
        except JournalUnavailable:
            _log.error("the record of task %r is damaged; it ends as an error", row[0])
            changes = "state = 'error', job = '{}', error_code = ?, error_message = ?"
            transaction.connection.execute(
                f"update entries set {changes} where task_id = ?", (*_DAMAGED_ENTRY, row[0])
            )
            transaction.add_unfinished(-1)
    return entries


def _put(connection: sqlite3.Connection, entry: Entry, job: str) -> None:
    """Insert the entry, or reset the one of the same id, result and error included."""
    values = (
        *(
            entry.task_id,
            entry.fingerprint,
            job,
            entry.state,
            entry.stage,
            entry.attempts,
            entry.owner,
            entry.run,
            int(entry.is_wanted),
        ),
        *(None, None, entry.accepted_at, entry.deadline_at, entry.updated_at),
    )
    connection.execute(_PUT, values)
    if entry.run > 1:
        _drop_result(connection, entry.task_id)


def _drop_result(connection: sqlite3.Connection, task_id: str) -> None:
    connection.execute(
        "delete from results where entry_id = (select id from entries where task_id = ?)", (task_id,)
    )


def _change(transaction: Transaction, bound: Mapping[str, object], changes: str, guard: str) -> bool:
    statement = f"update entries set {changes}, updated_at = :now where {_IS_OURS} and {guard}"
    return transaction.connection.execute(statement, {**bound, "now": transaction.now}).rowcount > 0


def _owners_of_unfinished(connection: sqlite3.Connection) -> list[str | None]:
    query = f"select distinct owner from entries where {_IS_UNFINISHED}"
    return [owner for (owner,) in connection.execute(query).fetchall()]


def _write_a_page(transaction: Transaction) -> None:
    """SQLite writes the page of its header, whatever stood there."""
    transaction.connection.execute(f"pragma user_version = {FORMAT}")


def _free_some(transaction: Transaction) -> bool:
    """Give some free pages back to the file system; whether there are more."""
    connection = transaction.connection
    before = _count_free(connection)
    # One row for each page: whoever does not fetch them all frees one.
    connection.execute(f"pragma incremental_vacuum({FREED_AT_ONCE})").fetchall()
    return 0 < _count_free(connection) < before


def _count_free(connection: sqlite3.Connection) -> int:
    return int(connection.execute("pragma freelist_count").fetchone()[0])
