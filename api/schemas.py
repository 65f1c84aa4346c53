"""What comes in and goes out, as `docs/contracts/api-contracts.md` says it. OpenAPI is made from these."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from api.errors import InvalidRequest
from sam3_runner.text import MAX_PROMPTS
from storage.urls import MAX_URL_CHARS

DEFAULT_SCORE_THRESHOLD = 0.5

# C0, C1 controls and DEL: Postgres cannot store NUL, and no prompt or URL has a use for the others.
_NO_CONTROLS = r"^[^\x00-\x1f\x7f-\x9f]*$"

ImageUrl = Annotated[
    str,
    StringConstraints(min_length=1, max_length=MAX_URL_CHARS, pattern=_NO_CONTROLS),
    Field(description="An image in our own storage: its public or S3 URL, `s3://bucket/key`, or a bare key."),
]
PromptText = Annotated[
    str,
    StringConstraints(min_length=1, max_length=1000, pattern=_NO_CONTROLS),
    Field(description="A concept in words, such as `red circle`; every instance of it is found."),
]
UserId = Annotated[
    str,
    StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:@-]+$"),
    Field(description="Recorded in the task's row."),
]
TaskId = Annotated[
    str,
    StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$"),
    Field(description="The row to work on; also names the mask."),
]
ScoreThreshold = Annotated[
    float,
    Field(ge=0, le=1, allow_inf_nan=False, description="Instances that score above it are kept."),
]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    image_url: ImageUrl
    user_id: UserId
    task_id: TaskId
    score_threshold: ScoreThreshold = DEFAULT_SCORE_THRESHOLD


class PredictRequest(_Request):
    """Find every instance of one concept in one image."""

    text_prompt: PromptText

    @property
    def all_prompts(self) -> tuple[str, ...]:
        """The prompts in order; here one."""
        return (self.text_prompt,)

    def field_of_prompt(self, index: int) -> str:
        """The name of the field that prompt `index` came in."""
        return "text_prompt"


class BatchRequest(_Request):
    """Find every instance of several concepts in one image."""

    # The upper limit is told here and held by the prompt check, which answers with a code of its own.
    prompts: Annotated[list[PromptText], Field(min_length=1, json_schema_extra={"maxItems": MAX_PROMPTS})]

    @property
    def all_prompts(self) -> tuple[str, ...]:
        """The prompts in order."""
        return tuple(self.prompts)

    def field_of_prompt(self, index: int) -> str:
        """The name of the field that prompt `index` came in."""
        return f"prompts.{index}"


RequestT = TypeVar("RequestT", PredictRequest, BatchRequest)


class _Response(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CocoMask(_Response):
    """A mask as COCO run-length encoding, compressed, as pycocotools reads it."""

    size: Annotated[list[int], Field(min_length=2, max_length=2, description="[height, width]")]
    counts: str


class Instance(_Response):
    """One object found."""

    score: Annotated[float, Field(ge=0, le=1)]
    box_xyxy_px: Annotated[list[float], Field(min_length=4, max_length=4, description="[x0, y0, x1, y1]")]
    area_px: Annotated[int, Field(ge=0)]
    mask_rle: CocoMask


class ImageSize(_Response):
    """Of the upright image."""

    width: int
    height: int


class ModelName(_Response):
    """Which model answered."""

    name: str
    version: str


class Timings(_Response):
    """Milliseconds per stage; stages overlap, so they may add up to more than `total`."""

    download: float
    decode: float
    queue: float
    infer: float
    encode: float
    upload: float
    row_update: float
    total: float


class PredictResponse(_Response):
    """The answer to one prompt."""

    task_id: str
    mask_url: Annotated[
        str, Field(description="Union of the instances: a PNG of 0 and 255 of the image's size.")
    ]
    labels: Annotated[list[str], Field(description="`[text_prompt]` if anything was found, else `[]`.")]
    inference_time_ms: float
    confidence: Annotated[float, Field(ge=0, le=1, description="The best instance's score; 0 if none.")]
    text_prompt: str
    instances: list[Instance]
    image_size: ImageSize
    score_threshold: float
    timings_ms: Timings
    model: ModelName


class BatchResponse(_Response):
    """The answers to all prompts, in their order."""

    task_id: str
    results: list[PredictResponse]
    total_inference_time_ms: float
    mask_url: Annotated[str, Field(description="Union over all prompts; also what the row gets.")]


class AcceptedResponse(_Response):
    """The task is on disk and will be carried through, whatever happens."""

    task_id: str
    status: Literal["processing"]


class TaskError(_Response):
    """Why a task failed; its row says the same."""

    code: str
    message: str


class TaskResponse(_Response):
    """How an accepted task stands."""

    task_id: str
    status: Literal["processing", "done", "error"]
    stage: Annotated[str, Field(description="The step that it has come to.")]
    attempts: Annotated[int, Field(ge=0, description="How often it was begun.")]
    accepted_at: Annotated[str, Field(description="ISO 8601, UTC.")]
    updated_at: Annotated[str, Field(description="ISO 8601, UTC.")]
    result: Annotated[
        PredictResponse | BatchResponse | None,
        Field(description="Once it is done: what predict, or predict/batch, answers."),
    ] = None
    error: Annotated[TaskError | None, Field(description="Once it failed.")] = None


class ModelInfoResponse(_Response):
    """What is loaded, counted from the loaded model itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

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


class DependencyHealth(_Response):
    """Whether a service that this one needs can be used."""

    status: Literal["ok", "down"]
    since: Annotated[str | None, Field(description="When it began to fail, as ISO 8601; null while ok.")]
    reason: Annotated[str | None, Field(description="Code of its last failure; null while ok.")]


class JournalHealth(_Response):
    """The record of accepted tasks."""

    status: Literal["ok", "down"]
    waiting: Annotated[int, Field(ge=0, description="Accepted tasks of this host that are not finished.")]


class Dependencies(_Response):
    """What the service needs."""

    storage: DependencyHealth
    tasks: DependencyHealth
    journal: JournalHealth


class HealthResponse(_Response):
    """The process is up, and this is what it has."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    status: Literal["ok"]
    model_loaded: bool
    gpu_available: bool
    dependencies: Dependencies


class FileResponse(_Response):
    """Where an uploaded file is."""

    url: Annotated[str, Field(description="Can be sent as `image_url` as it is.")]
    key: str


class FieldProblem(_Response):
    """What is wrong with one field."""

    field: str
    message: str


class ErrorDetail(_Response):
    """What went wrong."""

    code: str
    message: str
    details: list[FieldProblem] = Field(default_factory=list)


class ErrorMeta(_Response):
    """Which request it was."""

    request_id: str
    timestamp: str


class ErrorResponse(_Response):
    """The one shape of every error."""

    success: Literal[False]
    data: None
    error: ErrorDetail
    meta: ErrorMeta


def parse_request(schema: type[RequestT], body: Any) -> RequestT:
    """Check a JSON value against its schema.

    Raises:
        InvalidRequest: `details` has one entry per field at fault.
    """
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        details = tuple(
            {"field": ".".join(map(str, problem["loc"])) or "body", "message": problem["msg"]}
            for problem in problems[:20]
        )
        count = "1 field is" if len(problems) == 1 else f"{len(problems)} fields are"
        raise InvalidRequest(f"{count} invalid; see details.", details) from None
