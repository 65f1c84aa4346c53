"""Every kind of prompt with every kind of output, through the served service; each output read by its own reader."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO
from shapely.geometry import shape as geometry_of

from sam3_runner.outputs import KINDS
from tests.conftest import Served
from tests.service.conftest import BATCH, PREDICT, Check, Mask, Picture, ask, ask_many, iou, read_mask, row_of

CIRCLE = [40, 60, 130, 150]  # of the picture of 320×240
SQUARE = [200 / 320, 90 / 240, 280 / 320, 170 / 240]
PROMPTS: dict[str, dict[str, Any]] = {
    "words": {"text_prompt": "red circle"},
    "a box": {"boxes": [{"xyxy": CIRCLE}]},
    "words and a box": {"text_prompt": "circle", "boxes": [{"xyxy": CIRCLE}]},
    "words and not a box": {
        "text_prompt": "red circle",
        "boxes": [{"xyxy": SQUARE, "unit": "relative", "label": "negative"}],
    },
    "a region": {"text_prompt": "red circle", "region": {"xyxy": [0, 30, 160, 190]}},
}
OUTPUTS = ("mask", *KINDS)


def body_of(image_url: str, prompt: str, **more: Any) -> dict[str, Any]:
    body = {**ask(image_url), **PROMPTS[prompt], **more}
    if "text_prompt" not in PROMPTS[prompt]:
        del body["text_prompt"]
    return body


@pytest.fixture(scope="module")
def answers(local: Served, local_image: str, checked: Check) -> Callable[[str], dict[str, Any]]:
    """The answer to each kind of prompt with all outputs; asked once."""
    known: dict[str, dict[str, Any]] = {}

    def answer(prompt: str) -> dict[str, Any]:
        if prompt not in known:
            # However unsure the demo is: outputs are tested here, not whether it is right.
            body = body_of(local_image, prompt, outputs=list(OUTPUTS), score_threshold=0.0, max_instances=4)
            known[prompt] = checked(local, local.client.post(PREDICT, json=body), PREDICT)
        return known[prompt]

    return answer


def masks_of(answer: dict[str, Any]) -> list[Mask]:
    return [coco.decode(instance["mask_rle"]).astype(bool) for instance in answer["instances"]]


def read(name: str, data: bytes, answer: dict[str, Any], tmp_path: Path) -> None:
    """Read an output and hold it against the instances of the answer."""
    masks, size_hw = masks_of(answer), (240, 320)
    union = np.any(masks, axis=0) if masks else np.zeros(size_hw, bool)
    if name == "mask":
        np.testing.assert_array_equal(read_mask(data), union)
    elif name == "instance_map":
        numbers = np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(numbers > 0, union)
        assert set(np.unique(numbers)) <= set(range(len(masks) + 1))
    elif name == "overlay":
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.size, image.mode) == ("JPEG", (320, 240), "RGB")
    elif name == "cutout":
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.mode) == ("PNG", "RGBA")
        np.testing.assert_array_equal(np.asarray(image)[:, :, 3] == 255, union)
    else:
        read_document(name, json.loads(data), answer, tmp_path)


def read_document(name: str, document: Any, answer: dict[str, Any], tmp_path: Path) -> None:
    masks = masks_of(answer)
    if name == "coco":
        file = tmp_path / "coco.json"
        file.write_text(json.dumps(document))
        with redirect_stdout(io.StringIO()):
            loaded = COCO(str(file))
        for annotation, mask in zip(loaded.dataset["annotations"], masks, strict=True):
            np.testing.assert_array_equal(loaded.annToMask(annotation).astype(bool), mask)
        return
    assert [one["score"] for one in document["instances"]] == pytest.approx(
        [one["score"] for one in answer["instances"]], abs=1e-5
    )
    for told, instance, mask in zip(document["instances"], answer["instances"], masks, strict=True):
        if name == "rle":
            assert told["mask_rle"] == instance["mask_rle"]
        elif name == "boxes":
            assert told["box_xyxy_px"] == pytest.approx(instance["box_xyxy_px"], abs=0.01)
        else:
            polygon = geometry_of(told["geometry"])
            assert polygon.is_valid
            assert polygon.area == pytest.approx(mask.sum(), rel=0.1, abs=30)


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_output_of_every_prompt_says_what_the_answer_says(
    local: Served, answers: Callable[[str], dict[str, Any]], prompt: str, name: str, tmp_path: Path
) -> None:
    answer = answers(prompt)
    assert answer["instances"] and set(answer["outputs"]) == set(OUTPUTS)
    told = answer["outputs"][name]
    response = local.client.get(told["url"])
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == told["media_type"]
    read(name, response.content, answer, tmp_path)
    if "inline" in told:
        assert told["inline"] == response.json()
    assert ("inline" in told) == (told["media_type"] == "application/json")  # these are small


@pytest.mark.parametrize("prompt", ["words", "a region"])
def test_the_mask_is_where_the_thing_is(
    local: Served, local_image: str, picture: Picture, prompt: str, checked: Check
) -> None:
    body = body_of(local_image, prompt)
    answer = checked(local, local.client.post(PREDICT, json=body), PREDICT)
    assert "outputs" not in answer
    found = read_mask(local.client.get(answer["mask_url"]).content)
    assert iou(found, picture.masks["red circle"]) > 0.8


def test_prompts_of_a_batch_have_settings_of_their_own_and_outputs_in_common(
    local: Served, local_image: str, checked: Check
) -> None:
    prompts = [
        "red circle",
        {"text_prompt": "blue square", "score_threshold": 1.0},
        {"text_prompt": "square"},
    ]
    body = {**ask_many(local_image), "prompts": prompts, "outputs": ["coco", "mask"], "max_instances": 1}
    answer = checked(local, local.client.post(BATCH, json=body), BATCH)
    assert [len(result["instances"]) for result in answer["results"]] == [1, 0, 1]
    assert [result["score_threshold"] for result in answer["results"]] == [0.5, 1.0, 0.5]
    document = answer["outputs"]["coco"]["inline"]
    assert [category["name"] for category in document["categories"]] == [
        "red circle",
        "blue square",
        "square",
    ]
    assert [annotation["category_id"] for annotation in document["annotations"]] == [1, 3]
    assert all(result["instances"] == [] or result["mask_url"] for result in answer["results"])
    assert all(instance["mask_rle"] is None for one in answer["results"] for instance in one["instances"])


def test_nothing_that_was_not_asked_for_is_made(local: Served, local_image: str, checked: Check) -> None:
    body = ask(local_image, outputs=["boxes"])
    answer = checked(local, local.client.post(PREDICT, json=body), PREDICT)
    assert answer["mask_url"] is None and set(answer["outputs"]) == {"boxes"}
    assert answer["instances"] and answer["instances"][0]["mask_rle"] is None
    assert local.client.get(f"/files/masks/{body['task_id']}.png").status_code == 404
    row = row_of(local, body["task_id"])
    assert row is not None and (row["status"], row["mask_image_url"]) == ("done", None)


def test_an_answer_from_the_journal_has_the_same_outputs(local: Served, local_image: str) -> None:
    body = ask(local_image, outputs=["coco", "overlay"])
    first, again = (local.client.post(PREDICT, json=body).json() for _ in range(2))
    assert again["outputs"] == first["outputs"]
    task = local.client.get(f"/api/v1/tasks/{body['task_id']}").json()
    assert task["result"]["outputs"] == first["outputs"]


@pytest.mark.parametrize(
    ("more", "code"),
    [
        pytest.param(
            {"boxes": [{"xyxy": [400, 10, 500, 60]}]}, "INVALID_PROMPT", id="a box beside the image"
        ),
        pytest.param(
            {"region": {"xyxy": [400, 10, 500, 60]}}, "INVALID_REGION", id="a region beside the image"
        ),
        pytest.param(
            {"text_prompt": None, "points": [{"xy": [80, 100]}]}, "UNSUPPORTED_PROMPT", id="a click"
        ),
    ],
)
def test_what_cannot_be_answered_is_refused_and_told_to_the_row(
    local: Served, local_image: str, more: dict[str, Any], code: str
) -> None:
    body = ask(local_image, **more)
    response = local.client.post(PREDICT, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (422, code)
    row = row_of(local, body["task_id"])
    assert row is not None and (row["status"], row["metadata"]["error"]["code"]) == ("error", code)
