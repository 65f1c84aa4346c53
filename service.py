"""The BentoML services: `S3Backend` answers HTTP, `Sam3Runner` owns the model, each in its own processes.

    bentoml serve service:S3Backend

BentoML wants host, port and number of workers while it imports this module, so the settings are read here.
What is wrong with them is said when the service starts, not when it is merely imported (to build a bento).
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import bentoml

from api.app import create_app
from api.backend import check_settings, make_backend, prepare_journal
from api.bento_schema import BentoSchemaMiddleware
from api.config import DEFAULT_PORT, LOOPBACK, ConfigurationError, Settings, read_settings
from api.lifecycle import (
    count_as_caller,
    count_in_memory,
    drain_before_stop,
    end_with_supervisor,
    fail_service,
    outlive_callers,
    prepare_processes,
)
from api.logs import configure_logs
from api.metrics import BatchMetrics
from api.middleware import EnvelopeMiddleware
from api.runner_link import BatchGate, OnlyOurBodies, SegmentRequest, SegmentResponse
from sam3_runner.errors import CheckpointError

if TYPE_CHECKING:
    from sam3_runner.types import SegmentItem, SegmentResult

T = TypeVar("T")

logger = logging.getLogger("service")

settings: Settings
problem: ConfigurationError | None = None
try:
    settings = read_settings()
except ConfigurationError as error:
    settings, problem = Settings.model_construct(), error

# Our own log line, metrics and time limit stand in for BentoML's; nobody asked for traces.
COMMON: dict[str, Any] = {
    "logging": {"access": {"enabled": False}},
    "metrics": {"enabled": False},
    "tracing": {"excluded_urls": ".*"},
    # Never the first to give up: the request's own limit, the error row after it, and a slow body before it.
    "traffic": {"timeout": settings.request_timeout_s + 60},
}
# "However long": the queue is bounded by the requests in flight, and each of those has its own time limit.
MAX_LATENCY_MS = 600_000
# Python's own 5 ms is how long the model's thread may wait for the interpreter while answers are written: with
# this, throughput was 3 % higher at concurrency 32 and 6 % at 64 (three noisy runs each of bench/batching.py).
SWITCH_INTERVAL_S = 0.0005
LAST_WORDS_S = 0.5


@bentoml.service(**COMMON)
class Sam3Runner:
    """The model, in a process of its own, behind BentoML's adaptive batching."""

    def __init__(self) -> None:
        # What is compiled for a GPU lies where it survives a restart; torch reads this when it is imported.
        compiled = settings.data_dir.absolute() / "compiled"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        os.environ.setdefault(
            "TRITON_CACHE_DIR", str(compiled / "triton")
        )  # its own default is in the home directory
        import torch  # only this process pays for it

        from sam3_runner.segmenter import Segmenter

        configure_logs(settings.log_level, settings.secrets())
        end_with_supervisor()
        count_in_memory()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._has_gpu = torch.cuda.is_available()
        self.gate = BatchGate(settings.max_batch_size)
        self._metrics = BatchMetrics()
        self._model_thread = ThreadPoolExecutor(1, "model")
        if settings.sam3_device == "cuda" and not self._has_gpu:
            reason = "SAM3_DEVICE is cuda, but torch sees no CUDA device: set it to cpu, or mend the driver"
            fail_service(reason)
            raise ConfigurationError(reason)
        try:
            self._segmenter = Segmenter.from_checkpoint(
                settings.weights_path,
                device=settings.sam3_device or ("cuda" if self._has_gpu else "cpu"),
                dtype=None if settings.sam3_dtype is None else getattr(torch, settings.sam3_dtype),
            )
        except CheckpointError as error:
            fail_service(f"SAM3_WEIGHTS_PATH cannot be loaded: {error}")
            raise
        self._segmenter.warm_up()
        gc.freeze()  # what is loaded now stays: spare it the full collections under load

    @bentoml.on_startup
    async def stay(self) -> None:
        """Stop after the last web worker, not beside it."""
        outlive_callers(settings.request_timeout_s + 30)

    @bentoml.api(
        batchable=True,
        max_batch_size=settings.max_batch_size,
        max_latency_ms=MAX_LATENCY_MS,
        input_spec=SegmentRequest,
        output_spec=SegmentResponse,
    )
    async def segment(self, items: list[SegmentItem]) -> list[SegmentResult]:
        """Segment one batch; what is wrong with one item comes back as its own error."""
        self._metrics.observe(len(items))
        try:
            results = await self._in_model_thread(self._segmenter.segment_batch, items)
            if any(result.error is not None for result in results):
                await self._in_model_thread(self._end_if_device_is_lost)
            return results
        finally:
            self.gate.batch_done()

    async def _in_model_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._model_thread, call, *arguments)

    def _end_if_device_is_lost(self) -> None:
        """After some CUDA errors every later call of this process fails; a new process is the only cure."""
        import torch

        try:
            torch.ones(1, device=self._segmenter.info.device).sum().item()
        except RuntimeError:
            logger.critical("the device no longer answers: this process ends, and BentoML starts another")
            threading.Timer(LAST_WORDS_S, os._exit, (1,)).start()  # once the answers are out

    @bentoml.api
    async def info(self) -> dict[str, Any]:
        """What is loaded: the fields of `ModelInfo`."""
        info = self._segmenter.info
        extra = {**info.extra, "gpu_available": str(self._has_gpu).lower()}
        return dataclasses.asdict(dataclasses.replace(info, extra=extra))


