"""The whole service on its embedded defaults: real processes, real HTTP, real masks."""

from __future__ import annotations

import io
import json
import os
import signal
import uuid
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image
from pycocotools import mask as coco

from api.openapi import openapi_document
from api.routes import ROUTES
from tests.api.contract import read_contract
from tests.conftest import Served, wait_until
from tests.sam3_runner.made_images import KINDS
from tests.service.conftest import (
    BATCH,
    LOCAL_TIMEOUT_S,
    MAX_IMAGE_BYTES,
    PREDICT,
    SECRETS,
    Check,
    Picture,
    ask,
    ask_many,
    held,
    iou,
    is_processing,
    posting,
    read_mask,
    row_of,
)

CONTRACT = read_contract()


def mask_at(service: Served, url: str) -> Any:
    response = service.client.get(url)
    assert response.headers["content-type"] == "image/png"
    return read_mask(response.content)


# ------------------------------------------------------------------------------------------- what it is for


def test_a_picture_is_segmented_by_text(
    local: Served, local_image: str, picture: Picture, checked: Check
) -> None:
    body = ask(local_image)
    result = checked(local, local.client.post(PREDICT, json=body), PREDICT)
    assert result["labels"] == ["red circle"]
    assert result["image_size"] == {"width": 320, "height": 240}
    assert result["confidence"] == max(instance["score"] for instance in result["instances"])
    truth = picture.masks["red circle"]
    assert iou(mask_at(local, result["mask_url"]), truth) > 0.8
    (instance,) = result["instances"]
    assert iou(coco.decode(instance["mask_rle"]).astype(bool), truth) > 0.8
    assert instance["area_px"] == int(coco.area(instance["mask_rle"]))

    row = row_of(local, body["task_id"])
    assert row is not None
    assert (row["status"], row["mask_image_url"], row["labels"]) == (
        "done",
        result["mask_url"],
        ["red circle"],
    )
    assert row["metadata"]["model"] == result["model"] == {"name": "SAM3", "version": "demo"}
    assert {"inference_time_ms", "confidence", "user_id", "request_id"} <= row["metadata"].keys()


def test_what_is_not_there_is_not_found_and_that_is_no_error(
    local: Served, local_image: str, checked: Check
) -> None:
    result = checked(
        local, local.client.post(PREDICT, json=ask(local_image, text_prompt="green star")), PREDICT
    )
    assert (result["labels"], result["instances"], result["confidence"]) == ([], [], 0.0)
    assert not mask_at(local, result["mask_url"]).any()


def test_many_prompts_are_answered_in_their_order_over_one_image(
    local: Served, local_image: str, picture: Picture, checked: Check
) -> None:
    prompts = ["blue square", "green star", "red circle"]
    body = ask_many(local_image, *prompts)
    answer = checked(local, local.client.post(BATCH, json=body), BATCH)
    assert [result["text_prompt"] for result in answer["results"]] == prompts
    assert [bool(result["labels"]) for result in answer["results"]] == [True, False, True]
    for result, prompt in zip(answer["results"], prompts, strict=True):
        if prompt in picture.masks:
            assert iou(mask_at(local, result["mask_url"]), picture.masks[prompt]) > 0.8
    union = picture.masks["blue square"] | picture.masks["red circle"]
    assert iou(mask_at(local, answer["mask_url"]), union) > 0.8
    row = row_of(local, body["task_id"])
    assert row is not None and row["mask_image_url"] == answer["mask_url"]


def test_the_threshold_of_a_request_is_used(local: Served, local_image: str) -> None:
    none = local.client.post(PREDICT, json=ask(local_image, score_threshold=1)).json()
    some = local.client.post(PREDICT, json=ask(local_image, score_threshold=0)).json()
    assert none["instances"] == [] and len(some["instances"]) > 1


def test_the_same_request_again_gives_the_same_answer(local: Served, local_image: str) -> None:
    body = ask(local_image)
    first, second = (local.client.post(PREDICT, json=body).json() for _ in range(2))
    assert first["instances"] == second["instances"] and first["mask_url"] == second["mask_url"]


