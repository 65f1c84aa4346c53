"""What is done about a damaged journal: everything that can be read goes into a new one, and nothing is deleted."""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tasks.errors import JournalUnavailable
from tasks.journal_file import (
    BUSY_TIMEOUT_S,
    FORMAT,
    PAGE_BYTES,
    code_of,
    connect,
    database_of,
    end_salvage,
    is_damage,
    mapped_errors,
    prepared,
    sync,
    too_new,
)
from tasks.owners import is_free

_log = logging.getLogger(__name__)

_COLUMNS: Final = (
    "id, task_id, fingerprint, job, state, stage, attempts, run, is_wanted, error_code, error_message, "
    "accepted_at, deadline_at, updated_at"
)
_LAST_ID: Final = 2**40
_MAX_MISSES: Final = (
    20_000  # single rows that are asked for in vain: as many as one page that points to others leads to
)
_LOST_RESULT: Final = ("INTERNAL_ERROR", "The stored result was damaged on the disk. Send the task again.")


@dataclass(slots=True)
class Salvaged:
    """What was kept of a damaged journal.

    Attributes:
        damage: What SQLite said.
        kept_in: Where the damaged files are now.
        entries: How many were kept, finished ones included.
        unfinished: How many of these have still to be run or delivered.
        results: How many results were kept.
        lost: Entries that were not; None where nobody knows how many there were.
    """

    damage: str
    kept_in: Path
    entries: int = 0
    unfinished: int = 0
    results: int = 0
    lost: int | None = None


