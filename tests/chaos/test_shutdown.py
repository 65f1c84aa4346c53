"""SIGTERM under load: what runs ends or lies in the journal, and the next start goes on with it."""

from __future__ import annotations

import threading

from tests.chaos.conftest import Size, Told
from tests.chaos.edge import Edge, kinds_of
from tests.chaos.judge import Story, judge, wait_quiet
from tests.chaos.kept import Kept
from tests.chaos.world import RowWatch, World

ENDS_WITHIN_S = 60.0
# Accepted, or refused with Retry-After, or nobody is listening; a connection may break only where nothing was answered.
TOLD = {"200", "202", "503", "ConnectError", "ReadError", "RemoteProtocolError"}


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
