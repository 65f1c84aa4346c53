"""Circuit breakers: while object storage or the store of the rows is down, calls to it fail at once.

    closed ──3 failures in a row, or nobody there──▶ open ──pause over──▶ half-open: one call is let through
       ▲                                              ▲                      │              │
       └──────────────────────────── it was answered ─┼──────────────────────┘              │
                                                      └────────── it failed; longer pause ──┘

One breaker per dependency and process, on one event loop. An answer that the caller does not like, such as
`ObjectNotFound`, is an answer. A refused key is none: nothing works until somebody mends it, and asking more
often than the pauses allow would only get us locked out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from storage import (
    ObjectNotFound,
    ObjectStore,
    ObjectTooLarge,
    StorageRefused,
    StorageTimeout,
    StorageUnavailable,
)
from tasks.errors import TaskConflict, TaskNotFound, TaskRowRefused, TaskStoreTimeout, TaskStoreUnavailable
from tasks.store import TaskInputs, TaskResult, TaskRow, TaskStore

_log = logging.getLogger(__name__)

FAILURES_TO_OPEN = 3  # each of them after the retries of the client below
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 10.0
MAX_TOLD_PAUSE_S = 60.0  # a `Retry-After` may be longer than our own pauses, but not as long as it likes
PROBE_KEY = "masks/probe"  # neither need be there: "no" is an answer
PROBE_TASK_ID = "00000000-0000-0000-0000-000000000000"
IDLE_S = 30.0  # without a call for this long, one is made to see whether the dependency is there
# Those who slept through an outage come back one after the other, and not all in one moment.
_WAKE_SPREAD_S, _MAX_WAKE_SPREAD_S = 0.005, 5.0

_Errors = tuple[type[Exception], ...]


def _ignore(is_up: bool) -> None:
    """Nobody wants to know."""


class CircuitBreaker:
    """Watches the calls to one dependency, and refuses them while it is down.

    Args:
        name: Of the dependency, for people.
        failures: Errors that say that it could not be used. Any other error but `answers` says nothing.
        answers: Errors that it must be there to give.
        refusal: What a call that is not let through raises.
        first_pause_s: Before the first call is let through; doubles, and each is drawn from [half, whole].
        max_pause_s: No pause is longer, unless the dependency asked for one (`retry_after_s` of its error).
        on_change: Told whether the dependency is up, whenever that changes.
    """

    def __init__(
        self,
        name: str,
        *,
        failures: _Errors,
        answers: _Errors,
        refusal: type[Exception],
        first_pause_s: float,
        max_pause_s: float,
        on_change: Callable[[bool], None],
    ) -> None:
        self._name = name
        self._failures = failures
        self._answers = answers
        self._refusal = refusal
        self._first_pause_s = first_pause_s
        self._max_pause_s = max_pause_s
        self._on_change = on_change
        self._is_open = False
        self._n_failures = 0  # in a row, while closed
        self._pause_s = first_pause_s
        self._failing_since: datetime | None = None
        self._last_failure: type[Exception] | None = None
        self._probe_at_s = 0.0  # as the two below, on the monotonic clock
        self._looked_at_s = -math.inf
        self._is_probing = False
        # Counts openings and closings: a call that began before the last one has nothing to say any more.
        self._era = 0
        self._sleepers: set[asyncio.Future[float]] = set()
        self._changed = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether the dependency is taken to be down."""
        return self._is_open

    @property
    def since(self) -> datetime | None:
        """When the dependency began to fail (UTC); None while it is up."""
        return self._failing_since if self._is_open else None

    @property
    def last_failure(self) -> type[Exception] | None:
        """What kind of error came last; None while the dependency is up."""
        return self._last_failure if self._is_open else None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Around one call to the dependency.

        Raises:
            The `refusal` it was made with, at once: the dependency is down, and nothing was tried.
        """
        era, is_probe = self._admit()
        try:
            yield
        except self._answers:
            self._succeeded(era)
            raise
        except self._failures as error:
            self._failed(era, error)
            raise
        else:
            self._succeeded(era)
        finally:  # also when it was cancelled: then the next one may try
            if is_probe:
                self._is_probing = False
                self._changed.set()

    async def pause(self, seconds: float) -> None:
        """Sleep this long, or until an outage ends, if that is sooner.

        Of an end between the failure and this call nothing is known here: let no other await come between.
        """
        sleeper: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._sleepers.add(sleeper)
        try:
            async with asyncio.timeout(seconds):
                spread_s = await sleeper
                await asyncio.sleep(random.uniform(0, spread_s))
        except TimeoutError:
            return
        finally:
            self._sleepers.discard(sleeper)

    async def watch(self, probe: Callable[[], Awaitable[object]]) -> None:
        """Make a call of our own whenever one is due and nobody else makes it; never returns.

        So an outage ends, and is noticed, without traffic too.

        Args:
            probe: A cheap call to the dependency, within `attempt`.
        """
        while True:
            idle_s = IDLE_S * random.uniform(0.75, 1.25)
            while (seconds := self._seconds_to_probe(idle_s)) > 0:
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if math.isinf(seconds) else seconds):
                        await self._changed.wait()
            try:
                await probe()
            except Exception as error:  # whatever it is, the next look tells; `attempt` has taken note
                _log.debug("a look at %s failed: %r", self._name, error)
                self._looked_at_s = time.monotonic()
                await asyncio.sleep(self._first_pause_s)  # also after an error that `attempt` does not know

    def _seconds_to_probe(self, idle_s: float) -> float:
        if self._is_probing:
            return math.inf
        if self._is_open:
            return self._probe_at_s - time.monotonic()
        quiet_s = idle_s if self._n_failures == 0 else self._first_pause_s
        return self._looked_at_s + quiet_s - time.monotonic()

    def _admit(self) -> tuple[int, bool]:
        if not self._is_open:
            return self._era, False
        if self._is_probing or time.monotonic() < self._probe_at_s:
            raise self._refusal(
                f"not tried: {self._name} has been failing since {self._failing_since:%FT%TZ}"
            )
        self._is_probing = True
        return self._era, True

    def _succeeded(self, era: int) -> None:
        if era != self._era:
            return
        self._looked_at_s = time.monotonic()
        self._n_failures = 0
        if self._is_open:
            self._close()

    def _failed(self, era: int, error: Exception) -> None:
        if era != self._era:
            return
        now = datetime.now(UTC)
        if not self._is_open:
            if self._n_failures == 0:
                self._failing_since = now
            self._n_failures += 1
            if self._n_failures < FAILURES_TO_OPEN and not _is_nobody_there(error):
                return
            self._open(error)
        self._last_failure = type(error)
        pause_s = max(self._pause_s * random.uniform(0.5, 1.0), _told_pause_s(error))
        self._probe_at_s = time.monotonic() + pause_s
        self._pause_s = min(2 * self._pause_s, self._max_pause_s)

    def _open(self, error: Exception) -> None:
        self._is_open = True
        self._era += 1
        self._pause_s = self._first_pause_s
        _log.error("%s is down", self._name, extra={"reason": type(error).__name__})
        self._tell()

    def _close(self) -> None:
        self._is_open = False
        self._era += 1
        if self._failing_since is not None:
            down_s = (datetime.now(UTC) - self._failing_since).total_seconds()
            _log.warning("%s is back", self._name, extra={"down_s": round(down_s, 1)})
        spread_s = min(_WAKE_SPREAD_S * len(self._sleepers), _MAX_WAKE_SPREAD_S)
        for sleeper in self._sleepers:
            if not sleeper.done():
                sleeper.set_result(spread_s)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._on_change(not self._is_open)


class GuardedStore:
    """An `ObjectStore` behind a breaker: while it is down, every call raises `StorageUnavailable` at once.

    Args:
        store: The real one; closed with this.
        on_change: See `CircuitBreaker`, as the two below.

    Attributes:
        breaker: Says whether the store is down.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        on_change: Callable[[bool], None] = _ignore,
        first_pause_s: float = FIRST_PAUSE_S,
        max_pause_s: float = MAX_PAUSE_S,
    ) -> None:
        self._store = store
        self._watching: asyncio.Task[None] | None = None
        self.breaker = CircuitBreaker(
            "object storage",
            failures=(StorageUnavailable, StorageRefused, StorageTimeout),
            answers=(ObjectNotFound, ObjectTooLarge),
            refusal=StorageUnavailable,
            first_pause_s=first_pause_s,
            max_pause_s=max_pause_s,
            on_change=on_change,
        )

    async def get(self, key: str, max_bytes: int) -> bytes:
        """See `ObjectStore.get`."""
        with self.breaker.attempt():
            return await self._store.get(key, max_bytes)

    async def put(self, key: str, data: bytes, content_type: str) -> None:
        """See `ObjectStore.put`."""
        with self.breaker.attempt():
            await self._store.put(key, data, content_type)

    async def exists(self, key: str) -> bool:
        """See `ObjectStore.exists`."""
        with self.breaker.attempt():
            return await self._store.exists(key)

    def public_url(self, key: str) -> str:
        """See `ObjectStore.public_url`."""
        return self._store.public_url(key)

    def watch(self) -> None:
        """Begin to look whether the store is there when nobody calls it. Needs a running event loop."""
        self._watching = asyncio.create_task(
            self.breaker.watch(lambda: self.exists(PROBE_KEY)), name="storage-watch"
        )

    async def aclose(self) -> None:
        """See `ObjectStore.aclose`."""
        await _end(self._watching)
        await self._store.aclose()


