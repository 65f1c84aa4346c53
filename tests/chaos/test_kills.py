"""Processes of the service are killed with -9, or all of it is told to stop, while it works."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import httpx
import pytest

from tests.chaos.conftest import Size, Told
from tests.chaos.edge import Edge, kinds_of
from tests.chaos.judge import Story, judge, wait_quiet
from tests.chaos.kept import Kept, Killer
from tests.chaos.world import API_KEY, RowWatch, Task, World

SEED = 20261121
ENDS_WITHIN_S = 60.0
# Accepted, or refused with Retry-After, or nobody is listening; a connection may break only where nothing was answered.
TOLD = {"200", "202", "503", "ConnectError", "ReadError", "RemoteProtocolError"}


def asked(kept: Kept, task: Task) -> dict[str, Any]:
    """What `GET /api/v1/tasks/{task_id}` says, after all that."""
    headers = {"X-API-Key": API_KEY}
    response = httpx.get(f"{kept.url}/api/v1/tasks/{task.task_id}", headers=headers, trust_env=False)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


@pytest.mark.timeout(900)
def test_no_task_is_lost_while_processes_are_killed(world: World, kept: Kept, size: Size, told: Told) -> None:
    count, kills = size.storm
    tasks, story = world.tasks(count, SEED), Story()
    with RowWatch(world) as watch, Killer(kept, watch, tasks=count, kills=kills, seed=SEED):
        story.answers = Edge(kept.url, watch, patience_s=size.patience_s).carry_out(tasks, size.concurrency)
    wait_quiet(world, tasks, 60)
    print(kinds_of(story.answers), f"{kept.starts} starts", Counter(one.role for one in kept.kills))
    story.end(kept.log(), kept.kills)
    told(judge(f"kill -9 of any process, {size.concurrency} at a time", world, tasks, story))
    assert len(kept.kills) == kills
    told_of = {task.task_id: asked(kept, task) for task in tasks[:: max(1, count // 50)]}
    rows = world.rows(tasks)
    assert {task_id: one["status"] for task_id, one in told_of.items()} == {
        task_id: rows[task_id]["status"] for task_id in told_of
    }
    assert all(one["result"]["task_id"] == id_ for id_, one in told_of.items() if one["status"] == "done")


def test_a_stop_under_load_loses_nothing(world: World, kept: Kept, size: Size, told: Told) -> None:
    count, _ = size.outage
    tasks, story = world.tasks(count, seed=300), Story()
    ended: list[tuple[int, float]] = []

    def stop() -> None:
        watch.wait_count(count // 4, size.patience_s)
        ended.append(kept.terminate(ENDS_WITHIN_S))

    with RowWatch(world) as watch:
        stopper = threading.Thread(target=stop, name="stopper")
        stopper.start()
        try:
            story.answers = Edge(kept.url, watch, patience_s=size.patience_s).carry_out(
                tasks, size.concurrency
            )
        finally:
            stopper.join()
    wait_quiet(world, tasks, 60)
    print(kinds_of(story.answers), ended)
    ((status, at_s),) = ended
    story.blows.append(at_s)
    story.end(kept.log())
    told(judge("SIGTERM under load", world, tasks, story))
    assert status == 0
    assert {kind for one in story.answers.values() for kind in one.kinds} <= TOLD
