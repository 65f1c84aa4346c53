"""The Python client against a real server that misbehaves, and against the API's own schemas."""

from __future__ import annotations

import json
import time
from typing import Any, NotRequired, get_args, get_origin, get_type_hints

import pytest
from pydantic import BaseModel

from api import schemas
from clients import S3Client, S3ClientError, ServiceError, Unreachable, client
from tests.conftest import free_port
from tests.storage.failing_server import (
    Behaviour,
    FailingServer,
    answer,
    break_off_body,
    failing_server,
    hang_up,
    never_answer,
    speak_no_http,
)

KEY = "client-secret-key-0123456789"
OK = answer(200, b'{"task_id": "t", "instances": []}')


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_PAUSE_S", 0.05)


def error(status: int, code: str, headers: dict[str, str] | None = None, **more: Any) -> Behaviour:
    """An error in the contract's form."""
    body = {
        "success": False,
        "data": None,
        "error": {"code": code, "message": "What was wrong.", **more},
        "meta": {"request_id": "req-1", "timestamp": "2026-01-31T12:00:00+00:00"},
    }
    return answer(status, json.dumps(body).encode(), headers)


async def predict(server: FailingServer, **options: Any) -> Any:
    async with S3Client(server.endpoint, KEY, **options) as s3:
        return await s3.predict("uploads/a.png", "red circle")


async def failure(*behaviours: Behaviour, **options: Any) -> tuple[S3ClientError, FailingServer]:
    with failing_server(*behaviours) as server, pytest.raises(S3ClientError) as raised:
        await predict(server, **options)
    return raised.value, server


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(error(429, "OVERLOADED"), id="overloaded"),
        pytest.param(error(503, "MODEL_NOT_READY"), id="not ready"),
        pytest.param(answer(502, b"<html>Bad gateway</html>"), id="a proxy's own page"),
        pytest.param(hang_up, id="hangs up"),
        pytest.param(break_off_body(b"{", 100), id="breaks off"),
        pytest.param(speak_no_http, id="no HTTP"),
    ],
)
async def test_what_may_pass_is_tried_again_as_the_same_task(trouble: Behaviour) -> None:
    with failing_server(trouble, OK) as server:
        assert (await predict(server))["task_id"] == "t"
    first, second = server.requests
    assert first.body == second.body
    assert json.loads(first.body)["task_id"]


async def test_retry_after_is_waited_for() -> None:
    with failing_server(error(429, "OVERLOADED", {"Retry-After": "1"}), OK) as server:
        began = time.monotonic()
        await predict(server)
    assert time.monotonic() - began >= 1


@pytest.mark.parametrize(
    ("status", "code"), [(401, "UNAUTHORIZED"), (422, "INVALID_PROMPT"), (500, "INFERENCE_FAILED")]
)
async def test_what_would_fail_again_is_told_at_once(status: int, code: str) -> None:
    details = [{"field": "text_prompt", "message": "Blank"}]
    told, server = await failure(error(status, code, details=details), OK)
    assert isinstance(told, ServiceError)
    assert (told.status, told.code, told.message) == (status, code, "What was wrong.")
    assert (told.request_id, told.details, told.may_pass) == ("req-1", tuple(details), False)
    assert len(server.requests) == 1


async def test_it_gives_up_after_its_time_with_the_last_reason() -> None:
    began = time.monotonic()
    told, server = await failure(error(503, "MODEL_NOT_READY"), give_up_after_s=0.3)
    assert (told.code, told.may_pass) == ("MODEL_NOT_READY", True)
    assert len(server.requests) >= 2
    assert time.monotonic() - began < 30


async def test_it_does_not_wait_for_what_comes_too_late_anyway() -> None:
    told, server = await failure(error(429, "OVERLOADED", {"Retry-After": "3600"}))
    assert isinstance(told, ServiceError)
    assert told.retry_after_s == 3600
    assert len(server.requests) == 1


async def test_a_server_that_never_answers_is_given_up() -> None:
    told, _ = await failure(never_answer, timeout_s=0.2, give_up_after_s=0)
    assert isinstance(told, Unreachable)
    assert "gave no answer in time" in told.message


