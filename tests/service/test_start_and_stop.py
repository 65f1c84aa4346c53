"""How the service starts, refuses to start, and stops."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import uuid
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import Serve, Served, wait_until
from tests.sam3_runner.checkpoint_forms import meta_file
from tests.service.conftest import PREDICT, Picture, ask, held, iou, is_processing, posting, read_mask

END_DEADLINE_S = 120.0
R2 = {
    "R2_ENDPOINT": "https://account.r2.cloudflarestorage.com",
    "R2_ACCESS_KEY_ID": "key-id-0001",
    "R2_SECRET_ACCESS_KEY": "hunter2-hunter2",
}


def end_of(service: Served) -> str:
    """Its last line; it must have ended with a status that says that it failed."""
    try:
        status = service.process.wait(END_DEADLINE_S)
    except subprocess.TimeoutExpired:
        pytest.fail(f"it went on:\n{service.log()}")
    assert status == 1, service.log()
    return service.log().strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"R2_ENDPOINT": R2["R2_ENDPOINT"]}, "R2_ACCESS_KEY_ID, R2_SECRET_ACCESS_KEY is not set"),
        (R2, "API_SECRET_KEY is not set"),
        ({"SAM3_WEIGHTS_PATH": "/nowhere/sam3.pt"}, "SAM3_WEIGHTS_PATH is set to '/nowhere/sam3.pt'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_settings_end_the_start_in_one_line(served: Serve, env: dict[str, str], named: str) -> None:
    service = served(env, ready=False)
    assert named in end_of(service)
    assert "Traceback" not in service.log() and "hunter2" not in service.log()


def test_weights_that_do_not_load_end_the_service_instead_of_trying_for_ever(
    served: Serve, weights: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(weights, broken)
    (broken / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    service = served({"SAM3_WEIGHTS_PATH": str(broken)}, ready=False)
    assert "SAM3_WEIGHTS_PATH cannot be loaded: " in end_of(service)


@pytest.mark.slow
def test_meta_s_own_file_is_served(served: Serve, weights: Path, tmp_path: Path, picture: Picture) -> None:
    service = served({"SAM3_WEIGHTS_PATH": str(meta_file(weights, tmp_path / "mounted"))})
    info = service.client.get("/api/v1/model/info").json()
    assert (info["model_version"], info["parameters"]) == ("sam3", 2_412_554)
    service.client.put("/files/uploads/sam3.png", content=picture.png).raise_for_status()
    answer = service.client.post(PREDICT, json=ask("uploads/sam3.png")).raise_for_status().json()
    mask = read_mask(service.client.get(answer["mask_url"]).content)
    assert iou(mask, picture.masks["red circle"]) > 0.8


def listening_on(port: int) -> set[str]:
    """Local addresses of the sockets that listen on a port, from the kernel's table."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {
        line[1].split(":")[0] for line in lines if line[3] == "0A" and int(line[1].split(":")[1], 16) == port
    }


def test_with_a_key_it_listens_everywhere(local: Served) -> None:
    assert listening_on(local.port) == {"00000000"}


def test_without_a_key_it_listens_on_loopback_only_and_says_so(keyless: Served) -> None:
    assert listening_on(keyless.port) == {"0100007F"}
    assert "API_SECRET_KEY is not set" in keyless.log()
    assert keyless.client.get("/api/v1/model/info").status_code == 200


def test_without_a_key_no_page_of_the_web_gets_in(keyless: Served) -> None:
    def info(**headers: str) -> int:
        return httpx.get(f"{keyless.url}/api/v1/model/info", headers=headers, trust_env=False).status_code

    assert info() == info(Host="localhost:1") == info(Origin="http://localhost:5173") == 200
    assert info(Host="evil.example") == info(Origin="https://evil.example") == info(Origin="null") == 401
    assert info(**{"X-Forwarded-For": "127.0.0.1"}) == 401


def test_requests_under_way_are_finished_before_it_stops_and_new_ones_turned_away(
    keyless: Served, picture: Picture
) -> None:
    url = keyless.client.put("/files/uploads/a.png", content=picture.png).json()["url"]
    body, runner = ask(url), keyless.runner_pid()
    with posting(keyless, PREDICT, body) as (answer,), held(runner):
        wait_until(lambda: is_processing(keyless, body["task_id"]), 20, "the request is under way")
        keyless.process.terminate()

        def refused() -> httpx.Response | None:
            new = {**body, "task_id": str(uuid.uuid4())}
            try:
                response = keyless.client.post(PREDICT, json=new, timeout=1)
            except httpx.ReadTimeout:  # accepted before the signal had come
                return None
            return response if response.status_code == 503 else None

        turned_away = wait_until(refused, 20, "new requests are turned away")
        assert turned_away.json()["error"]["code"] == "SHUTTING_DOWN"
        assert int(turned_away.headers["Retry-After"]) >= 1
        os.kill(runner, signal.SIGCONT)
        assert answer.result().status_code == 200
    assert keyless.process.wait(60) == 0


def test_no_process_outlives_a_supervisor_that_was_killed_while_they_loaded(
    served: Serve, weights: Path
) -> None:
    service = served({}, ready=False)
    supervisor = psutil.Process(service.process.pid)
    wait_until(lambda: len(supervisor.children()) == 2, 120, "both are started")
    workers = supervisor.children()
    service.process.kill()
    _, alive = psutil.wait_procs(workers, timeout=90)
    for worker in alive:
        worker.kill()
    assert alive == []
