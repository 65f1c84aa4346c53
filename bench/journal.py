"""What the journal costs: tasks per second and the time of one call, beside what the disk takes for one commit.

    python -m bench.journal                                  # all rows: three minutes
    python -m bench.journal --concurrency 1 --seconds 2 --directory /data

A task is `accept`, `compute` with a result of so many bytes, and `finish`, each on the disk before the next one; so
many tasks are under way at a time, in each of so many processes. The floor is written beside: the same disk, asked
to keep 4 KB in a file that is there already, again and again.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import resource
import sqlite3
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np

from bench.results_file import RESULTS, Value, conditions, markdown, write
from tasks.journal import Journal

JOB = {
    "image_url": "https://images.example/users/0b9c6a1e-5f0e-4b0e-9c0a-1f3f3b0c7d11/photo.jpg",
    "prompts": ["red circle"],
    "user_id": "0b9c6a1e-5f0e-4b0e-9c0a-1f3f3b0c7d11",
    "request_id": "5d0a6b8e-3f1c-4a54-8a52-8d9f5f0f6a10",
    "is_batch": False,
}


@dataclass
class Seen:
    """What one process measured.

    Attributes:
        accept_ms: Time of each `accept`.
        compute_ms: Time of each `compute`.
        tasks: Finished.
        seconds: From the first call to the last answer.
        cpu_s: User and system time of the process in between.
    """

    accept_ms: list[float] = field(default_factory=list)
    compute_ms: list[float] = field(default_factory=list)
    tasks: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0


def run(directory: Path, concurrency: int, result_bytes: int, seconds: float) -> Seen:
    """Work on a journal for so long; with `result_bytes` 0, tasks are accepted and no more."""
    return asyncio.run(_run(directory, concurrency, result_bytes, seconds))


async def _run(directory: Path, concurrency: int, result_bytes: int, seconds: float) -> Seen:
    journal, seen, numbers = Journal(directory), Seen(), count()
    ends_at = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < ends_at:
            await _task(journal, f"{os.getpid()}-{os.urandom(8).hex()}-{next(numbers)}", result_bytes, seen)

    began, cpu = time.perf_counter(), _cpu_s()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    seen.seconds, seen.cpu_s = time.perf_counter() - began, _cpu_s() - cpu
    await journal.aclose()
    return seen


async def _task(journal: Journal, task_id: str, result_bytes: int, seen: Seen) -> None:
    result = os.urandom(result_bytes)
    began = time.perf_counter()
    entry, _ = await journal.accept(task_id, task_id, JOB, deadline_s=600, max_unfinished=10**9, begins=True)
    accepted = time.perf_counter()
    seen.accept_ms.append((accepted - began) * 1e3)
    if result_bytes:
        await journal.compute(entry, result)
        seen.compute_ms.append((time.perf_counter() - accepted) * 1e3)
        await journal.finish(entry)
    seen.tasks += 1


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def row_of(
    directory: Path, processes: int, concurrency: int, result_bytes: int, seconds: float
) -> dict[str, Value]:
    """One row of the table, on an empty journal."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="journal-bench-") as made:
        journal = Path(made) / "journal"
        if processes == 1:
            all_seen = [run(journal, concurrency, result_bytes, seconds)]
        else:
            with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
                list(pool.map(abs, range(processes)))  # they are up
                arguments = [(journal, concurrency, result_bytes, seconds)] * processes
                all_seen = list(pool.map(run, *zip(*arguments, strict=True)))
    accept_ms = [value for seen in all_seen for value in seen.accept_ms]
    compute_ms = [value for seen in all_seen for value in seen.compute_ms]
    tasks = sum(seen.tasks for seen in all_seen)
    return {
        "what": "accept, compute, finish" if result_bytes else "accept",
        "processes": processes,
        "concurrency": concurrency,
        "result_kb": result_bytes // 1000,
        "tasks_per_s": round(tasks / max(seen.seconds for seen in all_seen)),
        "accept_p50_ms": round(float(np.quantile(accept_ms, 0.5)), 2),
        "accept_p99_ms": round(float(np.quantile(accept_ms, 0.99)), 2),
        "compute_p50_ms": round(float(np.quantile(compute_ms, 0.5)), 2) if compute_ms else "",
        "compute_p99_ms": round(float(np.quantile(compute_ms, 0.99)), 2) if compute_ms else "",
        "cpu_ms_per_task": round(1e3 * sum(seen.cpu_s for seen in all_seen) / tasks, 2),
    }


Commit = Callable[[int], object]


def floor_row(directory: Path, what: str, prepare: Callable[[Path], Commit], times: int) -> dict[str, Value]:
    """How long the disk itself takes, in the columns of `accept`."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="journal-bench-") as made:
        commit = prepare(Path(made))
        took_ms = []
        for turn in range(times):
            began = time.perf_counter()
            commit(turn)
            took_ms.append((time.perf_counter() - began) * 1e3)
    return {
        "what": what,
        "processes": 1,
        "concurrency": 1,
        "result_kb": 0,
        "tasks_per_s": round(1e3 * times / sum(took_ms)),
        "accept_p50_ms": round(float(np.quantile(took_ms, 0.5)), 2),
        "accept_p99_ms": round(float(np.quantile(took_ms, 0.99)), 2),
    }


def disk_commit(directory: Path) -> Commit:
    """4 KB into a file that has its size, and on the disk."""
    descriptor = os.open(directory / "raw", os.O_RDWR | os.O_CREAT)
    os.write(descriptor, bytes(2**22))
    os.fsync(descriptor)
    page = os.urandom(4096)

    def commit(turn: int) -> None:
        os.pwrite(descriptor, page, turn % 1024 * 4096)
        os.fdatasync(descriptor)

    return commit


def sqlite_commit(directory: Path) -> Commit:
    """One row of 300 bytes with SQLite alone, in this thread."""
    connection = sqlite3.connect(directory / "raw.sqlite", isolation_level=None)
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = full")
    connection.execute("create table entries (id integer primary key, job text)")
    text = "x" * 300
    return lambda turn: connection.execute("insert into entries values (?, ?)", (turn, text))


def main(arguments: list[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.journal", description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--result-kb", type=int, nargs="+", default=[0, 1, 50], help="0: tasks are only accepted"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="per row")
    parser.add_argument(
        "--directory", type=Path, default=None, help="on the disk in question; default: as tempfile"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    directory = given.directory or Path(tempfile.gettempdir())
    # Real-time (`chrt -f 1`) shows the journal's own times on a machine that others keep busy.
    priority = "usual" if os.sched_getscheduler(0) == os.SCHED_OTHER else "real-time"
    seen = conditions(sqlite=sqlite3.sqlite_version, seconds_per_row=given.seconds, priority=priority)
    rows: list[dict[str, Value]] = [
        floor_row(directory, "the disk: 4 KB", disk_commit, 500),
        floor_row(directory, "SQLite alone: one row", sqlite_commit, 500),
    ]
    for processes in given.processes:
        for result_kb in given.result_kb:
            for concurrency in given.concurrency:
                rows.append(row_of(directory, processes, concurrency, 1000 * result_kb, given.seconds))
                write(given.out, "journal", seen, rows)
                print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