async def test_nobody_listening_is_one_readable_error() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with S3Client(url, give_up_after_s=0) as s3:
        with pytest.raises(Unreachable, match=f"{url} cannot be reached"):
            await s3.model_info()


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        pytest.param(answer(200, b"<html>hello</html>"), "NOT_OUR_SERVICE", id="another site"),
        pytest.param(answer(404, b"nothing here"), "HTTP_404", id="another site's error"),
        pytest.param(answer(500, b'["an error"]'), "HTTP_500", id="JSON of another form"),
    ],
)
async def test_an_answer_of_something_else_is_an_error_of_the_same_kind(
    behaviour: Behaviour, code: str
) -> None:
    told, _ = await failure(behaviour)
    assert (type(told), told.code) == (ServiceError, code)


async def test_a_redirect_is_not_followed_so_that_the_key_goes_nowhere_else() -> None:
    with failing_server(OK) as elsewhere:
        told, server = await failure(answer(307, headers={"Location": elsewhere.endpoint}))
        assert elsewhere.requests == []
    assert told.code == "HTTP_307"
    assert server.requests[0].headers["X-API-Key"] == KEY


async def test_no_proxy_comes_between_a_machine_and_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with failing_server(OK) as server:
        await predict(server, give_up_after_s=0)


async def test_only_what_was_given_is_sent() -> None:
    with failing_server(OK) as server:
        async with S3Client(server.endpoint) as s3:
            await s3.predict("a", task_id="t", boxes=[{"xyxy": [1, 2, 3, 4]}], max_instances=3)
            await s3.predict_batch("a", ["cat", {"text_prompt": "dog"}], task_id="t", outputs=["coco"])
    one, many = (json.loads(request.body) for request in server.requests)
    common = {"image_url": "a", "user_id": "python", "task_id": "t"}
    assert one == common | {"boxes": [{"xyxy": [1, 2, 3, 4]}], "max_instances": 3}
    assert many == common | {"prompts": ["cat", {"text_prompt": "dog"}], "outputs": ["coco"]}
    assert "X-API-Key" not in server.requests[0].headers


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "not a url\n"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        S3Client(url)


def test_a_key_that_fits_in_no_header_is_refused_and_not_shown() -> None:
    with pytest.raises(ValueError) as raised:
        S3Client(api_key="geheim\nschlüssel")
    assert "geheim" not in str(raised.value)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (client.PredictResult, schemas.PredictResponse),
        (client.BatchResult, schemas.BatchResponse),
        (client.Instance, schemas.Instance),
        (client.CocoRle, schemas.CocoMask),
        (client.ImageSize, schemas.ImageSize),
        (client.Output, schemas.StoredOutput),
        (client.Task, schemas.TaskResponse),
        (client.TaskError, schemas.TaskError),
        (client.ModelInfo, schemas.ModelInfoResponse),
    ],
)
def test_the_types_of_answers_are_those_of_the_api(ours: Any, theirs: type[BaseModel]) -> None:
    fields = set(theirs.model_fields)
    hints = get_type_hints(ours, include_extras=True)
    assert fields <= set(hints)
    assert {name for name, hint in hints.items() if get_origin(hint) is not NotRequired} <= fields


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (client.PredictOptions, schemas.PredictRequest),
        (client.BatchOptions, schemas.BatchRequest),
        (client.PromptObject, schemas.PromptObject),
        (client.ExemplarBox, schemas.BoxExemplar),
        (client.Click, schemas.Click),
        (client.Region, schemas.Rectangle),
    ],
)
def test_all_that_may_be_asked_can_be_asked(ours: Any, theirs: type[BaseModel]) -> None:
    arguments = {"image_url", "user_id", "task_id", "prompts"}
    if theirs is schemas.PredictRequest:
        arguments.add("text_prompt")
    assert set(ours.__annotations__) == set(theirs.model_fields) - arguments
    assert get_args(client.OutputName) == get_args(schemas.OutputName)
