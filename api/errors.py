"""The one table from error to status and code, and the JSON body that every error has.

Domain errors know nothing of HTTP; nothing else in the project does this translation. A test walks all
subclasses of the domains' base errors and fails on one that has no row of its own here.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from api.runner_link import RunnerAway, RunnerLost, RunnerTimedOut
from sam3_runner import errors as runner_errors
from sam3_runner.wire import WireError
from storage import errors as storage_errors
from tasks import errors as task_errors

Details = tuple[dict[str, str], ...]


class ApiError(Exception):
    """Base of the face's own errors. `message` is written for the caller.

    ApiError
    ├── RequestRefused      by the server itself, before any route
    ├── MalformedJson
    ├── BodyIncomplete
    ├── BodyTooLarge
    ├── UnsupportedMediaType
    ├── InvalidRequest      a field is at fault; `details` says which
    ├── PromptRefused       a prompt is at fault; `details` says which
    ├── Unauthorized
    ├── RouteNotFound
    ├── MethodNotAllowed
    ├── Overloaded
    ├── ModelNotReady
    └── GivenUp             by the server itself, after its own time limit
    """

    def __init__(
        self, message: str = "", details: Details = (), headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        self.headers = headers or {}


class RequestRefused(ApiError):
    """Refused by the server itself, before any route: a CORS preflight from a foreign origin, say."""


class MalformedJson(ApiError):
    """The body is not JSON."""


class BodyIncomplete(ApiError):
    """The body stopped arriving."""


class BodyTooLarge(ApiError):
    """More bytes of JSON than the limit."""


class UnsupportedMediaType(ApiError):
    """A body that says it is something else than JSON."""


class InvalidRequest(ApiError):
    """A field is missing, unknown, or of the wrong type or form."""


class PromptRefused(ApiError):
    """A prompt cannot be read; raised in place of the runner's own error to name the field."""


class Unauthorized(ApiError):
    """No key, or a wrong one."""


class RouteNotFound(ApiError):
    """No such route or file."""


class MethodNotAllowed(ApiError):
    """The route does not know this method."""


class Overloaded(ApiError):
    """Too many requests in flight."""


class ModelNotReady(ApiError):
    """The runner's process is not there (yet, or any more)."""


class GivenUp(ApiError):
    """The server itself gave the request up, after its own time limit."""


@dataclass(frozen=True, slots=True)
class Fault:
    """How one class of error looks from outside.

    Attributes:
        status: HTTP status.
        code: What programs compare.
        message: What people read; None where the error's own words are meant for the caller.
        retry_after_s: For the `Retry-After` header.
    """

    status: int
    code: str
    message: str | None = None
    retry_after_s: int | None = None


INTERNAL = Fault(500, "INTERNAL_ERROR", "Something went wrong here. Quote the request id when you report it.")
_STORAGE_DOWN = "The object storage failed, also after retries. Try again later."
_TASKS_DOWN = "The task table could not be reached, also after retries. Try again later."

_NOT_READY = Fault(
    503, "MODEL_NOT_READY", "The model is not loaded at the moment. Try again later.", retry_after_s=5
)
_NO_JOURNAL = Fault(
    503,
    "JOURNAL_UNAVAILABLE",
    "No task can be put on record at the moment, so none is accepted. Try again later.",
    retry_after_s=5,
)
_TIMED_OUT = Fault(504, "TIMED_OUT", "The request took too long and was given up. Try again.")

