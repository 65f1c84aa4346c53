"""What the README says one can type does what it says, against the built bento."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from examples.draw_shapes import SHAPES_JPG, mask_of

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def curl_commands(page: str) -> str:
    """The block that begins with the upload: the round trip by hand."""
    (found,) = (block for block in blocks(page, "sh") if block.startswith("curl -T"))
    return found


@pytest.fixture(scope="session")
def curl() -> str:
    """The command that the README's examples are written for."""
    if found := shutil.which("curl"):
        return f"{found} -fsS --noproxy '*' "
    if os.environ.get("CI") == "true":
        pytest.fail("CI must have curl")
    pytest.skip("curl is not installed")


def test_the_request_shown_first_is_one_of_the_round_trip() -> None:
    first = next(block for block in blocks("README.md", "sh") if block.startswith("curl"))
    assert first in curl_commands("README.md")


@pytest.mark.parametrize("page", ["README.md", "README.ko.md"])
def test_the_round_trip_by_curl_ends_with_the_mask(
    page: str, curl: str, bento_client: httpx.Client, tmp_path: Path
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    script = curl_commands(page).replace(":8000", f":{bento_client.base_url.port}").replace("curl ", curl)
    result = subprocess.run(
        ["sh", "-e"], input=script, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    mask = np.asarray(Image.open(tmp_path / "mask.png").convert("L")) > 127
    truth = mask_of("red", "circle")
    assert (mask & truth).sum() / (mask | truth).sum() > 0.85


def test_the_library_example_prints_three_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (example,) = (block for block in blocks("README.md", "python") if "Segmenter" in block)
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(example, "README.md", "exec"), {})
    assert len(re.findall(r"[01]\.\d*", printed.getvalue().split("]")[0])) == 3


def test_the_closer_look_comes_with_an_overlay(curl: str, bento_client: httpx.Client, tmp_path: Path) -> None:
    bento_client.put("/files/uploads/shapes.jpg", content=SHAPES_JPG.read_bytes())
    (commands,) = (block for block in blocks("README.md", "sh") if "overlay.jpg" in block)
    script = commands.replace(":8000", f":{bento_client.base_url.port}").replace("curl ", curl)
    result = subprocess.run(
        ["sh", "-e"], input=script, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "overlay.jpg") as overlay:
        assert overlay.size == (800, 600)
    answer = json.loads(result.stdout)
    assert len(answer["instances"]) == 3 and set(answer["outputs"]) == {"mask", "overlay", "coco"}


@pytest.mark.parametrize("client", ["S3Client", "SyncHTTPClient"])
def test_the_examples_of_clients_get_an_answer(client: str, bento_client: httpx.Client) -> None:
    bento_client.put("/files/uploads/shapes.jpg", content=SHAPES_JPG.read_bytes())
    (example,) = (block for block in blocks("README.md", "python") if client in block)
    example = example.replace(":8000", f":{bento_client.base_url.port}")
    # By itself: BentoML's client leaves a folder to the interpreter's end.
    ran = subprocess.run(
        [sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"0\.9\d", ran.stdout)


def test_the_command_that_makes_an_overlay_does(tmp_path: Path) -> None:
    (command,) = (block for block in blocks("README.md", "sh") if "sam3_runner view" in block)
    arguments = [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', command)][1:]
    arguments[arguments.index("overlay.png")] = str(tmp_path / "overlay.png")
    shown = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0, shown.stderr
    assert "red circle" in shown.stdout
    with Image.open(tmp_path / "overlay.png") as overlay:
        assert overlay.size == (800, 600)


def test_the_answer_that_the_readme_shows_has_the_fields_of_a_real_one(bento_client: httpx.Client) -> None:
    shown = json.loads(blocks("README.md", "json")[0])
    image = bento_client.put("/files/uploads/shapes.jpg", content=SHAPES_JPG.read_bytes()).json()
    request = {"image_url": image["key"], "text_prompt": "red circle", "user_id": "me", "task_id": "shown"}
    real = bento_client.post("/api/v1/predict", json=request).json()
    assert list(shown) == list(real)
    assert list(shown["instances"][0]) == list(real["instances"][0])
