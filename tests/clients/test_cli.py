"""What the command line says where there is no service to ask, and what it costs to load."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from clients import cli
from clients.client import ModelInfo
from clients.results import mask_paths, write_whole
from tests.conftest import ROOT, free_port
from tests.storage.failing_server import FailingServer, answer, failing_server

INFO: ModelInfo = {
    "model_name": "SAM3",
    "model_version": "demo",
    "parameters": 1,
    "weights_size_gb": 0.1,
    "device": "cpu",
    "dtype": "float32",
    "input_size_px": 224,
    "max_text_tokens": 32,
    "max_prompts": 32,
    "max_batch_size": 16,
}
MODEL = answer(200, json.dumps(INFO).encode())
DOCS = answer(200, b'{"paths": {"/files/{key}": {}}}')
NOTHING_FOUND = b'{"results": [{"image_size": {"width": 4, "height": 2}, "instances": []}]}'
MASKS = Path("results/masks")


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"pixels")
    return "a.png"


@pytest.fixture
def service() -> Iterator[FailingServer]:
    """Takes every image, and finds nothing in it."""
    replies = {
        "/api/v1/model/info": MODEL,
        "/docs.json": DOCS,
        "/api/v1/predict/batch": answer(200, NOTHING_FOUND),
    }
    stored = answer(200, b'{"url": "http://127.0.0.1/files/a"}')
    with failing_server(lambda handler: replies.get(handler.path, stored)(handler)) as server:
        yield server


def run(service: FailingServer, *images: str, prompt: str = "red circle") -> int:
    return cli.main([*images, "--prompt", prompt, "--url", service.endpoint, "--jobs", "1"])


def sent(service: FailingServer) -> int:
    return sum(request.method == "PUT" for request in service.requests)


def test_nobody_listening_is_one_line(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert cli.main([image, "--prompt", "cat", "--url", url, "--give-up-after", "0"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {url} cannot be reached")


def test_a_service_that_goes_away_ends_the_run_and_what_is_left_is_told(
    tmp_path: Path, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(bytes([number]))
    with failing_server(MODEL, DOCS, answer(503, b"away")) as server:
        arguments = [".", "--prompt", "cat", "--url", server.endpoint, "--give-up-after", "0", "--jobs", "1"]
        assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert "0 of 6 images done, 0 instances, 2 failed" in out
    assert err.splitlines()[-1].startswith("stopped, 4 images not tried: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["nowhere", "--prompt", "cat"], "nowhere names no image", id="no image"),
        pytest.param(["a.png", "--prompt", "cat", "--url", "localhost"], "http://", id="no URL"),
        pytest.param(["a.png"], "--prompt", id="no prompt"),
        pytest.param(["a.png", "--prompt", "cat", "--score-threshold", "2"], "from 0 to 1", id="threshold"),
        pytest.param(["a.png", "--prompt", "cat", "--jobs", "many"], "expected a number", id="no number"),
    ],
)
def test_wrong_usage_is_told_without_a_traceback(
    image: str, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    try:
        status = cli.main(arguments)
    except SystemExit as exit:
        status = int(exit.code or 0)
    assert status == 2
    assert said in capsys.readouterr().err


def test_results_that_cannot_be_written_are_one_line(
    tmp_path: Path, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([image, "--prompt", "cat", "--out", "a.png/results"]) == 1
    assert capsys.readouterr().err == "error: a.png/results: Not a directory\n"


def test_prompts_that_look_alike_in_a_file_s_name_get_masks_of_their_own() -> None:
    paths = mask_paths(Path("masks"), "deep/a.jpg", ["red circle", "red/circle", "빨간 원", "…"])
    assert [str(path) for path in paths.values()] == [
        "masks/deep/a.jpg.red-circle.png",
        "masks/deep/a.jpg.red-circle-2.png",
        "masks/deep/a.jpg.빨간-원.png",
        "masks/deep/a.jpg.prompt.png",
    ]


def test_names_that_are_too_long_are_cut_and_still_differ(tmp_path: Path) -> None:
    long = "가" * 83  # three bytes each
    prompts = ["빨간 원 " * 20, "빨간 원 " * 20 + "둘", "cat"]
    paths = [
        path
        for name in (f"deep/{long}1.jpg", f"deep/{long}2.jpg")
        for path in mask_paths(tmp_path, name, prompts).values()
    ]
    assert len(set(paths)) == 6
    for path in paths:
        write_whole(path, b"mask")
        assert path.parent == tmp_path / "deep"
        assert path.name.startswith("가" * 50) and path.suffix == ".png"
    assert paths[0].name.split(".")[1].startswith("빨간-원-빨간-원")


def test_the_longest_name_that_a_file_may_have_gets_its_mask(image: str, service: FailingServer) -> None:
    longest = "a" * 251 + ".png"
    Path(longest).write_bytes(b"pixels")
    assert run(service, longest, image) == 0
    assert len(list(MASKS.iterdir())) == 2
    assert run(service, longest, image) == 0
    assert sent(service) == 2


def test_a_mask_that_cannot_be_written_is_that_images_failure(
    image: str, service: FailingServer, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("b.png").write_bytes(b"others")
    (MASKS / "a.png.red-circle.png" / "taken").mkdir(parents=True)
    assert run(service, ".") == 1
    out, err = capsys.readouterr()
    assert "1 of 2 images done, 0 instances, 1 failed" in out
    assert err == "a.png: Is a directory (UNWRITABLE_MASK)\n"
    (failure,) = csv.DictReader(io.StringIO(Path("results/failed.csv").read_text()))
    assert (failure["image"], failure["code"]) == ("a.png", "UNWRITABLE_MASK")
    assert (MASKS / "b.png.red-circle.png").is_file()


def test_a_mask_that_cannot_be_written_again_is_that_images_failure(
    image: str, service: FailingServer, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("b.png").write_bytes(b"others")
    assert run(service, ".") == 0
    (MASKS / "a.png.red-circle.png").unlink()
    (MASKS / "a.png.red-circle.png" / "taken").mkdir(parents=True)
    assert run(service, ".") == 1
    assert "1 of 2 images done (1 of them before), 0 instances, 1 failed" in capsys.readouterr().out


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_full_disk_ends_the_run_in_one_line(
    image: str, service: FailingServer, capsys: pytest.CaptureFixture[str], is_resumed: bool
) -> None:
    Path("b.png").write_bytes(b"others")
    if is_resumed:
        assert run(service, ".") == 0
        (MASKS / "a.png.red-circle.png").unlink()
    n_sent = sent(service)
    MASKS.mkdir(parents=True, exist_ok=True)
    full = MASKS / ".partial-a.png.red-circle.png"
    full.symlink_to("/dev/full")
    capsys.readouterr()
    assert run(service, ".") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: results: No space left on device; once that is mended, run the same")
    assert sent(service) == n_sent + (not is_resumed)
    full.unlink()
    assert run(service, ".") == 0


def test_a_key_file_that_is_not_text_is_one_line(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("key").write_bytes(b"\xff\xfekey")
    assert cli.main([image, "--prompt", "cat", "--key-file", "key"]) == 2
    assert capsys.readouterr().err == "error: key is not text: expected the API key in UTF-8\n"


@pytest.mark.parametrize(
    ("field", "value", "is_same"),
    [
        pytest.param("model_version", "sam3", False, id="other weights"),
        pytest.param("parameters", 2, False, id="another architecture"),
        pytest.param("dtype", "bfloat16", False, id="other arithmetic"),
        pytest.param("input_size_px", 448, False, id="another resolution"),
        pytest.param("device", "cuda", True, id="another machine"),
        pytest.param("max_batch_size", 32, True, id="another load"),
    ],
)
def test_answers_of_another_model_are_not_taken(field: str, value: object, is_same: bool) -> None:
    options = cli._read_options(["a.png", "--prompt", "cat"])
    other = cast(ModelInfo, {**INFO, field: value})
    assert (options.job(other) == options.job(INFO)) == is_same


def test_it_loads_neither_the_service_nor_pytorch() -> None:
    code = "import sys, clients.cli; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "clients" in loaded
    assert not loaded & {"torch", "bentoml", "api", "tasks", "boto3", "service"}