FAULTS: dict[type[BaseException], Fault] = {
    # the face
    ApiError: INTERNAL,
    RequestRefused: Fault(400, "REQUEST_REFUSED"),
    MalformedJson: Fault(400, "MALFORMED_JSON"),
    BodyIncomplete: Fault(400, "BODY_INCOMPLETE"),
    BodyTooLarge: Fault(413, "BODY_TOO_LARGE"),
    UnsupportedMediaType: Fault(415, "UNSUPPORTED_MEDIA_TYPE"),
    InvalidRequest: Fault(422, "VALIDATION_FAILED"),
    PromptRefused: Fault(422, "INVALID_PROMPT"),
    Unauthorized: Fault(401, "UNAUTHORIZED"),
    RouteNotFound: Fault(404, "NOT_FOUND"),
    MethodNotAllowed: Fault(405, "METHOD_NOT_ALLOWED"),
    Overloaded: Fault(429, "OVERLOADED", retry_after_s=1),
    ModelNotReady: _NOT_READY,
    GivenUp: _TIMED_OUT,
    TimeoutError: _TIMED_OUT,
    asyncio.CancelledError: _TIMED_OUT,
    # the runner
    runner_errors.RunnerError: INTERNAL,
    runner_errors.InvalidInput: Fault(422, "VALIDATION_FAILED"),
    runner_errors.InvalidPrompt: Fault(422, "INVALID_PROMPT"),
    runner_errors.TooManyPrompts: Fault(422, "TOO_MANY_PROMPTS"),
    runner_errors.UnsupportedPrompt: Fault(422, "UNSUPPORTED_PROMPT"),
    runner_errors.InvalidRegion: Fault(422, "INVALID_REGION"),
    runner_errors.OutputTooLarge: Fault(422, "OUTPUT_TOO_LARGE"),
    runner_errors.ImageError: Fault(422, "UNDECODABLE_IMAGE"),
    runner_errors.UnsupportedImage: Fault(415, "UNSUPPORTED_IMAGE"),
    runner_errors.UndecodableImage: Fault(422, "UNDECODABLE_IMAGE"),
    runner_errors.ImageTooLarge: Fault(413, "IMAGE_TOO_LARGE"),
    runner_errors.CheckpointError: Fault(
        503, "MODEL_NOT_READY", "The model could not be loaded. Try again later.", retry_after_s=30
    ),
    runner_errors.DeviceOutOfMemory: Fault(
        503,
        "DEVICE_OUT_OF_MEMORY",
        "The device had no memory left for this request. Try again, or send fewer prompts at once.",
        retry_after_s=5,
    ),
    runner_errors.InferenceFailed: Fault(500, "INFERENCE_FAILED", "The model failed on this image."),
    WireError: INTERNAL,
    RunnerLost: _NOT_READY,
    RunnerAway: _NOT_READY,
    RunnerTimedOut: _TIMED_OUT,
    # storage
    storage_errors.StorageError: Fault(502, "STORAGE_UNAVAILABLE", _STORAGE_DOWN),
    storage_errors.InvalidKey: Fault(422, "VALIDATION_FAILED"),
    storage_errors.InvalidContentType: INTERNAL,  # we choose it, never the caller
    storage_errors.ForeignUrl: Fault(422, "FOREIGN_IMAGE_URL"),
    storage_errors.ObjectNotFound: Fault(404, "IMAGE_NOT_FOUND"),
    storage_errors.ObjectTooLarge: Fault(413, "IMAGE_TOO_LARGE"),
    storage_errors.StorageUnavailable: Fault(502, "STORAGE_UNAVAILABLE", _STORAGE_DOWN),
    storage_errors.StorageRefused: Fault(502, "STORAGE_UNAVAILABLE", _STORAGE_DOWN),
    storage_errors.StorageTimeout: Fault(
        504, "STORAGE_TIMEOUT", "The object storage did not answer in time."
    ),
    # tasks
    task_errors.TaskError: Fault(502, "TASK_STORE_UNAVAILABLE", _TASKS_DOWN),
    task_errors.InvalidTaskId: Fault(422, "VALIDATION_FAILED"),
    task_errors.TaskNotFound: Fault(404, "TASK_NOT_FOUND"),
    task_errors.TaskConflict: Fault(409, "TASK_CONFLICT"),
    task_errors.TaskStoreUnavailable: Fault(502, "TASK_STORE_UNAVAILABLE", _TASKS_DOWN),
    task_errors.TaskStoreTimeout: Fault(504, "TASK_STORE_TIMEOUT", "The task table did not answer in time."),
    task_errors.TaskRowRefused: Fault(
        502,
        "TASK_STORE_UNAVAILABLE",
        "The task table refuses what the row of this task would say. Sending it again will not help.",
    ),
    task_errors.JournalUnavailable: _NO_JOURNAL,
    task_errors.JournalTooNew: _NO_JOURNAL,
    task_errors.BacklogFull: Fault(429, "OVERLOADED", retry_after_s=5),
    task_errors.TaskFailed: INTERNAL,  # it carries a code of its own
    task_errors.TaskGaveUp: Fault(
        500,
        "TASK_GAVE_UP",
        "The task was begun several times, and each time the process that worked on it ended. It may be its image.",
    ),
    task_errors.WorkerStops: Fault(
        503, "SHUTTING_DOWN", "The service is about to stop. Try again later.", retry_after_s=5
    ),
    task_errors.NotOurTask: Fault(
        503, "SHUTTING_DOWN", "The task goes on in another process. Ask for it again.", retry_after_s=1
    ),
    task_errors.RecordUnreadable: INTERNAL,
}
FAULT_OF_CODE: dict[str, Fault] = {fault.code: fault for fault in FAULTS.values()}


