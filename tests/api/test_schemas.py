"""Requests are checked strictly, and what is wrong is told field by field."""

from typing import Any

import pytest

from api.errors import InvalidRequest
from api.schemas import BatchRequest, PredictRequest, parse_request

SOUND: dict[str, Any] = {
    "image_url": "uploads/a.jpg",
    "text_prompt": "cat",
    "user_id": "u-1",
    "task_id": "t-1",
}


def test_a_sound_request_passes_with_the_default_threshold() -> None:
    request = parse_request(PredictRequest, SOUND)
    assert request.score_threshold == 0.5
    assert request.all_prompts == ("cat",)


def test_the_longest_presigned_url_passes() -> None:
    url = "https://images.example.com/uploads/a.jpg?X-Amz-Security-Token=".ljust(8192, "x")
    assert parse_request(PredictRequest, {**SOUND, "image_url": url}).image_url == url


@pytest.mark.parametrize("value", [0, 1, 0.25])
def test_whole_numbers_are_thresholds_too(value: float) -> None:
    assert parse_request(PredictRequest, {**SOUND, "score_threshold": value}).score_threshold == value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_url", ""),
        ("image_url", "x" * 8193),
        ("image_url", "uploads/\x00.jpg"),
        ("image_url", None),
        ("image_url", ["uploads/a.jpg"]),
        ("text_prompt", ""),
        ("text_prompt", "cat\n"),
        ("text_prompt", "x" * 1001),
        ("text_prompt", 5),
        ("user_id", ""),
        ("user_id", "a b"),
        ("user_id", "x" * 129),
        ("task_id", ""),
        ("task_id", "../../etc/passwd"),
        ("task_id", "a/b"),
        ("task_id", "a.b"),
        ("task_id", "-a"),
        ("task_id", "a\n"),
        ("task_id", "ä"),
        ("task_id", "x" * 129),
        ("task_id", 7),
        ("score_threshold", "0.5"),
        ("score_threshold", -0.1),
        ("score_threshold", 1.1),
        ("score_threshold", True),
        ("score_threshold", None),
        ("score_treshold", 0.5),
    ],
)
def test_a_field_at_fault_is_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(PredictRequest, {**SOUND, field: value})
    assert [detail["field"] for detail in caught.value.details] == [field]


@pytest.mark.parametrize("field", SOUND)
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(PredictRequest, {name: value for name, value in SOUND.items() if name != field})
    assert caught.value.details == ({"field": field, "message": "Field required"},)


@pytest.mark.parametrize("body", [None, 5, "text", [], [SOUND]], ids=repr)
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(PredictRequest, body)
    assert caught.value.details[0]["field"] == "body"


def test_a_prompt_of_a_batch_is_named_by_its_place() -> None:
    batch = {name: value for name, value in SOUND.items() if name != "text_prompt"}
    with pytest.raises(InvalidRequest) as caught:
        parse_request(BatchRequest, {**batch, "prompts": ["cat", "", 5]})
    assert [detail["field"] for detail in caught.value.details] == ["prompts.1", "prompts.2"]
    with pytest.raises(InvalidRequest):
        parse_request(BatchRequest, {**batch, "prompts": []})
    assert parse_request(BatchRequest, {**batch, "prompts": ["cat", "dog"]}).field_of_prompt(1) == "prompts.1"


def test_ids_of_both_usual_kinds_pass() -> None:
    for task_id in ("0c9f7f1e-51d1-4a1b-9a55-c0a1f5f3b7aa", "42", "job_7"):
        parse_request(PredictRequest, {**SOUND, "task_id": task_id})
    for user_id in ("0c9f7f1e-51d1-4a1b-9a55-c0a1f5f3b7aa", "auth0:5f", "kim@example.com"):
        parse_request(PredictRequest, {**SOUND, "user_id": user_id})


def test_details_stop_before_they_become_a_book() -> None:
    batch = {name: value for name, value in SOUND.items() if name != "text_prompt"}
    with pytest.raises(InvalidRequest, match=r"^100000 fields are invalid") as caught:
        parse_request(BatchRequest, {**batch, "prompts": [5] * 100_000})
    assert len(caught.value.details) == 20
