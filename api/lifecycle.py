"""How the processes of one `bentoml serve` end together, and where they count together.

BentoML's supervisor leaves three things to wish for:

- It starts a process that ended again, for ever. That is right after a crash, and wrong when the weights are
  broken: the service would never be ready and never end. `fail_service` ends it, with a status that says so.
- It tells all processes to stop at the same moment. A request whose image is still on its way would find the
  model gone. So web workers hold a lock as long as they live, and the runner stops after the last of them.
- When it is killed, the others go on for ever, the model's memory with them. They ask the kernel to be told.

And it has every process count its metrics in mapped files on a disk, where the first write with no space left is a
SIGBUS, in each process that is started anew. Here they lie in memory, with what else the processes share.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import FrameType
from typing import Any

_VARIABLE = "S3_LIFECYCLE_DIR"  # ours alone: from the supervisor to its processes
_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_MEMORY = "/dev/shm"
_MEMORY_BYTES = 16 << 20  # a process's metrics take some 200 kB, and stay when it dies


def prepare_processes() -> None:
    """In the supervisor, before it starts any process: make the other functions possible."""
    parent = _MEMORY if _is_roomy_memory(_MEMORY) else None  # else that of temporary files
    directory = Path(tempfile.mkdtemp(prefix="s3-backend-", dir=parent))
    (directory / "metrics").mkdir()
    (directory / "callers").touch()
    (directory / "supervisor").write_text(str(os.getpid()))
    os.environ[_VARIABLE] = str(directory)
    atexit.register(_end_as_told, directory, os.getpid())


def end_with_supervisor() -> None:
    """In one of the processes: stop, gently, when the supervisor is gone, in whatever way it went."""
    directory = _directory()
    if directory is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != _supervisor_of(directory):  # it went before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def fail_service(reason: str) -> None:
    """In one of the processes: end the whole service with status 1, soon after this returns."""
    directory = _directory()
    if directory is None:
        return
    with contextlib.suppress(OSError):  # the supervisor is already on its way out
        (directory / "fatal").write_text(reason, encoding="utf-8")
        os.kill(os.getppid(), signal.SIGTERM)


def count_as_caller() -> None:
    """In a web worker: keep the runner from stopping before this process has ended."""
    directory = _directory()
    if directory is not None:
        # Never closed: the kernel lets go of the lock when the process ends, in whatever way.
        fcntl.flock(os.open(directory / "callers", os.O_RDONLY | os.O_CLOEXEC), fcntl.LOCK_SH)


def shared_file(name: str) -> Path | None:
    """In any of the processes: a path that is the same for all of them; None where nobody supervises."""
    directory = _directory()
    return None if directory is None else directory / name


def count_in_memory() -> None:
    """In one of the processes, before its first metric: count where all of them do, and not where BentoML says."""
    directory = _directory()
    if directory is not None:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory / "metrics")


def outlive_callers(deadline_s: float) -> None:
    """In the runner, on its event loop: let SIGTERM wait until no web worker is left.

    Args:
        deadline_s: The longest that it waits.
    """
    directory, loop, stop = _directory(), asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)
    if directory is None or not callable(stop):
        return

    def wait_then_stop() -> None:
        _wait_for_callers(directory / "callers", deadline_s)
        loop.call_soon_threadsafe(stop, signal.SIGTERM, None)

    def on_sigterm(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, stop)  # who asks twice means it
        threading.Thread(target=wait_then_stop, name="outlive-callers", daemon=True).start()

    signal.signal(signal.SIGTERM, on_sigterm)


def drain_before_stop(drain: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """In a web worker, on its event loop: let SIGTERM wait until `drain` is through; it is answered until then.

    Args:
        drain: Turns new work away and lets what runs end, in bounded time.
    """
    loop, stop = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)
    if not callable(stop):
        return
    draining: list[asyncio.Task[None]] = []  # the event loop itself holds tasks only weakly

    async def drain_then_stop() -> None:
        try:
            await drain()
        finally:
            stop(signal.SIGTERM, None)

    def on_sigterm(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, stop)  # who asks twice means it
        loop.call_soon_threadsafe(lambda: draining.append(loop.create_task(drain_then_stop())))

    signal.signal(signal.SIGTERM, on_sigterm)


def _is_roomy_memory(path: str) -> bool:
    """Whether it is a file system in memory that this process may write to, with space left."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        space = os.statvfs(path)
    except OSError:
        return False
    is_memory = any(mount[1:3] == [path, "tmpfs"] for mount in mounts)
    return is_memory and os.access(path, os.W_OK) and space.f_bavail * space.f_frsize >= _MEMORY_BYTES


def _wait_for_callers(path: Path, deadline_s: float) -> None:
    ends = time.monotonic() + deadline_s
    with contextlib.suppress(OSError), path.open("rb") as lock:
        while time.monotonic() < ends:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(_POLL_S)


def _supervisor_of(directory: Path) -> int | None:
    try:
        return int((directory / "supervisor").read_text())
    except (OSError, ValueError):
        return None


def _directory() -> Path | None:
    """None where nobody supervises."""
    path = os.environ.get(_VARIABLE)
    return None if path is None else Path(path)


def _end_as_told(directory: Path, supervisor_pid: int) -> None:
    if os.getpid() != supervisor_pid:  # a fork of it
        return
    try:
        reason = (directory / "fatal").read_text(encoding="utf-8")
    except OSError:
        reason = ""
    shutil.rmtree(directory, ignore_errors=True)
    if reason:
        print(f"Error: {reason}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # too late for sys.exit