def salvage(directory: Path) -> Salvaged | None:
    """Look the journal through and, if it is damaged, put what is readable into a new one.

    To be called once at start, before any process opens the journal: it reads all of the file. The damaged files
    are kept beside under a name with the time, as they were. A crash in the middle leaves the journal as it was,
    or done. What has no result any more is computed again; what was done and has none ends as an error.

    Returns:
        None when there is no damage, or no journal yet.

    Raises:
        JournalUnavailable: a process has the journal open, or the disk does not do what it must.
    """
    with mapped_errors(), prepared(directory) as lock, closing(lock):
        file = database_of(directory)
        if not all(is_free(path) for path in (directory / "owners").iterdir()):
            raise JournalUnavailable("a journal that a process has open is not looked through")
        damage = _damage_of(file)
        if damage is None:
            return None
        told = Salvaged(damage, directory / f"damaged-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
        beside = directory / "db.new"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        mended = beside / "mended.sqlite"
        with closing(connect(beside / file.name)) as new:
            _copy_all(file, new, mended, told)
        for path in beside.glob(f"{mended.name}*"):
            path.unlink()
        sync(beside)
        file.parent.rename(told.kept_in)
        end_salvage(directory)
    _log.error(
        "the journal was damaged (%s): kept %d entries (%d of them unfinished) and %d results; lost %s entries; "
        "the damaged files are in %s",
        told.damage,
        told.entries,
        told.unfinished,
        told.results,
        "an unknown number of" if told.lost is None else told.lost,
        told.kept_in,
    )
    return told


def _damage_of(file: Path) -> str | None:
    wal = _wal_of(file)
    if not file.exists() or file.stat().st_size == 0:
        # SQLite would delete this log if it opened the file.
        is_left = wal.exists() and wal.stat().st_size > 0
        return "the file is gone or empty, but its log is not" if is_left else None
    try:
        with closing(_connect_read_only(file)) as connection:
            lines = [str(line) for (line,) in connection.execute("pragma quick_check(3)")]
            version = int(connection.execute("pragma user_version").fetchone()[0])
            if lines == ["ok"] and version > FORMAT:
                raise too_new(version)
            if lines == ["ok"] and version == FORMAT:
                connection.execute(f"select {_COLUMNS}, entry_id from entries, results limit 1").fetchone()
    except sqlite3.DatabaseError as error:
        if is_damage(error) or code_of(error) == sqlite3.SQLITE_ERROR:  # the latter: a table is not there
            return str(error)
        raise
    return None if lines == ["ok"] else "; ".join(lines)


def _connect_read_only(file: Path) -> sqlite3.Connection:
    """Sees what is in the log, and leaves both files as they are."""
    return sqlite3.connect(
        f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None
    )


def _wal_of(file: Path) -> Path:
    return file.with_name(f"{file.name}-wal")


def _copy_all(file: Path, new: sqlite3.Connection, mended: Path, told: Salvaged) -> None:
    if not _knows_its_tables(file):
        _lend_first_page(file, mended)
        file = mended
    new.execute("begin immediate")
    with closing(_connect_read_only(file)) as old:
        _copy(old, new, told)
    new.execute("commit")


def _knows_its_tables(file: Path) -> bool:
    try:
        with closing(_connect_read_only(file)) as connection:
            return (
                len(connection.execute("select name from sqlite_master where type = 'table'").fetchall()) >= 2
            )
    except sqlite3.DatabaseError:
        return False


def _lend_first_page(file: Path, mended: Path) -> None:
    """Make a copy of the file with the first page of an empty journal.

    The first page says where the tables begin. All files of one format say the same there, apart from their length.
    """
    with closing(connect(mended)):
        pass  # closing brings everything from the log into the file
    first = bytearray(mended.read_bytes()[:PAGE_BYTES])
    with suppress(FileNotFoundError):
        shutil.copyfile(file, mended)
    with suppress(FileNotFoundError):
        shutil.copyfile(_wal_of(file), _wal_of(mended))
    with mended.open("r+b") as copy:
        pages = max(1, copy.seek(0, 2) // PAGE_BYTES)
        first[28:32] = pages.to_bytes(4, "big")
        copy.seek(0)
        copy.write(first)


def _copy(old: sqlite3.Connection, new: sqlite3.Connection, told: Salvaged) -> None:
    for row in _rows(old):
        if not _insert(new, row):
            continue
        told.entries += 1
        result = _result_of(old, row[0])
        state = row[4]
        if result is not None and state in ("computed", "done"):
            new.execute("insert into results values (?, ?)", (row[0], result))
            told.results += 1
        elif state == "computed":
            new.execute("update entries set state = 'accepted' where id = ?", (row[0],))
        elif state == "done":
            statement = "update entries set state = 'error', error_code = ?, error_message = ? where id = ?"
            new.execute(statement, (*_LOST_RESULT, row[0]))
        told.unfinished += state in ("accepted", "computed", "failed")
    with suppress(sqlite3.DatabaseError):  # counted in an index, which may well be whole
        told.lost = max(0, int(old.execute("select count(*) from entries").fetchone()[0]) - told.entries)


def _rows(old: sqlite3.Connection) -> Iterator[tuple[Any, ...]]:
    """Every row that can be read: from the end down to the first damage, then from the start, around all damage."""
    last, misses = _LAST_ID, 0
    with suppress(sqlite3.DatabaseError):
        for row in old.execute(f"select {_COLUMNS} from entries order by id desc"):
            yield row
            last = row[0] - 1
        return
    with suppress(sqlite3.DatabaseError):  # an index knows all ids, if it is whole
        last = min(
            last, max((row[0] for row in old.execute("select id from entries order by task_id")), default=0)
        )
    spans = [(1, last)] if any(_is_reachable(old, 2**power) for power in range(41)) else []
    query = f"select {_COLUMNS} from entries where id between ? and ? order by id"
    while spans and misses < _MAX_MISSES:
        first, last = spans.pop()
        try:
            for row in old.execute(query, (first, last)):
                yield row
                first = row[0] + 1
        except sqlite3.DatabaseError:
            if first < last:
                middle = (first + last) // 2
                spans += [(middle + 1, last), (first, middle)]
            else:
                misses += 1


def _is_reachable(old: sqlite3.Connection, entry_id: int) -> bool:
    """Whether the way to this row is whole, be it there or not."""
    try:
        old.execute("select 1 from entries where id = ?", (entry_id,)).fetchone()
    except sqlite3.DatabaseError:
        return False
    return True


def _insert(new: sqlite3.Connection, row: tuple[Any, ...]) -> bool:
    """Put one row into the new file; its types and constraints tell what is garbage."""
    marks = ", ".join("?" * len(row))
    try:
        if not isinstance(json.loads(row[3]), dict):
            return False
        new.execute(f"insert into entries ({_COLUMNS}) values ({marks})", row)
    except (TypeError, ValueError, sqlite3.IntegrityError):
        return False
    return True


def _result_of(old: sqlite3.Connection, entry_id: int) -> bytes | None:
    with suppress(sqlite3.DatabaseError):
        found = old.execute("select result from results where entry_id = ?", (entry_id,)).fetchone()
        if found is not None and isinstance(found[0], bytes):
            return found[0]
    return None
