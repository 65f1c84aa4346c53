"""The contract document, the OpenAPI document and the code say the same."""

from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from pycocotools import mask as coco

from api import examples, schemas
from api.errors import FAULTS
from api.openapi import openapi_document
from api.routes import ANY_PATH_ERRORS, ROUTES
from tests.api.contract import read_contract

CONTRACT = read_contract()
OPENAPI = openapi_document(ROUTES)
NAMES = {
    "predict.request": examples.REQUESTS["predict"],
    "batch.request": examples.REQUESTS["predict_batch"],
    "predict.response": examples.RESPONSES["predict"],
    "batch.response": examples.RESPONSES["predict_batch"],
    "health": examples.RESPONSES["health"],
    "accepted": examples.ACCEPTED,
    "task": examples.RESPONSES["task"],
    "model_info": examples.RESPONSES["model_info"],
    "file": examples.RESPONSES["put_file"],
    "error": examples.ERROR,
}
PARTS = {"batch.prompts": examples.BATCH_PROMPTS, "outputs": examples.OUTPUTS}
SCHEMAS = {
    "predict.request": "PredictRequest",
    "batch.request": "BatchRequest",
    "predict.response": "PredictResponse",
    "batch.response": "BatchResponse",
    "health": "HealthResponse",
    "accepted": "AcceptedResponse",
    "task": "TaskResponse",
    "model_info": "ModelInfoResponse",
    "file": "FileResponse",
    "error": "ErrorResponse",
}


def check(value: Any, schema: str) -> None:
    document = {"$ref": f"#/components/schemas/{schema}", "components": OPENAPI["components"]}
    Draft202012Validator(document).validate(value)


def test_the_document_was_read() -> None:
    assert len(CONTRACT.routes) == len(ROUTES)
    assert len(CONTRACT.statuses) > 20
    assert set(CONTRACT.examples) == {*NAMES, *PARTS}


def test_the_document_has_exactly_the_routes_of_the_code() -> None:
    assert set(CONTRACT.routes) == {(spec.method, spec.path) for spec in ROUTES}


def test_the_document_has_exactly_the_errors_of_the_code() -> None:
    assert CONTRACT.statuses == {fault.code: fault.status for fault in FAULTS.values()}


@pytest.mark.parametrize("spec", ROUTES, ids=lambda spec: f"{spec.method} {spec.path}")
def test_a_route_has_the_statuses_and_the_key_that_the_document_says(spec: Any) -> None:
    needs_key, successes, statuses = CONTRACT.routes[spec.method, spec.path]
    operation = OPENAPI["paths"][spec.path][spec.method.lower()]
    of_any_path = {CONTRACT.statuses[code] for code in ANY_PATH_ERRORS}
    assert needs_key == spec.needs_key == bool(operation["security"])
    assert {CONTRACT.statuses[code] for code in spec.errors} == statuses
    assert successes == ({200, 202} if spec.may_accept else {200})
    assert set(map(int, operation["responses"])) == successes | statuses | of_any_path


def test_every_code_is_answered_by_some_route() -> None:
    assert set(ANY_PATH_ERRORS).union(*(spec.errors for spec in ROUTES)) == set(CONTRACT.statuses)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_the_same_in_both_documents_and_fits_its_schema(name: str) -> None:
    assert CONTRACT.examples[name] == NAMES[name]
    check(NAMES[name], SCHEMAS[name])


def test_the_examples_of_parts_fit_into_the_whole() -> None:
    assert {name: CONTRACT.examples[name] for name in PARTS} == PARTS
    check({**NAMES["predict.response"], "outputs": examples.OUTPUTS}, "PredictResponse")
    batch = {**NAMES["batch.request"], "prompts": examples.BATCH_PROMPTS}
    check(batch, "BatchRequest")
    words, square, exemplars = schemas.parse_request(schemas.BatchRequest, batch).all_prompts
    assert (words.text, square.text, exemplars.text) == ("red circle", "square", None)
    assert (words.selection.score_threshold, square.selection.score_threshold) == (0.5, 0.3)
    assert [box.is_positive for box in exemplars.boxes] == [True, False]


def test_the_example_requests_are_requests_that_the_code_takes() -> None:
    schemas.parse_request(schemas.PredictRequest, examples.REQUESTS["predict"])
    schemas.parse_request(schemas.BatchRequest, examples.REQUESTS["predict_batch"])


def test_the_example_masks_are_masks() -> None:
    found = [*examples.RESPONSES["predict"]["instances"]]
    found += [
        each for result in examples.RESPONSES["predict_batch"]["results"] for each in result["instances"]
    ]
    for instance in found:
        assert int(coco.area(instance["mask_rle"])) == instance["area_px"]
        x0, y0, x1, y1 = instance["box_xyxy_px"]
        assert coco.toBbox(instance["mask_rle"]).tolist() == [x0, y0, x1 - x0, y1 - y0]


def test_every_error_example_has_the_form_of_errors() -> None:
    for code in CONTRACT.statuses:
        body = examples.error_body(code)
        assert body["error"]["code"] == code
        check(body, "ErrorResponse")


def test_the_openapi_document_is_one() -> None:
    validate(OPENAPI)


def test_the_files_routes_are_told_only_where_they_exist() -> None:
    remote = openapi_document([spec for spec in ROUTES if not spec.is_local_only])
    assert "/files/{key}" in OPENAPI["paths"]
    assert "/files/{key}" not in remote["paths"]
    validate(remote)
