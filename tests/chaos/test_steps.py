"""A web worker is killed between two steps of a task: another one takes the task over, and computes it once."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.chaos.conftest import ENV, Told
from tests.chaos.edge import Answers, Edge
from tests.chaos.judge import Story, judge, wait_quiet
from tests.chaos.kept import Kept
from tests.chaos.world import RowWatch, Task, World
from tests.conftest import wait_until

STEPS = ("claim", "download", "model", "decode", "segment", "store", "upload", "finish", "done")
MOST_TELLING = ("segment", "store", "upload", "done")  # before, at and after the result's way to the journal
TAKEN_OVER_WITHIN_S = 15.0
MAX_ATTEMPTS = 3
PATIENCE_S = 90.0
WORKERS = 2


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where faults lie, see `faulty_service`."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def kept(shared_world: World, faults: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    env = {**shared_world.env, **ENV, "S3_API_WORKERS": str(WORKERS), "S3_CHAOS_FAULTS": str(faults)}
    target = "tests.chaos.faulty_service:S3Backend"
    with Kept(tmp_path_factory.mktemp("kept"), env, target) as running:
        yield running


@pytest.fixture(autouse=True)
def _all_workers_are_there(kept: Kept) -> None:
    wait_until(lambda: kept.owners() == WORKERS, 60, "all web workers are there", kept.log)


def carried_out(world: World, kept: Kept, tasks: Sequence[Task]) -> dict[str, Answers]:
    with RowWatch(world) as watch:
        answers = Edge(kept.url, watch, patience_s=PATIENCE_S).carry_out(tasks, len(tasks))
    wait_quiet(world, tasks, 30)
    return answers


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=[] if step in MOST_TELLING else pytest.mark.slow) for step in STEPS]
)
def test_a_kill_before_a_step(world: World, kept: Kept, faults: Path, told: Told, step: str) -> None:
    tasks, story = world.tasks(1, seed=STEPS.index(step), asynchronous=1.0), Story()
    fault = faults / f"{tasks[0].task_id}@{step}"
    fault.write_text("1")
    story.answers = carried_out(world, kept, tasks)
    wait_until(lambda: fault.read_text() == "0", 5, f"the worker is killed before {step}", kept.log)
    # The row may be done before the blow, and the owner's death be all that is left to clean up.
    wait_until(lambda: kept.unfinished() == 0, TAKEN_OVER_WITHIN_S, "nothing is left to do", kept.log)
    story.blows.append(fault.stat().st_mtime)
    story.end(kept.log())
    verdict = judge(f"kill -9 before {step}", world, tasks, story, kills=1)
    told(verdict)
    assert verdict.done == 1 and verdict.recovery_s < TAKEN_OVER_WITHIN_S


def test_the_tasks_of_a_dead_worker_are_taken_over(world: World, kept: Kept, told: Told) -> None:
    tasks, story = world.tasks(8, seed=100, asynchronous=1.0), Story()
    with ThreadPoolExecutor(1) as pool:
        with world.storage.trouble(holds=True):
            answers = pool.submit(carried_out, world, kept, tasks)
            wait_until(
                lambda: all(row["status"] == "processing" for row in world.rows(tasks).values()),
                20,
                "all are under way",
                kept.log,
            )
            blow = kept.kill("web", random.Random(0))
        story.answers = answers.result()
    assert blow is not None
    story.end(kept.log(), [blow])
    verdict = judge("one of two web workers killed", world, tasks, story)
    told(verdict)
    last_s = max(row["at_s"] for row in world.rows(tasks).values())
    assert verdict.done == len(tasks) and last_s - blow.at_s < TAKEN_OVER_WITHIN_S


def test_a_task_that_kills_its_worker_each_time_is_given_up_and_its_neighbours_are_done(
    world: World, kept: Kept, faults: Path, told: Told
) -> None:
    tasks, story = world.tasks(7, seed=200, asynchronous=1.0), Story()
    fault = faults / f"{tasks[0].task_id}@segment"
    fault.write_text("100")
    began_s = time.time()
    story.answers = carried_out(world, kept, tasks)
    assert fault.read_text() == str(100 - MAX_ATTEMPTS)
    story.blows.append(began_s)
    story.end(kept.log())
    verdict = judge("a task that kills its worker", world, tasks, story, kills=MAX_ATTEMPTS)
    told(verdict)
    assert verdict.errors == {"TASK_GAVE_UP": 1} and verdict.done == len(tasks) - 1
    assert world.status(tasks[0]) == "error"
