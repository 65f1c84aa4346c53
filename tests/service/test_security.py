"""What an attacker would try on the served thing: keys, foreign URLs, hostile ids and headers, pickled data."""

from __future__ import annotations

import json
import os
import pickle
import socket
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from _bentoml_impl.serde import ALL_SERDE

from api.access import DELAY_S, FREE_FAILURES
from tests.conftest import Served, wait_until
from tests.servers.canary import Canary, listening_canary
from tests.service.conftest import (
    BATCH,
    NEXT_KEY,
    PREDICT,
    REMOTE_KEY,
    SECRETS,
    Check,
    Remote,
    ask,
    ask_many,
    row_of,
)
from tests.storage.hostile_urls import hostile_urls
from tests.tasks.test_hostile_ids import HOSTILE

KEY = SECRETS["API_SECRET_KEY"]


# ---------------------------------------------------------------------------------------------------------- the key


def guess(service: Served, key: str) -> httpx.Response:
    return httpx.get(
        f"{service.url}/api/v1/model/info", headers={"X-API-Key": key}, trust_env=False, timeout=30
    )


def failures_of(service: Served) -> float:
    lines = httpx.get(f"{service.url}/metrics", trust_env=False).text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("s3_auth_failures_total"))


def test_both_keys_open_and_only_guesses_are_slowed_counted_and_never_logged(remote: Remote) -> None:
    service = remote.service
    assert [
        guess(service, key).status_code for key in (REMOTE_KEY, NEXT_KEY, f"{REMOTE_KEY},{NEXT_KEY}")
    ] == [
        200,
        200,
        401,
    ]
    before = failures_of(service)
    guesses = [f"guessed-private-{number}" for number in range(FREE_FAILURES - 1)]
    with ThreadPoolExecutor(8) as pool:
        fast = list(pool.map(lambda key: guess(service, key), guesses))
        slow = list(pool.map(lambda key: guess(service, key), guesses[:8]))
        assert {answer.status_code for answer in (*fast, *slow)} == {401}
        assert max(answer.elapsed.total_seconds() for answer in fast) < DELAY_S
        assert min(answer.elapsed.total_seconds() for answer in slow) >= DELAY_S * 0.9
        kept = pool.submit(guess, service, "guessed-private")
        right = guess(service, REMOTE_KEY)  # from the same address, while others wait
        assert (right.status_code, kept.done()) == (200, False)
    assert failures_of(service) == before + len(fast) + len(slow) + 1
    slowed = [line for line in service.log().splitlines() if "answers to this address are slowed" in line]
    assert len(slowed) == 1 and json.loads(slowed[0])["address"] == "127.0.0.1"
    assert "guessed-private" not in service.log()


def test_a_right_key_in_a_wrong_place_is_in_no_log(local: Served) -> None:
    wrong_places: list[dict[str, Any]] = [
        {"url": f"/api/v1/model/info?api_key={KEY}&X-API-Key={KEY}"},
        {"url": f"/{KEY}"},
        {"url": f"/{'x' * 190}{KEY}"},
        {"url": f"/api/v1/{KEY}"},
        {"url": f"/files/uploads/{KEY}.png"},
        {"url": f"/files/{KEY}%00"},
        {
            "url": "/health",
            "headers": {"Authorization": f"Bearer {KEY}", "Cookie": f"key={KEY}", "X-Key": KEY},
        },
        {"url": "/nope", "headers": {"X-Request-ID": KEY, "Referer": f"http://localhost/?key={KEY}"}},
        {"url": "/health", "headers": {"User-Agent": KEY, "Host": f"{KEY}.example"}},
        {"method": KEY, "url": "/health"},
        {"method": "POST", "url": PREDICT, "content": KEY},
        {"method": "POST", "url": PREDICT, "json": {"api_key": KEY}},
        {"method": "POST", "url": PREDICT, "json": {KEY: KEY}},
        {"method": "POST", "url": PREDICT, "json": ask(f"https://{KEY}@example.com/{KEY}")},
        {"method": "POST", "url": PREDICT, "json": ask(f"https://{KEY}.example.com/{KEY}")},
        {
            "method": "POST",
            "url": PREDICT,
            "json": ask("uploads/x", task_id=KEY, user_id=KEY, text_prompt=KEY),
        },
        {"method": "PUT", "url": f"/files/uploads/{KEY}", "content": KEY},
    ]
    for place in wrong_places:
        local.client.request(**{"method": "GET", **place})
    with socket.create_connection(("127.0.0.1", local.port), timeout=5) as connection:
        connection.sendall(f"{KEY}\r\nX-API-Key: {KEY}\r\n\r\n".encode())
        connection.recv(1000)
    local.client.get("/nope", headers={"X-Request-ID": "the-last-of-them"})
    wait_until(lambda: "the-last-of-them" in local.log(), 10, "the log is written")
    for part in (KEY, KEY[:10], KEY[-10:], KEY.upper()):
        assert part not in local.log()


