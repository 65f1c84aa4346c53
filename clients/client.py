"""The service's HTTP API in Python: typed, asynchronous, and patient with what passes.

    async with S3Client("http://127.0.0.1:8000") as s3:
        image_url = await s3.upload(Path("desk.jpg").read_bytes(), "uploads/desk.jpg")
        found = await s3.predict(image_url, "red circle")

S3ClientError
├── ServiceError   the service answered with an error: has its status, code and request id
└── Unreachable    no answer: nobody listens, the connection broke, or it took too long
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, NotRequired, TypedDict, Unpack
from urllib.parse import quote

import httpx

Unit = Literal["px", "relative"]
OutputName = Literal["mask", "instance_map", "overlay", "cutout", "rle", "polygons", "boxes", "coco"]

# Passing by nature: too much to do, a dependency or the model away, too slow; and what Cloudflare says for these.
# 500 is not: the model fails on this image, or has died of it three times, and would again.
_MAY_PASS = frozenset({429, 502, 503, 504, *range(520, 525)})
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.5, 10.0
_VISIBLE_ASCII = re.compile("[!-~]+")
_SHOWN_CHARACTERS = 200  # of an answer that is not the service's own


class ExemplarBox(TypedDict):
    """A box around something to find (positive) or not to find (negative)."""

    xyxy: Sequence[float]
    label: NotRequired[Literal["positive", "negative"]]
    unit: NotRequired[Unit]


class Click(TypedDict):
    """A point on the object (1) or beside it (0)."""

    xy: Sequence[float]
    label: NotRequired[Literal[0, 1]]
    unit: NotRequired[Unit]


class Region(TypedDict):
    """The part of the image that is looked at."""

    xyxy: Sequence[float]
    unit: NotRequired[Unit]


class Selection(TypedDict, total=False):
    """Which instances are kept, and what of them; docs/contracts/api-contracts.md has limits and defaults."""

    score_threshold: float
    mask_threshold: float
    max_instances: int
    nms_iou: float


class PromptObject(Selection, total=False):
    """One prompt of a batch that is more than words."""

    text_prompt: str
    boxes: Sequence[ExemplarBox]
    points: Sequence[Click]


class BatchOptions(Selection, total=False):
    """What a batch may be asked beside its prompts."""

    region: Region
    outputs: Sequence[OutputName]
    polygon_tolerance_px: float


class PredictOptions(BatchOptions, total=False):
    """What predict may be asked beside its words."""

    boxes: Sequence[ExemplarBox]
    points: Sequence[Click]


class CocoRle(TypedDict):
    """A mask as COCO's compressed run lengths; `size` is [height, width]."""

    size: list[int]
    counts: str


class Instance(TypedDict):
    """One object found. Box in pixels of the upright image, origin top left."""

    score: float
    box_xyxy_px: list[float]
    area_px: int
    mask_rle: CocoRle | None


class ImageSize(TypedDict):
    """Of the upright image."""

    width: int
    height: int


class Output(TypedDict):
    """Something that was asked for in `outputs`, as it is stored."""

    url: str
    media_type: str
    inline: NotRequired[Any]


class PredictResult(TypedDict):
    """The answer to one prompt; instances best first."""

    task_id: str
    mask_url: str | None
    labels: list[str]
    inference_time_ms: float
    confidence: float
    text_prompt: str | None
    instances: list[Instance]
    image_size: ImageSize
    score_threshold: float
    timings_ms: dict[str, float]
    model: dict[str, str]
    outputs: NotRequired[dict[OutputName, Output]]


class BatchResult(TypedDict):
    """The answers to all prompts, in their order."""

    task_id: str
    results: list[PredictResult]
    total_inference_time_ms: float
    mask_url: str | None
    outputs: NotRequired[dict[OutputName, Output]]


class TaskError(TypedDict):
    """Why a task failed."""

    code: str
    message: str


class Task(TypedDict):
    """How an accepted task stands."""

    task_id: str
    status: Literal["processing", "done", "error"]
    stage: str
    attempts: int
    accepted_at: str
    updated_at: str
    result: NotRequired[PredictResult | BatchResult]
    error: NotRequired[TaskError]


