"""The routes, as an ASGI application that BentoML mounts at `/`.

BentoML's own routes (`/livez`, `/readyz`, …) stay beside it. Errors are raised, never answered here:
`EnvelopeMiddleware`, around both, gives them their form.
"""

from __future__ import annotations

import asyncio
import mimetypes
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from api import metrics, playground
from api.backend import Backend
from api.errors import (
    BodyTooLarge,
    InvalidRequest,
    MalformedJson,
    ModelNotReady,
    PromptRefused,
    RouteNotFound,
)
from api.limits import MAX_JSON_BYTES, read_body, require_json
from api.openapi import openapi_document
from api.preferences import RESPOND_ASYNC, wants_async
from api.requests import RECORD, RequestRecord
from api.routes import ROUTES, RouteSpec
from api.schemas import BatchRequest, PredictRequest, RequestT, parse_request
from sam3_runner import rle
from sam3_runner.errors import ImageError, ImageTooLarge, InvalidPrompt, TooManyPrompts, UnsupportedPrompt
from sam3_runner.images import ImageHeader
from sam3_runner.outputs import KINDS
from sam3_runner.text import MAX_PROMPTS, PromptChecker
from sam3_runner.types import ModelInfo, Prompt, Segmentation
from storage import ObjectNotFound
from storage.keys import validate_key
from tasks.job import Job
from tasks.pipeline import JobOutcome, PromptOutcome, document

T = TypeVar("T")

MAX_INLINE_BYTES = 65_536  # of a document in an answer
_UPLOAD_KEY = re.compile(r"uploads(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+\Z")
_MAX_UPLOAD_KEY_CHARS = 255
_MASKS_PREFIX = "masks/"
# Whatever the limits on images are by now, a mask of ours is read. The worst one, all noise, is 0.2 bytes a pixel.
_MAX_MASK_BYTES = 1 << 28


class FaceApp(Starlette):
    """Starlette without its error layers: what a route raises reaches the envelope as it is."""

    def build_middleware_stack(self) -> ASGIApp:
        """The bare router."""
        return self.router


def create_app(*, is_local: bool) -> FaceApp:
    """The application; its `state.backend` must be set before its first request.

    Args:
        is_local: Whether objects live in a local directory, so that the `/files` routes exist.
    """
    specs = [spec for spec in ROUTES if is_local or not spec.is_local_only]
    served = [spec for spec in specs if spec.operation in _HANDLERS]
    paths = dict.fromkeys(spec.path for spec in served)
    routes = [_route(path, [spec for spec in served if spec.path == path]) for path in paths]
    app = FaceApp(routes=routes)
    app.router.redirect_slashes = False
    app.state.document = orjson.dumps(openapi_document(specs))
    return app


Handler = Callable[[Request, Backend, RequestRecord], Awaitable[Response]]


def _route(path: str, specs: list[RouteSpec]) -> Route:
    """All methods of one path: of several routes, the first would answer 405 without knowing of the others."""
    handlers = {spec.method: _HANDLERS[spec.operation] for spec in specs}

    async def endpoint(request: Request) -> Response:
        record: RequestRecord = request.scope[RECORD]
        record.route = path
        handler = handlers["GET" if request.method == "HEAD" else request.method]
        return await handler(request, request.app.state.backend, record)

    return Route(path.replace("{key}", "{key:path}"), endpoint, methods=[*handlers], name=specs[0].operation)


def _json(body: Any) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")


async def _health(request: Request, backend: Backend, record: RequestRecord) -> Response:
    model = backend.watch.model
    return _json(
        {
            "status": "ok",
            "model_loaded": model is not None,
            "gpu_available": _has_gpu(model),
            "dependencies": await backend.dependencies(),
        }
    )


def _has_gpu(model: ModelInfo | None) -> bool:
    return model is not None and model.extra.get("gpu_available") == "true"


async def _metrics(request: Request, backend: Backend, record: RequestRecord) -> Response:
    text = await asyncio.to_thread(backend.metrics.exposition, await backend.tasks_waiting())
    return Response(text, headers={"content-type": metrics.CONTENT_TYPE})


async def _docs(request: Request, backend: Backend, record: RequestRecord) -> Response:
    return Response(request.app.state.document, media_type="application/json")


async def _playground(request: Request, backend: Backend, record: RequestRecord) -> Response:
    return playground.page(backend.settings.r2_public_url)


async def _playground_file(request: Request, backend: Backend, record: RequestRecord) -> Response:
    return playground.file(request.path_params["file"], backend.settings.r2_public_url)


async def _model_info(request: Request, backend: Backend, record: RequestRecord) -> Response:
    model = backend.watch.require()
    return _json(
        {
            "model_name": model.model_name,
            "model_version": model.model_version,
            "parameters": model.parameters,
            "weights_size_gb": model.weights_size_gb,
            "device": model.device,
            "dtype": model.dtype,
            "input_size_px": model.input_size_px,
            "max_text_tokens": model.max_text_tokens,
            "max_prompts": MAX_PROMPTS,
            "max_batch_size": backend.settings.max_batch_size,
        }
    )


