"""Prometheus metrics over all processes of the service.

All processes of one `bentoml serve` have the same `PROMETHEUS_MULTIPROC_DIR` (`api/lifecycle.py`); the Prometheus
client then keeps each process's values in a file there, and any process can add them all up. One scrape of any web
worker sees the other workers and the runner too. Counters and histograms stay right when a process dies; of
gauges, the file that it leaves behind is removed. What all processes share, such as the tasks of the journal,
is asked for at the scrape, and in no file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from api.requests import RequestRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STAGES = ("download", "decode", "queue", "infer", "encode", "upload", "row_update")
OUTCOMES = ("done", "error")
WAITING_STATES = ("accepted", "computed", "failed")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256)


class RequestMetrics:
    """What the web workers count.

    Attributes:
        tasks: What becomes of accepted tasks.
    """

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.tasks = TaskMetrics(registry)
        self._requests = Counter(
            "s3_requests", "Requests answered.", ["method", "route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "s3_request_seconds",
            "Seconds from request to response.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._errors = Counter("s3_errors", "Error responses by code.", ["code"], registry=registry)
        self._auth_failures = Counter(
            "s3_auth_failures", "Requests with a missing or wrong key.", registry=registry
        )

    def observe(self, request: RequestRecord) -> None:
        """Count one answered request."""
        method = request.method if request.method in _METHODS else "other"  # callers may invent any
        self._requests.labels(method, request.route, str(request.status)).inc()
        self._seconds.labels(request.route).observe(request.elapsed_s)
        if request.status >= 400:
            self._errors.labels(request.outcome).inc()
        if request.status == 401:
            self._auth_failures.inc()

    def exposition(self, waiting: Mapping[str, int]) -> bytes:
        """Everything that all processes counted, in the text format.

        Args:
            waiting: Accepted tasks that are not finished, by state; other states are left out.
        """
        at_scrape = CollectorRegistry()
        at_scrape.register(_Waiting(waiting))
        counted = self._registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            directory = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
            _forget_dead_processes(directory)
            counted = CollectorRegistry()
            MultiProcessCollector(counted, str(directory))
        return generate_latest(counted) + generate_latest(at_scrape)


class TaskMetrics:
    """What becomes of accepted tasks, and whether what they need is there.

    Args:
        registry: Of this process.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ended = Counter("s3_tasks", "Tasks that ended.", ["outcome"], registry=registry)
        self._retries = Counter(
            "s3_task_retries", "Steps of tasks that were tried again.", ["step"], registry=registry
        )
        self._takeovers = Counter(
            "s3_task_takeovers", "Tasks taken over from a worker that died.", registry=registry
        )
        self._is_up = Gauge(
            "s3_dependency_up",
            "0 if a web worker takes the dependency to be down, else 1.",
            ["dependency"],
            multiprocess_mode="livemin",
            registry=registry,
        )
        self._stages = Histogram(
            "s3_stage_seconds",
            "Seconds spent in one stage of a segmentation; stages overlap.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        for outcome in OUTCOMES:
            self._ended.labels(outcome)
        for stage in STAGES:
            self._stages.labels(stage)
        self.storage_is_up(True)
        self.rows_are_up(True)

    def ended(self, outcome: str, stage_ms: Mapping[str, float]) -> None:
        """Count a task that ended, as `done` or as `error`, and the time of each stage that it came to."""
        self._ended.labels(outcome).inc()
        for stage, ms in stage_ms.items():
            if stage in STAGES and ms > 0:  # 0: it did not come so far
                self._stages.labels(stage).observe(ms / 1000)

    def retried(self, step: str) -> None:
        """Count another try of a step of the pipeline."""
        self._retries.labels(step).inc()

    def taken_over(self) -> None:
        """Count a task that was taken over from a worker that died."""
        self._takeovers.inc()

    def storage_is_up(self, is_up: bool) -> None:
        """Say whether object storage can be used, as far as this process knows."""
        self._is_up.labels("storage").set(is_up)

    def rows_are_up(self, is_up: bool) -> None:
        """Say whether the rows can be read and written, as far as this process knows."""
        self._is_up.labels("tasks").set(is_up)


class BatchMetrics:
    """What the runner counts."""

    def __init__(self) -> None:
        self._sizes = Histogram(
            "s3_batch_size",
            "Items in one batch of the model.",
            buckets=_BATCH_SIZES,
            registry=CollectorRegistry(),
        )

    def observe(self, size: int) -> None:
        """Count one batch."""
        self._sizes.observe(size)


class _Waiting(Collector):
    """Tasks of the whole host: not a value of any one process."""

    def __init__(self, waiting: Mapping[str, int]) -> None:
        self._waiting = waiting

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "s3_tasks_waiting", "Accepted tasks of this host that are not finished.", labels=["state"]
        )
        for state in WAITING_STATES:
            family.add_metric([state], self._waiting.get(state, 0))
        yield family


def _forget_dead_processes(directory: Path) -> None:
    """Remove the gauges of processes that are gone, or what a worker said before it was killed would stay."""
    for path in directory.glob("gauge_live*_*.db"):
        pid = int(path.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)  # another worker may be at it too
        except PermissionError:
            continue