@pytest.mark.parametrize("path", ["/health", "/api/v1/model/info"])
def test_the_service_tells_what_it_is(local: Served, checked: Check, path: str) -> None:
    body = checked(local, local.client.get(path), path)
    if path == "/health":
        assert (body["status"], body["model_loaded"]) == ("ok", True)
        assert {part["status"] for part in body["dependencies"].values()} == {"ok"}
    else:
        assert body["model_version"] == "demo"
        assert 100_000 < body["parameters"] < 10_000_000
        assert 0 < body["weights_size_gb"] < 0.1


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz", "/metrics", "/docs.json"])
def test_probes_metrics_and_documents_need_no_key(local: Served, path: str) -> None:
    response = httpx.get(local.url + path, trust_env=False)
    assert response.status_code == 200
    assert response.headers["X-Request-ID"]


def test_the_served_openapi_is_the_one_that_is_held_against_the_contract(local: Served) -> None:
    assert local.client.get("/docs.json").json() == json.loads(json.dumps(openapi_document(ROUTES)))


# ------------------------------------------------------------------------------------------ what goes wrong


def jpeg(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def stored(local: Served) -> dict[str, str]:
    """Keys of files that got into the storage past the checks of PUT."""
    files = {
        "text": b"not an image at all",
        "empty": b"",
        "truncated": jpeg((300, 300))[:700],
        "long": jpeg((10, 10)) + b"\0" * MAX_IMAGE_BYTES,
        "wide": jpeg((2000, 1000)),
    }
    folder: Path = local.data_dir / "files" / "uploads"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: f"uploads/{name}" for name in files}


