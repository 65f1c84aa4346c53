"""Which processes live: each holds a lock on a file of its own until it ends, however it ends.

The kernel lets go of an flock when the last descriptor of its file is closed, by `kill -9` too. So whether a process
is dead is a question with an exact answer: no clocks, no leases. All processes must run under one kernel.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Lock:
    """An flock on one file, which is made if it is missing.

    A child that is forked without exec would share the lock and keep it when its parent dies; so the child
    closes its copy of the descriptor, which leaves the parent's lock alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _OPEN.add(self)

    def take(self) -> bool:
        """Take the lock if nobody has it, at once; whether it is ours now."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Let go of it for others; closing does that too."""
        if self._descriptor >= 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of it for good; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class Turns:
    """A lock that processes hold in turns: whoever had it waits behind those who wait already.

    One process at a time stands at the door and takes the lock next; the others wait for the door. Without it a
    process with much to do takes the lock again before another notices that it was free.

    Args:
        path: Of the lock; the door is a file beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock(path)
        self._door = Lock(path.with_name(f"{path.name}.next"))

    @contextmanager
    def held(self, timeout_s: float) -> Iterator[None]:
        """Hold the lock, after waiting for whoever has it.

        Raises:
            TimeoutError: somebody else held it all that time; a stopped process, say.
        """
        ends_at = time.monotonic() + timeout_s
        self._wait(self._door, ends_at)
        try:
            self._wait(self._lock, ends_at)
        finally:
            self._door.release()
        try:
            yield
        finally:
            self._lock.release()

    def close(self) -> None:
        """Let go of it; a second call does nothing."""
        self._lock.close()
        self._door.close()

    def _wait(self, lock: Lock, ends_at: float) -> None:
        pause_s = 0.000_05  # a commit takes 0.2 to 1 ms
        while not lock.take():
            if time.monotonic() > ends_at:
                raise TimeoutError(f"another process has held {self.path} for too long")
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, 0.001)


_OPEN: weakref.WeakSet[Lock] = weakref.WeakSet()


def _close_all() -> None:
    for lock in list(_OPEN):
        with contextlib.suppress(OSError):
            lock.close()


os.register_at_fork(after_in_child=_close_all)


class Owners:
    """The lock files of all processes in one directory, and ours among them.

    Args:
        directory: Of the lock files; must exist. While this makes our file, no other process may run
            `remove_the_dead`: a file is there a moment before its lock.

    Attributes:
        ours: The name of this process's file, used by no other process before or after.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.ours = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._lock = Lock(directory / self.ours)
        self._lock.take()

    def is_dead(self, owner: str) -> bool:
        """Whether this process has ended. A name is only known to others once its file has its lock."""
        return owner != self.ours and is_free(self._directory / owner)

    def remove_the_dead(self) -> None:
        """Remove the files of all dead processes; a name without a file is one of the dead too."""
        for path in self._directory.iterdir():
            if self.is_dead(path.name):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """From here on others see this process as dead."""
        with contextlib.suppress(OSError):  # without its lock it is a dead one's in any case
            (self._directory / self.ours).unlink()
        self._lock.close()


def is_free(path: Path) -> bool:
    """Whether nobody holds a lock on this file, or it is not there."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
