"""The service as a container runtime keeps it: killed by us in part or in whole, and started again when it ended."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import httpx
import psutil

from tests.chaos.world import RowWatch
from tests.conftest import READY_DEADLINE_S, Served, wait_until

Role = Literal["supervisor", "web", "runner", "child", "all"]
# One in so many kills, each.
ROLES: Final[dict[Role, int]] = {"web": 4, "runner": 3, "child": 2, "supervisor": 2, "all": 3}
LAST_BREATH_S = 10.0  # for those whose supervisor died; then they are killed, as a runtime does
WATCH_S = 0.1
PROGRESS_DEADLINE_S = 30.0


@dataclass(frozen=True)
class Kill:
    """One blow: who, and when in unix seconds."""

    role: Role
    pids: tuple[int, ...]
    at_s: float


class Kept:
    """`bentoml serve`, always on the same port and the same data directory, started again whenever it ended.

    Attributes:
        service: The one that runs now.
        starts: How often it was started.
        kills: Every blow so far.
    """

    def __init__(
        self,
        home: Path,
        env: Mapping[str, str],
        target: str = "service:S3Backend",
        within: tuple[str, ...] = (),
    ) -> None:
        self._home, self._env, self._target, self._within = home, env, target, within
        self.kills: list[Kill] = []
        self.starts = 1
        self.service = Served(home, env, target=target, within=within)
        self.url = self.service.url
        self._ends = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)

    def __enter__(self) -> Kept:
        try:
            self.service.wait_ready()
        except BaseException:
            self.service.stop()
            raise
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._keeper.join()
        self.service.stop()
        for process in self.processes():
            kill(process)

    def log(self) -> str:
        """Of all starts."""
        return self.service.log()

    def wait_ready(self) -> None:
        """Until it answers, whoever has been killed."""

        def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{self.url}/readyz", timeout=5, trust_env=False).status_code == 200
            return False

        wait_until(ready, READY_DEADLINE_S, "the service becomes ready again", self.log)

    def processes(self) -> list[psutil.Process]:
        """Every process that has our data directory in its environment, whoever its parent is by now."""
        mark, found = f"S3_DATA_DIR={self.service.data_dir}\0".encode(), []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if mark in Path(f"/proc/{process.pid}/environ").read_bytes():
                    found.append(process)
        return found

    def of_role(self, role: Role) -> list[psutil.Process]:
        """The processes that a role names at this moment."""
        supervisor = psutil.Process(self.service.process.pid)
        if role == "supervisor":
            return [supervisor]
        if role == "all":
            return [supervisor, *supervisor.children(recursive=True)]
        workers = {"S3Backend": "web", "Sam3Runner": "runner"}
        named: dict[str, list[psutil.Process]] = {"web": [], "runner": [], "child": []}
        for worker in supervisor.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                words = worker.cmdline()
                for service, name in workers.items():
                    if service in words:
                        named[name].append(worker)
                        if name == "web":
                            named["child"] += worker.children(recursive=True)
        return named[role]

    def kill(self, role: Role, lot: random.Random) -> Kill | None:
        """Kill -9 one process of this role, or every one; None if there is none at this moment."""
        with contextlib.suppress(psutil.NoSuchProcess):
            there = self.of_role(role)
            victims = there if role == "all" else [lot.choice(there)] if there else []
            for victim in victims:
                kill(victim)
            if victims:
                blow = Kill(role, tuple(victim.pid for victim in victims), time.time())
                self.kills.append(blow)
                return blow
        return None

    def owners(self) -> int:
        """How many web workers are up: each holds a lock of its own in the journal's directory."""
        held = {line.split()[5].split(":")[2] for line in Path("/proc/locks").read_text().splitlines()}
        files = (self.service.data_dir / "journal" / "owners").glob("*")
        return sum(str(file.stat().st_ino) in held for file in files)

    def unfinished(self) -> int:
        """How many entries of the journal are not at their end."""
        path = self.service.data_dir / "journal" / "db" / "journal.sqlite"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as journal:
            query = "select count(*) from entries where state in ('accepted', 'computed', 'failed')"
            return int(journal.execute(query).fetchone()[0])

    def terminate(self, within_s: float) -> tuple[int, float]:
        """SIGTERM to the supervisor, as `docker stop` does; its exit status, and when it had ended, unix seconds."""
        process = self.service.process
        process.terminate()
        return process.wait(within_s), time.time()

    def _keep(self) -> None:
        while not self._ends.wait(WATCH_S):
            if self.service.process.poll() is None:
                continue
            left = self.processes()
            psutil.wait_procs(left, LAST_BREATH_S)
            for process in self.processes():
                kill(process)
            psutil.wait_procs(left, LAST_BREATH_S)
            if self._ends.is_set():
                return
            self.service.client.close()
            self.service = Served(
                self._home, self._env, target=self._target, port=self.service.port, within=self._within
            )
            self.starts += 1


def kill(process: psutil.Process) -> None:
    """With -9, if it is still there."""
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


class Killer:
    """Kills at moments drawn over the whole run: when so and so many tasks have ended, and a random while later.

    Args:
        kept: Whom.
        watch: Tells how many tasks have ended.
        moments: How many of them must have, one entry a kill, ascending.
        seed: Draws whom and the whiles.
    """

    def __init__(self, kept: Kept, watch: RowWatch, *, tasks: int, kills: int, seed: int) -> None:
        self._kept, self._watch = kept, watch
        self._lot = random.Random(seed)
        self._moments = sorted(self._lot.sample(range(tasks * 9 // 10), kills))
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._kill, name="killer", daemon=True)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(1.0)  # the last moments are over when the tasks are
        self._ends.set()
        self._thread.join()

    def _kill(self) -> None:
        for moment in self._moments:
            # A service that makes no progress is hit again all the same.
            self._watch.wait_count(moment, PROGRESS_DEADLINE_S)
            blow = None
            while blow is None and not self._ends.wait(self._lot.uniform(0.05, 0.8)):
                role = self._lot.choices([*ROLES], [*ROLES.values()])[0]
                blow = self._kept.kill(role, self._lot)