@pytest.mark.parametrize(
    ("image", "status", "code"),
    [
        ("uploads/nobody-put-this.jpg", 404, "IMAGE_NOT_FOUND"),
        ("text", 415, "UNSUPPORTED_IMAGE"),
        ("empty", 422, "UNDECODABLE_IMAGE"),
        ("truncated", 422, "UNDECODABLE_IMAGE"),
        ("long", 413, "IMAGE_TOO_LARGE"),
        ("wide", 413, "IMAGE_TOO_LARGE"),
        ("https://elsewhere.example/uploads/a.jpg", 422, "FOREIGN_IMAGE_URL"),
        ("http://169.254.169.254/latest/meta-data", 422, "FOREIGN_IMAGE_URL"),
        ("file:///etc/passwd", 422, "FOREIGN_IMAGE_URL"),
        ("uploads/../../tasks.sqlite3", 422, "FOREIGN_IMAGE_URL"),
    ],
)
def test_an_image_that_cannot_be_used_is_told_and_leaves_an_error_row(
    local: Served, stored: dict[str, str], checked: Check, image: str, status: int, code: str
) -> None:
    body = ask(stored.get(image, image))
    response = local.client.post(PREDICT, json=body)
    assert response.status_code == status, response.text
    assert checked(local, response, PREDICT)["error"]["code"] == code
    assert str(local.data_dir) not in response.text
    assert code in CONTRACT.leaves_row
    row = row_of(local, body["task_id"])
    if row is not None:  # a row that was never claimed is not made
        assert (row["status"], row["metadata"]["error"]["code"]) == ("error", code)
    assert row is not None or code == "FOREIGN_IMAGE_URL"


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "MALFORMED_JSON"),
        (b"", 400, "MALFORMED_JSON"),
        (b'{"image_url": "\xff"}', 400, "MALFORMED_JSON"),
        (b'{"score_threshold": NaN}', 400, "MALFORMED_JSON"),
        (b"[" * 100_000, 400, "MALFORMED_JSON"),
        (b"\x80\x05\x95pickle", 400, "MALFORMED_JSON"),
        (b"[]", 422, "VALIDATION_FAILED"),
        (b"{}", 422, "VALIDATION_FAILED"),
        (b" " * 1_000_001, 413, "BODY_TOO_LARGE"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_body_that_is_none_is_told(
    local: Served, checked: Check, content: bytes, status: int, code: str
) -> None:
    response = local.client.post(PREDICT, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert checked(local, response, PREDICT)["error"]["code"] == code


def test_a_body_without_a_length_is_limited_too(local: Served) -> None:
    response = local.client.post(PREDICT, content=(b" " * 10_000 for _ in range(101)))
    assert response.status_code == 413


def test_prompts_that_the_model_cannot_read_are_named(
    local: Served, local_image: str, checked: Check
) -> None:
    body = ask_many(local_image, "cat", "  ", "dog " * 100)
    response = local.client.post(BATCH, json=body)
    error = checked(local, response, BATCH)["error"]
    assert (response.status_code, error["code"]) == (422, "INVALID_PROMPT")
    assert [detail["field"] for detail in error["details"]] == ["prompts.1", "prompts.2"]
    many = ask_many(local_image, *["cat"] * 33)
    refused = local.client.post(BATCH, json=many)
    assert checked(local, refused, BATCH)["error"]["code"] == "TOO_MANY_PROMPTS"
    for asked, code in ((body, "INVALID_PROMPT"), (many, "TOO_MANY_PROMPTS")):
        row = row_of(local, asked["task_id"])
        assert row is not None
        assert (row["status"], row["metadata"]["error"]["code"]) == ("error", code)


def test_a_task_id_in_use_with_other_inputs_is_a_conflict_and_keeps_its_row(
    local: Served, local_image: str, checked: Check
) -> None:
    body = ask(local_image)
    assert local.client.post(PREDICT, json=body).status_code == 200
    response = local.client.post(PREDICT, json={**body, "text_prompt": "blue square"})
    assert response.status_code == 409
    assert checked(local, response, PREDICT)["error"]["code"] == "TASK_CONFLICT"
    row = row_of(local, body["task_id"])
    assert row is not None and row["status"] == "done"


@pytest.mark.parametrize("key", [None, "", "wrong", SECRETS["API_SECRET_KEY"][:-1]])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", PREDICT),
        ("POST", BATCH),
        ("GET", "/api/v1/model/info"),
        ("PUT", "/files/uploads/a"),
        ("GET", "/api/v1/x"),
    ],
)
def test_without_the_key_nothing_is_told(local: Served, method: str, path: str, key: str | None) -> None:
    headers = {} if key is None else {"X-API-Key": key}
    response = httpx.request(method, local.url + path, headers=headers, trust_env=False)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "UNAUTHORIZED")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "NOT_FOUND"),
        ("GET", "/api/v1/nope", 404, "NOT_FOUND"),
        ("GET", "/playground", 404, "NOT_FOUND"),
        ("GET", "/playground/%2e%2e%2fservice.py", 404, "NOT_FOUND"),
        ("GET", "/readyz/", 404, "NOT_FOUND"),
        ("POST", f"{PREDICT}/", 404, "NOT_FOUND"),
        ("GET", "/files", 404, "NOT_FOUND"),
        ("GET", PREDICT, 405, "METHOD_NOT_ALLOWED"),
        ("POST", "/livez", 405, "METHOD_NOT_ALLOWED"),
        ("POST", "/", 405, "METHOD_NOT_ALLOWED"),
        ("DELETE", "/files/uploads/a", 405, "METHOD_NOT_ALLOWED"),
    ],
)
def test_a_path_or_method_that_is_none_has_the_same_form(
    local: Served, method: str, path: str, status: int, code: str
) -> None:
    response = local.client.request(method, path, headers={"X-Request-ID": "mine-1"})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.json()["meta"]["request_id"] == response.headers["X-Request-ID"] == "mine-1"
    assert ("Allow" in response.headers) == (status == 405)
    if path.startswith("/files/"):
        assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD", "PUT"}
    assert "Location" not in response.headers


