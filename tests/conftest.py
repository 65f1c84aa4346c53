"""The one fixture that many folders share: the real service, in its own processes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import httpx
import psutil
import pytest

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
# Ten seconds is usual; two busy cores are not.
READY_DEADLINE_S = float(os.environ.get("TEST_READY_DEADLINE_S", "150"))
STOP_DEADLINE_S = 20.0
POLL_S = 0.1

# What a process needs to run at all, and which weights to use if not the demo's; nothing of a developer's.
PASSED_ON = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "SAM3_WEIGHTS_PATH", "CUDA_VISIBLE_DEVICES")


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(ask: Callable[[], T | None], deadline_s: float, what: str, log: Callable[[], str] = str) -> T:
    """Ask until the answer is true; fail with `what`, and the log, when it takes too long."""
    ends = time.monotonic() + deadline_s
    while True:
        if answer := ask():
            return answer
        if time.monotonic() > ends:
            pytest.fail(f"{what}: not within {deadline_s:g} s\n{log()}")
        time.sleep(POLL_S)


class Served:
    """One `bentoml serve service:S3Backend`, with all its processes.

    Started again over the same `home` it finds its data, and its log goes on.

    Attributes:
        port: On which it listens.
        url: `http://127.0.0.1:PORT`.
        client: For requests to it; sends the key if there is one.
        key: Its API key; the first of several.
        data_dir: `S3_DATA_DIR`.
    """

    def __init__(
        self,
        home: Path,
        env: Mapping[str, str],
        arguments: tuple[str, ...] = (),
        *,
        target: str = "service:S3Backend",
        port: int | None = None,
        within: tuple[str, ...] = (),
    ) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.data_dir = home / "data"
        self.key = env["API_SECRET_KEY"].split(",")[0] if "API_SECRET_KEY" in env else None
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        headers = {} if self.key is None else {"X-API-Key": self.key}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)
        self._log = home / "log"
        command = [
            *within,
            Path(sysconfig.get_path("scripts")) / "bentoml",
            "serve",
            target,
            "--port",
            str(self.port),
        ]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*map(str, command), *arguments],
                cwd=ROOT,
                env=self._environment(home, env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _environment(self, home: Path, env: Mapping[str, str]) -> dict[str, str]:
        return {
            **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
            "S3_ENV_FILE": "",
            "S3_DATA_DIR": str(self.data_dir),
            "S3_API_WORKERS": "1",
            "BENTOML_HOME": str(home / "bentoml"),
            "PROMETHEUS_MULTIPROC_DIR": str(home / "metrics"),
            "BENTOML_DO_NOT_TRACK": "true",
            **env,
        }

    def log(self) -> str:
        """Everything that its processes have written so far."""
        return self._log.read_text(errors="replace")

    def is_ready(self) -> bool:
        """What `/readyz` says; nothing listening is not ready."""
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def wait_ready(self) -> Served:
        """Wait until it is ready; fail with its log if it ends instead."""

        def ready() -> bool:
            if self.process.poll() is not None:
                pytest.fail(f"the service ended with status {self.process.returncode}:\n{self.log()}")
            return self.is_ready()

        wait_until(ready, READY_DEADLINE_S, "the service becomes ready", self.log)
        return self

    def runner_pid(self) -> int:
        """Process of the model."""
        return wait_until(self._find_runner, STOP_DEADLINE_S, "the runner's process is there")

    def _find_runner(self) -> int | None:
        for worker in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "Sam3Runner" in worker.cmdline():
                    return int(worker.pid)
        return None

    def stop(self) -> None:
        """End every process of it, gently first."""
        self.client.close()
        if self.process.poll() is None:
            workers = psutil.Process(self.process.pid).children(recursive=True)  # sessions of their own
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_DEADLINE_S)
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
        self.process.kill()
        self.process.wait()


Serve = Callable[..., Served]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts services: `served(env, *arguments)`; each is stopped at the end of the run if not before."""
    running: list[Served] = []

    def serve(env: Mapping[str, str], *arguments: str, ready: bool = True) -> Served:
        service = Served(tmp_path_factory.mktemp("served"), env, arguments)
        running.append(service)
        return service.wait_ready() if ready else service

    yield serve
    for service in running:
        service.stop()
