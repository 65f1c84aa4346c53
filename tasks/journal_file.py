"""The journal's file on the disk: its format, how it is opened, and what its errors mean.

DIRECTORY/lock                   held by whoever writes, checkpoints, opens or closes
DIRECTORY/owners/OWNER           see `tasks/owners.py`
DIRECTORY/db/journal.sqlite      with SQLite's -wal and -shm beside it
DIRECTORY/db.new/                while a damaged journal is salvaged
DIRECTORY/damaged-TIME/          the damaged files as they were found; ours never to delete
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tasks.errors import JournalTooNew, JournalUnavailable
from tasks.owners import Turns

# `STEPS[n]` brings a file of format n to format n + 1; format 0 is an empty file. Released steps never change.
STEPS: Final = (
    """
    create table entries (
        id integer primary key,
        task_id text not null unique,
        fingerprint text not null,
        job text not null,
        state text not null check (state in ('accepted', 'computed', 'failed', 'done', 'error')),
        stage text not null,
        attempts integer not null,
        owner text,
        run integer not null,
        is_wanted integer not null,
        error_code text,
        error_message text,
        accepted_at real not null,
        deadline_at real not null,
        updated_at real not null
    ) strict;
    create index unfinished on entries (state, owner) where state in ('accepted', 'computed', 'failed');
    create index finished on entries (updated_at) where state in ('done', 'error');
    create table results (entry_id integer primary key, result blob not null) strict;
    """,
)
FORMAT: Final = len(STEPS)
PAGE_BYTES: Final = 4096

BUSY_TIMEOUT_S: Final = 10.0  # for another process's write, or its lock; a commit takes 0.2 to 1 ms
DAMAGED: Final = "the journal is damaged; the next start of the service salvages what is readable"

_WORDS: Final = {
    sqlite3.SQLITE_FULL: "no space is left on the journal's disk",
    sqlite3.SQLITE_CORRUPT: DAMAGED,
    sqlite3.SQLITE_NOTADB: DAMAGED,
    sqlite3.SQLITE_READONLY: "the journal's directory cannot be written to",
    sqlite3.SQLITE_CANTOPEN: "the journal's file cannot be opened",
    sqlite3.SQLITE_BUSY: "another process kept the journal locked",
}


@contextmanager
def mapped_errors() -> Iterator[None]:
    """Turns whatever SQLite and the file system raise into `JournalUnavailable`, with words for the log."""
    try:
        yield
    except sqlite3.Error as error:
        raise JournalUnavailable(f"{_words_of(error)} ({_name_of(error)})") from error
    except OSError as error:
        raise JournalUnavailable(f"the journal's files failed: {error.strerror or error}") from error


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file's content is wrong, and not the disk, the rights or another process."""
    return code_of(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def code_of(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 where Python's module raised by itself."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def _name_of(error: sqlite3.Error) -> str:
    return getattr(error, "sqlite_errorname", None) or type(error).__name__


def _words_of(error: sqlite3.Error) -> str:
    return _WORDS.get(code_of(error), "the journal's file failed")


def database_of(directory: Path) -> Path:
    """The SQLite file of the journal in this directory."""
    return directory / "db" / "journal.sqlite"


@contextmanager
def prepared(directory: Path) -> Iterator[Turns]:
    """Makes the directories where they are missing, and holds the lock that orders all who write."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds prompts, links and results
    (directory / "owners").mkdir(exist_ok=True)
    for path in made:
        sync(path.parent)
    lock = Turns(directory / "lock")
    try:
        with lock.held(BUSY_TIMEOUT_S):
            end_salvage(directory)
            if not database_of(directory).parent.exists():
                database_of(directory).parent.mkdir()
                sync(directory)
            yield lock
    except BaseException:
        lock.close()
        raise


def connect(file: Path) -> sqlite3.Connection:
    """A connection for writing; brings the file to today's format. The caller holds the lock.

    Every commit is on the disk when it returns (`synchronous = full`). SQLite never checkpoints by itself: a
    checkpoint beside a commit of another process can lose committed pages in SQLite before 3.51.3 ("WAL-reset
    bug"), so the caller does it, under the lock.

    Raises:
        JournalTooNew: a newer version of this service wrote the file.
        sqlite3.Error: it cannot be opened, or is damaged.
    """
    connection = sqlite3.connect(file, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute(f"pragma page_size = {PAGE_BYTES}")
        connection.execute("pragma auto_vacuum = incremental")  # both count only before the first table
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma wal_autocheckpoint = 0")
        connection.execute("pragma synchronous = full")
        connection.execute("pragma journal_size_limit = 67108864")
        _migrate(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def connect_reader(file: Path) -> sqlite3.Connection:
    """A connection that only reads, and never waits for one that writes."""
    connection = sqlite3.connect(file, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("pragma query_only = on")
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection) -> None:
    found = int(connection.execute("pragma user_version").fetchone()[0])
    if found > FORMAT:
        raise too_new(found)
    for step in range(found, FORMAT):
        script = f"begin immediate; {STEPS[step]}; pragma user_version = {step + 1}; commit;"
        connection.executescript(script)


def too_new(version: int) -> JournalTooNew:
    """The error for a file of a format that we do not know yet."""
    return JournalTooNew(
        f"the journal has format {version}, and this version of the service knows {FORMAT}: "
        f"start the version that wrote it, or a newer one"
    )


def end_salvage(directory: Path) -> None:
    """The last step of a salvage, also of one that was cut off there: `db` is only gone once `db.new` is whole."""
    database, beside = directory / "db", directory / "db.new"
    if beside.exists() and not database.exists():
        beside.rename(database)
        sync(directory)


def sync(directory: Path) -> None:
    """Puts the names in a directory on the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
