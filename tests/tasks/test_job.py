"""What is asked for lies in the journal unchanged, and reaches the runner in the frame of what the model sees."""

from __future__ import annotations

import json

import pytest

from sam3_runner.errors import InvalidPrompt
from sam3_runner.images import Region
from sam3_runner.types import Box, Point, Prompt, Selection
from tasks.job import Job, in_crop, job_of, job_record, name_of
from tasks.pipeline import inputs_of
from tests.tasks.world import words

PLAIN = Job("t-1", "u-1", "uploads/a.jpg", words("red circle", "cat"), "r-1", is_batch=True)
RICH = Job(
    "t-1",
    "u-1",
    "uploads/a.jpg",
    (
        Prompt("red", (Box((1, 2, 3, 4)), Box((0, 0, 0.5, 1), is_positive=False, is_relative=True))),
        Prompt(points=(Point((5, 6)),), selection=Selection(0.0, 0.4, 3, 0.7)),
    ),
    "r-1",
    is_batch=True,
    region=Region((0.1, 0.2, 0.3, 0.4), is_relative=True),
    outputs=("mask", "coco"),
    polygon_tolerance_px=2.5,
)
# As version 1 of the journal wrote it.
WORDS_ALONE = {
    "task_id": "t-1",
    "user_id": "u-1",
    "image_url": "uploads/a.jpg",
    "prompts": ["red circle", "cat"],
    "score_threshold": 0.5,
    "request_id": "r-1",
    "is_batch": True,
}
# What rows of tasks in words alone have known their inputs by from the beginning.
FINGERPRINT_OF_WORDS = "202bbc7b"


@pytest.mark.parametrize("job", [PLAIN, RICH], ids=["plain", "rich"])
def test_a_job_comes_out_of_its_record_as_it_went_in(job: Job) -> None:
    assert job_of(json.loads(json.dumps(job_record(job)))) == job


def test_a_record_from_before_there_were_other_prompts_is_read() -> None:
    assert job_of(WORDS_ALONE) == PLAIN


@pytest.mark.parametrize("prompts", [[], [7], [{"text": "x"}]])
def test_what_is_no_job_is_told(prompts: object) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        job_of({**WORDS_ALONE, "prompts": prompts, "is_batch": False, "task_id": "t"})


def test_only_what_is_new_changes_the_fingerprint() -> None:
    assert PLAIN.question == ""
    assert inputs_of(PLAIN, "uploads/a.jpg").fingerprint.startswith(FINGERPRINT_OF_WORDS)
    assert inputs_of(RICH, "uploads/a.jpg").fingerprint != inputs_of(PLAIN, "uploads/a.jpg").fingerprint


def test_names() -> None:
    assert [name_of(prompt) for prompt in RICH.prompts] == ["red", "object"]


def test_marks_reach_the_runner_in_pixels_of_what_the_model_sees() -> None:
    first, second = RICH.prompts
    placed = in_crop(first, (100, 200), (0, 0, 200, 100))
    assert placed.boxes == (Box((1, 2, 3, 4)), Box((0, 0, 100, 100), is_positive=False))
    assert in_crop(second, (100, 200), (2, 3, 50, 60)).points == (Point((3, 3)),)
    cut = in_crop(Prompt(boxes=(Box((-5, 10, 30, 500)),)), (100, 200), (20, 5, 60, 90))
    assert cut.boxes == (Box((0, 5, 10, 85)),)
    assert in_crop(Prompt("cat"), (100, 200), (20, 5, 60, 90)) == Prompt("cat")


@pytest.mark.parametrize(
    ("prompt", "crop", "message"),
    [
        (
            Prompt(boxes=(Box((200, 0, 300, 50)),)),
            (0, 0, 200, 100),
            r"lies outside the image of 200×100 pixels",
        ),
        (Prompt(boxes=(Box((0, 0, 20, 50)),)), (20, 5, 60, 90), r"outside the region \[20, 5, 60, 90\] of"),
        (Prompt(points=(Point((201, 5)),)), (0, 0, 200, 100), r"point \[201, 5\] lies outside"),
    ],
)
def test_a_mark_beside_what_the_model_sees_is_refused(
    prompt: Prompt, crop: tuple[int, int, int, int], message: str
) -> None:
    with pytest.raises(InvalidPrompt, match=message):
        in_crop(prompt, (100, 200), crop)