# ---------------------------------------------------------------------------------- URLs, ids and headers of callers


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    with listening_canary() as listening:
        yield listening


def try_all(service: Served, checked: Check, canary: Canary, own_port: int) -> None:
    canary.calls.clear()
    for name, url in hostile_urls(canary.port, bucket="s3-images", own_port=own_port).items():
        response = service.client.post(PREDICT, json=ask(url))
        assert response.status_code in (404, 422), (name, response.text)
        code = checked(service, response, PREDICT)["error"]["code"]
        assert code in ("FOREIGN_IMAGE_URL", "VALIDATION_FAILED", "IMAGE_NOT_FOUND", "TASK_NOT_FOUND"), name
        assert "root:" not in response.text
    assert canary.calls == []


def test_no_hostile_url_is_called_or_read_in_local_mode(
    local: Served, checked: Check, canary: Canary
) -> None:
    try_all(local, checked, canary, local.port)


def test_no_hostile_url_is_called_or_read_on_r2(remote: Remote, checked: Check, canary: Canary) -> None:
    try_all(remote.service, checked, canary, int(remote.s3.endpoint.rpartition(":")[2]))


def test_links_below_the_files_lead_nowhere(local: Served, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(b"what no caller may read")
    uploads = local.data_dir / "files" / "uploads"
    uploads.mkdir(parents=True, exist_ok=True)
    (uploads / "link.png").symlink_to(outside / "secret.png")
    (uploads / "folder").symlink_to(outside)
    (uploads / "rows").symlink_to(local.data_dir)
    for key in ("uploads/link.png", "uploads/folder/secret.png", "uploads/rows/tasks.sqlite3"):
        assert local.client.get(f"/files/{key}").status_code == 404
        assert local.client.post(PREDICT, json=ask(key)).status_code == 404


@pytest.mark.parametrize(
    "key",
    [
        "uploads/../../outside.png",
        "uploads/..%2f..%2foutside.png",
        "uploads/%2e%2e/%2e%2e/outside.png",
        "uploads//etc/outside.png",
        "uploads/.ssh/outside.png",
        "uploads/.partial-outside.png",
        "uploads/out%00side.png",
        "uploads/out%0d%0aside.png",
        "uploads/out%5cside.png",
        "uploads/out%e2%80%ae.png",
        "uploads/" + "x" * 300,
        "masks/outside.png",
        "tasks.sqlite3",
        "/etc/outside.png",
    ],
)
def test_nothing_is_put_anywhere_else(local: Served, local_image: str, key: str) -> None:
    def files() -> set[Path]:
        return {path for path in (local.data_dir / "files").rglob("*") if path.is_file()}

    before = files()
    image = local.client.get(local_image).content
    # As it stands: httpx would resolve `..` itself.
    request = local.client.build_request("PUT", "/", content=image)
    request.url = request.url.copy_with(raw_path=f"/files/{key}".encode())
    assert local.client.send(request).status_code in (404, 422)
    assert files() == before


def test_no_hostile_id_gets_anywhere(local: Served, checked: Check) -> None:
    for hostile in HOSTILE:
        for field in ("task_id", "user_id"):
            body = ask("uploads/a.png", **{field: hostile})
            response = local.client.post(PREDICT, json=body)
            if field == "user_id" and hostile and set(hostile) <= set("abneq0.:id"):
                continue  # dots and colons are fit for a user's id
            assert checked(local, response, PREDICT)["error"]["code"] == "VALIDATION_FAILED", hostile
            assert row_of(local, body["task_id"]) is None


def test_what_a_caller_says_of_its_way_here_changes_nothing(local: Served, local_image: str) -> None:
    image = local.client.get(local_image).content
    told = {
        "Host": "evil.example",
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Proto": "gopher",
        "X-Forwarded-For": "evil.example, 127.0.0.1",
        "X-Original-URL": "/metrics",
        "X-HTTP-Method-Override": "DELETE",
        "Forwarded": "for=127.0.0.1;host=evil.example",
        "Prefer": "handling=lenient, return=minimal; evil, \t,,,=",
        "X-Request-ID": "evil.example\u00e9",
    }
    raw = [(name.encode(), value.encode("latin-1")) for name, value in told.items()]
    put = local.client.put("/files/uploads/told.png", content=image, headers=raw)
    assert put.json()["url"] == local_image.replace("shapes.png", "told.png")
    found = local.client.post(PREDICT, json=ask("uploads/told.png"), headers=raw)
    assert found.status_code == 200
    for response in (put, found):
        assert "evil" not in response.text + str(response.headers)


# -------------------------------------------------------------------------------------------------------- bodies

SAID = [
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/octet-stream",
    "application/jsonp",
    "image/png",
    "json",
    "",
]


@pytest.mark.parametrize("said", SAID)
def test_only_what_says_it_is_json_is_read_as_json(local: Served, checked: Check, said: str) -> None:
    for path, body in ((PREDICT, ask("uploads/a.png")), (BATCH, ask_many("uploads/a.png", "red circle"))):
        response = local.client.post(path, content=json.dumps(body), headers={"Content-Type": said})
        assert response.status_code == 415
        assert checked(local, response, path)["error"]["code"] == "UNSUPPORTED_MEDIA_TYPE"
        assert row_of(local, body["task_id"]) is None


@pytest.mark.parametrize(
    "said", [None, "application/json; charset=utf-8", "Application/JSON", "application/x+json"]
)
def test_json_by_any_of_its_names_is_read(local: Served, said: str | None) -> None:
    headers = {} if said is None else {"Content-Type": said}
    response = local.client.post(PREDICT, content=json.dumps(ask("uploads/never-put.png")), headers=headers)
    assert response.json()["error"]["code"] == "IMAGE_NOT_FOUND"


def test_a_compressed_body_is_not_unpacked(local: Served) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = local.client.post(PREDICT, content=b"\x1f\x8b" + b"\0" * 100, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")


class Payload:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


# What BentoML has a reader for, now or in the runners of its first version, and what others call pickled data.
PICKLED = [
    *ALL_SERDE,
    "application/octet-stream",
    "application/vnd.bentoml.pickle",
    "application/vnd.bentoml.DefaultContainer",
    "application/python-pickle",
    "application/x-pickle",
    "application/vnd.apache.arrow.stream",
    "multipart/form-data; boundary=x",
]


def pickled(path: Path) -> tuple[bytes, dict[str, str]]:
    """The payload, and every header that ever made BentoML unpickle."""
    data = pickle.dumps(Payload(path), protocol=5)
    return data, {
        "buffer-lengths": str(len(data)),
        "Payload-Container": "DefaultContainer",
        "Payload-Meta": json.dumps({"format": "default", "pickle_bytes_str": data.hex()}),
        "Batch-Size": "1",
        "Args-Number": "1",
        "Bentoml-Is-Main": "false",
    }


def test_pickled_data_makes_a_directory_where_it_is_unpickled(tmp_path: Path) -> None:
    data, _ = pickled(tmp_path / "made")
    pickle.loads(data)
    assert (tmp_path / "made").is_dir()


def test_nothing_is_unpickled_on_the_public_port(local: Served, tmp_path: Path) -> None:
    data, headers = pickled(tmp_path / "made")
    paths = [
        *local.client.get("/docs.json").json()["paths"],
        "/segment",
        "/info",
        "/",
        "/schema.json",
        "/healthz",
    ]
    statuses = set()
    for path in paths:
        for method in ("POST", "PUT"):
            for said in PICKLED:
                target = path.replace("{key}", "uploads/pickle")
                sent = {**headers, "Content-Type": said}
                statuses.add(local.client.request(method, target, content=data, headers=sent).status_code)
    assert statuses <= {400, 404, 405, 415, 422}
    assert not (tmp_path / "made").exists()


def runner_socket(service: Served) -> Path:
    """The one Unix socket that the runner listens on."""
    listening = {
        Path(str(connection.laddr))
        for connection in psutil.Process(service.runner_pid()).net_connections("unix")
        if connection.laddr and str(connection.laddr).endswith(".sock")
    }
    (path,) = listening
    return path


def test_the_runner_can_be_reached_by_its_own_user_only_and_unpickles_nothing_either(
    local: Served, tmp_path: Path
) -> None:
    local.wait_ready()
    path = runner_socket(local)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    others = psutil.Process(local.runner_pid()).net_connections("tcp")
    assert {connection.laddr.port for connection in others} <= {
        local.port
    }  # inherited; it does not listen there
    data, headers = pickled(tmp_path / "made")
    transport = httpx.HTTPTransport(uds=str(path))
    with httpx.Client(transport=transport, base_url="http://runner", timeout=20) as client:
        for route in ("/segment", "/info"):
            for said in (*PICKLED, None):
                sent = headers if said is None else {**headers, "Content-Type": said}
                answer = client.post(route, content=data, headers=sent)
                assert answer.status_code in (400, 415), (route, said)
        assert client.post("/info", json={}).json()["model_version"] == "demo"
    assert not (tmp_path / "made").exists()
    assert local.client.get("/readyz").status_code == 200