@pytest.mark.parametrize(
    ("key", "content", "status", "code"),
    [
        ("uploads/a.jpg", b"text", 415, "UNSUPPORTED_IMAGE"),
        ("uploads/a.jpg", jpeg((10, 10)) + b"\0" * MAX_IMAGE_BYTES, 413, "IMAGE_TOO_LARGE"),
        ("uploads/a.jpg", jpeg((2000, 1000)), 413, "IMAGE_TOO_LARGE"),
        ("masks/a.png", jpeg((10, 10)), 422, "VALIDATION_FAILED"),
        ("uploads/%2e%2e/a.jpg", jpeg((10, 10)), 422, "VALIDATION_FAILED"),
        ("uploads/.hidden", jpeg((10, 10)), 422, "VALIDATION_FAILED"),
        ("uploads/", jpeg((10, 10)), 422, "VALIDATION_FAILED"),
    ],
)
def test_only_images_get_in_and_only_below_uploads(
    local: Served, checked: Check, key: str, content: bytes, status: int, code: str
) -> None:
    response = local.client.put(f"/files/{key}", content=content)
    assert response.status_code == status
    assert checked(local, response, "/files/{key}")["error"]["code"] == code


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "heic", "avif", "bmp", "tiff", "gif"])
def test_every_kind_of_image_gets_in_and_keeps_its_type(local: Served, kind: str) -> None:
    response = local.client.put(f"/files/uploads/{kind}", content=KINDS[kind].make())
    assert response.status_code == 200, response.text
    assert local.client.get(response.json()["url"]).headers["content-type"] == f"image/{kind}"


def test_a_file_comes_back_as_it_was_put(
    local: Served, local_image: str, picture: Picture, stored: dict[str, str], checked: Check
) -> None:
    response = local.client.get(local_image)
    assert response.content == picture.png
    assert response.headers["content-type"] == "image/png"
    too_large = local.client.get(f"/files/{stored['long']}")
    assert too_large.status_code == 413
    assert checked(local, too_large, "/files/{key}")["error"]["code"] == "IMAGE_TOO_LARGE"
    missing = local.client.get("/files/uploads/never-put.png")
    assert checked(local, missing, "/files/{key}")["error"]["code"] == "NOT_FOUND"
    outside = local.client.get("/files/%2e%2e/tasks.sqlite3")
    assert outside.status_code in (404, 422)


# ---------------------------------------------------------------------------------- load, time, and crashes


def test_more_than_it_can_take_is_turned_away_and_the_rest_is_done(
    local: Served, local_image: str, checked: Check
) -> None:
    bodies = [ask(local_image), ask(local_image)]
    with held(local.runner_pid()), posting(local, PREDICT, *bodies) as answers:
        wait_until(
            lambda: all(is_processing(local, body["task_id"]) for body in bodies), 10, "both are under way"
        )
        refused = local.client.post(PREDICT, json=ask(local_image))
        assert refused.status_code == 429
        assert checked(local, refused, PREDICT)["error"]["code"] == "OVERLOADED"
        assert int(refused.headers["Retry-After"]) >= 1
        assert local.client.get("/health").status_code == 200
        os.kill(local.runner_pid(), signal.SIGCONT)
        assert [answer.result().status_code for answer in answers] == [200, 200]


def test_a_request_that_takes_too_long_is_given_up_and_the_next_one_works(
    local: Served, local_image: str, checked: Check
) -> None:
    local.wait_ready()
    body = ask(local_image)
    with held(local.runner_pid()):
        response = local.client.post(PREDICT, json=body)
    assert response.status_code == 504
    assert checked(local, response, PREDICT)["error"]["code"] == "TIMED_OUT"
    assert LOCAL_TIMEOUT_S - 1 < response.elapsed.total_seconds() < LOCAL_TIMEOUT_S + 15
    row = row_of(local, body["task_id"])
    assert row is not None
    assert (row["status"], row["metadata"]["error"]["code"]) == ("error", "TIMED_OUT")
    wait_until(lambda: local.client.post(PREDICT, json=body).is_success, 60, "the same request works")


