"""What a results folder remembers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from clients.state import Answer, Found, Stamp, State, StateError

ANSWER = Answer(
    {"width": 4, "height": 2},
    (
        Found(
            "cat",
            [
                {
                    "score": 0.5,
                    "box_xyxy_px": [0.0, 0.0, 1.0, 1.0],
                    "area_px": 1,
                    "mask_rle": {"size": [2, 4], "counts": "017"},
                }
            ],
        ),
    ),
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(b"pixels")
    return path


@pytest.fixture
def path(tmp_path: Path, image: Path) -> Path:
    """A state file with one finished image."""
    path = tmp_path / "state.jsonl"
    with State(path, "job") as state:
        state.add("a.png", Stamp.read(image)[0], ANSWER)
    return path


def remembered(path: Path, image: Path, job: str = "job") -> Answer | None:
    with State(path, job) as state:
        return state.answer_for("a.png", image)


def test_a_finished_image_is_remembered_with_its_answer(path: Path, image: Path) -> None:
    assert remembered(path, image) == ANSWER


def test_another_job_is_another_question(path: Path, image: Path) -> None:
    assert remembered(path, image, "other job") is None
    assert remembered(path, image) == ANSWER


@pytest.mark.parametrize("content", [b"other!", b"longer than before"])
def test_a_file_that_changed_is_not_done(path: Path, image: Path, content: bytes) -> None:
    image.write_bytes(content)
    os.utime(image, ns=(0, 0))
    assert remembered(path, image) is None


def test_a_file_that_was_merely_touched_is_done(path: Path, image: Path) -> None:
    os.utime(image, ns=(0, 0))
    assert remembered(path, image) == ANSWER


@pytest.mark.parametrize("cut_bytes", [1, 10])
def test_a_line_that_was_cut_off_is_forgotten_and_the_file_goes_on(
    path: Path, image: Path, cut_bytes: int
) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-cut_bytes])
    with State(path, "job") as state:
        assert state.answer_for("a.png", image) == ANSWER
        state.add("b.png", Stamp.read(image)[0], ANSWER)
    assert [json.loads(line)["name"] for line in path.read_bytes().splitlines()] == ["a.png", "b.png"]


@pytest.mark.parametrize("line", [b"no JSON\n", b"{}\n", b"[]\n", b'{"job":"job","name":"a","answer":{}}\n'])
def test_a_damaged_line_is_named(path: Path, line: bytes) -> None:
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(StateError, match="damaged in line 2"):
        State(path, "job")


def test_two_runs_do_not_write_into_one_folder(path: Path) -> None:
    with State(path, "job"), pytest.raises(StateError, match="in use"):
        State(path, "job")
