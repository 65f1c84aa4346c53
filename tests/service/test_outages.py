"""The whole service on an S3 server and Supabase (Postgres behind PostgREST), each of them failing in turn."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.conftest import wait_until
from tests.servers.postgrest import insert_task, read_task
from tests.service.conftest import (
    PREDICT,
    REMOTE_KEY,
    REMOTE_TIMEOUT_S,
    Check,
    Picture,
    Remote,
    held,
    iou,
    posting,
    read_mask,
)

KEY = "uploads/shapes.png"


def ask(remote: Remote, **other: Any) -> dict[str, Any]:
    """A request whose row the Edge has inserted."""
    user_id = str(uuid.uuid4())
    body = {
        "image_url": f"https://images.example.com/{KEY}",
        "text_prompt": "red circle",
        "user_id": user_id,
        **other,
    }
    task_id = insert_task(
        remote.supabase.dsn, user_id=user_id, image_url=body["image_url"], text_prompt=body["text_prompt"]
    )
    return {"task_id": task_id, **body}


def row_of(remote: Remote, body: dict[str, Any]) -> dict[str, Any]:
    return read_task(remote.supabase.dsn, body["task_id"])


@pytest.fixture(autouse=True)
def _picture_is_stored(remote: Remote, picture: Picture) -> None:
    remote.put(KEY, picture.png)


@contextmanager
def in_the_middle(remote: Remote, body: dict[str, Any]) -> Iterator[Any]:
    """A request that is under way: row claimed, waiting for the model until the block ends."""
    with posting(remote.service, PREDICT, body) as (answer,), held(remote.service.runner_pid()):
        wait_until(lambda: row_of(remote, body)["status"] == "processing", 15, "the row is claimed")
        yield answer


def test_from_object_storage_to_mask_and_row(remote: Remote, picture: Picture, checked: Check) -> None:
    body = ask(remote)
    result = checked(remote.service, remote.service.client.post(PREDICT, json=body), PREDICT)
    key = f"masks/{body['task_id']}.png"
    assert result["mask_url"] == f"https://images.example.com/{key}"
    assert iou(read_mask(remote.get(key)), picture.masks["red circle"]) > 0.8
    row = row_of(remote, body)
    assert (row["status"], row["mask_image_url"], row["labels"]) == (
        "done",
        result["mask_url"],
        ["red circle"],
    )
    assert row["metadata"]["user_id"] == body["user_id"]


@pytest.mark.parametrize("form", ["{endpoint}/{bucket}/{key}", "s3://{bucket}/{key}", "{key}"])
def test_every_form_of_our_own_urls_is_read(remote: Remote, form: str) -> None:
    url = form.format(endpoint=remote.s3.endpoint, bucket=remote.s3.bucket, key=KEY)
    assert remote.service.client.post(PREDICT, json=ask(remote, image_url=url)).status_code == 200


def test_the_files_routes_do_not_exist(remote: Remote) -> None:
    assert remote.service.client.get(f"/files/{KEY}").status_code == 404
    assert remote.service.client.put("/files/uploads/a.png", content=b"x").status_code == 404
    assert "/files/{key}" not in remote.service.client.get("/docs.json").json()["paths"]
    assert httpx.get(f"{remote.service.url}/files/{KEY}", trust_env=False).status_code == 401


@pytest.mark.parametrize("task_id", [str(uuid.uuid4()), "not-a-uuid"], ids=["a uuid", "no uuid"])
def test_a_task_without_a_row_is_told_before_anything_is_computed(
    remote: Remote, checked: Check, task_id: str
) -> None:
    response = remote.service.client.post(PREDICT, json={**ask(remote), "task_id": task_id})
    assert response.status_code == 404
    assert checked(remote.service, response, PREDICT)["error"]["code"] == "TASK_NOT_FOUND"


def test_a_row_with_other_inputs_is_a_conflict(remote: Remote, checked: Check) -> None:
    body = ask(remote)
    assert remote.service.client.post(PREDICT, json=body).status_code == 200
    response = remote.service.client.post(PREDICT, json={**body, "text_prompt": "blue square"})
    assert response.status_code == 409
    assert checked(remote.service, response, PREDICT)["error"]["code"] == "TASK_CONFLICT"
    assert row_of(remote, body)["status"] == "done"


@pytest.mark.parametrize(
    ("image_url", "status", "code"),
    [
        (f"https://images.example.com.evil.example/{KEY}", 422, "FOREIGN_IMAGE_URL"),
        ("https://images.example.com/uploads/missing.png", 404, "IMAGE_NOT_FOUND"),
    ],
)
def test_an_image_that_is_not_ours_or_not_there_leaves_an_error_row(
    remote: Remote, checked: Check, image_url: str, status: int, code: str
) -> None:
    body = ask(remote, image_url=image_url)
    response = remote.service.client.post(PREDICT, json=body)
    assert response.status_code == status
    assert checked(remote.service, response, PREDICT)["error"]["code"] == code
    row = row_of(remote, body)
    assert (row["status"], row["metadata"]["error"]["code"]) == ("error", code)


def test_the_object_storage_dies_in_the_middle_and_the_result_is_delivered_when_it_is_back(
    remote: Remote, checked: Check
) -> None:
    body = ask(remote)
    with in_the_middle(remote, body) as answer:
        remote.s3.kill()
    try:
        response = answer.result()
    finally:
        remote.s3.start()
    assert response.status_code == 504  # computed, but not delivered by the deadline
    assert checked(remote.service, response, PREDICT)["error"]["code"] == "TIMED_OUT"
    wait_until(lambda: row_of(remote, body)["status"] == "done", 60, "the result is delivered")
    assert remote.service.client.post(PREDICT, json=body).status_code == 200
    remote.wait_recovered()


def test_object_storage_that_is_away_until_the_deadline_is_an_error(remote: Remote, checked: Check) -> None:
    body = ask(remote)
    remote.s3.kill()
    try:
        response = remote.service.client.post(PREDICT, json=body)
    finally:
        remote.s3.start()
    assert response.status_code == 502
    assert checked(remote.service, response, PREDICT)["error"]["code"] == "STORAGE_UNAVAILABLE"
    row = row_of(remote, body)
    assert (row["status"], row["metadata"]["error"]["code"]) == ("error", "STORAGE_UNAVAILABLE")
    remote.wait_recovered()
    assert remote.service.client.post(PREDICT, json=body).status_code == 200
    assert row_of(remote, body)["status"] == "done"


def test_an_outage_is_told_and_ends_without_traffic_while_the_service_stays_ready(
    remote: Remote, checked: Check
) -> None:
    def metric() -> str:
        text = remote.service.client.get("/metrics").text
        return next(
            line for line in text.splitlines() if line.startswith('s3_dependency_up{dependency="storage"')
        )

    assert metric().endswith(" 1.0")
    remote.s3.kill()
    try:
        with posting(remote.service, PREDICT, ask(remote)) as (answer,):
            wait_until(lambda: remote.dependency("storage")["status"] == "down", 60, "the outage is noticed")
            response = remote.service.client.get("/health")
            told = checked(remote.service, response, "/health")
            assert (response.status_code, told["status"]) == (200, "ok")
            assert told["dependencies"]["storage"]["reason"] == "STORAGE_UNAVAILABLE"
            since = datetime.fromisoformat(told["dependencies"]["storage"]["since"])
            assert timedelta() < datetime.now(UTC) - since < timedelta(minutes=2)
            assert told["dependencies"]["tasks"] == {"status": "ok", "since": None, "reason": None}
            assert remote.service.is_ready()
            assert metric().endswith(" 0.0")
            assert response.elapsed.total_seconds() < 1
            answer.result()
    finally:
        remote.s3.start()
    wait_until(lambda: remote.dependency("storage")["status"] == "ok", 60, "its end is noticed")
    assert metric().endswith(" 1.0")


def test_the_object_storage_hangs_and_the_next_request_works(remote: Remote, checked: Check) -> None:
    body = ask(remote)
    with held(remote.s3.pid):
        response = remote.service.client.post(PREDICT, json=body)
    code = checked(remote.service, response, PREDICT)["error"]["code"]
    assert code in (
        "TIMED_OUT",
        "STORAGE_TIMEOUT",
        "STORAGE_UNAVAILABLE",
    )  # the last once the breaker is open
    assert response.elapsed.total_seconds() < REMOTE_TIMEOUT_S + 15
    assert row_of(remote, body)["status"] == "error"
    assert remote.service.client.post(PREDICT, json=body).status_code == 200


def test_supabase_fails_in_the_middle_and_the_task_is_done_all_the_same(remote: Remote) -> None:
    body = ask(remote)
    with in_the_middle(remote, body) as answer:
        remote.supabase.faults.fail(6, status=503, method="PATCH")  # more than one update's own tries
    assert answer.result().status_code == 200
    assert row_of(remote, body)["status"] == "done"


def test_postgres_dies_in_the_middle_and_the_result_is_delivered_when_it_is_back(
    remote: Remote, checked: Check
) -> None:
    body = ask(remote)
    try:
        with in_the_middle(remote, body) as answer:
            remote.postgres.stop()
        response = answer.result()
    finally:
        remote.postgres.start()
    assert response.status_code == 504
    assert checked(remote.service, response, PREDICT)["error"]["code"] == "TIMED_OUT"
    wait_until(lambda: row_of(remote, body)["status"] == "done", 60, "the result is delivered")
    assert remote.service.client.post(PREDICT, json=body).status_code == 200


def test_the_runner_dies_in_the_middle_and_the_task_is_done_all_the_same(remote: Remote) -> None:
    body = ask(remote)
    with in_the_middle(remote, body):
        os.kill(remote.service.runner_pid(), signal.SIGKILL)
    wait_until(lambda: row_of(remote, body)["status"] in ("done", "error"), 90, "the task ends")
    remote.service.wait_ready()
    assert remote.service.client.post(PREDICT, json=body).status_code == 200
    assert row_of(remote, body)["status"] == "done"


def test_no_secret_is_in_any_log_or_row(remote: Remote) -> None:
    secrets = [REMOTE_KEY, remote.s3.secret_access_key, remote.s3.access_key_id, remote.supabase.secret_key]
    log = remote.service.log()
    assert '"outcome": "STORAGE_UNAVAILABLE"' in log
    assert [secret for secret in secrets if secret in log] == []
