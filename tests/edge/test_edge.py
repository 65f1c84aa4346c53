"""The Edge's Worker in the real Workers runtime, end to end with the real service: image in, mask out, row `done`."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import httpx
import pytest

from tests.chaos.pictures import Picture, iou, read_mask
from tests.conftest import ROOT, wait_until
from tests.edge.package import Package
from tests.edge.worker import Phone, new_id
from tests.edge.world import (
    API_KEY,
    GIVE_UP_AFTER_S,
    MAX_BACKLOG,
    PUBLIC_URL,
    USERS,
    World,
)

# The first one waits for all servers to start.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BACKLOG_RETRY_AFTER_S = 5  # of the service's 429 when too many tasks are unfinished
# A call arrives whole in half of the Worker's patience, and its answer comes too late.
SLOW_BYTES_PER_S = 200
OLD, LOST, HOPELESS = timedelta(minutes=2), timedelta(minutes=20), timedelta(hours=25)


@contextmanager
def runner_held(world: World) -> Iterator[None]:
    """The model's process stands still inside the block."""
    pid = world.service.runner_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def assert_fault(response: httpx.Response, status: int, code: str) -> None:
    """It has the one shape of errors."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body["success"] is False and body["data"] is None
    assert body["error"]["code"] == code and body["error"]["message"]
    assert body["meta"]["request_id"] == response.headers["X-Request-ID"]


def test_an_image_goes_in_and_its_mask_comes_out(world: World, phone: Phone, picture: Picture) -> None:
    world.transcript.scene("image in, mask out")
    answer = phone.send(picture.file, "red circle")
    assert answer.status_code == 202, answer.text
    task_id = answer.json()["task_id"]
    assert answer.json() == {"task_id": task_id, "status": "pending"}
    assert answer.headers["Location"] == f"/tasks/{task_id}"

    told = world.wait_done(phone, task_id)
    assert told["status"] == "done"
    assert told["labels"] == ["red circle"]
    assert told["confidence"] > 0.5
    assert told["error"] is None
    assert iou(read_mask(world.object(told["mask_url"])), picture.truth("red circle")) > 0.9

    row = world.row(task_id)
    assert row["status"] == "done"
    assert str(row["user_id"]) == USERS[0]
    assert row["mask_image_url"] == told["mask_url"]
    assert world.object(row["source_image_url"]) == picture.file
    assert row["source_image_url"].startswith(f"{PUBLIC_URL}/uploads/{USERS[0]}/")


def test_the_image_may_be_the_body(world: World, phone: Phone) -> None:
    world.transcript.scene("the image as the body")
    answer = phone.send_bare((ROOT / "examples" / "shapes.jpg").read_bytes(), "blue square")
    assert answer.status_code == 202, answer.text
    assert world.wait_done(phone, answer.json()["task_id"])["labels"] == ["blue square"]


def test_a_task_is_its_users_own(world: World, phone: Phone, picture: Picture) -> None:
    world.transcript.scene("somebody else asks")
    task_id = phone.send(picture.file, "red circle").json()["task_id"]
    with world.worker.phone(USERS[1]) as other:
        refused = other.client.get(f"/tasks/{task_id}")
        world.transcript.asked(refused, "(another user)")
        assert_fault(refused, 404, "TASK_NOT_FOUND")
        assert_fault(other.send(picture.file, "red circle", task_id), 409, "TASK_CONFLICT")
    assert world.wait_done(phone, task_id)["status"] == "done"


def test_a_phone_that_sends_again_has_one_task(world: World, phone: Phone, picture: Picture) -> None:
    world.transcript.scene("the phone missed the answer, and sends again")
    task_id, before = new_id(), world.computed()
    first = phone.send(picture.file, "red circle", task_id)
    again = phone.send(picture.file, "red circle", task_id)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json() == again.json()
    assert_fault(phone.send(picture.file, "blue square", task_id), 409, "TASK_CONFLICT")
    assert world.wait_done(phone, task_id)["status"] == "done"
    assert phone.send(picture.file, "red circle", task_id).status_code == 202
    assert world.row(task_id)["status"] == "done"
    assert world.computed() == before + 1


@pytest.mark.parametrize(
    ("image", "prompt", "task_id", "status", "code"),
    [
        pytest.param(b"GIF", "cat", None, 415, "UNSUPPORTED_IMAGE", id="no image"),
        pytest.param(b"", "cat", None, 415, "UNSUPPORTED_IMAGE", id="nothing"),
        pytest.param(b"\xff\xd8\xff" + bytes(25_000_000), "cat", None, 413, "IMAGE_TOO_LARGE", id="large"),
        pytest.param(b"\xff\xd8\xff", " ", None, 422, "VALIDATION_FAILED", id="blank prompt"),
        pytest.param(b"\xff\xd8\xff", "c" * 1001, None, 422, "VALIDATION_FAILED", id="long prompt"),
        pytest.param(b"\xff\xd8\xff", "c\x00t", None, 422, "VALIDATION_FAILED", id="prompt with NUL"),
        pytest.param(b"\xff\xd8\xff", "cat", "../etc", 422, "VALIDATION_FAILED", id="no task id"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    world: World, phone: Phone, image: bytes, prompt: str, task_id: str | None, status: int, code: str
) -> None:
    world.transcript.scene(f"refused: {code}")
    assert_fault(phone.send(image, prompt, task_id), status, code)
    assert not [seen for seen in world.supabase.seen if seen.method == "POST"]


def test_a_form_without_an_image_is_refused(phone: Phone) -> None:
    assert_fault(phone.client.post("/segment", data={"text_prompt": "cat"}), 422, "VALIDATION_FAILED")
    assert_fault(phone.client.post("/segment", files={"x": b""}), 422, "VALIDATION_FAILED")
    broken = {"Content-Type": "multipart/form-data"}
    assert_fault(phone.client.post("/segment", content=b"x", headers=broken), 400, "MALFORMED_FORM")


def test_other_routes_are_none(phone: Phone) -> None:
    assert_fault(phone.client.get("/"), 404, "NOT_FOUND")
    assert_fault(phone.client.get("/tasks/one"), 404, "TASK_NOT_FOUND")
    assert_fault(phone.client.get(f"/tasks/{new_id()}"), 404, "TASK_NOT_FOUND")


def test_nobody_gets_in_without_a_session(world: World, picture: Picture) -> None:
    other = world.supabase.user_jwt(USERS[0])
    forged = other.rpartition(".")[0] + "." + "A" * 43
    for token in (
        forged,
        world.supabase.anon_jwt,
        world.supabase.service_jwt,
        "x",
        world.supabase.secret_key,
    ):
        with world.worker.phone(USERS[0], token) as stranger:
            assert_fault(stranger.client.get(f"/tasks/{new_id()}"), 401, "UNAUTHORIZED")
            assert_fault(stranger.client.post("/segment", content=picture.file), 401, "UNAUTHORIZED")
    assert_fault(httpx.post(f"{world.worker.url}/segment", trust_env=False), 401, "UNAUTHORIZED")
    assert not world.supabase.seen


def test_the_request_id_goes_all_the_way(world: World, phone: Phone, picture: Picture) -> None:
    request_id = f"phone-{uuid.uuid4()}"
    answer = phone.send(picture.file, "red circle", None, **{"X-Request-ID": request_id})
    assert answer.headers["X-Request-ID"] == request_id
    world.wait_done(phone, answer.json()["task_id"])
    assert [status for _, status in world.requests(request_id)] == [202]
    assert world.row(answer.json()["task_id"])["metadata"]["request_id"] == request_id


def test_what_the_service_refuses_is_told_in_the_row(world: World, phone: Phone, picture: Picture) -> None:
    world.transcript.scene("a prompt that the service refuses")
    task_id = phone.send(picture.file, "<|endoftext|>").json()["task_id"]
    told = world.wait_done(phone, task_id)
    assert told["status"] == "error"
    assert told["error"]["code"] == "INVALID_PROMPT"
    assert told["mask_url"] is None


def test_a_service_that_is_down_for_a_moment_gets_the_task_when_it_is_back(
    world: World, phone: Phone, picture: Picture
) -> None:
    world.transcript.scene("the service is down for a moment")
    with world.way.trouble(refuses=True):
        answer = phone.send(picture.file, "red circle")
        assert answer.status_code == 202
        assert answer.elapsed < timedelta(seconds=5)  # the phone does not wait for it
        task_id = answer.json()["task_id"]
        assert phone.look(task_id)["status"] == "pending"
    world.transcript.note("the service is back")
    assert world.wait_done(phone, task_id)["labels"] == ["red circle"]


def test_a_service_that_is_down_for_long_gets_the_task_from_the_sweep(
    world: World, phone: Phone, picture: Picture
) -> None:
    world.transcript.scene("the service is down for longer than a delivery lasts")
    with world.way.trouble(refuses=True):
        task_id = phone.send(picture.file, "red circle").json()["task_id"]

        def given_up() -> bool:
            return "not delivered" in world.worker.log() and task_id in world.worker.log()

        wait_until(given_up, GIVE_UP_AFTER_S + 30, "the delivery is given up", world.worker.log)
        world.age(task_id, OLD)
        world.worker.sweep()
        assert phone.look(task_id)["status"] == "pending"
        world.transcript.note(f"given up after {GIVE_UP_AFTER_S:g} s; the row says pending")
    world.worker.sweep()
    world.transcript.note("the service is back, and the cron trigger fires")
    assert world.wait_done(phone, task_id)["labels"] == ["red circle"]
    secrets = (
        API_KEY,
        world.supabase.secret_key,
        world.supabase.jwt_secret,
        phone.client.headers["Authorization"],
    )
    assert not any(secret in world.worker.log() for secret in secrets)


def test_the_sweep_knows_what_is_lost_and_what_is_hopeless(
    world: World, phone: Phone, picture: Picture
) -> None:
    world.transcript.scene("the sweep")
    image_url = str(world.row(phone.send(picture.file, "red circle").json()["task_id"])["source_image_url"])
    fresh, working, lost, hopeless = (new_id() for _ in range(4))
    world.insert(fresh, image_url, age=timedelta(seconds=5))
    world.insert(working, image_url, status="processing", age=OLD)
    world.insert(lost, image_url, status="processing", age=LOST)
    world.insert(hopeless, image_url, age=HOPELESS)
    world.worker.sweep()
    assert world.wait_done(phone, lost)["status"] == "done"
    assert world.wait_done(phone, hopeless)["error"]["code"] == "NOT_DELIVERED"
    assert phone.look(fresh)["status"] == "pending"
    assert phone.look(working)["status"] == "processing"


@pytest.mark.parametrize(
    ("status", "goes_on"),
    [
        pytest.param(500, True, id="a task that fails by itself"),
        pytest.param(401, False, id="a wrong key"),
        pytest.param(503, False, id="a service that is away"),
    ],
)
def test_the_sweep_goes_on_behind_a_task_unless_all_others_would_meet_the_same(
    world: World, phone: Phone, picture: Picture, status: int, goes_on: bool
) -> None:
    first = phone.send(picture.file, "red circle").json()["task_id"]
    world.wait_done(phone, first)
    image_url = str(world.row(first)["source_image_url"])
    older, old = new_id(), new_id()
    world.insert(older, image_url, age=2 * LOST)
    world.insert(old, image_url, age=LOST)
    with world.way.trouble(error_share=1.0, error_status=status):
        world.worker.sweep()
    log = world.worker.log()
    assert older in log
    assert (old in log) == goes_on
    world.worker.sweep()
    for task_id in (older, old):
        assert world.wait_done(phone, task_id)["status"] == "done"


def test_an_overloaded_service_is_left_alone_for_as_long_as_it_asks(
    world: World, phone: Phone, picture: Picture
) -> None:
    world.transcript.scene("the service is overloaded")
    ids = [f"phone-{uuid.uuid4()}" for _ in range(MAX_BACKLOG + 1)]
    with runner_held(world):
        tasks = []
        for request_id in ids:
            answer = phone.send(picture.file, "red circle", None, **{"X-Request-ID": request_id})
            tasks.append(answer.json()["task_id"])
            wait_until(lambda: world.requests(request_id), 30, "the Worker has called")  # noqa: B023
        refused = world.requests(ids[-1])
        assert [status for _, status in refused] == [429]
        assert phone.look(tasks[-1])["status"] == "pending"
        world.transcript.note(f"429, Retry-After: {BACKLOG_RETRY_AFTER_S}; the row says pending")
    for task_id in tasks:
        assert world.wait_done(phone, task_id)["status"] == "done"
    (first, _), *between, (last, status) = world.requests(ids[-1])
    assert status == 202 and not between
    pause_s = (last - first).total_seconds()
    assert BACKLOG_RETRY_AFTER_S <= pause_s < GIVE_UP_AFTER_S
    world.transcript.note(f"the Worker called again after {pause_s:.1f} s")


def test_a_slow_service_is_called_again_with_the_same_task_and_computes_it_once(
    world: World, phone: Phone, picture: Picture
) -> None:
    world.transcript.scene("the service is slow")
    before, request_id = world.computed(), f"phone-{uuid.uuid4()}"

    def accepted() -> int:
        return [status for _, status in world.requests(request_id)].count(202)

    with world.way.trouble(bytes_per_s=SLOW_BYTES_PER_S):
        answer = phone.send(picture.file, "red circle", None, **{"X-Request-ID": request_id})
        wait_until(lambda: accepted() >= 2, 30, "two calls are accepted", world.worker.log)
    told = world.wait_done(phone, answer.json()["task_id"])
    assert told["status"] == "done"
    assert world.computed() == before + 1
    world.transcript.note(f"the Worker called {accepted()} times with the same task; computed once")


def test_a_database_that_is_down_is_told_the_phone(world: World, phone: Phone, picture: Picture) -> None:
    world.transcript.scene("Supabase is down")
    world.supabase.faults.fail(100, status=503)
    assert_fault(phone.send(picture.file, "red circle"), 502, "TASK_STORE_UNAVAILABLE")
    world.supabase.faults.clear()
    world.supabase.faults.fail(2, status=503)
    world.supabase.faults.hang_up(1, after_work=True)
    answer = phone.send(picture.file, "red circle")  # the row of the cut answer is its own
    assert answer.status_code == 202, answer.text
    assert world.wait_done(phone, answer.json()["task_id"])["status"] == "done"


def test_an_image_that_cannot_be_stored_is_told_the_phone(
    world: World, phone: Phone, picture: Picture
) -> None:
    world.s3.stop()
    try:
        assert_fault(phone.send(picture.file, "red circle"), 502, "STORAGE_UNAVAILABLE")
    finally:
        world.s3.start()
    assert not world.supabase.seen


def test_the_client_gets_from_the_service_what_its_types_say(
    world: World, phone: Phone, picture: Picture, compiled: Package
) -> None:
    image_url = str(world.row(phone.send(picture.file, "red circle").json()["task_id"])["source_image_url"])
    tasks = [new_id() for _ in range(3)]
    for task_id in tasks:
        world.insert(task_id, image_url, age=timedelta())
    env = {
        "SERVICE_URL": world.service.url,
        "API_SECRET_KEY": API_KEY,
        "IMAGE_URL": image_url,
        "USER_ID": USERS[0],
        "TASK_IDS": ",".join(tasks),
    }
    said = compiled.run(compiled.node, "--test", "--test-timeout=60000", "dist/test/service.e2e.js", env=env)
    assert "# pass 7" in said and "# fail 0" in said, said