async def _predict(request: Request, backend: Backend, record: RequestRecord) -> Response:
    return await _do(request, backend, record, PredictRequest)


async def _predict_batch(request: Request, backend: Backend, record: RequestRecord) -> Response:
    return await _do(request, backend, record, BatchRequest)


async def _do(request: Request, backend: Backend, record: RequestRecord, schema: type[RequestT]) -> Response:
    with backend.in_flight.slot():  # first of all: under overload this is the answer, and it costs nothing
        await backend.require_room()
        job = await _read_job(request, backend, record, schema)
        await _require_model(backend, job)
        if wants_async(request.headers.getlist("prefer")):
            await backend.executor.submit(job)
            return _accepted(job)
        outcome = await _run(request, backend, record, job)
        return _json(await _in_pool(backend, _answer, job, outcome, record.elapsed_s))


async def _read_job(request: Request, backend: Backend, record: RequestRecord, schema: type[RequestT]) -> Job:
    """The body as its schema says, with prompts that the text encoder reads; if it does not, the row says so."""
    require_json(request)
    too_large = BodyTooLarge(
        f"The body is larger than {MAX_JSON_BYTES} bytes: images are sent by URL, not in the body."
    )
    body = await read_body(request, MAX_JSON_BYTES, too_large)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedJson(f"The body is not JSON: {error}.") from error
    asked = parse_request(schema, value)
    record.task_id = asked.task_id
    record.fields["prompts"] = len(asked.all_prompts)
    job = Job(
        task_id=asked.task_id,
        user_id=asked.user_id,
        image_url=asked.image_url,
        prompts=asked.all_prompts,
        request_id=record.request_id,
        is_batch=isinstance(asked, BatchRequest),
        region=None if asked.region is None else asked.region.region,
        outputs=None if asked.outputs is None else tuple(dict.fromkeys(asked.outputs)),
        polygon_tolerance_px=float(asked.polygon_tolerance_px),
    )
    try:
        _check_prompts(backend.prompts, asked)
    except (PromptRefused, TooManyPrompts, UnsupportedPrompt) as error:
        await backend.executor.refuse(job, error)
        raise
    return job


async def _require_model(backend: Backend, job: Job) -> None:
    """A task that is known may be asked for while no model is there; a new one is not accepted then."""
    try:
        backend.watch.require()
    except ModelNotReady:
        if not await backend.executor.knows(job.task_id):
            raise


def _accepted(job: Job) -> Response:
    body = {"task_id": job.task_id, "status": "processing"}
    headers = {"location": f"/api/v1/tasks/{job.task_id}", "preference-applied": RESPOND_ASYNC}
    return Response(orjson.dumps(body), 202, headers, "application/json")


def _check_prompts(check: PromptChecker, asked: PredictRequest | BatchRequest) -> None:
    try:
        check.check(asked.all_prompts)
    except InvalidPrompt as error:
        details = tuple(
            {"field": asked.field_of_prompt(index), "message": message}
            for index, prompt in enumerate(asked.all_prompts)
            if (message := _why_refused(check, prompt)) is not None
        )
        raise PromptRefused(str(error), details) from error


def _why_refused(check: PromptChecker, prompt: Prompt) -> str | None:
    try:
        check.check([prompt])
    except InvalidPrompt as error:
        return str(error)
    return None


async def _run(request: Request, backend: Backend, record: RequestRecord, job: Job) -> JobOutcome:
    try:
        outcome = await backend.executor.run(
            job, timeout_s=backend.settings.request_timeout_s, is_caller_gone=request.is_disconnected
        )
    except Exception as error:
        record.stage_ms = getattr(error, "stage_ms", {})
        raise
    record.stage_ms = outcome.stage_ms
    record.fields["batch_size"] = outcome.batch_size
    record.fields["instances"] = sum(len(prompt.segmentation.masks) for prompt in outcome.prompts)
    return outcome


async def _task(request: Request, backend: Backend, record: RequestRecord) -> Response:
    record.task_id = request.path_params["task_id"]
    view = await backend.executor.look(record.task_id)
    body: dict[str, Any] = {
        "task_id": record.task_id,
        "status": view.status,
        "stage": view.stage,
        "attempts": view.attempts,
        "accepted_at": _iso(view.accepted_at),
        "updated_at": _iso(view.updated_at),
    }
    if view.outcome is not None:
        took_s = view.updated_at - view.accepted_at
        body["result"] = await _in_pool(backend, _answer, view.job, view.outcome, took_s)
    if view.error is not None:
        body["error"] = {"code": view.error[0], "message": view.error[1]}
    return _json(body)


