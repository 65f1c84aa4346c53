"""Processes that are killed with -9: nothing that was said to be done is lost, and nothing is taken twice."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks.journal import ACCEPTED, COMPUTED, DONE, Journal
from tasks.journal_salvage import salvage
from tests.conftest import ROOT, wait_until
from tests.tasks.journal_child import result_of

STATES = {"accepted": {ACCEPTED, COMPUTED, DONE}, "computed": {COMPUTED, DONE}, "done": {DONE}}


class Child:
    """One `journal_child`, with what it has told in a file."""

    def __init__(self, said: Path, journal: Path, command: str, argument: object) -> None:
        self._said = said
        with said.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.tasks.journal_child", str(journal), command, str(argument)],
                cwd=ROOT,
                stdout=out,
            )

    def said(self) -> list[list[str]]:
        """Its lines, in words; what a kill cut off was not said."""
        whole, _, _ = self._said.read_text().rpartition("\n")
        return [line.split() for line in whole.splitlines()]

    def wait_said(self, count: int) -> None:
        wait_until(lambda: len(self.said()) >= count, 30, f"a child says {count} lines")

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait() in (0, -signal.SIGKILL)


Start = Callable[..., Child]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    children: list[Child] = []

    def start_one(command: str, argument: object) -> Child:
        children.append(Child(tmp_path / f"said-{len(children)}", tmp_path / "journal", command, argument))
        return children[-1]

    yield start_one
    for child in children:
        child.kill()


async def assert_all_is_kept(directory: Path, said: list[list[str]]) -> None:
    with_journal = Journal(directory)
    try:
        for state, task_id in said:
            entry = await with_journal.get(task_id)
            assert entry is not None, f"{task_id} was {state}, and is lost"
            assert entry.state in STATES[state], f"{task_id} was {state}, and is {entry.state}"
            assert entry.fingerprint == f"of {task_id}"
            if entry.state in (COMPUTED, DONE):
                assert await with_journal.result_of(task_id) == result_of(task_id)
    finally:
        await with_journal.aclose()


@pytest.mark.parametrize("rounds", [2, pytest.param(25, marks=pytest.mark.slow)])
async def test_what_was_said_to_be_done_is_there_after_kill_9_of_all_processes(
    start: Start, tmp_path: Path, rounds: int
) -> None:
    said: list[list[str]] = []
    dice = random.Random(rounds)
    for _ in range(rounds):
        children = [start("accept", 8), start("accept", 1)]
        for child in children:
            child.wait_said(1)
        await asyncio.sleep(dice.uniform(0, 0.4))
        for child in children:
            child.kill()
        said += [line for child in children for line in child.said()]
        assert salvage(tmp_path / "journal") is None
    assert len(said) > 20 * rounds
    await assert_all_is_kept(tmp_path / "journal", said)


@pytest.mark.parametrize("rounds", [1, pytest.param(15, marks=pytest.mark.slow)])
async def test_the_tasks_of_a_killed_process_are_each_taken_over_once_and_soon(
    start: Start, tmp_path: Path, rounds: int
) -> None:
    takers = [start("take-over", 0.2) for _ in range(3)]
    for taker in takers:
        taker.wait_said(1)
    journal = Journal(tmp_path / "journal")
    for _ in range(rounds):
        worker = start("accept", 8)
        worker.wait_said(40)
        worker.kill()
        took_s = await until_taken(journal, unfinished_by(worker))
        assert took_s < 5  # the takers ask every 0.2 s; the rest is for a busy machine
    await journal.aclose()
    taken = Counter(line[1] for taker in takers for line in taker.said() if line[0] == "took")
    assert taken
    assert set(taken.values()) == {1}


def unfinished_by(worker: Child) -> set[str]:
    said = worker.said()
    return {line[1] for line in said if line[0] == "accepted"} - {
        line[1] for line in said if line[0] == "done"
    }


async def until_taken(journal: Journal, task_ids: set[str]) -> float:
    """Until every one of them is done, or a second run's. A task that was done without a word is done too."""
    assert task_ids
    began = time.monotonic()
    left = task_ids
    while left:
        assert time.monotonic() - began < 20, f"{len(left)} of {len(task_ids)} tasks were not taken over"
        await asyncio.sleep(0.02)
        entries = [await journal.get(task_id) for task_id in left]
        assert None not in entries
        left = {entry.task_id for entry in entries if entry and entry.is_unfinished and entry.run == 1}
    return time.monotonic() - began


async def test_a_taker_that_is_killed_hands_its_tasks_on(start: Start, tmp_path: Path) -> None:
    worker = start("accept", 4)
    worker.wait_said(20)
    worker.kill()
    first = start("take-over", 0.1)
    first.wait_said(5)
    first.kill()
    journal = Journal(tmp_path / "journal")
    mine = {entry.task_id: entry.run for entry in await journal.take_over()}
    await journal.aclose()
    taken_first = {line[1] for line in first.said() if line[0] == "took"}
    assert taken_first <= set(mine)
    assert {mine[task_id] for task_id in taken_first} == {3}
