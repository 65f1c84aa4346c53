"""The routes, on real local stores, without BentoML around them and without a model."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.middleware.exceptions import ExceptionMiddleware

from api.access import KeyCheck
from api.app import create_app
from api.errors import code_of
from api.limits import InFlight
from api.metrics import RequestMetrics
from api.middleware import EnvelopeMiddleware
from api.readiness import RunnerWatch
from sam3_runner import rle
from sam3_runner.checkpoint import DEMO_CHECKPOINT
from sam3_runner.images import ImageLimits
from sam3_runner.masks import encode_png
from sam3_runner.sandbox import ImageSandbox
from sam3_runner.text import PromptChecker
from sam3_runner.types import ModelInfo, SegmentItem, SegmentResult
from storage import ImageUrls
from storage.local import LocalStore
from tasks.errors import TaskStoreUnavailable
from tasks.executor import RetryRules, TaskExecutor
from tasks.journal import Journal
from tasks.local import LocalTasks
from tasks.pipeline import Pipeline
from tasks.store import TaskInputs, TaskRow
from tests.api.contract import read_contract

PREDICT, BATCH = "/api/v1/predict", "/api/v1/predict/batch"
LIMITS = ImageLimits(max_bytes=2_000, max_pixels=1_000)


class Flaky(LocalTasks):
    """Local rows that cannot be written for a while."""

    is_down = False

    async def fail(self, task: TaskInputs, code: str, message: str) -> None:
        if self.is_down:
            raise TaskStoreUnavailable("down")
        await super().fail(task, code, message)


@dataclass
class Face:
    """A client of the routes, and what is below them."""

    client: httpx.AsyncClient
    store: LocalStore
    tasks: Flaky

    async def row(self, task_id: str) -> TaskRow:
        row = await self.tasks.get(task_id)
        assert row is not None
        return row


async def nothing_is_loaded() -> Any:
    raise ConnectionError


class NoRunner:
    """A model that is not there."""

    async def segment(self, item: SegmentItem) -> SegmentResult:
        raise ConnectionError

    async def info(self) -> ModelInfo:
        raise ConnectionError


async def pause(error: BaseException, seconds: float) -> None:
    await asyncio.sleep(seconds)


@pytest.fixture
async def face(tmp_path: Path) -> AsyncIterator[Face]:
    store, tasks = LocalStore(tmp_path / "files", "http://localhost"), Flaky(tmp_path / "tasks.sqlite3")
    app, sandbox = create_app(is_local=True), ImageSandbox(LIMITS, processes=1)
    watch, journal = RunnerWatch(nothing_is_loaded), Journal(tmp_path / "journal")
    with ThreadPoolExecutor(1) as pool:
        urls = ImageUrls.for_local("http://localhost")
        pipeline = Pipeline(store, tasks, NoRunner(), urls, sandbox, LIMITS, codec_pool=pool)
        rules = RetryRules((), (), pause, first_pause_s=0.02, max_pause_s=0.1)
        metrics = RequestMetrics()
        executor = TaskExecutor(journal, pipeline, rules, code_of=code_of, observer=metrics.tasks)
        app.state.backend = SimpleNamespace(
            key_check=KeyCheck(()),
            metrics=metrics,
            in_flight=InFlight(2),
            limits=LIMITS,
            codec_pool=pool,
            sandbox=sandbox,
            prompts=PromptChecker.from_checkpoint(DEMO_CHECKPOINT),
            store=store,
            tasks=tasks,
            watch=watch,
            executor=executor,
            require_room=executor.require_room,
        )
        below = ExceptionMiddleware(app)  # as BentoML's: answers 404 and 405 in plain text
        transport = httpx.ASGITransport(app=EnvelopeMiddleware(below, app.state), client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield Face(client, store, tasks)
        await executor.aclose()
        await journal.aclose()
        await sandbox.aclose()
        await tasks.aclose()
        await store.aclose()


def ask(prompt: str, **other: Any) -> dict[str, Any]:
    return {"image_url": "uploads/a.jpg", "text_prompt": prompt, "user_id": "u-1", "task_id": "t-1", **other}


def ask_many(*prompts: str) -> dict[str, Any]:
    body = ask("", prompts=list(prompts))
    del body["text_prompt"]
    return body


REFUSED = [
    pytest.param(PREDICT, ask(" "), "INVALID_PROMPT", id="blank"),
    pytest.param(PREDICT, ask("\u200b\u00ad"), "INVALID_PROMPT", id="invisible"),
    pytest.param(PREDICT, ask("<|endoftext|>"), "INVALID_PROMPT", id="special token"),
    pytest.param(PREDICT, ask("dog " * 100), "INVALID_PROMPT", id="too long"),
    pytest.param(BATCH, ask_many("cat", "\ufeff"), "INVALID_PROMPT", id="one of a batch"),
    pytest.param(BATCH, ask_many(*["cat"] * 33), "TOO_MANY_PROMPTS", id="too many"),
]


@pytest.mark.parametrize(("path", "body", "code"), REFUSED)
async def test_prompts_that_are_refused_leave_an_error_row(
    face: Face, path: str, body: dict[str, Any], code: str
) -> None:
    response = await face.client.post(path, json=body, headers={"X-Request-ID": "r-1"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (422, code)
    row = await face.row("t-1")
    assert (row.status, row.metadata["request_id"]) == ("error", "r-1")
    assert row.metadata["error"] == {"code": code, "message": error["message"]}
    assert code in read_contract().leaves_row


async def test_refused_prompts_leave_a_row_with_other_inputs_alone(face: Face) -> None:
    await face.tasks.start(TaskInputs("t-1", "u-1", "uploads/a.jpg", ("cat",), 0.5))
    assert (await face.client.post(PREDICT, json=ask(" "))).status_code == 422
    assert (await face.row("t-1")).status == "processing"


async def test_the_row_of_refused_prompts_is_written_later_if_it_cannot_be_now(
    face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.executor.TELL_WAIT_S", 0.05)
    face.tasks.is_down = True
    assert (await face.client.post(PREDICT, json=ask(" "))).status_code == 422
    assert await face.tasks.get("t-1") is None
    face.tasks.is_down = False
    async with asyncio.timeout(30):
        while await face.tasks.get("t-1") is None:
            await asyncio.sleep(0.05)
    assert (await face.row("t-1")).status == "error"


@pytest.mark.parametrize("body", [ask(""), ask("cat\n"), ask("cat", score_threshold=2), ask("cat", more=1)])
async def test_a_field_of_the_wrong_form_touches_no_row(face: Face, body: dict[str, Any]) -> None:
    response = await face.client.post(PREDICT, json=body)
    assert response.json()["error"]["code"] == "VALIDATION_FAILED"
    assert await face.tasks.get("t-1") is None


async def test_a_sound_request_before_the_model_is_loaded_touches_no_row(face: Face) -> None:
    response = await face.client.post(PREDICT, json=ask("cat"))
    assert response.json()["error"]["code"] == "MODEL_NOT_READY"
    assert await face.tasks.get("t-1") is None


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", PREDICT + "/"), ("POST", BATCH + "/"), ("GET", "/metrics/"), ("GET", "/files")],
)
async def test_a_path_that_is_nearly_a_route_is_none_and_nothing_redirects(
    face: Face, method: str, path: str
) -> None:
    response = await face.client.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "NOT_FOUND")
    assert "location" not in response.headers


async def test_the_document_stays_served(face: Face) -> None:
    assert (await face.client.get("/docs.json")).json()["openapi"] == "3.1.0"


async def test_a_mask_is_read_whatever_the_limits_on_images_are(face: Face) -> None:
    noise = np.random.default_rng(0).random((200, 200)) < 0.5
    png = encode_png(rle.encode_mask(noise))
    assert len(png) > LIMITS.max_bytes and noise.size > LIMITS.max_pixels
    await face.store.put("masks/t-1/0.png", png, "image/png")
    response = await face.client.get("/files/masks/t-1/0.png")
    assert (response.status_code, response.content) == (200, png)
    assert response.headers["content-type"] == "image/png"


async def test_an_upload_is_held_to_the_limits_on_images(face: Face) -> None:
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "PNG")
    await face.store.put("uploads/small.png", file.getvalue(), "image/png")
    await face.store.put("uploads/large.png", file.getvalue().ljust(3_000, b"\0"), "image/png")
    assert (await face.client.get("/files/uploads/small.png")).headers["content-type"] == "image/png"
    response = await face.client.get("/files/uploads/large.png")
    assert (response.status_code, response.json()["error"]["code"]) == (413, "IMAGE_TOO_LARGE")