def _iso(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat()


async def _in_pool(backend: Backend, call: Callable[..., T], *arguments: Any) -> T:
    """What takes milliseconds of CPU, such as run-length strings of large masks: not on the event loop."""
    return await asyncio.get_running_loop().run_in_executor(backend.codec_pool, call, *arguments)


def _answer(job: Job, outcome: JobOutcome, elapsed_s: float) -> dict[str, Any]:
    """The body of predict, or of predict/batch."""
    results = [_result(job, outcome, prompt, elapsed_s) for prompt in outcome.prompts]
    outputs = {} if job.outputs is None else {"outputs": _outputs(job, outcome)}
    if not job.is_batch:
        return {**results[0], **outputs}
    return {
        "task_id": job.task_id,
        "results": results,
        "total_inference_time_ms": round(outcome.inference_time_ms, 3),
        "mask_url": outcome.mask_url,
        **outputs,
    }


def _outputs(job: Job, outcome: JobOutcome) -> dict[str, Any]:
    """What was asked for, each with its URL; small documents as they are, too."""
    told: dict[str, Any] = {}
    for name in job.outputs or ():
        if name == "mask":
            told[name] = {"url": outcome.mask_url, "media_type": "image/png"}
            continue
        told[name] = {"url": outcome.output_urls[name], "media_type": KINDS[name].media_type}
        if KINDS[name].is_document and len(data := document(job, outcome, name)) <= MAX_INLINE_BYTES:
            told[name]["inline"] = orjson.loads(data)
    return told


def _result(job: Job, outcome: JobOutcome, prompt: PromptOutcome, elapsed_s: float) -> dict[str, Any]:
    height, width = outcome.image_size_hw
    timings = {stage: round(ms, 3) for stage, ms in outcome.stage_ms.items()}
    return {
        "task_id": job.task_id,
        "mask_url": prompt.mask_url,
        "labels": list(prompt.labels),
        "inference_time_ms": round(outcome.inference_time_ms, 3),
        "confidence": prompt.confidence,
        "text_prompt": prompt.prompt.text,
        "instances": _instances(prompt.segmentation, has_rle=job.makes("rle")),
        "image_size": {"width": width, "height": height},
        "score_threshold": prompt.prompt.selection.score_threshold,
        "timings_ms": {**timings, "total": round(elapsed_s * 1000, 3)},
        "model": {"name": outcome.model.model_name, "version": outcome.model.model_version},
    }


def _instances(found: Segmentation, *, has_rle: bool) -> list[dict[str, Any]]:
    return [
        {
            "score": float(score),
            "box_xyxy_px": box.tolist(),
            "area_px": rle.area_px(mask),
            "mask_rle": rle.to_coco(mask) if has_rle else None,
        }
        for score, box, mask in zip(found.scores, found.boxes_xyxy_px, found.masks, strict=True)
    ]


async def _get_file(request: Request, backend: Backend, record: RequestRecord) -> Response:
    key = request.path_params["key"]
    validate_key(key)
    is_mask = key.startswith(_MASKS_PREFIX)
    try:
        data = await backend.store.get(key, _MAX_MASK_BYTES if is_mask else backend.limits.max_bytes)
    except ObjectNotFound as error:
        raise RouteNotFound(f"There is no file {key!r}.") from error
    if is_mask:
        media_type = mimetypes.guess_type(key)[0] or "application/octet-stream"
    else:
        media_type = await _media_type_of_file(backend, data)
    return Response(data, media_type=media_type, headers={"x-content-type-options": "nosniff"})


async def _put_file(request: Request, backend: Backend, record: RequestRecord) -> Response:
    key = request.path_params["key"]
    if len(key) > _MAX_UPLOAD_KEY_CHARS or not _UPLOAD_KEY.match(key):
        message = (
            "must be uploads/ and then segments of A-Z a-z 0-9 _ . - joined by /, none beginning with a dot"
        )
        raise InvalidRequest(
            "This key cannot be written; see details.", ({"field": "key", "message": message},)
        )
    max_bytes = backend.limits.max_bytes
    backend.require_running()
    with backend.in_flight.slot():
        data = await read_body(
            request, max_bytes, ImageTooLarge(f"The file is larger than {max_bytes} bytes.")
        )
        header = await backend.sandbox.probe(data)
        await backend.store.put(key, data, _media_type(header))
    return _json({"url": backend.store.public_url(key), "key": key})


def _media_type(header: ImageHeader) -> str:
    return f"image/{header.format.partition('/')[0].lower()}"  # "HEIC/HEIF" is image/heic


async def _media_type_of_file(backend: Backend, data: bytes) -> str:
    try:
        return _media_type(await backend.sandbox.probe(data))
    except ImageError:  # put there past us
        return "application/octet-stream"


_HANDLERS: dict[str, Handler] = {
    "health": _health,
    "metrics": _metrics,
    "docs": _docs,
    "playground": _playground,
    "playground_file": _playground_file,
    "predict": _predict,
    "predict_batch": _predict_batch,
    "model_info": _model_info,
    "task": _task,
    "get_file": _get_file,
    "put_file": _put_file,
}
