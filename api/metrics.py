"""Prometheus metrics over all processes of the service.

BentoML gives every process of one `bentoml serve` the same `PROMETHEUS_MULTIPROC_DIR`; the Prometheus client
then keeps each process's values in a file there, and any process can add them all up. One scrape of any web
worker sees the other workers and the runner too. Only counters and histograms are used: they stay right when
a process dies.
"""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from api.requests import RequestRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STAGES = ("download", "decode", "queue", "infer", "encode", "upload", "row_update")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256)


class RequestMetrics:
    """What the web workers count."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
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
        self._stages = Histogram(
            "s3_stage_seconds",
            "Seconds spent in one stage of a segmentation; stages overlap.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._errors = Counter("s3_errors", "Error responses by code.", ["code"], registry=registry)
        self._auth_failures = Counter(
            "s3_auth_failures", "Requests with a missing or wrong key.", registry=registry
        )
        for stage in STAGES:
            self._stages.labels(stage)

    def observe(self, request: RequestRecord) -> None:
        """Count one answered request."""
        method = request.method if request.method in _METHODS else "other"  # callers may invent any
        self._requests.labels(method, request.route, str(request.status)).inc()
        self._seconds.labels(request.route).observe(request.elapsed_s)
        for stage, ms in request.stage_ms.items():
            if stage in STAGES and ms > 0:  # 0: the request did not come so far
                self._stages.labels(stage).observe(ms / 1000)
        if request.status >= 400:
            self._errors.labels(request.outcome).inc()
        if request.status == 401:
            self._auth_failures.inc()

    def exposition(self) -> bytes:
        """Everything that all processes counted, in the text format."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return generate_latest(together)


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
