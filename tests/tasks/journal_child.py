"""A process of its own that works on a journal until it is killed, and tells each thing on a line once it is done.

    python -m tests.tasks.journal_child DIRECTORY COMMAND [ARGUMENT]

`accept N`: accepts N tasks at a time for ever, computes every second one, finishes every fourth.
`take-over SECONDS`: takes over again and again, that often.
`small-files BYTES`: accepts until files may not grow any more, then once more when they may.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import sys
from pathlib import Path

from tasks.errors import JournalUnavailable
from tasks.journal import Journal

RESULT_BYTES = 2_000


def tell(*words: object) -> None:
    """One line, in one write: whole or not at all."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def result_of(task_id: str) -> bytes:
    """What the task's result is, wherever it is computed."""
    return task_id.encode() * (RESULT_BYTES // len(task_id))


async def accept_one(journal: Journal, task_id: str, turn: int) -> None:
    entry, _ = await journal.accept(
        task_id, f"of {task_id}", {"turn": turn}, deadline_s=600, max_unfinished=10**6, begins=True
    )
    tell("accepted", task_id)
    if turn % 2 == 0:
        await journal.compute(entry, result_of(task_id))
        tell("computed", task_id)
    if turn % 4 == 0:
        await journal.finish(entry)
        tell("done", task_id)


async def accept(journal: Journal, at_once: int) -> None:
    turns = itertools.count()

    async def go_on() -> None:
        while True:
            turn = next(turns)
            await accept_one(journal, f"task-{journal.owner}-{turn}", turn)

    await asyncio.gather(*(go_on() for _ in range(at_once)))


async def take_over(journal: Journal, every_s: float) -> None:
    tell("ready")
    while True:
        for entry in await journal.take_over():
            tell("took", entry.task_id, entry.run)
        await asyncio.sleep(every_s)


async def small_files(journal: Journal, limit_bytes: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    turn = 0
    try:
        for turn in itertools.count():
            await asyncio.gather(*(accept_one(journal, f"task-{turn}-{i}", 2) for i in range(8)))
    except JournalUnavailable as error:
        tell("refused", error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    await accept_one(journal, "task-after", 1)


async def main(directory: str, command: str, argument: str) -> None:
    journal = Journal(Path(directory))
    try:
        await {
            "accept": lambda: accept(journal, int(argument)),
            "take-over": lambda: take_over(journal, float(argument)),
            "small-files": lambda: small_files(journal, int(argument)),
        }[command]()
    finally:
        await journal.aclose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