class GuardedTasks:
    """A `TaskStore` behind a breaker: while it is down, every call raises `TaskStoreUnavailable` at once.

    Args:
        tasks: The real one; closed with this.
        on_change: See `CircuitBreaker`, as the two below.

    Attributes:
        breaker: Says whether the store is down.
    """

    def __init__(
        self,
        tasks: TaskStore,
        *,
        on_change: Callable[[bool], None] = _ignore,
        first_pause_s: float = FIRST_PAUSE_S,
        max_pause_s: float = MAX_PAUSE_S,
    ) -> None:
        self._tasks = tasks
        self._watching: asyncio.Task[None] | None = None
        self.breaker = CircuitBreaker(
            "the store of the rows",
            failures=(TaskStoreUnavailable, TaskStoreTimeout),
            answers=(TaskNotFound, TaskConflict, TaskRowRefused),
            refusal=TaskStoreUnavailable,
            first_pause_s=first_pause_s,
            max_pause_s=max_pause_s,
            on_change=on_change,
        )

    async def start(self, task: TaskInputs) -> None:
        """See `TaskStore.start`."""
        with self.breaker.attempt():
            await self._tasks.start(task)

    async def finish(self, task: TaskInputs, result: TaskResult) -> None:
        """See `TaskStore.finish`."""
        with self.breaker.attempt():
            await self._tasks.finish(task, result)

    async def fail(self, task: TaskInputs, code: str, message: str) -> None:
        """See `TaskStore.fail`."""
        with self.breaker.attempt():
            await self._tasks.fail(task, code, message)

    async def get(self, task_id: str) -> TaskRow | None:
        """See `TaskStore.get`."""
        with self.breaker.attempt():
            return await self._tasks.get(task_id)

    def watch(self) -> None:
        """Begin to look whether the store is there when nobody calls it. Needs a running event loop."""
        self._watching = asyncio.create_task(
            self.breaker.watch(lambda: self.get(PROBE_TASK_ID)), name="tasks-watch"
        )

    async def aclose(self) -> None:
        """See `TaskStore.aclose`."""
        await _end(self._watching)
        await self._tasks.aclose()


async def _end(watch: asyncio.Task[None] | None) -> None:
    if watch is not None:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch


def _told_pause_s(error: Exception) -> float:
    """How long the dependency asked to be left alone; 0 if it did not."""
    told_s: float | None = getattr(error, "retry_after_s", None)
    return min(told_s or 0.0, MAX_TOLD_PAUSE_S)


def _is_nobody_there(error: BaseException | None) -> bool:
    """True if at the bottom of the error nobody listened, or the host's name does not resolve."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError | socket.gaierror):
            return True
        if isinstance(error, BaseExceptionGroup):  # several addresses of one host were tried
            return all(_is_nobody_there(each) for each in error.exceptions)
        error = error.__cause__ or error.__context__
    return False
