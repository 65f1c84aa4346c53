"""`python -m sam3_runner view`: the picture it writes and the table it prints."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3_runner import __main__ as command
from tests.chaos.pictures import draw_pictures

PICTURE = draw_pictures()[0]  # a red circle and a blue square


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("S3_ENV_FILE", "")
    monkeypatch.delenv("SAM3_WEIGHTS_PATH", raising=False)
    path = tmp_path / "desk.heic"  # what it is, its bytes say
    path.write_bytes(PICTURE.file)
    return path


def test_it_draws_what_it_finds_and_tells_it_in_a_table(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--prompt", "red circle", "--prompt", "green star"]
    assert command.main(["view", "desk.heic", *asked, "--out", "seen.png"]) == 0
    heading, circle, star, timings, written = capsys.readouterr().out.splitlines()
    assert heading.split() == ["prompt", "score", "box", "x0", "y0", "x1", "y1", "area", "px", "share"]
    found = re.fullmatch(r"red circle +(0\.\d{3}) +(\d+ \d+ \d+ \d+) +([\d,]+) +([\d.]+) %", circle)
    assert found is not None
    truth = PICTURE.truth("red circle")
    assert float(found[1]) > 0.5
    assert [int(edge) for edge in found[2].split()] == pytest.approx([40, 60, 131, 151], abs=4)
    assert int(found[3].replace(",", "")) == pytest.approx(truth.sum(), rel=0.1)
    assert float(found[4]) == pytest.approx(100 * truth.mean(), abs=1)
    assert star.split() == ["green", "star", "–", "nothing", "found", "0", "0.0", "%"]
    assert re.fullmatch(
        r"read \d+ ms, load model [\d,]+ ms, segment [\d,]+ ms, draw \d+ ms \(demo on \w+\)", timings
    )
    assert written == "overlay: seen.png"

    before = np.asarray(Image.open(io.BytesIO(PICTURE.file)).convert("RGB")).astype(int)
    after = np.asarray(Image.open(io.BytesIO(Path("seen.png").read_bytes()))).astype(int)
    changed = (np.abs(after - before) > 8).any(axis=2)
    assert changed[truth].mean() > 0.9
    assert not changed[PICTURE.truth("blue square")].any()


def test_the_overlay_is_named_after_the_image_unless_told(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prompt", "red circle", "--score-threshold", "1"]
    assert command.main(["view", str(image), *arguments]) == 0
    assert "nothing found" in capsys.readouterr().out
    with Image.open("desk.overlay.jpg") as overlay:
        assert (overlay.format, overlay.size) == ("JPEG", (320, 240))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["nowhere.png", "--prompt", "cat"], "nowhere.png: No such file", id="no image"),
        pytest.param(["text.jpg", "--prompt", "cat"], "Convert it to one of these", id="not an image"),
        pytest.param(["desk.heic", "--prompt", " "], "blank", id="blank prompt"),
        pytest.param(["desk.heic", "--prompt", "cat", "--weights", "none"], "none", id="no weights"),
        pytest.param(["desk.heic", "--prompt", "cat", "--out", "a.heic"], ".jpg, .png", id="no picture"),
        pytest.param(["desk.png", "--prompt", "cat", "--out", "desk.png"], "the image itself", id="itself"),
        pytest.param(["desk.heic", "--prompt", "cat", "--out", "no/a.png"], "no/a.png: No such", id="no dir"),
    ],
)
def test_what_is_wrong_is_one_readable_line(
    image: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    Path("text.jpg").write_text("no picture")
    assert command.main(["view", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert image.read_bytes() == PICTURE.file


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "needs --prompt, --box, or both"),
        (["--prompt", "cat", "--prompt", "dog", "--box", "1,2,3,4"], "not clear which"),
        (["--box", "1,2,3"], "expected four numbers"),
        (["--box", "5,2,3,4"], "expected left < right"),
        (["--prompt", "cat", "--score-threshold", "1.5"], "from 0 to 1"),
    ],
)
def test_wrong_usage_is_told(
    image: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        command.main(["view", "desk.heic", *arguments])
    assert raised.value.code == 2
    assert said in capsys.readouterr().err


def test_the_weights_are_those_of_the_settings_unless_told(
    image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAM3_WEIGHTS_PATH", "weights-of-the-settings")
    assert command.main(["view", "desk.heic", "--prompt", "cat"]) == 1
    assert "weights-of-the-settings" in capsys.readouterr().err


def test_a_prompt_may_be_boxes_alone(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = ["--box", "40,60,130.5,150", "--box", "195,80,275,160"]
    assert command.main(["view", "desk.heic", *boxes, "--out", "seen.png"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("like the boxes")
