"""The API as OpenAPI 3.1, made from the schemas, the routes and the error table: nothing is told twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from api import examples
from api.errors import FAULT_OF_CODE
from api.requests import REQUEST_ID_HEADER
from api.routes import ANY_PATH_ERRORS, RouteSpec
from api.schemas import AcceptedResponse, ErrorResponse

_REF = "#/components/schemas/{model}"
_VERSION = "1.0.0"

STATUS_OF_CODE: dict[str, int] = {code: fault.status for code, fault in FAULT_OF_CODE.items()}


def openapi_document(specs: Sequence[RouteSpec]) -> dict[str, Any]:
    """The document for the routes that exist."""
    paths: dict[str, dict[str, Any]] = {}
    for spec in specs:
        paths.setdefault(spec.path, {})[spec.method.lower()] = _operation(spec)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "S3 backend",
            "version": _VERSION,
            "description": "Segments images by text with SAM3. Every error has the form of `ErrorResponse`.",
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(specs),
            "securitySchemes": {"ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"}},
        },
    }


def _schemas(specs: Iterable[RouteSpec]) -> dict[str, Any]:
    wanted: list[tuple[type[BaseModel], Any]] = [(ErrorResponse, "serialization")]
    for spec in specs:
        if spec.request is not None:
            wanted.append((spec.request, "validation"))
        if spec.response is not None:
            wanted.append((spec.response, "serialization"))
        if spec.may_accept:
            wanted.append((AcceptedResponse, "serialization"))
    _, document = models_json_schema(wanted, ref_template=_REF)
    schemas: dict[str, Any] = document["$defs"]
    return schemas


def _operation(spec: RouteSpec) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": spec.operation,
        "summary": spec.summary,
        "security": [{"ApiKey": []}] if spec.needs_key else [],
        "parameters": _parameters(spec),
        "responses": {"200": _success(spec)} | _accepted(spec) | _errors(spec),
    }
    if spec.request is not None:
        content = {"schema": {"$ref": _REF.format(model=spec.request.__name__)}}
        example = examples.REQUESTS[spec.operation]
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": content | {"example": example}},
        }
    if spec.takes_file:
        binary = {"schema": {"type": "string", "format": "binary"}}
        operation["requestBody"] = {"required": True, "content": {"application/octet-stream": binary}}
    return operation


def _parameters(spec: RouteSpec) -> list[dict[str, Any]]:
    request_id = {
        "name": REQUEST_ID_HEADER,
        "in": "header",
        "required": False,
        "schema": {"type": "string"},
        "description": "1 to 128 of `A-Z a-z 0-9 . _ : -`; anything else is replaced, not refused.",
    }
    parameters: list[dict[str, Any]] = [request_id]
    if spec.may_accept:
        prefer = {
            "name": "Prefer",
            "in": "header",
            "required": False,
            "schema": {"type": "string"},
            "description": "`respond-async` (RFC 7240): answer 202 once the task is accepted, and work on.",
        }
        parameters.append(prefer)
    if "{task_id}" in spec.path:
        task_id = {"name": "task_id", "in": "path", "required": True, "schema": {"type": "string"}}
        parameters.append(task_id)
    if "{file}" in spec.path:
        file = {"name": "file", "in": "path", "required": True, "schema": {"type": "string"}}
        parameters.append(file)
    if "{key}" in spec.path:
        description = "May contain slashes, as `uploads/desk.jpg`."
        key = {
            "name": "key",
            "in": "path",
            "required": True,
            "schema": {"type": "string"},
            "description": description,
        }
        parameters.append(key)
    return parameters


def _success(spec: RouteSpec) -> dict[str, Any]:
    response: dict[str, Any] = {"description": "OK", "headers": _headers()}
    if spec.response is not None:
        schema = {"$ref": _REF.format(model=spec.response.__name__)}
        example = examples.RESPONSES[spec.operation]
        response["content"] = {"application/json": {"schema": schema, "example": example}}
    elif spec.response_types == ("application/json",):
        response["content"] = {"application/json": {"schema": {"type": "object"}}}
    else:
        response["content"] = {
            media_type: {"schema": {"type": "string"}} for media_type in spec.response_types
        }
    return response


def _accepted(spec: RouteSpec) -> dict[str, Any]:
    if not spec.may_accept:
        return {}
    schema = {"$ref": _REF.format(model=AcceptedResponse.__name__)}
    location = {"schema": {"type": "string"}, "description": "Where the task can be asked for."}
    applied = {"schema": {"type": "string"}, "description": "`respond-async`"}
    return {
        "202": {
            "description": "Accepted",
            "headers": {**_headers(), "Location": location, "Preference-Applied": applied},
            "content": {"application/json": {"schema": schema, "example": examples.ACCEPTED}},
        }
    }


def _errors(spec: RouteSpec) -> dict[str, Any]:
    """One response per status, with an example per code."""
    codes_of: dict[int, list[str]] = {}
    for code in dict.fromkeys((*spec.errors, *ANY_PATH_ERRORS)):
        codes_of.setdefault(STATUS_OF_CODE[code], []).append(code)
    return {str(status): _error(status, codes) for status, codes in sorted(codes_of.items())}


def _error(status: int, codes: list[str]) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model=ErrorResponse.__name__)}
    shown = {code: {"value": examples.error_body(code)} for code in codes}
    response: dict[str, Any] = {
        "description": f"{HTTPStatus(status).phrase}: {', '.join(f'`{code}`' for code in codes)}",
        "headers": _headers(),
        "content": {"application/json": {"schema": schema, "examples": shown}},
    }
    if status in (429, 503):
        response["headers"]["Retry-After"] = {"schema": {"type": "integer"}, "description": "seconds"}
    return response


def _headers() -> dict[str, Any]:
    return {REQUEST_ID_HEADER: {"schema": {"type": "string"}}}