def fault_of(error: BaseException) -> Fault:
    """The row of the nearest class; anything unknown is a bug of ours."""
    for cls in type(error).__mro__:
        if cls in FAULTS:
            return FAULTS[cls]
    return INTERNAL


def code_of(error: BaseException) -> tuple[str, str]:
    """Code and message as the caller sees them, for the task's row. Never raises."""
    answer = answer_of(error)
    return answer.code, answer.message


def answer_of(error: BaseException) -> Answer:
    """Translate any exception into what is sent."""
    if isinstance(error, task_errors.TaskFailed):
        return _answer_of_record(error)
    fault = fault_of(error)
    headers = {"Retry-After": str(fault.retry_after_s)} if fault.retry_after_s is not None else {}
    details: Details = ()
    if isinstance(error, ApiError):
        headers |= error.headers
        details = error.details
    return Answer(fault.status, fault.code, fault.message or str(error) or fault.code, details, headers)


def _answer_of_record(error: task_errors.TaskFailed) -> Answer:
    """What was said when the task failed; a code of an older version is a bug's."""
    fault = FAULT_OF_CODE.get(error.code, INTERNAL)
    headers = {} if fault.retry_after_s is None else {"Retry-After": str(fault.retry_after_s)}
    return Answer(fault.status, error.code, error.message, (), headers)


def error_of_status(status: int, method: str, path: str, headers: dict[str, str]) -> ApiError:
    """The error behind a response that another layer wrote in its own form: an unknown route, say.

    A redirect is an unknown route too: it leads from a path that is nearly one to the path that is.
    """
    if status == 404 or 300 <= status < 400:
        return RouteNotFound(
            f"There is no route {path!r}. GET /docs.json lists what there is.", headers=headers
        )
    if status == 405:
        return MethodNotAllowed(
            f"{method} is not allowed on {path!r}; the Allow header says what is.", headers=headers
        )
    if status == 413:
        return BodyTooLarge("The body is larger than this service takes.", headers=headers)
    if status == 429:
        return Overloaded(
            "Too many requests are in flight here already. Wait as long as Retry-After says.", headers=headers
        )
    if status == 503:
        return ModelNotReady(headers=headers)
    if status == 504:
        return GivenUp(headers=headers)
    if status < 500:
        return RequestRefused(
            f"The request was refused before it reached a route (status {status}).", headers=headers
        )
    return ApiError(f"status {status} from the server below", headers=headers)


@dataclass(frozen=True, slots=True)
class Answer:
    """An error, ready to be sent.

    Attributes:
        status: HTTP status.
        code: The error's code.
        message: For people.
        details: One per field at fault; may be empty.
        headers: Beside the usual ones: `Retry-After`, `Allow`, …
    """

    status: int
    code: str
    message: str
    details: Details
    headers: dict[str, str]

    def body(self, request_id: str) -> dict[str, Any]:
        """The envelope of `docs/contracts/api-contracts.md`."""
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.details:
            error["details"] = list(self.details)
        return {
            "success": False,
            "data": None,
            "error": error,
            "meta": {"request_id": request_id, "timestamp": datetime.now(UTC).isoformat()},
        }
