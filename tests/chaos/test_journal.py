"""The journal's disk is full, or its file damaged: new work is refused with a reason, and nothing loops or is lost."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.chaos.conftest import ENV, Told
from tests.chaos.edge import Edge
from tests.chaos.judge import Story, judge, wait_quiet
from tests.chaos.kept import Kept
from tests.chaos.world import API_KEY, RowWatch, Task, World
from tests.conftest import ROOT, wait_until

DISK_BYTES = 4_000_000
REFUSED_AFTER_AT_MOST = 400  # tasks: the journal uses up the room that it has already
# A file system of its own for the journal, in a mount namespace of its own: nobody else's disk is full.
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
MOUNT_AND_STAY = f'mount -t tmpfs -o size={DISK_BYTES} tmpfs "$0" && echo mounted && exec sleep infinity'


class Disk:
    """The journal's, and a way to start processes that have it."""

    def __init__(self, journal: Path, holder: int) -> None:
        self._filler = Path(f"/proc/{holder}/root{journal}/filler")
        enter = ("nsenter", "--target", str(holder), "--user", "--mount", "--preserve-credentials")
        self.within = (*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(ROOT))  # nsenter goes to /

    def fill(self) -> None:
        """To the last byte."""
        with self._filler.open("wb", buffering=0) as file:
            try:
                for _ in range(DISK_BYTES):
                    file.write(bytes(4096))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def free(self) -> None:
        """There is room again."""
        self._filler.unlink()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def disk(home: Path) -> Iterator[Disk]:
    journal = home / "data" / "journal"
    journal.mkdir(parents=True)
    command = [*NAMESPACE, "sh", "-c", MOUNT_AND_STAY, str(journal)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as holder:
        assert holder.stdout is not None
        said = holder.stdout.readline().strip()
        if said == "mounted":
            yield Disk(journal, holder.pid)
        holder.kill()
    if said != "mounted":
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have user namespaces: {said}")
        pytest.skip(f"no user namespaces here: {said}")


@pytest.fixture(scope="module")
def kept(disk: Disk, home: Path, shared_world: World) -> Iterator[Kept]:
    with Kept(home, {**shared_world.env, **ENV}, within=disk.within) as running:
        yield running


def first_refusal(kept: Kept, tasks: list[Task]) -> tuple[int, httpx.Response]:
    """Sends tasks until one is refused: how many were accepted, and the refusal."""
    with httpx.Client(
        base_url=kept.url, headers={"X-API-Key": API_KEY, "Prefer": "respond-async"}, trust_env=False
    ) as client:
        for number, task in enumerate(tasks):
            response = client.post(task.path, json=task.body, timeout=30)
            if response.status_code not in (202, 429):
                return number, response
    pytest.fail(f"{len(tasks)} tasks were accepted on a disk that is full")


def journal_status(kept: Kept) -> str:
    health = httpx.get(f"{kept.url}/health", trust_env=False).json()
    return str(health["dependencies"]["journal"]["status"])


def pids(kept: Kept) -> set[int]:
    return {process.pid for role in ("supervisor", "web", "runner") for process in kept.of_role(role)}


def assert_refused(response: httpx.Response) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (503, "JOURNAL_UNAVAILABLE")
    assert int(response.headers["Retry-After"]) >= 1


def test_a_full_disk_refuses_new_work_until_there_is_room_again(
    world: World, kept: Kept, disk: Disk, told: Told
) -> None:
    tasks, story = world.tasks(REFUSED_AFTER_AT_MOST, seed=400, asynchronous=1.0, batches=0.0), Story()
    before = pids(kept)
    disk.fill()
    try:
        accepted, refusal = first_refusal(kept, tasks)
        assert_refused(refusal)
        assert world.status(tasks[accepted]) == "pending"
        # The worker that could not write says so; which of the two is asked, nobody knows.
        wait_until(lambda: journal_status(kept) == "down", 30, "a worker tells it", kept.log)
        assert pids(kept) == before
        # Started on a disk that is full, it is up to say so, and is not started again and again.
        kept.kill("all", random.Random(0))
        wait_until(lambda: kept.starts == 2, 60, "it is started again", kept.log)
        kept.wait_ready()
        assert_refused(first_refusal(kept, tasks[accepted:])[1])
    finally:
        disk.free()
    wait_until(lambda: journal_status(kept) == "ok", 30, "the journal is well again", kept.log)
    sent = tasks[: accepted + 1]
    with RowWatch(world) as watch:  # the Edge's patience: all of them once more
        story.answers = Edge(kept.url, watch, patience_s=60).carry_out(sent, 4)
    wait_quiet(world, sent, 60)
    story.end(kept.log(), kept.kills)
    verdict = judge("the journal's disk is full, also at start", world, sent, story)
    told(verdict)
    assert verdict.done == len(sent) and kept.starts == 2


@pytest.mark.slow
def test_a_damaged_journal_is_put_aside_and_the_service_goes_on(
    world: World, tmp_path: Path, told: Told
) -> None:
    first, second = (world.tasks(6, seed=seed) for seed in (401, 402))
    env, story = {**world.env, **ENV}, Story()
    with RowWatch(world) as watch, Kept(tmp_path, env) as healthy:
        Edge(healthy.url, watch, patience_s=60).carry_out(first, 3)
        wait_quiet(world, first, 30)
    database = tmp_path / "data" / "journal" / "db" / "journal.sqlite"
    for file in database.parent.iterdir():
        file.write_bytes(random.Random(0).randbytes(max(4096, file.stat().st_size)))
    with RowWatch(world) as watch, Kept(tmp_path, env) as damaged:
        before = pids(damaged)
        story.answers = Edge(damaged.url, watch, patience_s=60).carry_out(second, 3)
        wait_quiet(world, second, 30)
        story.end(damaged.log())
        assert (pids(damaged), damaged.starts) == (before, 1)
        assert "damaged" in damaged.log()
    verdict = judge("the journal is damaged", world, [*first, *second], story)
    told(verdict)
    assert verdict.done == len(first) + len(second)
