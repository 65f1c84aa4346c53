"""`make demo`, as a newcomer runs it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.draw_shapes import SIZE_HW, mask_of

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 170  # a quarter of a minute is usual; less than pytest's own limit


def demo(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "examples/demo.py", "--out", str(out), *arguments]
    theirs = ("SAM3_", "IMAGE", "PROMPT")  # whoever runs the tests may have a model of their own
    clean = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    with subprocess.Popen(
        command, cwd=ROOT, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            said, complained = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.terminate()  # asked, not killed: it stops its service before it ends
    return subprocess.CompletedProcess(command, process.returncode, said, complained)


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / (first | second).sum())


def port_in(text: str) -> int:
    found = re.search(r"127\.0\.0\.1:(\d+)", text)
    assert found, text
    return int(found[1])


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_demo_finds_the_three_red_circles_and_leaves_nothing_running(tmp_path: Path) -> None:
    result = demo(tmp_path)
    assert result.returncode == 0, result.stderr
    mask = np.asarray(Image.open(tmp_path / "mask.png").convert("L")) > 127
    assert mask.shape == SIZE_HW
    assert iou(mask, mask_of("red", "circle")) > 0.85
    answer = json.loads((tmp_path / "predict.json").read_text())
    assert (answer["labels"], len(answer["instances"])) == (["red circle"], 3)
    results = json.loads((tmp_path / "batch.json").read_text())["results"]
    found = {result["text_prompt"]: len(result["instances"]) for result in results}
    assert found == {"red circle": 3, "blue square": 1, "green star": 1, "yellow ring": 1, "purple cross": 0}
    for name in ("overlay.png", "overlay-batch.png"):
        with Image.open(tmp_path / name) as overlay:
            assert overlay.size == SIZE_HW[::-1]
    assert '"status": "done"' in result.stdout
    assert not is_listening(port_in(result.stdout))


def test_an_image_that_is_not_there_is_one_readable_line(tmp_path: Path) -> None:
    result = demo(tmp_path, "--image", "no-such.jpg")
    assert result.returncode == 1
    assert result.stderr == "demo: cannot read the image no-such.jpg: No such file or directory\n"


def test_a_folder_that_holds_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    result = demo(tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith(f"demo: {tmp_path} holds other things")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_folder_that_cannot_be_made_is_one_readable_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = demo(tmp_path / "file" / "out")
    assert result.returncode == 1
    assert re.fullmatch(r"demo: cannot empty .*/file/out: Not a directory\n", result.stderr)


def test_an_answer_of_the_service_is_one_readable_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not an image")
    result = demo(tmp_path / "out", "--image", str(tmp_path / "notes.txt"))
    assert result.returncode == 1
    assert re.search(
        r"^demo: PUT /files/uploads/notes.txt answered 415 UNSUPPORTED_IMAGE: ", result.stderr, re.M
    )
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_demo_stops_its_service(tmp_path: Path, sent: signal.Signals) -> None:
    command = [sys.executable, "-u", "examples/demo.py", "--out", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        port = port_in(process.stdout.readline())
        deadline = time.monotonic() + 60
        while not is_listening(port) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(sent)
        assert process.wait(60) != 0
    assert not is_listening(port)
