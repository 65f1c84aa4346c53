"""What the command line says where there is no service to ask, and what it costs to load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from clients import cli
from clients.results import mask_paths
from tests.conftest import ROOT, free_port
from tests.storage.failing_server import answer, failing_server

MODEL = answer(200, b'{"model_name": "SAM3", "model_version": "demo", "parameters": 1}')


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"pixels")
    return "a.png"


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
    docs = answer(200, b'{"paths": {"/files/{key}": {}}}')
    with failing_server(MODEL, docs, answer(503, b"away")) as server:
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


def test_it_loads_neither_the_service_nor_pytorch() -> None:
    code = "import sys, clients.cli; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "clients" in loaded
    assert not loaded & {"torch", "bentoml", "api", "tasks", "boto3", "service"}