class ModelInfo(TypedDict):
    """What the service has loaded."""

    model_name: str
    model_version: str
    parameters: int
    weights_size_gb: float
    device: str
    dtype: str
    input_size_px: int
    max_text_tokens: int
    max_prompts: int
    max_batch_size: int


class S3ClientError(Exception):
    """Base of all errors of the client.

    Attributes:
        code: One word for machines.
        message: One sentence for people.
        may_pass: Whether the same call may well succeed later.
        request_id: Under which the service's log has it, if the service answered.
    """

    def __init__(self, code: str, message: str, *, may_pass: bool, request_id: str | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.may_pass = may_pass
        self.request_id = request_id


class ServiceError(S3ClientError):
    """The service answered with an error.

    Attributes:
        status: Of HTTP.
        details: The fields to blame, if the service named any.
        retry_after_s: When to come back, if it said so.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        request_id: str | None = None,
        details: Sequence[dict[str, str]] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(code, message, may_pass=status in _MAY_PASS, request_id=request_id)
        self.status = status
        self.details = tuple(details)
        self.retry_after_s = retry_after_s


class Unreachable(S3ClientError):
    """There was no answer. Whether the service has begun with the task is unknown; the same call finds out."""


class S3Client:
    """A caller of the service. Every call is safe to repeat, and is repeated while the reason may pass.

    429, 502 to 504 and broken connections are tried again with growing, jittered pauses, no sooner than `Retry-After`
    says. A task keeps its id over all tries, so it is computed once.

    Args:
        url: Where the service is; a path in it is kept.
        api_key: Sent as `X-API-Key`, to this URL alone: nothing is redirected.
        timeout_s: For one try. Longer than the service's own limit (60 s unless set), or a slow result is asked for
            twice.
        give_up_after_s: For one call with all its tries: no new one begins after it.
    Raises:
        ValueError: the URL is not http(s), or the key does not fit in a header.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        *,
        timeout_s: float = 90.0,
        give_up_after_s: float = 120.0,
    ) -> None:
        base = _parse_url(url)
        if api_key is not None and not _VISIBLE_ASCII.fullmatch(api_key):
            raise ValueError("the API key must be visible ASCII characters, without blanks and line breaks")
        self._url = str(base)
        self._give_up_after_s = give_up_after_s
        self._http = httpx.AsyncClient(
            base_url=base,
            headers={} if api_key is None else {"X-API-Key": api_key},
            timeout=httpx.Timeout(timeout_s, connect=10.0),
            limits=httpx.Limits(max_connections=None),
            # A proxy of the environment has no business between a machine and itself.
            mounts={f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")},
        )

    async def __aenter__(self) -> S3Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections; calls under way end."""
        await self._http.aclose()

    async def predict(
        self,
        image_url: str,
        text_prompt: str | None = None,
        *,
        task_id: str | None = None,
        user_id: str = "python",
        **options: Unpack[PredictOptions],
    ) -> PredictResult:
        """Find every instance of one concept in one image.

        Args:
            image_url: In the service's own storage: what `upload` gave, its public URL, or a bare key.
            text_prompt: The concept in words; may be left out where boxes or points say it.
            task_id: Names the task, its row and its mask; the same id with the same inputs is the same task. A new
                one if not given.
            user_id: Recorded in the row.
            options: As in the contract; what is not given is not sent.
        Raises:
            ServiceError, Unreachable: after the last try.
        """
        asked = dict(options) if text_prompt is None else {"text_prompt": text_prompt, **options}
        answer: PredictResult = await self._post("/api/v1/predict", image_url, task_id, user_id, asked)
        return answer

    async def predict_batch(
        self,
        image_url: str,
        prompts: Sequence[str | PromptObject],
        *,
        task_id: str | None = None,
        user_id: str = "python",
        **options: Unpack[BatchOptions],
    ) -> BatchResult:
        """Find every instance of several concepts in one image, which is downloaded and encoded once.

        Args and errors are those of `predict`; `options` hold for every prompt that does not say otherwise.
        """
        asked = {"prompts": list(prompts), **options}
        answer: BatchResult = await self._post("/api/v1/predict/batch", image_url, task_id, user_id, asked)
        return answer

    async def upload(self, data: bytes, key: str) -> str:
        """Put an image into the service's local storage; once R2 is configured there is none (404 `NOT_FOUND`).

        Args:
            data: The file's bytes.
            key: `uploads/…`: segments of `A-Z a-z 0-9 _ . -` joined by slashes. What was there is replaced.
        Returns:
            The URL to send as `image_url`.
        """
        answer = await self._call("PUT", f"/files/{quote(key)}", content=data)
        url: str = answer["url"]
        return url

    async def takes_uploads(self) -> bool:
        """Whether the service has the route that `upload` needs, by its own description."""
        return "/files/{key}" in (await self._call("GET", "/docs.json"))["paths"]

    async def task(self, task_id: str) -> Task:
        """How an accepted task stands, and its result once there is one."""
        answer: Task = await self._call("GET", f"/api/v1/tasks/{quote(task_id, safe='')}")
        return answer

    async def model_info(self) -> ModelInfo:
        """What the service has loaded."""
        answer: ModelInfo = await self._call("GET", "/api/v1/model/info")
        return answer

    async def _post(
        self, path: str, image_url: str, task_id: str | None, user_id: str, asked: dict[str, Any]
    ) -> Any:
        # The id is chosen before the first try: all tries are one task.
        task_id = str(uuid.uuid4()) if task_id is None else task_id
        body = {"image_url": image_url, "user_id": user_id, "task_id": task_id, **asked}
        return await self._call("POST", path, json=body)

    async def _call(self, method: str, path: str, **request: Any) -> Any:
        now = asyncio.get_running_loop().time
        ends_at = now() + self._give_up_after_s
        for attempt in itertools.count():
            try:
                return await self._try(method, path, request)
            except S3ClientError as error:
                pause_s = _pause_s(error, attempt)
                if not error.may_pass or now() + pause_s > ends_at:
                    raise
            await asyncio.sleep(pause_s)
        raise AssertionError("unreachable: the loop has no end")

    async def _try(self, method: str, path: str, request: dict[str, Any]) -> Any:
        try:
            response = await self._http.request(method, path, **request)
        except httpx.TimeoutException as error:
            raise self._unreachable("gave no answer in time", error) from error
        except httpx.ConnectError as error:
            raise self._unreachable("cannot be reached", error) from error
        except httpx.RequestError as error:
            raise self._unreachable("broke off", error) from error
        if not response.is_success:
            raise _error_of(response)
        try:
            return response.json()
        except ValueError as error:
            raise ServiceError(
                response.status_code,
                "NOT_OUR_SERVICE",
                f"{self._url} answered {method} {path} with something else than JSON: is it the right URL?",
            ) from error

    def _unreachable(self, what: str, error: httpx.RequestError) -> Unreachable:
        message = f"{self._url} {what} ({type(error).__name__})"
        return Unreachable("UNREACHABLE", message, may_pass=not isinstance(error, httpx.UnsupportedProtocol))


def _parse_url(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"not a URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError("the service's URL must begin with http:// or https:// and name a host")
    return parsed


def _error_of(response: httpx.Response) -> ServiceError:
    """The service's own error; for what something in between says, one of the same form."""
    told = response.headers.get("Retry-After", "")
    retry_after_s = float(told) if re.fullmatch("[0-9]{1,6}", told) else None
    try:
        body = response.json()
        error, request_id = body["error"], body["meta"]["request_id"]
        code, message, details = str(error["code"]), str(error["message"]), error.get("details") or ()
    except (ValueError, KeyError, TypeError, AttributeError):
        request_id, details = response.headers.get("X-Request-ID"), ()
        code = f"HTTP_{response.status_code}"
        message = " ".join(response.text[:_SHOWN_CHARACTERS].split()) or response.reason_phrase
    return ServiceError(
        response.status_code,
        code,
        message,
        request_id=request_id,
        details=details,
        retry_after_s=retry_after_s,
    )


def _pause_s(error: S3ClientError, attempt: int) -> float:
    """Before the next try: doubling, with jitter so that many callers do not come back together."""
    told_s = error.retry_after_s if isinstance(error, ServiceError) else None
    own_s = random.uniform(0.5, 1.0) * min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(attempt, 10))
    return max(own_s, (told_s or 0.0) * random.uniform(1.0, 1.25))
