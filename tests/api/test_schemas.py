"""Requests are checked strictly, and what is wrong is told field by field."""

from typing import Any

import pytest

from api.errors import InvalidRequest
from api.schemas import BatchRequest, PredictRequest, parse_request
from sam3_runner.types import Box, Point, Prompt, Selection

SOUND: dict[str, Any] = {
    "image_url": "uploads/a.jpg",
    "text_prompt": "cat",
    "user_id": "u-1",
    "task_id": "t-1",
}


def test_a_sound_request_passes_with_the_default_threshold() -> None:
    request = parse_request(PredictRequest, SOUND)
    assert request.score_threshold == 0.5
    assert request.all_prompts == (Prompt("cat"),)


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
        ("mask_threshold", 0),
        ("mask_threshold", 1),
        ("max_instances", 0),
        ("max_instances", 201),
        ("max_instances", 1.5),
        ("nms_iou", 1.1),
        ("outputs", []),
        ("outputs", "mask"),
        ("polygon_tolerance_px", -1),
        ("region", [0, 0, 1, 1]),
        ("boxes", []),
        ("points", [{"xy": [1, 2]}]),  # beside words
    ],
)
def test_a_field_at_fault_is_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(PredictRequest, {**SOUND, field: value})
    assert [detail["field"] for detail in caught.value.details] == [field]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"boxes": [{"xyxy": [1, 2, 3, 4]}, {"xyxy": [5, 2, 5, 4]}]}, "boxes.1.xyxy"),
        ({"boxes": [{"xyxy": [1, 2, 3]}]}, "boxes.0.xyxy"),
        ({"boxes": [{"xyxy": [1, 2, 3, "4"]}]}, "boxes.0.xyxy.3"),
        ({"boxes": [{"xyxy": [1, 2, 3, 1e7]}]}, "boxes.0.xyxy.3"),
        ({"boxes": [{"xyxy": [0, 0, 1, 2], "unit": "relative"}]}, "boxes.0.xyxy"),
        ({"boxes": [{"xyxy": [0, 0, 1, 2], "label": "maybe"}]}, "boxes.0.label"),
        ({"boxes": [{"xyxy": [0, 0, 1, 2]}] * 33}, "boxes"),
        ({"region": {"xyxy": [4, 0, 1, 2]}}, "region.xyxy"),
        ({"region": {"xyxy": [0, 0, 1, 2], "label": "positive"}}, "region.label"),
        ({"outputs": ["mask", "video"]}, "outputs.1"),
    ],
)
def test_what_is_wrong_with_a_mark_or_a_list_is_told_at_its_place(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(PredictRequest, {**SOUND, **fields})
    assert [detail["field"] for detail in caught.value.details] == [named]


WORDLESS = {name: value for name, value in SOUND.items() if name != "text_prompt"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"boxes": [{"xyxy": [0, 0, 1, 2], "label": "negative"}]}, "boxes"),
        ({"points": [{"xy": [1, 2], "label": 2}]}, "points.0.label"),
        ({"points": [{"xy": [1, 2], "label": True}]}, "points.0.label"),
        ({"points": [{"xy": [1, 2, 3]}]}, "points.0.xy"),
        ({"points": [{"xy": [1, 2], "unit": "relative"}]}, "points.0.xy"),
        ({"points": [{"xy": [1, 2]}], "boxes": [{"xyxy": [0, 0, 1, 2]}]}, "points"),
    ],
)
def test_marks_that_say_nothing_to_look_for_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(PredictRequest, {**WORDLESS, **fields})
    assert [detail["field"] for detail in caught.value.details] == [named]


def test_marks_are_read_as_they_are_meant() -> None:
    boxes = [{"xyxy": [1, 2.5, 3, 4]}, {"xyxy": [0, 0, 0.5, 1], "unit": "relative", "label": "negative"}]
    request = parse_request(PredictRequest, {**SOUND, "boxes": boxes, "nms_iou": 0.7, "max_instances": 3})
    assert request.all_prompts == (
        Prompt(
            "cat",
            (Box((1, 2.5, 3, 4)), Box((0, 0, 0.5, 1), is_positive=False, is_relative=True)),
            selection=Selection(max_instances=3, nms_iou=0.7),
        ),
    )


def test_a_click_means_something_however_unsure_the_model_is() -> None:
    click = {**WORDLESS, "points": [{"xy": [1, 2]}, {"xy": [0.1, 0.2], "label": 0, "unit": "relative"}]}
    (prompt,) = parse_request(PredictRequest, click).all_prompts
    assert prompt == Prompt(
        points=(Point((1, 2)), Point((0.1, 0.2), is_positive=False, is_relative=True)),
        selection=Selection(score_threshold=0.0),
    )
    (prompt,) = parse_request(PredictRequest, {**click, "score_threshold": 0.5}).all_prompts
    assert prompt.selection.score_threshold == 0.5


def test_the_settings_of_a_batch_are_those_of_its_prompts_unless_they_have_their_own() -> None:
    prompts = ["cat", {"text_prompt": "dog", "score_threshold": 0.9, "mask_threshold": 0.2}]
    batch = {**WORDLESS, "prompts": prompts, "score_threshold": 0.3, "max_instances": 5}
    cat, dog = parse_request(BatchRequest, batch).all_prompts
    assert cat == Prompt("cat", selection=Selection(0.3, 0.5, 5))
    assert dog == Prompt("dog", selection=Selection(0.9, 0.2, 5))


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
    request = parse_request(BatchRequest, {**batch, "prompts": ["cat", "dog", {"text_prompt": "cow"}]})
    assert (request.field_of_prompt(1), request.field_of_prompt(2)) == ("prompts.1", "prompts.2.text_prompt")
    for prompt, field in (({}, "text_prompt"), ({"text": "x"}, "text"), ({"boxes": []}, "boxes")):
        with pytest.raises(InvalidRequest) as caught:
            parse_request(BatchRequest, {**batch, "prompts": ["cat", prompt]})
        assert caught.value.details[0]["field"] == f"prompts.1.{field}"


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
