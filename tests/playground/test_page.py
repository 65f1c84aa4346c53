"""The playground in a real browser, on the real service: what is drawn is held against what is true of the picture."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from examples.draw_shapes import SHAPES_JPG, mask_of
from tests.conftest import ROOT, Serve, Served
from tests.playground.browser import Watched
from tests.playground.conftest import OpenPage

# Installing Chromium, the first time, is part of it.
pytestmark = pytest.mark.timeout(600)

KEY = "playground-key-0123456789"
PREDICT = "/api/v1/predict"
RED_CIRCLE = mask_of("red", "circle")
Mask = npt.NDArray[np.bool_]


@pytest.fixture(scope="module")
def service(served: Serve) -> Iterator[Served]:
    """On the embedded defaults, with a key."""
    service = served({"API_SECRET_KEY": KEY})
    yield service
    service.stop()


@pytest.fixture(scope="module")
def page_url(service: Served) -> str:
    return service.url


def give_key(page: Page, key: str = KEY) -> None:
    page.locator("#key").fill(key)
    page.locator("#key-form button[type=submit]").click()


def use(page: Page, file: Path | dict[str, Any]) -> None:
    """Choose a file; the key is asked for, since it is stored by the service."""
    page.locator("#file").set_input_files(file)  # type: ignore[arg-type]
    give_key(page)


def ask(page: Page, prompt: str) -> None:
    page.locator("#prompt").fill(prompt)
    page.keyboard.press("Enter")


def wait_answered(page: Page, *prompts: str) -> None:
    for prompt in prompts:
        label = json.dumps(prompt, ensure_ascii=False)
        page.locator(f".chip[data-status=done][data-label={label}]").wait_for()
    # Until nothing is drawn any more.
    page.wait_for_function(
        "() => performance.now() - performance.getEntriesByName('draw').at(-1).startTime > 150"
    )


def sample_page(open_page: OpenPage, *prompts: str, **options: Any) -> Watched:
    """The sample with answers to these."""
    watched = open_page(**options)
    watched.page.locator("#sample").click()
    give_key(watched.page)
    for prompt in prompts:
        ask(watched.page, prompt)
    wait_answered(watched.page, *prompts)
    return watched


def drawn(page: Page) -> Image.Image:
    """What lies over the photo, as RGBA."""
    url = page.locator("#overlay").evaluate("canvas => canvas.toDataURL('image/png')")
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGBA")


def drawn_mask(page: Page) -> Mask:
    return np.asarray(drawn(page))[..., 3] > 0


def iou(one: Mask, other: Mask) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def scaled(mask: Mask, like: Mask) -> Mask:
    size = (like.shape[1], like.shape[0])
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def saved(page: Page, button: str) -> Path:
    with page.expect_download() as download:
        page.locator(button).click()
    return Path(download.value.path()).rename(
        Path(download.value.path()).with_name(download.value.suggested_filename)
    )


# --------------------------------------------------------------------------------------------------- how it is served


def test_the_page_and_its_files_need_no_key_and_keep_to_themselves(service: Served) -> None:
    page = httpx.get(service.url, trust_env=False)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    files = set(re.findall(r'(?:src|href)="([^"]+)"', page.text))
    assert files
    for path in files:
        response = httpx.get(f"{service.url}/{path}", trust_env=False)
        assert response.status_code == 200
        assert response.headers["x-content-type-options"] == "nosniff"
        policy = response.headers["content-security-policy"]
        assert "unsafe" not in policy and "http" not in policy and "*" not in policy
        assert {"default-src 'none'", "frame-ancestors 'none'", "form-action 'none'"} <= set(
            policy.split("; ")
        )


def test_no_script_or_style_is_in_the_page_itself_and_nothing_comes_from_elsewhere() -> None:
    for path in (ROOT / "playground").iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<style|\sstyle=|\son\w+=\"|innerHTML|<script(?![^>]*\ssrc=)", text), path.name
        assert set(re.findall(r"https?://[^\s'\"`)]+", text)) <= {"http://www.w3.org/2000/svg"}, path.name


def test_what_is_no_file_of_the_page_is_not_there(service: Served) -> None:
    for name in ("index.html", "app.py", "..%2fservice.py", "%2e%2e", ""):
        response = service.client.get(f"/playground/{name}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "NOT_FOUND"), name


def test_run_lengths_are_read_as_pycocotools_reads_them(open_page: OpenPage) -> None:
    random = np.random.default_rng(0)
    masks: list[Mask] = [random.random((37, 53)) < share for share in (0.0, 0.02, 0.5, 0.98, 1.0)]
    masks += [
        np.zeros((1, 1), bool),
        np.ones((1, 4000), bool),
        np.pad(np.ones((150, 7), bool), ((9, 9), (40, 400))),
    ]
    told = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    painted = open_page().page.evaluate(
        """async (masks) => {
            const { decodeEnds, paintMask } = await import("/playground/rle.js");
            return masks.map(({ size: [height, width], counts }) => {
                const map = new Uint16Array(width * height);
                paintMask(map, width, height, decodeEnds(counts), [height, width], 1);
                return [...map];
            });
        }""",
        [{"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()} for rle in told],
    )
    for mask, values in zip(masks, painted, strict=True):
        assert np.array_equal(np.array(values, bool).reshape(mask.shape), mask)


# -------------------------------------------------------------------------------------------------- what is seen


def test_a_picture_is_uploaded_asked_about_and_its_instances_light_up_where_they_are(
    open_page: OpenPage,
) -> None:
    watched = open_page()
    page = watched.page
    use(page, SHAPES_JPG)
    ask(page, "red circle")
    ask(page, "green star, blue square")
    wait_answered(page, "red circle", "green star", "blue square")
    mask = drawn_mask(page)
    truth = RED_CIRCLE | mask_of("green", "star") | mask_of("blue", "square")
    assert iou(mask, scaled(truth, mask)) > 0.85
    assert page.locator("#count").inner_text() == "5"
    # One call a prompt, all about one upload.
    bodies = watched.bodies(PREDICT)
    assert [body["text_prompt"] for body in bodies] == ["red circle", "green star", "blue square"]
    assert len({body["image_url"] for body in bodies}) == 1 and len({body["task_id"] for body in bodies}) == 3
    assert {(body["user_id"], body["score_threshold"]) for body in bodies} == {("playground", 0.05)}
    assert re.search(r"/files/uploads/playground/[0-9a-f-]{36}\.jpg$", bodies[0]["image_url"])
    # Each prompt has a colour of its own.
    image = np.asarray(drawn(page))
    centres = [(170, 178), (402, 160), (640, 172)]
    scale = image.shape[1] / 800
    assert len({tuple(image[int(y * scale), int(x * scale)]) for x, y in centres}) == 3


def test_a_prompt_that_is_taken_away_takes_its_instances_along(open_page: OpenPage) -> None:
    page = sample_page(open_page, "red circle", "green star").page
    page.get_by_role("button", name="Remove red circle").click()
    page.wait_for_function("() => document.querySelectorAll('.found').length === 1")
    page.wait_for_timeout(100)
    mask = drawn_mask(page)
    assert iou(mask, scaled(mask_of("green", "star"), mask)) > 0.8


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_can_be_dropped_and_pasted(open_page: OpenPage, way: str) -> None:
    page = open_page().page
    page.evaluate(
        """([way, base64]) => {
            const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "it.jpg", { type: "image/jpeg" }));
            const how = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
            document.body.dispatchEvent(way === "drop" ? new DragEvent("drop", how) : new ClipboardEvent("paste", how));
        }""",
        [way, base64.b64encode(SHAPES_JPG.read_bytes()).decode()],
    )
    give_key(page)
    ask(page, "green star")
    wait_answered(page, "green star")
    assert drawn_mask(page).any()


def test_a_photo_that_lies_on_its_side_is_shown_and_segmented_upright(
    open_page: OpenPage, tmp_path: Path
) -> None:
    image = Image.open(SHAPES_JPG).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    image.save(tmp_path / "sideways.jpg", exif=exif, quality=90)
    page = open_page().page
    use(page, tmp_path / "sideways.jpg")
    ask(page, "red circle")
    wait_answered(page, "red circle")
    mask = drawn_mask(page)
    assert iou(mask, scaled(RED_CIRCLE, mask)) > 0.85
    photo = page.locator("#photo").evaluate("canvas => canvas.toDataURL('image/png')")
    shown = Image.open(io.BytesIO(base64.b64decode(photo.split(",")[1]))).convert("RGB").resize((800, 600))
    difference = np.abs(np.asarray(shown, int) - np.asarray(Image.open(SHAPES_JPG).convert("RGB"), int))
    assert difference.mean() < 6


def test_the_views_show_the_photo_the_instances_and_the_cutout(open_page: OpenPage) -> None:
    page = sample_page(open_page, "red circle").page
    photo = np.asarray(Image.open(SHAPES_JPG).convert("RGB"), int)
    pixels = {}
    for view in ("overlay", "instances", "cutout"):
        page.locator(f"input[value={view}]").check(force=True)
        page.wait_for_timeout(150)
        image = drawn(page)
        pixels[view] = np.asarray(image)
        assert (
            page.locator("#photo").evaluate("canvas => getComputedStyle(canvas).visibility") == "visible"
        ) == (view == "overlay")
    alpha = {view: set(np.unique(image[..., 3])) for view, image in pixels.items()}
    assert alpha["instances"] == alpha["cutout"] == {0, 255} and 255 > max(alpha["overlay"] - {242, 255}) > 80
    inside = pixels["cutout"][..., 3] == 255
    cut = np.asarray(Image.fromarray(pixels["cutout"]).resize((800, 600)), int)
    assert np.abs(cut[178, 170, :3] - photo[178, 170]).max() < 12
    assert iou(inside, scaled(RED_CIRCLE, inside)) > 0.85
    centres = [
        tuple(np.asarray(Image.fromarray(pixels["instances"]).resize((800, 600)))[y, x])
        for x, y in ((170, 178), (372, 452))
    ]
    assert centres[0] != centres[1]


def test_score_and_size_are_told_of_what_is_under_the_pointer(open_page: OpenPage) -> None:
    watched = sample_page(open_page, "red circle")
    page = watched.page
    frame = page.locator("#frame").bounding_box()
    assert frame is not None
    page.mouse.move(frame["x"] + frame["width"] * 170 / 800, frame["y"] + frame["height"] * 178 / 600)
    expect(page.locator("#tip")).to_be_visible()
    told = page.locator("#tip").inner_text()
    instance = watched.answers(PREDICT)[0]["instances"][0]
    assert f"red circle {instance['score']:.2f}" in told and f"{instance['area_px']:,} px" in told
    assert page.locator(".found li.lit").count() == 1
    page.mouse.move(frame["x"] + frame["width"] * 402 / 800, frame["y"] + frame["height"] * 160 / 600)
    expect(page.locator("#tip")).to_be_hidden()


def test_a_contour_is_dark_and_then_white_and_as_wide_in_every_direction(open_page: OpenPage) -> None:
    down, across = np.mgrid[0:200, 0:200]
    rle = coco_mask.encode(np.asfortranarray((np.hypot(across - 100, down - 100) < 80).astype(np.uint8)))
    pixels = open_page().page.evaluate(
        """async (counts) => {
            const { colourTable, InstanceMap } = await import("/playground/painter.js");
            const { decodeEnds } = await import("/playground/rle.js");
            const red = [255, 0, 0];
            const colours = { promptColour: red, ownColour: red };
            const disc = { score: 0.9, ends: decodeEnds(counts), sizeHw: [200, 200], ...colours };
            const map = new InstanceMap(200, 200, [disc]);
            const pixels = new Uint32Array(200 * 200);
            map.fill(pixels, colourTable(map, { view: "overlay", threshold: 0.5 }));
            return [...new Uint8Array(pixels.buffer)];
        }""",
        rle["counts"].decode(),
    )
    image = np.array(pixels, float).reshape(200, 200, 4)
    # The least of the three colours is what white there is: mean width of the ring, by its area.
    whiteness = image[..., :3].min(2) / 255 * image[..., 3] / 255
    inwards = 80 - np.hypot(across - 100, down - 100)
    for angle in range(0, 180, 15):
        near = np.abs(np.degrees(np.arctan2(down - 100, across - 100)) - angle) < 5
        ring = whiteness[near].sum() / (np.radians(10) * 78)
        assert ring == pytest.approx(2, abs=0.4), angle
        outermost = image[near & (inwards > 0) & (inwards < 0.8)]
        assert outermost[:, :3].mean() < 90 and outermost[:, 3].mean() > 120
    assert len(np.unique(whiteness[(inwards > 0) & (inwards < 4)].round(2))) >= 6  # smooth, not one step


# -------------------------------------------------------------------------------------------------------- the slider


def test_the_slider_hides_and_shows_without_a_request(open_page: OpenPage) -> None:
    watched = sample_page(open_page, "red circle")
    page = watched.page
    answer = watched.answers(PREDICT)[0]
    scores = sorted(instance["score"] for instance in answer["instances"])
    asked = len(watched.requests)
    for threshold in (0.05, 0.94, 0.5, 1.0):
        page.locator("#threshold").fill(str(threshold))
        page.wait_for_timeout(100)
        left = [instance for instance in answer["instances"] if instance["score"] > threshold]
        assert page.locator("#count").inner_text() == str(len(left))
        assert page.locator(".found li:visible").count() == len(left)
        mask = drawn_mask(page)
        union = np.zeros((600, 800), bool)
        for instance in left:
            union |= coco_mask.decode(instance["mask_rle"]).astype(bool)
        assert mask.any() == union.any()
        assert not union.any() or iou(mask, scaled(union, mask)) > 0.97
    assert len(watched.requests) == asked and scores[-1] > 0.9


def big_answer(width: int, height: int, count: int) -> list[dict[str, Any]]:
    """Instances such as a model might find on a large photo: ragged discs that overlap."""
    random = np.random.default_rng(1)
    down, across = np.mgrid[0:height:4, 0:width:4]
    found = []
    for index in range(count):
        x, y, radius = random.uniform(0, width), random.uniform(0, height), random.uniform(100, 600)
        angle = np.arctan2(down - y, across - x)
        small = np.hypot(across - x, down - y) < radius * (1 + 0.1 * np.sin(9 * angle + index))
        rle = coco_mask.encode(np.asfortranarray(small.repeat(4, 0).repeat(4, 1).astype(np.uint8)))
        x0, y0, w, h = coco_mask.toBbox(rle).tolist()
        found.append(
            {
                "score": float(random.uniform(0.1, 0.99)),
                "box_xyxy_px": [x0, y0, x0 + w, y0 + h],
                "area_px": int(coco_mask.area(rle)),
                "mask_rle": {"size": [height, width], "counts": rle["counts"].decode()},
            }
        )
    return sorted(found, key=lambda instance: -instance["score"])


SLIDE = """async () => {
    const slider = document.getElementById("threshold");
    const frame = () => new Promise(requestAnimationFrame);
    const work = [], draws = [], gaps = [];
    let last = await frame();
    for (let step = 0; step <= 90; step++) {
        const began = performance.now();
        slider.value = String(0.05 + 0.01 * step);
        slider.dispatchEvent(new Event("input", { bubbles: true }));
        const handled = performance.now() - began;
        const now = await frame();
        const draw = performance.getEntriesByName("draw").at(-1).duration;
        work.push(handled + draw);
        draws.push(draw);
        gaps.push(now - last);
        last = now;
    }
    const sorted = (values) => values.slice(2).sort((a, b) => a - b);
    return [sorted(work), sorted(draws), sorted(gaps)];
}"""


def test_the_slider_redraws_fifty_instances_on_twelve_megapixels_within_a_frame(
    open_page: OpenPage, tmp_path: Path, record_property: Any
) -> None:
    width, height = 4000, 3000
    Image.open(SHAPES_JPG).resize((width, height)).save(tmp_path / "large.jpg", quality=85)
    watched = open_page(
        viewport={"width": 1600, "height": 1200}, device_scale_factor=2
    )  # as many pixels as are drawn
    page = watched.page
    use(page, tmp_path / "large.jpg")
    ask(page, "red circle")
    wait_answered(page, "red circle")  # 12 megapixels, by the model
    mask = drawn_mask(page)
    assert iou(mask, scaled(RED_CIRCLE, mask)) > 0.85

    found = big_answer(width, height, 50)

    def answer_with_fifty(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "instances": found})

    page.route(f"**{PREDICT}", answer_with_fifty)
    ask(page, "anything")
    wait_answered(page, "anything")
    asked = len(watched.requests)
    # Once of five times, on a machine that other tests keep busy: what it takes is its best, not theirs.
    work, draws, gaps = min(
        (page.evaluate(SLIDE) for _ in range(5)), key=lambda slid: slid[0][len(slid[0]) // 2]
    )
    canvas = page.locator("#overlay").evaluate("canvas => [canvas.width, canvas.height]")
    figures = {
        name: [round(values[len(values) // 2], 2), round(values[int(len(values) * 0.95)], 2)]
        for name, values in (("work", work), ("draw", draws), ("gap", gaps))
    }
    print(f"slider, median and p95 in ms, at {canvas[0]}×{canvas[1]}: {figures}")
    record_property("slider_ms", figures)
    assert len(watched.requests) == asked
    assert work[len(work) // 2] <= 16


# ---------------------------------------------------------------------------------------------------- what goes wrong


def test_a_wrong_key_is_told_and_asked_for_again_and_the_right_one_goes_on(open_page: OpenPage) -> None:
    watched = open_page()
    page = watched.page
    expect(page.locator("#model")).to_contain_text("key")
    page.locator("#sample").click()
    expect(page.locator("#key-reason")).to_contain_text("The X-API-Key header is missing")
    give_key(page, "not-the-key")
    expect(page.locator("#key-reason")).to_contain_text("is not the service's API_SECRET_KEY")
    assert page.locator("#key").input_value() == ""
    give_key(page)
    ask(page, "red circle")
    wait_answered(page, "red circle")
    expect(page.locator("#model")).to_contain_text("SAM3 · demo")
    assert page.locator("#key").input_value() == ""
    kept = page.evaluate(
        "JSON.stringify([{ ...localStorage }, { ...sessionStorage }, document.cookie, location.href])"
    )
    assert KEY not in kept
    page.reload()
    page.locator("html[data-ready=true]").wait_for()
    page.locator("#sample").click()
    expect(page.locator("#key-dialog")).to_be_visible()


def test_without_a_key_the_picture_fails_readably_and_can_be_tried_again(open_page: OpenPage) -> None:
    page = open_page().page
    page.locator("#sample").click()
    page.locator("#key-dialog[open]").wait_for()
    page.keyboard.press("Escape")
    card = page.locator(".error[data-code=UNAUTHORIZED]")
    expect(card).to_contain_text("401 UNAUTHORIZED")
    card.get_by_role("button", name="Try again").click()
    give_key(page)
    ask(page, "red circle")
    wait_answered(page, "red circle")
    assert page.locator(".error").count() == 0


def test_an_error_says_what_happened_what_to_do_and_what_to_quote(
    open_page: OpenPage, service: Served, tmp_path: Path
) -> None:
    (tmp_path / "text.jpg").write_text("this is no picture")
    watched = open_page()
    page = watched.page
    use(page, tmp_path / "text.jpg")
    card = page.locator(".error[data-code=UNSUPPORTED_IMAGE]")
    card.wait_for()
    (stored,) = (
        request for request in watched.requests if "x-api-key" in request.headers and request.method == "PUT"
    )
    response = stored.response()
    assert response is not None and response.status == 415
    same = service.client.put("/files/uploads/text.jpg", content=b"this is no picture").json()
    told = card.inner_text().lower()  # the page begins sentences with a capital
    for part in (
        same["error"]["message"],
        "415 UNSUPPORTED_IMAGE",
        response.headers["x-request-id"],
        "JPEG or PNG",
    ):
        assert part.lower() in told
    assert card.get_attribute("role") == "alert"


def test_an_error_of_one_prompt_leaves_the_others_alone(open_page: OpenPage) -> None:
    page = sample_page(open_page, "red circle").page
    ask(page, "<|endoftext|>")
    card = page.locator(".error[data-code=INVALID_PROMPT]")
    expect(card).to_contain_text("422 INVALID_PROMPT")
    assert card.get_by_role("button", name="Try again").count() == 0  # the same again would fail the same
    assert page.locator(".chip[data-status=done]").count() == 1 and drawn_mask(page).any()
    page.get_by_role("button", name="Remove <|endoftext|>").click()
    assert page.locator(".error").count() == 0


def test_a_service_that_is_gone_is_told_as_that(open_page: OpenPage) -> None:
    watched = sample_page(open_page, "red circle")
    page = watched.page
    page.route(f"**{PREDICT}", lambda route: route.abort())
    ask(page, "green star")
    expect(page.locator(".error[data-code=UNREACHABLE]")).to_contain_text("did not answer")
    page.unroute(f"**{PREDICT}")
    page.get_by_role("button", name="Try again").click()
    wait_answered(page, "green star")
    tasks = [body["task_id"] for body in watched.bodies(PREDICT)]
    assert tasks[1] == tasks[2] != tasks[0]  # asked again, it is the same task


BROKEN_FETCH = """(path) => {
    const whole = window.fetch;
    const start = (body) => { body.enqueue(new Uint8Array([123])); body.error(new TypeError("network error")); };
    const broken = () => new Response(new ReadableStream({ start }));
    window.fetch = (url, options) => url.endsWith(path) ? Promise.resolve(broken()) : whole(url, options);
}"""


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        pytest.param("<html>Sign in</html>", "BAD_ANSWER", "in its place", id="a proxy's page"),
        pytest.param("{}", "BAD_ANSWER", "could not make use of the answer", id="JSON of another kind"),
        pytest.param(None, "UNREACHABLE", "before the answer was whole", id="broken in the middle"),
    ],
)
def test_an_answer_that_is_none_is_told_and_waited_for_no_longer(
    open_page: OpenPage, body: str | None, code: str, words: str
) -> None:
    page = sample_page(open_page).page
    if body is None:
        page.evaluate(BROKEN_FETCH, PREDICT)
    else:
        page.route(f"**{PREDICT}", lambda route: route.fulfill(status=200, body=body))
    ask(page, "red circle")
    expect(page.locator(f".error[data-code={code}]")).to_contain_text(words)
    expect(page.locator(".chip")).to_have_attribute("data-status", "error")


def overloaded(route: Route, headers: dict[str, str]) -> None:
    error = {"code": "OVERLOADED", "message": "Too many requests"}
    told = {"success": False, "data": None, "error": error, "meta": {"request_id": "r-1", "timestamp": ""}}
    route.fulfill(status=429, headers=headers, json=told)


def test_what_an_error_promises_is_done(open_page: OpenPage) -> None:
    watched = open_page()
    page = watched.page
    uploads = "**/files/uploads/**"
    page.route(uploads, lambda route: overloaded(route, {"Retry-After": "2"}), times=1)
    page.locator("#sample").click()
    card = page.locator(".error[data-code=OVERLOADED]")
    expect(card).to_contain_text(
        "Too many requests.Others are being served; it will be tried again by itself."
    )
    expect(card.get_by_role("button", name="Copy request id r-1")).to_have_text("Copy")
    give_key(page)  # asked for by the second upload
    ask(page, "red circle")
    wait_answered(page, "red circle")
    page.route(f"**{PREDICT}", lambda route: overloaded(route, {}))
    ask(page, "green star")
    expect(card).to_contain_text("Others are being served; try again in a moment.")


def small_picture(name: str, side: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (side, 200)).save(file, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": file.getvalue()}


def test_an_upload_that_fails_late_says_nothing_about_the_next_picture(open_page: OpenPage) -> None:
    page = sample_page(open_page).page
    held: list[Route] = []
    page.route("**/files/uploads/**", lambda route: held.append(route), times=1)
    with page.expect_request("**/files/uploads/**"):
        page.locator("#file").set_input_files(small_picture("first.png", 300))  # type: ignore[arg-type]
    with page.expect_response("**/files/uploads/**"):
        page.locator("#file").set_input_files(SHAPES_JPG)
    with page.expect_event("requestfailed"):
        held[0].abort()
    ask(page, "red circle")
    wait_answered(page, "red circle")
    assert page.locator(".error").count() == 0


def test_the_picture_chosen_last_wins_however_long_another_takes(open_page: OpenPage) -> None:
    watched = sample_page(open_page)
    page = watched.page
    page.evaluate(
        """() => {
            const decode = window.createImageBitmap;
            window.slow = new Promise((resolve) => (window.goOn = resolve));
            window.createImageBitmap = async (file) => {
                if (file.name === "slow.png") await window.slow;
                return decode(file);
            };
        }"""
    )
    page.locator("#file").set_input_files(small_picture("slow.png", 300))  # type: ignore[arg-type]
    with page.expect_response("**/files/uploads/**"):
        page.locator("#file").set_input_files(small_picture("quick.png", 400))  # type: ignore[arg-type]
    page.evaluate("async () => { window.goOn(); await new Promise((resolve) => setTimeout(resolve, 200)); }")
    frame = page.locator("#frame").bounding_box()
    assert frame is not None and frame["width"] / frame["height"] == pytest.approx(2, abs=0.02)
    assert len([one for one in watched.requests if one.method == "PUT" and "x-api-key" in one.headers]) == 2


# ------------------------------------------------------------------------------------------------------- example boxes


def test_a_box_that_is_being_drawn_outlives_an_answer(open_page: OpenPage) -> None:
    page = sample_page(open_page).page
    held: list[Route] = []
    page.route(f"**{PREDICT}", lambda route: held.append(route), times=1)
    with page.expect_request(f"**{PREDICT}"):
        ask(page, "red circle")
    frame = page.locator("#frame").bounding_box()
    assert frame is not None
    page.mouse.move(frame["x"] + 60, frame["y"] + 60)
    page.mouse.down()
    page.mouse.move(frame["x"] + 160, frame["y"] + 160, steps=3)
    held[0].continue_()
    wait_answered(page, "red circle")
    assert page.locator(".box.draft").count() == 1
    page.mouse.up()
    expect(page.locator(".box:not(.draft)")).to_have_count(1)
    assert page.locator(".box.draft").count() == 0


def boxes_sent(watched: Watched) -> Any:
    return watched.bodies(PREDICT)[-1].get("boxes")


def test_boxes_are_dragged_positive_and_negative_and_sent_in_pixels_of_the_picture(
    open_page: OpenPage,
) -> None:
    watched = sample_page(open_page, "red circle")
    page = watched.page
    frame = page.locator("#frame").bounding_box()
    assert frame is not None

    def drag(x0: int, y0: int, x1: int, y1: int) -> None:
        scale = frame["width"] / 800
        page.mouse.move(frame["x"] + x0 * scale, frame["y"] + y0 * scale)
        page.mouse.down()
        page.mouse.move(frame["x"] + x1 * scale, frame["y"] + y1 * scale, steps=3)
        with page.expect_request(f"**{PREDICT}"):
            page.mouse.up()

    def is_near(sent: Any, *expected: tuple[str, list[int]]) -> bool:
        return [box["label"] for box in sent] == [label for label, _ in expected] and all(
            np.abs(np.subtract(box["xyxy"], xyxy)).max() <= 2
            for box, (_, xyxy) in zip(sent, expected, strict=True)
        )

    drag(66, 74, 274, 282)  # nothing is pressed: a question of its own
    sent = watched.bodies(PREDICT)[-1]
    assert "text_prompt" not in sent and is_near(sent["boxes"], ("positive", [66, 74, 274, 282]))
    page.keyboard.down("Shift")
    drag(420, 560, 300, 380)  # from the far corner
    page.keyboard.up("Shift")
    assert is_near(boxes_sent(watched), ("positive", [66, 74, 274, 282]), ("negative", [300, 380, 420, 560]))
    page.locator('.chip[data-label="red circle"] button').first.click()
    page.locator("#box-negative").click()
    drag(600, 380, 760, 560)
    sent = watched.bodies(PREDICT)[-1]
    assert sent["text_prompt"] == "red circle" and is_near(sent["boxes"], ("negative", [600, 380, 760, 560]))
    assert page.locator(".box").count() == 3 and page.locator(".box.faint").count() == 2


# ------------------------------------------------------------------------------------------------------------ keyboard


def tab_to(page: Page, selector: str) -> None:
    for _ in range(60):
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
        page.keyboard.press("Tab")
    pytest.fail(f"{selector} is not reached by Tab")


def test_everything_can_be_done_with_the_keyboard_alone(open_page: OpenPage) -> None:
    watched = open_page()
    page = watched.page
    tab_to(page, "#sample")
    page.keyboard.press("Enter")
    page.locator("#key-dialog[open]").wait_for()
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    tab_to(page, "#prompt")
    page.keyboard.type("red circle")
    page.keyboard.press("Enter")
    wait_answered(page, "red circle")
    tab_to(page, "#threshold")
    before = page.locator("#threshold-value").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#threshold-value").inner_text() != before
    tab_to(page, ".found li")
    page.keyboard.press("ArrowDown")
    assert "red circle" in page.locator("#tip").inner_text()
    expect(page.locator(".found li").nth(1)).to_be_focused()
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "input[value=overlay]")
    page.keyboard.press("ArrowRight")
    assert page.locator("#frame").get_attribute("data-view") == "instances"
    tab_to(page, "#box-positive")
    page.keyboard.press("Enter")
    expect(page.locator(".box")).to_be_focused()
    for key in ("ArrowLeft", "ArrowUp", "Shift+ArrowRight", "Shift+ArrowDown", "n"):
        page.keyboard.press(key)
    with page.expect_request(f"**{PREDICT}"):
        pass
    assert boxes_sent(watched) == [{"xyxy": [292, 219, 500, 375], "label": "negative"}]
    page.keyboard.press("Delete")
    assert page.locator(".box").count() == 0
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.press("Backspace")
    assert page.locator(".chip").count() == 0
    page.keyboard.type("green star, blue square")
    page.keyboard.press("Enter")
    for _ in range(4):
        page.keyboard.down("Backspace")  # held: the first press counts
    page.keyboard.up("Backspace")
    assert page.locator(".chip").count() == 1


# --------------------------------------------------------------------------------------------------- narrow, dark, calm

NARROW = {
    "viewport": {"width": 390, "height": 844},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 3,
}


def sideways(page: Page) -> int:
    width: int = page.evaluate("document.scrollingElement.scrollWidth - innerWidth")
    return width


def test_nothing_is_wider_than_a_telephone(open_page: OpenPage) -> None:
    page = open_page(**NARROW).page
    assert sideways(page) <= 0
    page.locator("#sample").tap()
    page.locator("#key-dialog[open]").wait_for()
    assert sideways(page) <= 0
    give_key(page)
    for prompt in (
        "red circle",
        "a rather long description of something that is not there at all",
        "<|endoftext|>",
    ):
        ask(page, prompt)
    expect(page.locator(".error")).to_have_count(2, timeout=30_000)  # too long, and not to be read
    wait_answered(page, "red circle")
    assert sideways(page) <= 0
    frame = page.locator("#frame").bounding_box()
    assert frame is not None and 320 < frame["width"] <= 390
    page.touchscreen.tap(frame["x"] + frame["width"] * 170 / 800, frame["y"] + frame["height"] * 178 / 600)
    expect(page.locator("#tip")).to_have_text(re.compile(r"^0\.\d\d · \d+×\d+$"))
    tip = page.locator("#tip").bounding_box()
    assert tip is not None and tip["y"] >= frame["y"] + frame["height"] * 0.45  # under the circle
    assert tip["x"] >= 0 and tip["x"] + tip["width"] <= 390


CONTRASTS = """() => {
    const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
    const behind = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const colour = parse(getComputedStyle(at).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const texts = [...document.querySelectorAll("body *")].filter((element) =>
        element.checkVisibility() && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
    return texts.map((element) => {
        const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
        return [`${element.tagName} ${element.className} ${element.textContent.slice(0, 30)}`, (a + 0.05) / (b + 0.05)];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_light_and_in_dark(open_page: OpenPage, scheme: str) -> None:
    page = sample_page(open_page, "red circle", color_scheme=scheme).page
    ask(page, "<|endoftext|>")
    page.locator(".error").wait_for()
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (max(paper) < 40) == (scheme == "dark")
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 30
    assert [(text, contrast) for text, contrast in contrasts if contrast < 4.5] == []


def test_what_comes_lights_up_and_does_not_for_those_who_asked_for_less_motion(open_page: OpenPage) -> None:
    drawings = {}
    for motion in ("no-preference", "reduce"):
        watched = sample_page(open_page, "red circle", reduced_motion=motion)
        page = watched.page
        drawings[motion] = page.evaluate("window.draws")
    assert drawings["reduce"] < drawings["no-preference"] and drawings["reduce"] <= 12


# ------------------------------------------------------------------------------------------------- what is taken along


def test_what_is_saved_is_what_is_seen_and_others_can_read_it(open_page: OpenPage) -> None:
    page = sample_page(open_page, "red circle", "green star").page
    mask = np.asarray(Image.open(saved(page, "#download-mask")).convert("L"))
    truth = RED_CIRCLE | mask_of("green", "star")
    assert mask.shape == (600, 800) and set(np.unique(mask)) == {0, 255}
    assert iou(mask == 255, truth) > 0.85

    overlay = saved(page, "#download-view")
    assert overlay.name == "shapes-overlay.png"
    drawn_over = np.asarray(Image.open(overlay).convert("RGB"), int)
    photo = np.asarray(Image.open(SHAPES_JPG).convert("RGB"), int)
    changed = np.abs(drawn_over - photo).max(2) > 25
    assert iou(changed, mask == 255) > 0.9

    document = COCO(str(saved(page, "#download-coco")))
    assert [category["name"] for category in document.loadCats(document.getCatIds())] == [
        "red circle",
        "green star",
    ]
    union = np.zeros((600, 800), bool)
    for annotation in document.loadAnns(document.getAnnIds()):
        one = document.annToMask(annotation).astype(bool)
        assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()
        assert annotation["area"] == one.sum()
        union |= one
    assert np.array_equal(union, mask == 255)

    raw = json.loads(saved(page, "#download-json").read_text())
    assert [call["answer"]["text_prompt"] for call in raw["calls"]] == ["red circle", "green star"]
    assert raw["calls"][0]["request"]["task_id"] == raw["calls"][0]["answer"]["task_id"]


@pytest.fixture(scope="module")
def node() -> str:
    """To run the TypeScript: what is shown is JavaScript, too."""
    if found := shutil.which("node"):
        return found
    if os.environ.get("CI") == "true":
        pytest.fail("CI must have node")
    pytest.skip("node is not installed")


def test_the_call_can_be_run_as_it_is_shown(open_page: OpenPage, node: str) -> None:
    prompt = 'it\'s a "red circle" – $HOME'
    page = sample_page(open_page, prompt).page
    expected = int(page.locator("#count").inner_text())
    commands = {
        "curl": ["sh", "-c"],
        "python": [sys.executable, "-c"],
        "typescript": [node, "--input-type=module", "-e"],
    }
    environment = {**os.environ, "API_SECRET_KEY": KEY, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    for language, command in commands.items():
        page.locator(f"input[value={language}]").check(force=True)
        code = page.locator("#code").inner_text()
        assert KEY not in code and page.locator("#copy").is_visible()
        done = subprocess.run([*command, code], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        if language == "curl":
            answer = json.loads(done.stdout)
            assert answer["text_prompt"] == prompt and len(answer["instances"]) == expected
        else:
            assert len(done.stdout.splitlines()) == expected


def test_timings_and_model_are_shown(open_page: OpenPage) -> None:
    watched = sample_page(open_page, "red circle")
    told = watched.answers(PREDICT)[0]["timings_ms"]
    shown = watched.page.locator("#bars p[data-stage=infer] .ms").inner_text()
    assert float(shown.removesuffix(" ms").replace(",", "")) == pytest.approx(told["infer"], abs=0.51)
    assert watched.page.locator("#bars p").count() == 8
    expect(watched.page.locator("#model")).to_contain_text("M parameters")