def test_the_runner_dies_in_the_middle_and_the_task_is_done_all_the_same(
    local: Served, local_image: str, checked: Check
) -> None:
    local.wait_ready()
    body, pid = ask(local_image), local.runner_pid()
    with held(pid):
        accepted = local.client.post(PREDICT, json=body, headers={"Prefer": "respond-async"})
        wait_until(lambda: is_processing(local, body["task_id"]), 10, "the task is under way")
        wait_until(lambda: task_of(local, accepted)["stage"] == "segment", 10, "it is in the model")
        os.kill(pid, signal.SIGKILL)

    wait_until(lambda: local.client.get("/readyz").status_code == 503, 10, "the loss is noticed")
    early = local.client.post(PREDICT, json=ask(local_image))
    assert (early.status_code, local.client.get("/readyz").status_code) == (503, 503)
    assert checked(local, early, PREDICT)["error"]["code"] == "MODEL_NOT_READY"
    assert int(early.headers["Retry-After"]) >= 1
    assert checked(local, local.client.get("/readyz"), "/readyz")["error"]["code"] == "MODEL_NOT_READY"
    assert local.client.get("/api/v1/model/info").status_code == 503
    assert local.client.get("/health").json()["model_loaded"] is False

    local.wait_ready()
    assert local.runner_pid() != pid
    wait_until(lambda: task_of(local, accepted)["status"] == "done", 60, "the task is done")
    assert task_of(local, accepted)["attempts"] == 2
    row = row_of(local, body["task_id"])
    assert row is not None and row["status"] == "done"


# ------------------------------------------------------------------------------------------- accepted tasks


def task_of(local: Served, accepted: httpx.Response) -> dict[str, Any]:
    answer = local.client.get(accepted.headers["Location"])
    assert answer.status_code == 200
    return dict(answer.json())


@pytest.mark.parametrize(
    "prefer", ["respond-async", "Respond-Async; foo=bar, wait=5", "wait=5,respond-async"]
)
def test_a_caller_who_does_not_wait_is_told_where_to_look(
    local: Served, local_image: str, checked: Check, picture: Picture, prefer: str
) -> None:
    body = ask(local_image)
    accepted = local.client.post(PREDICT, json=body, headers={"Prefer": prefer})
    assert accepted.status_code == 202
    assert accepted.json() == {"task_id": body["task_id"], "status": "processing"}
    assert accepted.headers["Location"] == f"/api/v1/tasks/{body['task_id']}"
    assert accepted.headers["Preference-Applied"] == "respond-async"
    wait_until(lambda: task_of(local, accepted)["status"] == "done", 30, "the task is done")
    checked(local, local.client.get(accepted.headers["Location"]), "/api/v1/tasks/{task_id}")
    told = task_of(local, accepted)
    assert (told["stage"], told["attempts"]) == ("done", 1)
    again = local.client.post(PREDICT, json=body)  # answered from the journal
    assert again.status_code == 200
    unlike = {"timings_ms"}
    assert {k: v for k, v in again.json().items() if k not in unlike} == {
        k: v for k, v in told["result"].items() if k not in unlike
    }
    png = local.client.get(told["result"]["mask_url"].removeprefix(local.url)).content
    assert iou(read_mask(png), picture.masks["red circle"]) > 0.8


def test_a_batch_that_nobody_waits_for_tells_all_results(local: Served, local_image: str) -> None:
    body = ask_many(local_image, "red circle", "blue square")
    accepted = local.client.post(BATCH, json=body, headers={"Prefer": "respond-async"})
    assert accepted.status_code == 202
    wait_until(lambda: task_of(local, accepted)["status"] == "done", 30, "the task is done")
    results = task_of(local, accepted)["result"]["results"]
    assert [result["labels"] for result in results] == [["red circle"], ["blue square"]]


