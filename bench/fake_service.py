"""Two BentoML services around a model that only takes time: what `bench/batching.py` measures.

Each `*Api` answers `POST /predict` with the size of the batch that the item was in.

- `TunedApi` is wired as the real service is: the same client, wire format and gate, the same decorators.
- `ConfiguredApi` calls through `depends()`, with everything set that settings alone can mend.
- `PlainApi` is what BentoML's documentation shows: `depends()` and defaults.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import bentoml
import numpy as np
from bentoml.validators import ContentType
from pydantic import BaseModel, ConfigDict
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from api.runner_link import ITEMS_PER_REQUEST, BatchGate, RunnerClient, SegmentRequest, SegmentResponse
from bench.fake_model import MAX_BATCH_SIZE, OFF_VARIABLE, SIDE_PX_VARIABLE, run_batch
from sam3_runner.types import Prompt, SegmentItem, SegmentResult


class Item(BaseModel):
    """An item for BentoML's own proxy, which takes pydantic models."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    text_prompt: str
    pixels: Any


class Body(BaseModel):
    """What the load generator sends."""

    image_url: str
    text_prompt: str
    user_id: str
    task_id: str


def make_pixels() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The image of every item."""
    side = int(os.environ.get(SIDE_PX_VARIABLE, "1"))
    return np.zeros((side, side, 3), np.uint8)


def is_off(part: str) -> bool:
    """Whether this part of the tuned link is to be left out."""
    return part in os.environ.get(OFF_VARIABLE, "").split(",")


class OpenGate(BatchGate):
    """No gate: whoever comes goes in."""

    async def enter(self, items: int) -> None:
        """Pass."""


QUIET: dict[str, Any] = {
    "logging": {"access": {"enabled": False}},
    "metrics": {"enabled": False},
    "tracing": {"excluded_urls": ".*"},
}


@bentoml.service(**QUIET)
class TunedRunner:
    """The fake model behind BentoML's adaptive batching, as `Sam3Runner` is made."""

    def __init__(self) -> None:
        self.gate = OpenGate(MAX_BATCH_SIZE) if is_off("gate") else BatchGate(MAX_BATCH_SIZE)
        self._device_thread = ThreadPoolExecutor(1, "device")
        sys.setswitchinterval(0.0005)  # the device's thread need not wait 5 ms for the interpreter
        gc.freeze()

    @bentoml.api(
        batchable=True,
        max_batch_size=MAX_BATCH_SIZE,
        max_latency_ms=600_000,
        input_spec=SegmentRequest,
        output_spec=SegmentResponse,
    )
    async def segment(self, items: list[SegmentItem]) -> list[SegmentResult]:
        """One batch."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._device_thread, self._run, items)
        finally:
            self.gate.batch_done()

    def _run(self, items: Sequence[SegmentItem]) -> list[SegmentResult]:
        run_batch(len(items))
        return [SegmentResult(batch_size=len(items))] * len(items)


async def tuned_predict(request: Request) -> JSONResponse:
    """One item."""
    body = json.loads(await request.body())
    prompts = (Prompt(body["text_prompt"]),)
    result = await request.app.state.runner.segment(
        SegmentItem(request.app.state.pixels, (480, 640), prompts)
    )
    return JSONResponse({"batch_size": result.batch_size})


tuned_app = Starlette(routes=[Route("/predict", tuned_predict, methods=["POST"])])


@bentoml.service(**QUIET)
@bentoml.asgi_app(tuned_app, path="/")
class TunedApi:
    """The HTTP side, as `S3Backend` is made."""

    runner = bentoml.depends(TunedRunner)

    def __init__(self) -> None:
        url: str | None = TunedRunner.url  # type: ignore[attr-defined]  # a `bentoml.Service` by now
        assert url is not None, "served without its runner"
        together = 1 if is_off("sharing") else ITEMS_PER_REQUEST
        tuned_app.state.runner = RunnerClient(url, items_per_request=together)
        tuned_app.state.pixels = make_pixels()
        gc.freeze()


@bentoml.service(**QUIET, runner_connection={"max_requests": 10**9, "max_age": 1e9})
class ConfiguredRunner:
    """The fake model; its answer carries its media type, so that no schema is made to find it."""

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_SIZE, max_latency_ms=600_000)
    def segment(
        self, items: list[Item]
    ) -> Annotated[list[int], ContentType("application/vnd.bentoml+pickle")]:
        """One batch."""
        run_batch(len(items))
        return [len(items)] * len(items)


@bentoml.service(**QUIET)
class ConfiguredApi:
    """The HTTP side, calling through `depends()`."""

    runner = bentoml.depends(ConfiguredRunner)

    def __init__(self) -> None:
        self._pixels = make_pixels()

    @bentoml.api
    async def predict(self, body: Body, /) -> Annotated[dict[str, int], ContentType("application/json")]:
        """One item."""
        item = Item(text_prompt=body.text_prompt, pixels=self._pixels)
        sizes = await self.runner.to_async.segment([item])
        return {"batch_size": sizes[0]}


@bentoml.service
class PlainRunner:
    """The fake model, with BentoML's defaults."""

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_SIZE)
    def segment(self, items: list[Item]) -> list[int]:
        """One batch."""
        run_batch(len(items))
        return [len(items)] * len(items)


@bentoml.service
class PlainApi:
    """The HTTP side, with BentoML's defaults."""

    runner = bentoml.depends(PlainRunner)

    def __init__(self) -> None:
        self._pixels = make_pixels()

    @bentoml.api
    async def predict(self, body: Body, /) -> dict[str, int]:
        """One item."""
        item = Item(text_prompt=body.text_prompt, pixels=self._pixels)
        sizes = await self.runner.to_async.segment([item])
        return {"batch_size": sizes[0]}
