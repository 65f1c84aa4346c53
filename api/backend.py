"""Puts the parts of the backend together as the settings say, and takes them apart again."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from urllib.parse import urlsplit

from api.access import KeyCheck
from api.config import ConfigurationError, Settings
from api.errors import ModelNotReady, code_of
from api.lifecycle import shared_file
from api.limits import InFlight
from api.metrics import RequestMetrics
from api.readiness import RunnerWatch, WatchedRunner
from api.runner_link import ITEMS_PER_REQUEST, RunnerClient, RunnerLost, RunnerTimedOut
from sam3_runner.errors import CheckpointError
from sam3_runner.images import ImageLimits
from sam3_runner.sandbox import ImageSandbox
from sam3_runner.text import PromptChecker
from storage import ImageUrls, ObjectStore
from storage.errors import StorageError, StorageRefused, StorageTimeout, StorageUnavailable
from storage.keys import PARTIAL_PREFIX
from storage.local import LocalStore
from tasks.breaker import MAX_TOLD_PAUSE_S, CircuitBreaker, GuardedStore, GuardedTasks
from tasks.errors import (
    JournalTooNew,
    JournalUnavailable,
    TaskError,
    TaskStoreTimeout,
    TaskStoreUnavailable,
    WorkerStops,
)
from tasks.executor import RetryRules, TaskExecutor
from tasks.journal import Journal
from tasks.journal_salvage import salvage
from tasks.local import LocalTasks
from tasks.pipeline import Pipeline
from tasks.store import TaskStore
from tasks.supabase import SupabaseTasks

logger = logging.getLogger("api")

# Docker waits 10 s before it kills, unless told otherwise (docs/deploy.md does); the journal has what is not done.
SHUTDOWN_GRACE_S = 25.0


@dataclass(frozen=True, slots=True)
class Backend:
    """What the routes work with; one per process.

    Attributes:
        settings: What everything was made from.
        key_check: What a guarded path must pass.
        metrics: Of this process.
        in_flight: How much is taken in at once.
        limits: Of image files.
        codec_pool: Threads for what takes the CPU.
        sandbox: Processes that read what callers send as images.
        prompts: Checked before anything is claimed.
        store: Images and masks, behind a circuit breaker.
        tasks: Rows, behind another.
        client: Of the runner's process.
        watch: Whether the runner is ready.
        journal: Of the tasks that this process accepted or took over.
        executor: Carries them through.
    """

    settings: Settings
    key_check: KeyCheck
    metrics: RequestMetrics
    in_flight: InFlight
    limits: ImageLimits
    codec_pool: ThreadPoolExecutor
    sandbox: ImageSandbox
    prompts: PromptChecker
    store: GuardedStore
    tasks: GuardedTasks
    client: RunnerClient
    watch: RunnerWatch
    journal: Journal
    executor: TaskExecutor

    def require_running(self) -> None:
        """Turn a request away once this process is about to stop.

        Raises:
            WorkerStops: it is.
        """
        if self.executor.is_draining:
            raise WorkerStops("this process stops")

    async def require_room(self) -> None:
        """Turn a request away, before its body is read, that would not be accepted.

        Raises:
            WorkerStops: this process is about to stop.
            BacklogFull: too many tasks are under way already.
            JournalUnavailable: none can be accepted.
        """
        self.require_running()
        await self.executor.require_room()

    async def drain(self) -> None:
        """Turn new requests away, and let what runs end."""
        await self.executor.drain(SHUTDOWN_GRACE_S)

    def start(self) -> None:
        """Begin to look after what this needs, and for tasks that nobody carries. Needs a running event loop."""
        self.sandbox.start()
        self.watch.start()
        self.store.watch()
        self.tasks.watch()
        self.executor.start()

    async def tasks_waiting(self) -> dict[str, int]:
        """How many accepted tasks of this host are not finished, by state; empty when nobody can tell."""
        try:
            return await self.journal.counts()
        except JournalUnavailable:
            return {}

    async def dependencies(self) -> dict[str, Any]:
        """What `/health` says about what this needs; asks none of them."""
        return {
            "storage": _health_of(self.store.breaker),
            "tasks": _health_of(self.tasks.breaker),
            "journal": await self._journal_health(),
        }

    async def _journal_health(self) -> dict[str, Any]:
        waiting = await self.tasks_waiting()
        is_ok = bool(waiting) and self.journal.is_writable
        return {"status": "ok" if is_ok else "down", "waiting": sum(waiting.values())}

    async def aclose(self) -> None:
        """Leave to the journal what still runs, then free processes, threads and connections."""
        await self.executor.aclose()
        await self.journal.aclose()
        await self.sandbox.aclose()
        await self.watch.aclose()
        await self.client.aclose()
        await self.tasks.aclose()
        await self.store.aclose()
        self.codec_pool.shutdown()


def make_backend(settings: Settings, runner_url: str, own_url: str) -> Backend:
    """Make all parts; nothing is connected yet.

    Args:
        settings: Checked.
        runner_url: Of the runner's service.
        own_url: Where this service listens, for links to `/files` if the settings do not say better.

    Raises:
        ConfigurationError: a local part cannot use `S3_DATA_DIR`; in one line that names it.
    """
    base_url = settings.public_url or own_url
    client = RunnerClient(
        runner_url,
        timeout_s=settings.task_deadline_s,  # callers who wait have their own
        items_per_request=min(ITEMS_PER_REQUEST, settings.max_batch_size),
    )
    watch = RunnerWatch(client.info)
    limits = ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="codec")
    metrics = RequestMetrics()
    store = GuardedStore(make_store(settings, base_url), on_change=metrics.tasks.storage_is_up)
    tasks = GuardedTasks(make_tasks(settings), on_change=metrics.tasks.rows_are_up)
    sandbox = ImageSandbox(limits, processes=decoders_per_worker(settings.api_workers))
    urls = make_urls(settings, base_url)
    runner = WatchedRunner(client, watch)
    pipeline = Pipeline(store, tasks, runner, urls, sandbox, limits, codec_pool=pool)
    journal = make_journal(settings)
    executor = TaskExecutor(
        journal,
        pipeline,
        retry_rules(watch, store.breaker, tasks.breaker),
        code_of=code_of,
        observer=metrics.tasks,
        deadline_s=settings.task_deadline_s,
        max_unfinished=settings.max_backlog,
        max_running=math.ceil(2 * settings.max_batch_size / settings.api_workers),
    )
    return Backend(
        settings=settings,
        key_check=make_key_check(settings),
        metrics=metrics,
        in_flight=InFlight(settings.max_in_flight, shared_file("in-flight")),
        limits=limits,
        codec_pool=pool,
        sandbox=sandbox,
        prompts=PromptChecker.from_checkpoint(settings.weights_path),
        store=store,
        tasks=tasks,
        client=client,
        watch=watch,
        journal=journal,
        executor=executor,
    )


def retry_rules(watch: RunnerWatch, storage: CircuitBreaker, rows: CircuitBreaker) -> RetryRules:
    """What passes by itself, and when to look again."""

    async def pause(error: BaseException, seconds: float) -> None:
        told_s: float = getattr(error, "retry_after_s", None) or 0.0
        seconds = max(seconds, min(told_s, MAX_TOLD_PAUSE_S))
        if isinstance(error, ModelNotReady | RunnerLost):
            await watch.pause(seconds)
        elif isinstance(error, StorageError):
            await storage.pause(seconds)
        elif isinstance(error, TaskError):
            await rows.pause(seconds)
        else:
            await asyncio.sleep(seconds)

    suspicious = (RunnerLost,)
    # A refused key too: whoever mends it within the deadline loses nothing.
    storage_errors = (StorageUnavailable, StorageRefused, StorageTimeout)
    passing = (
        *storage_errors,
        TaskStoreUnavailable,
        TaskStoreTimeout,
        ModelNotReady,
        RunnerTimedOut,
        RunnerLost,
    )
    return RetryRules(passing, suspicious, pause)


def prepare_journal(settings: Settings) -> None:
    """Once, before any process opens the journal: carry what is readable out of a damaged one.

    Raises:
        ConfigurationError: a newer version of this service wrote it.
    """
    try:
        salvage(_journal_dir(settings))
    except JournalTooNew as error:
        raise _data_dir_error(settings, str(error)) from error
    except JournalUnavailable as error:  # a full disk, say: what runs is carried on, what is new refused
        logger.error("the journal cannot be used: no task is accepted: %s", error)


def make_journal(settings: Settings) -> Journal:
    """The journal of accepted tasks, shared by all processes of this host."""
    return Journal(_journal_dir(settings))


def _health_of(breaker: CircuitBreaker) -> dict[str, str | None]:
    since, failure = breaker.since, breaker.last_failure
    if since is None or failure is None:
        return {"status": "ok", "since": None, "reason": None}
    return {"status": "down", "since": since.isoformat(), "reason": code_of(failure())[0]}


def make_key_check(settings: Settings) -> KeyCheck:
    """What a guarded path must pass."""
    public_host = None if settings.public_url is None else urlsplit(settings.public_url).hostname
    return KeyCheck(
        settings.api_keys,
        own_hosts=() if public_host is None else (public_host,),
        origins=settings.cors_origins,
    )


def decoders_per_worker(api_workers: int) -> int:
    """Decoding processes of one web worker: all workers' together as many as cores, within 2 to 8 each.

    Two at least, so that an image that hangs its decoder does not hold up the others.
    """
    return max(2, min(8, len(os.sched_getaffinity(0)) // api_workers))


def make_store(settings: Settings, base_url: str) -> ObjectStore:
    """R2 if it is configured, else a local directory."""
    if settings.r2_endpoint is None:
        with _data_dir_errors(settings):
            return LocalStore(_files_dir(settings), base_url)
    from storage.r2 import R2Store  # boto3 takes half a second that local mode need not wait

    return R2Store(
        settings.r2_endpoint,
        settings.r2_bucket,
        _value(settings, "r2_access_key_id") or "",
        _value(settings, "r2_secret_access_key") or "",
        public_url=settings.r2_public_url,
    )


def make_urls(settings: Settings, base_url: str) -> ImageUrls:
    """Which image URLs are ours."""
    if settings.r2_endpoint is None:
        return ImageUrls.for_local(base_url)
    return ImageUrls.for_r2(
        endpoint=settings.r2_endpoint, bucket=settings.r2_bucket, public_url=settings.r2_public_url
    )


def make_tasks(settings: Settings) -> TaskStore:
    """Supabase if it is configured, else SQLite."""
    if settings.supabase_url is None:
        with _data_dir_errors(settings):
            return LocalTasks(_tasks_file(settings))
    return SupabaseTasks(settings.supabase_url, _value(settings, "supabase_service_key") or "")


def check_settings(settings: Settings) -> None:
    """Find what would stop a worker from starting, before any worker is started.

    Raises:
        ConfigurationError: in one line, naming the variable.
    """
    settings.check_weights()
    try:
        PromptChecker.from_checkpoint(settings.weights_path)
    except CheckpointError as error:
        raise ConfigurationError(f"SAM3_WEIGHTS_PATH is wrong: {error}") from None
    try:
        make_urls(settings, settings.public_url or "http://localhost")
    except ValueError as error:
        variables = "R2_ENDPOINT, R2_BUCKET or R2_PUBLIC_URL" if settings.uses_r2 else "S3_PUBLIC_URL"
        raise ConfigurationError(f"{variables} is wrong: {error}") from None
    if settings.supabase_url is not None:
        try:
            make_tasks(settings)
        except ValueError as error:
            raise ConfigurationError(f"SUPABASE_URL or SUPABASE_SERVICE_KEY is wrong: {error}") from None
    _check_writable(settings, settings.data_dir)  # the journal, and SQLite beside its own files
    if not settings.uses_r2:
        _check_writable(settings, _files_dir(settings))
    if not settings.uses_supabase:
        _check_tasks_file(settings)


def _check_writable(settings: Settings, directory: Path) -> None:
    """Make a directory and write a file in it as `LocalStore` does; the file is gone afterwards.

    A full disk is no mistake in the settings: the service starts, refuses new tasks and works again with space.
    """
    with _data_dir_errors(settings):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(prefix=PARTIAL_PREFIX, dir=directory) as probe:
                probe.write(b"probe")
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            logger.error("the disk of S3_DATA_DIR is full")


def _check_tasks_file(settings: Settings) -> None:
    """Open the database once, and see that it can be written: SQLite opens a read-only file without a word."""
    asyncio.run(make_tasks(settings).aclose())
    path = _tasks_file(settings)
    if not os.access(path, os.W_OK):
        raise _data_dir_error(settings, f"let the user {os.geteuid()} write {path.name} in it")


@contextmanager
def _data_dir_errors(settings: Settings) -> Iterator[None]:
    try:
        yield
    except (OSError, StorageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        advice = f"name a directory where the user {os.geteuid()} may write ({reason})"
        raise _data_dir_error(settings, advice) from error
    except TaskError as error:
        advice = f"move {_tasks_file(settings).name} in it away if it is damaged ({error})"
        raise _data_dir_error(settings, advice) from error


def _data_dir_error(settings: Settings, advice: str) -> ConfigurationError:
    return ConfigurationError(f"S3_DATA_DIR is {str(settings.data_dir)!r}, which cannot be used: {advice}.")


def _files_dir(settings: Settings) -> Path:
    return settings.data_dir / "files"


def _journal_dir(settings: Settings) -> Path:
    return settings.data_dir / "journal"


def _tasks_file(settings: Settings) -> Path:
    return settings.data_dir / "tasks.sqlite3"


def _value(settings: Settings, name: str) -> str | None:
    secret = getattr(settings, name)
    return None if secret is None else secret.get_secret_value()
