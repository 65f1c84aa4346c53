"""The playground of a service that reads pictures from R2: no upload; and what it shows while no model is there."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import uvicorn
from playwright.sync_api import expect
from pycocotools import mask as coco_mask
from starlette.middleware.exceptions import ExceptionMiddleware

from api.access import KeyCheck
from api.app import create_app
from api.limits import InFlight
from api.metrics import RequestMetrics
from api.middleware import EnvelopeMiddleware
from api.readiness import RunnerWatch
from examples.draw_shapes import SHAPES_JPG
from sam3_runner.checkpoint import DEMO_CHECKPOINT
from sam3_runner.text import PromptChecker
from sam3_runner.types import ModelInfo
from tests.conftest import free_port, wait_until
from tests.playground.conftest import OpenPage

pytestmark = pytest.mark.timeout(600)  # Chromium may have to be installed

PREDICT = "/api/v1/predict"
MASK = np.array([[0, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], np.uint8)


async def nothing_is_loaded() -> ModelInfo:
    raise ConnectionError


async def nothing() -> None:
    pass


async def knows_none(task_id: str) -> bool:
    return False


async def all_is_well() -> dict[str, object]:
    return {}


@pytest.fixture(scope="module")
def page_url() -> Iterator[str]:
    """The routes as they are with R2 configured, before the model is loaded."""
    app = create_app(is_local=False)
    app.state.backend = SimpleNamespace(
        settings=SimpleNamespace(r2_public_url="https://images.example.com/s3"),
        key_check=KeyCheck(()),
        metrics=RequestMetrics(),
        in_flight=InFlight(2),
        prompts=PromptChecker.from_checkpoint(DEMO_CHECKPOINT),
        watch=RunnerWatch(nothing_is_loaded),
        executor=SimpleNamespace(knows=knows_none),
        require_room=nothing,
        dependencies=all_is_well,
    )
    port = free_port()
    face = EnvelopeMiddleware(ExceptionMiddleware(app), app.state)
    server = uvicorn.Server(uvicorn.Config(face, port=port, log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, 30, "the routes are served")
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(30)


def test_the_policy_lets_the_page_read_from_the_bucket_and_nowhere_else(page_url: str) -> None:
    policy = httpx.get(page_url, trust_env=False).headers["content-security-policy"].split("; ")
    assert "connect-src 'self' https://images.example.com" in policy
    assert "img-src 'self' blob:" in policy and "script-src 'self'" in policy


def test_it_asks_for_a_key_of_the_bucket_and_counts_down_while_the_model_loads(open_page: OpenPage) -> None:
    watched = open_page()
    page = watched.page
    expect(page.locator("#model")).to_have_text("The model is being loaded…")
    assert not page.locator("#choose").is_visible()
    page.locator("#address").fill("uploads/desk.jpg")
    page.locator("#address").press("Enter")
    expect(page.locator("#note")).to_contain_text("masks are drawn without it")
    page.locator("#prompt").fill("red circle")
    page.keyboard.press("Enter")
    card = page.locator(".error[data-code=MODEL_NOT_READY]")
    expect(card.locator(".countdown")).to_have_text("again in 1 s")
    asked = watched.calls(PREDICT)[0]
    assert watched.bodies(PREDICT)[0]["image_url"] == "uploads/desk.jpg"
    wait_seconds = int(asked.response().headers["retry-after"])  # type: ignore[union-attr]
    page.wait_for_function(
        "() => performance.getEntriesByType('resource').filter(({ name }) => name.endsWith('/predict')).length > 1"
    )
    again = watched.calls(PREDICT)[1]
    assert again.post_data == asked.post_data  # the same task
    assert again.timing["startTime"] - asked.timing["startTime"] >= wait_seconds * 1000 - 300


def test_the_same_picture_can_be_shown_underneath_and_is_sent_nowhere(open_page: OpenPage) -> None:
    watched = open_page()
    page = watched.page
    page.locator("#file").set_input_files(SHAPES_JPG)
    expect(page.locator("#note")).to_contain_text("from its bucket only")
    page.locator("#address").fill("uploads/shapes.jpg")
    page.locator("#address").press("Enter")
    page.locator("#file").set_input_files(SHAPES_JPG)
    expect(page.locator("#frame")).to_be_visible()
    assert {request.method for request in watched.requests} == {"GET"}
    assert json.loads(page.evaluate("JSON.stringify(document.querySelector('#photo').width > 300)"))


def test_what_is_saved_holds_no_signature_of_a_url(open_page: OpenPage, page_url: str) -> None:
    page = open_page().page
    mask = {"size": [4, 5], "counts": coco_mask.encode(np.asfortranarray(MASK))["counts"].decode()}
    found = {"score": 0.9, "box_xyxy_px": [0.4, 0.2, 4.7, 3.9], "area_px": 3, "mask_rle": mask}
    answer = {"image_size": {"width": 5, "height": 4}, "instances": [found], "timings_ms": {"total": 1.0}}
    page.route(f"**{PREDICT}", lambda route: route.fulfill(json=answer))
    page.locator("#address").fill(f"{page_url}/files/uploads/my%20desk.jpg?X-Amz-Signature=secret")
    page.locator("#address").press("Enter")
    page.locator("#prompt").fill("red circle")
    page.keyboard.press("Enter")
    page.locator(".chip[data-status=done]").wait_for()
    texts = {}
    for button in ("coco", "json"):
        with page.expect_download() as download:
            page.locator(f"#download-{button}").click()
        assert download.value.suggested_filename.startswith("my desk.")
        texts[button] = Path(download.value.path()).read_text()
        assert "secret" not in texts[button]
    document = json.loads(texts["coco"])
    assert document["images"][0]["file_name"] == "my desk.jpg"
    assert document["annotations"][0]["bbox"] == [1, 1, 2, 2]
