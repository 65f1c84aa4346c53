"""Storage and rows are away, slow, or fail now and then, while the service works."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from tests.chaos.conftest import Size, Told
from tests.chaos.edge import Edge, kinds_of
from tests.chaos.judge import Story, judge, wait_quiet
from tests.chaos.kept import Kept
from tests.chaos.world import RowWatch, World

Outage = Callable[[World], AbstractContextManager[None]]


def rows_down(world: World) -> AbstractContextManager[None]:
    return world.database.trouble(refuses=True)


def storage_shaky(world: World) -> AbstractContextManager[None]:
    return world.storage.trouble(error_share=0.2, hang_share=0.05)


@contextlib.contextmanager
def network_cut(world: World) -> Iterator[None]:
    with world.storage.trouble(is_cut=True), world.database.trouble(is_cut=True):
        yield


@contextlib.contextmanager
def network_silent(world: World) -> Iterator[None]:
    with world.storage.trouble(holds=True), world.database.trouble(holds=True):
        yield


@contextlib.contextmanager
def postgres_restarted(world: World) -> Iterator[None]:
    world.postgres.stop()
    try:
        yield
    finally:
        world.postgres.start()


# What happens, and for which share of the longest outage; None: until the last task is done.
SCENARIOS: dict[str, tuple[Outage, float | None]] = {
    "Supabase refuses connections for {s:g} s": (rows_down, 1.0),
    "R2: 503 to 20 %, hangs on 5 %": (storage_shaky, None),
    "Postgres away for {s:g} s": (postgres_restarted, 0.25),
    "network cut for {s:g} s: reset": (network_cut, 0.5),
    "network cut for {s:g} s: silent": (network_silent, 0.5),
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_task_is_lost_in_an_outage(
    world: World, kept: Kept, size: Size, told: Told, scenario: str
) -> None:
    outage, share = SCENARIOS[scenario]
    (count, longest_s), story = size.outage, Story()
    seconds = None if share is None else longest_s * share
    tasks, is_over = world.tasks(count, seed=len(scenario)), threading.Event()

    def break_then_mend() -> None:
        watch.wait_count(count // 4, size.patience_s)
        with outage(world):
            is_over.wait(seconds)
        story.blows.append(time.time())

    with RowWatch(world) as watch:
        breaker = threading.Thread(target=break_then_mend, name="breaker")
        breaker.start()
        try:
            story.answers = Edge(kept.url, watch, patience_s=size.patience_s).carry_out(
                tasks, size.concurrency
            )
        finally:
            is_over.set()
            breaker.join()
    wait_quiet(world, tasks, 60)
    print(kinds_of(story.answers), dict(world.storage.counts), dict(world.database.counts))
    story.end(kept.log())
    verdict = judge(scenario.format(s=seconds or 0), world, tasks, story)
    told(verdict)
    assert "INTERNAL_ERROR" not in verdict.errors
    # Who waits is told in time that it failed; who does not wait gets a result, ten minutes being longer than this.
    rows = world.rows(tasks)
    assert {rows[task.task_id]["status"] for task in tasks if task.is_async} == {"done"}
