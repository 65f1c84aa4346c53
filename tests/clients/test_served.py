"""The command line, the Python client and BentoML's generated client against the served service."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from clients import S3Client, ServiceError, cli
from tests.chaos.pictures import Picture, draw_pictures
from tests.conftest import ROOT, Served, wait_until

KEY = "clients-secret-key-0123456789"
PROMPTS = ("red square", "blue square")
BATCH = ("POST", "/api/v1/predict/batch")
PUT = ("PUT", "/files/{key}")
PICTURES = draw_pictures()
MAX_IMAGE_BYTES = 1_000_000
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    service = Served(
        tmp_path_factory.mktemp("served"),
        {"API_SECRET_KEY": f"{KEY},the-next-{KEY}", "S3_MAX_IMAGE_BYTES": str(MAX_IMAGE_BYTES)},
        ("--host", "127.0.0.1"),
    )
    try:
        yield service.wait_ready()
    finally:
        service.stop()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pictures, some of them further down, and where a person would be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("S3_API_KEY", KEY)
    for number, picture in enumerate(PICTURES):
        write(picture, name_of(number), tmp_path / "photos")
    return tmp_path / "photos"


def name_of(number: int) -> str:
    suffix = Path(PICTURES[number].key).suffix
    return f"{'deep/' if number % 2 else ''}{number}{suffix}"


def write(picture: Picture, name: str, folder: Path) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture.file)


def run(service: Served, *arguments: str, prompts: tuple[str, ...] = PROMPTS) -> int:
    asked = [part for prompt in prompts for part in ("--prompt", prompt)]
    return cli.main([*arguments, *asked, "--url", service.url])


def requests(service: Served, route: tuple[str, str]) -> int:
    """How many the service has counted."""
    method, path = map(re.escape, route)
    pattern = rf'^s3_requests_total\{{method="{method}",route="{path}",status="\d+"\}} ([0-9.e+]+)$'
    return int(sum(map(float, re.findall(pattern, service.client.get("/metrics").text, re.MULTILINE))))


def tasks_done(service: Served) -> int:
    pattern = r'^s3_tasks_total\{outcome="done"\} ([0-9.e+]+)$'
    return int(sum(map(float, re.findall(pattern, service.client.get("/metrics").text, re.MULTILINE))))


def iou(one: Any, other: Any) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def assert_is_truth(mask: Any, picture: Picture, prompt: str) -> None:
    truth = picture.truth(prompt)
    assert iou(mask, truth) > 0.8 if truth.any() else not mask.any()


def failed(results: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((results / "failed.csv").read_text())))


def test_a_folder_becomes_masks_coco_and_csv_that_others_read(
    service: Served, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # progress is shown to people alone
    assert run(service, "photos") == 0
    out, err = capsys.readouterr()
    assert f"{len(PICTURES)} of {len(PICTURES)} images done" in out
    assert re.search(r"8/8 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+(img/s|s/img)\]", err)
    results = folder.parent / "results"
    stored = {path.read_bytes() for path in service.data_dir.rglob("masks/**/*.png")}

    coco = COCO(str(results / "coco.json"))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(PROMPTS)
    assert len(coco.getImgIds()) == len(PICTURES)
    for number, picture in enumerate(PICTURES):
        for category_id, prompt in enumerate(PROMPTS, 1):
            name = name_of(number)
            png = (results / "masks" / f"{name}.{prompt.replace(' ', '-')}.png").read_bytes()
            assert png in stored
            mask = np.asarray(Image.open(io.BytesIO(png))) == 255
            assert_is_truth(mask, picture, prompt)

            (image,) = (one for one in coco.loadImgs(coco.getImgIds()) if one["file_name"] == name)
            assert (image["width"], image["height"]) == (320, 240)
            found = coco.loadAnns(coco.getAnnIds(image["id"], category_id))
            union = np.zeros_like(mask)
            for annotation in found:
                pixels = coco.annToMask(annotation).astype(bool)
                assert annotation["area"] == pixels.sum()
                union |= pixels
            assert (union == mask).all()

    rows = list(csv.DictReader(io.StringIO((results / "instances.csv").read_text())))
    assert len(rows) == len(coco.getAnnIds())
    for row, annotation in zip(rows, coco.loadAnns(coco.getAnnIds()), strict=True):
        assert row["image"] == coco.imgs[annotation["image_id"]]["file_name"]
        assert row["prompt"] == coco.cats[annotation["category_id"]]["name"]
        x0, y0, x1, y1 = (float(row[edge]) for edge in ("x0", "y0", "x1", "y1"))
        assert [x0, y0, x1 - x0, y1 - y0] == annotation["bbox"]
        assert float(row["score"]) == annotation["score"] > 0.5
    assert failed(results) == []


def test_what_is_done_and_unchanged_is_not_sent_again(service: Served, folder: Path) -> None:
    assert run(service, "photos") == 0
    results = folder.parent / "results"
    coco, sent = (results / "coco.json").read_bytes(), (requests(service, BATCH), requests(service, PUT))
    lost = results / "masks" / "0.png.red-square.png"
    mask = lost.read_bytes()
    lost.unlink()
    (results / "instances.csv").unlink()
    assert run(service, "photos") == 0
    assert (requests(service, BATCH), requests(service, PUT)) == sent
    assert (results / "coco.json").read_bytes() == coco
    assert lost.read_bytes() == mask
    assert (results / "instances.csv").exists()

    os.utime(folder / "2.png", ns=(0, 0))  # touched, not changed
    write(PICTURES[1], "0.png", folder)  # another picture under the same name
    assert run(service, "photos") == 0
    assert (requests(service, BATCH), requests(service, PUT)) == (sent[0] + 1, sent[1] + 1)
    assert_is_truth(np.asarray(Image.open(io.BytesIO(lost.read_bytes()))) == 255, PICTURES[1], "red square")


def test_what_fails_is_listed_and_tried_again_and_the_rest_is_done(
    service: Served, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = folder / "broken.png"
    broken.write_bytes(PICTURES[0].file[:400])
    (folder / "text.jpg").write_text("no picture")
    (folder / "nowhere.png").symlink_to("nothing")
    (folder / "huge.png").write_bytes(PICTURES[0].file + bytes(20 * MAX_IMAGE_BYTES))
    images = ["photos", "photos/nowhere.png", "--format", "coco"]
    assert run(service, *images) == 1
    results = folder.parent / "results"
    why = {row["image"]: row["code"] for row in failed(results)}
    assert why == {
        "broken.png": "UNDECODABLE_IMAGE",
        "huge.png": "IMAGE_TOO_LARGE",
        "text.jpg": "UNSUPPORTED_IMAGE",
        "nowhere.png": "UNREADABLE_FILE",
    }
    assert all(row["message"] for row in failed(results))
    assert [bool(row["request_id"]) for row in failed(results)] == [True, True, False, True]
    out, err = capsys.readouterr()
    assert f"{len(PICTURES)} of {len(PICTURES) + 4} images done" in out
    assert "4 failed" in out
    assert "broken.png: " in err and "(UNDECODABLE_IMAGE)" in err
    assert len(json.loads((results / "coco.json").read_text())["images"]) == len(PICTURES)
    assert not (results / "masks").exists()

    broken.write_bytes(PICTURES[0].file)
    sent = requests(service, BATCH)
    assert run(service, *images) == 1
    assert requests(service, BATCH) == sent + 1
    assert {row["image"] for row in failed(results)} == {"huge.png", "nowhere.png", "text.jpg"}


@pytest.mark.parametrize(
    ("ending", "status", "prompt"),
    [
        pytest.param(signal.SIGINT, cli.INTERRUPTED, "green circle", id="Ctrl-C"),
        pytest.param(signal.SIGKILL, -signal.SIGKILL, "yellow circle", id="killed"),
    ],
)
def test_an_interrupted_run_goes_on_where_it_stood(
    service: Served, folder: Path, ending: signal.Signals, status: int, prompt: str
) -> None:
    n_images = 24
    for number in range(len(PICTURES), n_images):
        # Other bytes, the same picture: what follows the end of a PNG or JPEG is not read.
        picture = PICTURES[number % len(PICTURES)]
        (folder / f"{number}{Path(picture.key).suffix}").write_bytes(picture.file + bytes([number]))
    done_before = tasks_done(service)
    state = folder.parent / "results" / "state.jsonl"
    arguments = ["photos", "--prompt", prompt, "--jobs", "2", "--url", service.url]
    process = subprocess.Popen(
        # Where tests run in the background, Ctrl-C would be ignored by everything they start.
        ["env", "--default-signal=INT", sys.executable, "-m", "clients.cli", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(
            lambda: state.exists() and state.read_bytes().count(b"\n") >= 2, DEADLINE_S, "two are done"
        )
        process.send_signal(ending)
        out, err = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == status, (out, err)
    assert "Traceback" not in err
    n_done = len(state.read_bytes().splitlines())
    assert 2 <= n_done < n_images
    if ending == signal.SIGINT:
        assert "it goes on from there" in err
        coco = json.loads((folder.parent / "results" / "coco.json").read_text())
        assert len(coco["images"]) == n_done

    sent = requests(service, PUT)
    assert run(service, "photos", prompts=(prompt,)) == 0
    assert requests(service, PUT) == sent + n_images - n_done
    assert len({json.loads(line)["name"] for line in state.read_bytes().splitlines()}) == n_images
    # What the interrupted run had sent, but not recorded, was not computed a second time.
    n_tasks = done_before + n_images
    wait_until(lambda: tasks_done(service) >= n_tasks, DEADLINE_S, "all tasks are counted")
    assert tasks_done(service) == n_tasks


@pytest.mark.parametrize(
    ("key", "prompt", "said"),
    [
        pytest.param("wrong-" + KEY, "cat", "UNAUTHORIZED). The key is read from S3_API_KEY", id="wrong key"),
        pytest.param(KEY, "\u200b", "INVALID_PROMPT", id="prompt of nothing"),
    ],
)
def test_what_is_wrong_with_every_image_ends_the_run_in_one_line(
    service: Served,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
    prompt: str,
    said: str,
) -> None:
    monkeypatch.setenv("S3_API_KEY", key)
    assert run(service, "photos", "--jobs", "1", prompts=(prompt,)) == 1
    out, err = capsys.readouterr()
    assert said in err.splitlines()[-1]
    assert key not in out + err


def test_the_key_may_come_from_a_file_or_be_one_of_the_service_s_own(
    service: Served, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("S3_API_KEY")
    arguments = ["photos/0.png", "--format", "csv"]
    (folder / "key").write_text(f"{KEY}\n")
    assert run(service, *arguments, "--key-file", "photos/key") == 0
    monkeypatch.setenv("API_SECRET_KEY", f"{KEY},the-next-{KEY}")
    assert run(service, *arguments) == 0


def test_the_python_client_uploads_segments_and_looks_up(service: Served) -> None:
    picture = PICTURES[0]
    prompt, other = picture.masks

    async def round_trip() -> tuple[Any, Any, Any, Any]:
        async with S3Client(service.url, KEY) as s3:
            url = await s3.upload(picture.file, "uploads/client/a.png")
            one = await s3.predict(url, prompt, score_threshold=0.6)
            both = await s3.predict_batch("uploads/client/a.png", [prompt, other], task_id="client-batch")
            with pytest.raises(ServiceError) as missing:
                await s3.predict("uploads/client/none.png", prompt)
            assert missing.value.code == "IMAGE_NOT_FOUND"
            return one, both, await s3.task("client-batch"), await s3.model_info()

    one, both, task, info = asyncio.run(round_trip())
    assert (one["labels"], one["score_threshold"]) == ([prompt], 0.6)
    assert [result["labels"] for result in both["results"]] == [[prompt], [other]]
    assert task["status"] == "done" and task["result"]["results"][0]["labels"] == [prompt]
    assert info["model_name"] == "SAM3"


def test_bentoml_s_generated_client_has_a_method_for_each_route_that_segments(service: Served) -> None:
    picture = PICTURES[0]
    prompt, other = picture.masks
    with bentoml.SyncHTTPClient(service.url) as client:
        client.client.headers["X-API-Key"] = KEY
        put = client.request("PUT", "/files/uploads/bento/a.png", content=picture.file)
        common = {"image_url": put.json()["url"], "user_id": "bento"}
        one = client.predict(**common, task_id="bento-one", text_prompt=prompt)
        both = client.predict_batch(**common, task_id="bento-both", prompts=[prompt, other])
        assert one["labels"] == [prompt] and one["instances"]
        assert [result["labels"] for result in both["results"]] == [[prompt], [other]]
        with pytest.raises(bentoml.exceptions.BentoMLException, match="INVALID_PROMPT"):
            client.predict(**common, task_id="bento-blank", text_prompt=" ")
        assert client.request("GET", "/api/v1/model/info").json()["model_name"] == "SAM3"
        client.client.headers["X-API-Key"] = "wrong"
        with pytest.raises(bentoml.exceptions.BentoMLException, match="UNAUTHORIZED"):
            client.predict(**common, task_id="bento-key", text_prompt=prompt)
    client._temp_dir.cleanup()  # which its close() leaves behind, with a warning