app = create_app(is_local=not settings.uses_r2)


@bentoml.service(
    **COMMON,
    workers=settings.api_workers,
    http={"host": settings.default_host if problem is None else LOOPBACK, "port": DEFAULT_PORT},
    runner_probe={"enabled": False},
)
@bentoml.asgi_app(app, path="/")
class S3Backend:
    """HTTP: from request to mask and row."""

    runner = bentoml.depends(Sam3Runner)

    def __init__(self) -> None:
        configure_logs(settings.log_level, settings.secrets())
        end_with_supervisor()
        count_in_memory()
        count_as_caller()
        runner_url, own_url = _url_of(Sam3Runner), _url_of(S3Backend)
        if runner_url is None or own_url is None:
            raise RuntimeError(
                "start with `bentoml serve service:S3Backend`: it starts the runner's process too"
            )
        try:
            self.backend = make_backend(settings, runner_url, own_url)
        except Exception as error:  # the edge of this process: the next one would fail in the same way
            fail_service(_reason(error))
            raise
        app.state.backend = self.backend
        gc.freeze()  # as in the runner

    @bentoml.on_deployment
    @staticmethod
    def prepare() -> None:
        """Once, before any worker is started: check the settings, and end here if they do not add up."""
        try:
            if problem is not None:
                raise problem
            check_settings(settings)
            prepare_journal(settings)
        except ConfigurationError as error:
            raise bentoml.exceptions.BentoMLConfigException(str(error)) from None
        # BentoML's images set this, and then no process that died is started again; here it must be.
        os.environ.pop("BENTOML_CONTAINERIZED", None)
        prepare_processes()
        for caution in settings.cautions():
            logger.warning(caution)

    @bentoml.on_startup
    async def open(self) -> None:
        """Begin to look after storage, rows and runner and to carry tasks; end gently when told to."""
        self.backend.start()
        drain_before_stop(self.backend.drain)

    @bentoml.on_shutdown
    async def close(self) -> None:
        """Let work under way end."""
        await self.backend.aclose()

    async def __is_ready__(self) -> bool:
        """What `/readyz` says."""
        return self.backend.watch.model is not None and self.backend.sandbox.is_ready


def _reason(error: Exception) -> str:
    """Why a web worker cannot be made, in one line."""
    if isinstance(error, ConfigurationError):
        return str(error)
    return " ".join(f"a web worker cannot be made: {type(error).__name__}: {error}".split())


def _url_of(service: Any) -> str | None:
    """Where a service listens; None unless `bentoml serve` started it."""
    url: str | None = service.url
    return url


_runner: Any = Sam3Runner  # a `bentoml.Service`, which the type of a decorated class does not say
_runner.add_asgi_middleware(OnlyOurBodies)
_backend: Any = S3Backend
_backend.add_asgi_middleware(EnvelopeMiddleware, state=app.state, cors_origins=settings.cors_origins)
_backend.add_asgi_middleware(BentoSchemaMiddleware)
