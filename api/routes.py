"""The table of routes: what each takes, gives, and can go wrong with. OpenAPI is made from it."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel

from api import schemas

# Errors of any guarded route, of any route that takes a body, and of one that segments.
_GUARDED = ("UNAUTHORIZED", "INTERNAL_ERROR")
_WITH_BODY = ("BODY_INCOMPLETE", "OVERLOADED")
_SEGMENTING = (
    *_GUARDED,
    *_WITH_BODY,
    "MALFORMED_JSON",
    "BODY_TOO_LARGE",
    "UNSUPPORTED_MEDIA_TYPE",
    "VALIDATION_FAILED",
    "INVALID_PROMPT",
    "TOO_MANY_PROMPTS",
    "UNSUPPORTED_PROMPT",
    "INVALID_REGION",
    "OUTPUT_TOO_LARGE",
    "FOREIGN_IMAGE_URL",
    "IMAGE_NOT_FOUND",
    "IMAGE_TOO_LARGE",
    "UNSUPPORTED_IMAGE",
    "UNDECODABLE_IMAGE",
    "TASK_NOT_FOUND",
    "TASK_CONFLICT",
    "INFERENCE_FAILED",
    "STORAGE_UNAVAILABLE",
    "STORAGE_TIMEOUT",
    "TASK_STORE_UNAVAILABLE",
    "TASK_STORE_TIMEOUT",
    "MODEL_NOT_READY",
    "DEVICE_OUT_OF_MEMORY",
    "TIMED_OUT",
    "TASK_GAVE_UP",
    "JOURNAL_UNAVAILABLE",
    "SHUTTING_DOWN",
)
_STORAGE = ("STORAGE_UNAVAILABLE", "STORAGE_TIMEOUT")

# What any path may answer, also one that is no route at all.
ANY_PATH_ERRORS = ("REQUEST_REFUSED", "NOT_FOUND", "METHOD_NOT_ALLOWED")


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """One route.

    Attributes:
        method: Of HTTP.
        path: As a template: `/files/{key}`.
        operation: Its name in OpenAPI, and of its handler.
        summary: One line.
        needs_key: Whether `X-API-Key` is asked for.
        errors: Codes that it may answer.
        request: Schema of the JSON body, if it takes one.
        response: Schema of the JSON body of 200, if it gives one.
        response_types: Media types of 200 otherwise.
        may_accept: May answer 202 instead, to `Prefer: respond-async`.
        is_local_only: Exists only while objects live in a local directory.
        takes_file: The body is the bytes of a file.
    """

    method: str
    path: str
    operation: str
    summary: str
    needs_key: bool = False
    errors: tuple[str, ...] = ("INTERNAL_ERROR",)
    request: type[BaseModel] | None = None
    response: type[BaseModel] | None = None
    response_types: tuple[str, ...] = ("application/json",)
    may_accept: bool = False
    is_local_only: bool = False
    takes_file: bool = False


ROUTES: tuple[RouteSpec, ...] = (
    RouteSpec("GET", "/health", "health", "What the service has", response=schemas.HealthResponse),
    RouteSpec("GET", "/livez", "livez", "Is the process serving?", response_types=("text/plain",)),
    RouteSpec(
        "GET",
        "/readyz",
        "readyz",
        "Is the model loaded and warmed up?",
        errors=("INTERNAL_ERROR", "MODEL_NOT_READY"),
        response_types=("text/plain",),
    ),
    RouteSpec("GET", "/metrics", "metrics", "Prometheus metrics", response_types=("text/plain",)),
    RouteSpec("GET", "/docs.json", "docs", "This document"),
    RouteSpec("GET", "/", "playground", "A page to try the API by hand", response_types=("text/html",)),
    RouteSpec(
        "GET",
        "/playground/{file}",
        "playground_file",
        "What that page is made of",
        errors=("INTERNAL_ERROR", "NOT_FOUND"),
        response_types=("text/css", "text/javascript", "image/svg+xml", "image/jpeg"),
    ),
    RouteSpec(
        "POST",
        "/api/v1/predict",
        "predict",
        "Find every instance of one concept in one image",
        needs_key=True,
        errors=_SEGMENTING,
        request=schemas.PredictRequest,
        response=schemas.PredictResponse,
        may_accept=True,
    ),
    RouteSpec(
        "POST",
        "/api/v1/predict/batch",
        "predict_batch",
        "Find every instance of several concepts in one image",
        needs_key=True,
        errors=_SEGMENTING,
        request=schemas.BatchRequest,
        response=schemas.BatchResponse,
        may_accept=True,
    ),
    RouteSpec(
        "GET",
        "/api/v1/tasks/{task_id}",
        "task",
        "How an accepted task stands, and its result",
        needs_key=True,
        errors=(*_GUARDED, "TASK_NOT_FOUND", "JOURNAL_UNAVAILABLE"),
        response=schemas.TaskResponse,
    ),
    RouteSpec(
        "GET",
        "/api/v1/model/info",
        "model_info",
        "What is loaded",
        needs_key=True,
        errors=(*_GUARDED, "MODEL_NOT_READY"),
        response=schemas.ModelInfoResponse,
    ),
    RouteSpec(
        "GET",
        "/files/{key}",
        "get_file",
        "Read an upload or a mask (local mode only)",
        needs_key=True,
        errors=(*_GUARDED, "NOT_FOUND", "IMAGE_TOO_LARGE", "VALIDATION_FAILED", *_STORAGE),
        response_types=("image/*",),
        is_local_only=True,
    ),
    RouteSpec(
        "PUT",
        "/files/{key}",
        "put_file",
        "Store an image under uploads/ (local mode only)",
        needs_key=True,
        errors=(
            *_GUARDED,
            *_WITH_BODY,
            *_STORAGE,
            "IMAGE_TOO_LARGE",
            "UNSUPPORTED_IMAGE",
            "UNDECODABLE_IMAGE",
            "VALIDATION_FAILED",
            "SHUTTING_DOWN",
        ),
        response=schemas.FileResponse,
        is_local_only=True,
        takes_file=True,
    ),
)