def test_a_task_that_failed_tells_why(local: Served, checked: Check) -> None:
    body = ask("uploads/never-put.png")
    accepted = local.client.post(PREDICT, json=body, headers={"Prefer": "respond-async"})
    assert accepted.status_code == 202
    wait_until(lambda: task_of(local, accepted)["status"] == "error", 30, "the task failed")
    assert task_of(local, accepted)["error"]["code"] == "IMAGE_NOT_FOUND"
    row = row_of(local, body["task_id"])
    assert row is not None and row["metadata"]["error"]["code"] == "IMAGE_NOT_FOUND"


def test_a_task_that_nobody_sent_is_not_found(local: Served, checked: Check) -> None:
    path = "/api/v1/tasks/{task_id}"
    answer = local.client.get(path.format(task_id=uuid.uuid4()))
    assert (answer.status_code, checked(local, answer, path)["error"]["code"]) == (404, "TASK_NOT_FOUND")


def test_a_task_whose_caller_hangs_up_is_done(local: Served, local_image: str) -> None:
    local.wait_ready()
    body = ask(local_image)
    with held(local.runner_pid()):
        with pytest.raises(httpx.ReadTimeout):
            local.client.post(PREDICT, json=body, timeout=1)
        wait_until(lambda: is_processing(local, body["task_id"]), 10, "the task is under way")

    def is_done() -> bool:
        row = row_of(local, body["task_id"])
        return row is not None and row["status"] == "done"

    wait_until(is_done, 30, "the task is done")


# ----------------------------------------------------------------------------------------- logs and metrics


def test_every_request_has_one_log_line_and_no_secret_is_in_any(local: Served, local_image: str) -> None:
    body = ask(local_image)
    local.client.post(PREDICT, json=body, headers={"X-Request-ID": "find-me-1"})
    local.client.post(PREDICT, content=b"{", headers={"X-Request-ID": "find-me-2"})
    wait_until(lambda: "find-me-2" in local.log(), 30, "the log line is written")
    lines = [json.loads(line) for line in local.log().splitlines() if line.startswith("{")]
    (done,) = [
        line for line in lines if line.get("request_id") == "find-me-1" and line["message"] == "request"
    ]
    assert (done["task_id"], done["status"], done["outcome"]) == (body["task_id"], 200, "ok")
    assert {"download", "decode", "queue", "infer", "encode", "upload", "row_update"} == done[
        "stage_ms"
    ].keys()
    assert done["stage_ms"]["infer"] > 0
    (failed,) = [line for line in lines if line.get("request_id") == "find-me-2"]
    assert (failed["status"], failed["outcome"]) == (400, "MALFORMED_JSON")
    assert SECRETS["API_SECRET_KEY"] not in local.log()


def test_metrics_of_all_processes_come_together(local: Served, local_image: str) -> None:
    def metric(text: str, name: str) -> float:
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    before = local.client.get("/metrics").text
    local.client.post(BATCH, json=ask_many(local_image, "red circle", "blue square"))
    assert local.client.post(BATCH, headers={"X-API-Key": ""}).status_code == 401
    after = local.client.get("/metrics").text
    counted = 's3_requests_total{method="POST",route="/api/v1/predict/batch",status="200"}'
    assert metric(after, counted) == metric(before, counted) + 1
    assert metric(after, "s3_batch_size_count") == metric(before, "s3_batch_size_count") + 1
    for stage in ("download", "decode", "queue", "infer", "encode", "upload", "row_update"):
        name = f's3_stage_seconds_count{{stage="{stage}"}}'
        assert metric(after, name) == metric(before, name) + 1, stage
    assert 's3_errors_total{code="UNAUTHORIZED"}' in after
    # In memory where there is some, and surely not in BENTOML_HOME.
    runner = psutil.Process(local.runner_pid())
    file = Path(runner.environ()["S3_LIFECYCLE_DIR"], "metrics", f"histogram_{runner.pid}.db")
    assert str(file) in {mapped.path for mapped in runner.memory_maps()}
