"""One world for all scenarios of a process, a service for each file, and the table at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench import results_file
from tests.chaos.judge import Verdict
from tests.chaos.kept import Kept
from tests.chaos.world import World, running_world

PROPERTY = "chaos"
# Two web workers, so that there is one to take over; the rest as in production.
ENV = {"S3_API_WORKERS": "2", "S3_REQUEST_TIMEOUT_S": "30", "S3_LOG_LEVEL": "info"}
CELLS = pytest.StashKey[list[dict[str, Any]]]()


@dataclass(frozen=True)
class Size:
    """How much of it: `make chaos` has minutes, continuous integration has seconds.

    Attributes:
        storm: Tasks while processes are killed, and how many kills.
        outage: Tasks while a dependency is away, and for how long, in seconds.
        patience_s: Of the Edge with one task.
    """

    storm: tuple[int, int]
    outage: tuple[int, float]
    concurrency: int
    patience_s: float


FULL = Size(storm=(1000, 20), outage=(300, 60.0), concurrency=16, patience_s=300.0)
SMALL = Size(storm=(60, 3), outage=(40, 4.0), concurrency=8, patience_s=90.0)


@pytest.fixture(scope="session")
def size() -> Size:
    return FULL if os.environ.get("CHAOS") == "full" else SMALL


@pytest.fixture(scope="session")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running_world(tmp_path_factory.mktemp("world")) as running:
        yield running


@pytest.fixture
def world(shared_world: World) -> World:
    """With nothing broken by an earlier test."""
    shared_world.heal()
    return shared_world


@pytest.fixture(scope="module")
def kept(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    """A service for the scenarios of one file."""
    with Kept(tmp_path_factory.mktemp("kept"), {**shared_world.env, **ENV}) as running:
        yield running


Told = Callable[[Verdict], None]


@pytest.fixture
def told(request: pytest.FixtureRequest, kept: Kept) -> Told:
    """Puts a verdict into the table, and fails the test if a promise was not kept."""

    def tell(verdict: Verdict) -> None:
        request.node.user_properties.append((PROPERTY, verdict.cells()))
        print(verdict)
        assert verdict.is_kept, f"{verdict}\n{kept.log()[-20_000:]}"

    return tell


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table; also as NAME.csv and NAME.md, if `CHAOS_TABLE` names one."""
    reports = [one for kind in ("passed", "failed") for one in terminalreporter.stats.get(kind, [])]
    rows = [cells for one in reports for name, cells in one.user_properties if name == PROPERTY]
    if not rows:
        return
    terminalreporter.section("chaos")
    terminalreporter.write_line(results_file.markdown(rows))
    if path := os.environ.get("CHAOS_TABLE"):
        seen = results_file.conditions("bentoml", "torch", size=os.environ.get("CHAOS", "small"))
        results_file.write(Path(path).parent, Path(path).name, seen, rows)
