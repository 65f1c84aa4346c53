"""What comes in and goes out, as `docs/contracts/api-contracts.md` says it. OpenAPI is made from these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
)

from api.errors import InvalidRequest
from sam3_runner.images import Region
from sam3_runner.text import MAX_PROMPTS
from sam3_runner.types import (
    DEFAULT_MASK_THRESHOLD,
    DEFAULT_SCORE_THRESHOLD,
    Box,
    Point,
    Prompt,
    Selection,
)
from storage.urls import MAX_URL_CHARS

MAX_MARKS = 32  # boxes, or points, of one prompt
MAX_INSTANCES = 200  # queries of SAM3: more are never found
DEFAULT_POLYGON_TOLERANCE_PX = 1.0

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


MaskThreshold = Annotated[
    float,
    Field(
        gt=0, lt=1, allow_inf_nan=False, description="The probability above which a pixel belongs to a mask."
    ),
]
MaxInstances = Annotated[
    int, Field(ge=1, le=MAX_INSTANCES, description="So many of the best are kept at most.")
]
NmsIou = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Of two instances whose masks overlap by more (intersection over union) the better one is kept.",
    ),
]
Unit = Annotated[
    Literal["px", "relative"],
    Field(description="Pixels of the upright image, or shares of its width and height."),
]
# A million pixels a side is beyond every image; it keeps what is computed from them finite.
_Coordinate = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
OutputName = Literal["mask", "instance_map", "overlay", "cutout", "rle", "polygons", "boxes", "coco"]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)


class Rectangle(_Part):
    """A part of the image."""

    xyxy: Annotated[
        list[_Coordinate],
        Field(
            min_length=4, max_length=4, description="[x0, y0, x1, y1], origin top left, x0 < x1 and y0 < y1."
        ),
    ]
    unit: Unit = "px"

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom edge."""
        x0, y0, x1, y1 = self.xyxy
        return x0, y0, x1, y1

    @property
    def region(self) -> Region:
        """As the decoder takes it."""
        return Region(self.corners, self.unit == "relative")

    def problem(self) -> str | None:
        """Why it is no part of any image."""
        x0, y0, x1, y1 = self.xyxy
        if not (x0 < x1 and y0 < y1):
            return "Expected x0 < x1 and y0 < y1"
        if self.unit == "relative" and not all(0 <= edge <= 1 for edge in self.xyxy):
            return "Expected shares from 0 to 1; for pixels leave unit out"
        return None


class BoxExemplar(Rectangle):
    """Marks something that is like what is wanted, or is not."""

    label: Literal["positive", "negative"] = "positive"


class Click(_Part):
    """Marks the one object that is wanted, or what is not part of it."""

    xy: Annotated[
        list[_Coordinate], Field(min_length=2, max_length=2, description="[x, y], origin top left.")
    ]
    label: Annotated[int, Field(ge=0, le=1, description="1: on the object; 0: beside it.")] = 1
    unit: Unit = "px"

    def problem(self) -> str | None:
        """Why it lies in no image."""
        if self.unit == "relative" and not all(0 <= share <= 1 for share in self.xy):
            return "Expected shares from 0 to 1; for pixels leave unit out"
        return None


Boxes = Annotated[
    list[BoxExemplar] | None,
    Field(
        min_length=1,
        max_length=MAX_MARKS,
        description="Exemplars: find all that is like the positive ones and not like the negative ones.",
    ),
]
Points = Annotated[
    list[Click] | None,
    Field(min_length=1, max_length=MAX_MARKS, description="One object by clicks; without text and boxes."),
]


class PromptObject(_Part):
    """What to look for: a concept in words, by exemplars, or both; or one object, by clicks."""

    text_prompt: PromptText | None = None
    boxes: Boxes = None
    points: Points = None
    score_threshold: ScoreThreshold | None = None
    mask_threshold: MaskThreshold | None = None
    max_instances: MaxInstances | None = None
    nms_iou: NmsIou | None = None

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that do not fit together, and why."""
        yield from _problems_of_prompt(self.text_prompt, self.boxes, self.points)


def _kind_of_prompt(value: Any) -> str | None:
    if isinstance(value, str):
        return _WORDS
    return _OBJECT if isinstance(value, dict | PromptObject) else None


_WORDS, _OBJECT = "(words)", "(object)"
BatchPrompt = Annotated[
    Annotated[PromptText, Tag(_WORDS)] | Annotated[PromptObject, Tag(_OBJECT)],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt_type",
        custom_error_message="Expected a string or an object",
    ),
]


class _Request(_Part):
    image_url: ImageUrl
    user_id: UserId
    task_id: TaskId
    region: Annotated[
        Rectangle | None,
        Field(description="The model sees only this part of the image, at its full resolution."),
    ] = None
    score_threshold: ScoreThreshold = DEFAULT_SCORE_THRESHOLD
    mask_threshold: MaskThreshold = DEFAULT_MASK_THRESHOLD
    max_instances: MaxInstances | None = None
    nms_iou: NmsIou | None = None
    outputs: Annotated[
        list[OutputName] | None,
        Field(
            min_length=1,
            description="What is made of the instances; the mask, and run lengths, if not given.",
        ),
    ] = None
    polygon_tolerance_px: Annotated[
        float,
        Field(ge=0, le=100, allow_inf_nan=False, description="How far a polygon may be from its outline."),
    ] = DEFAULT_POLYGON_TOLERANCE_PX

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that do not fit together, and why."""
        if self.region is not None and (problem := self.region.problem()) is not None:
            yield "region.xyxy", problem

    def _prompt(self, asked: PromptObject) -> Prompt:
        """With the settings of the request where it has none of its own."""
        score_threshold = asked.score_threshold
        if score_threshold is None:  # a click on something means it, however unsure the model is
            is_default = asked.points and "score_threshold" not in self.model_fields_set
            score_threshold = 0.0 if is_default else self.score_threshold
        selection = Selection(
            score_threshold=float(score_threshold),
            mask_threshold=float(
                self.mask_threshold if asked.mask_threshold is None else asked.mask_threshold
            ),
            max_instances=self.max_instances if asked.max_instances is None else asked.max_instances,
            nms_iou=self.nms_iou if asked.nms_iou is None else asked.nms_iou,
        )
        boxes = (
            Box(box.corners, box.label == "positive", box.unit == "relative") for box in asked.boxes or ()
        )
        points = (
            Point((point.xy[0], point.xy[1]), point.label == 1, point.unit == "relative")
            for point in asked.points or ()
        )
        return Prompt(asked.text_prompt, tuple(boxes), tuple(points), selection)


class PredictRequest(_Request):
    """Find every instance of one concept in one image, or one object."""

    text_prompt: PromptText | None = None
    boxes: Boxes = None
    points: Points = None

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that do not fit together, and why."""
        yield from super().problems()
        yield from _problems_of_prompt(self.text_prompt, self.boxes, self.points)

    @property
    def all_prompts(self) -> tuple[Prompt, ...]:
        """The prompts in order; here one."""
        return (
            self._prompt(PromptObject(text_prompt=self.text_prompt, boxes=self.boxes, points=self.points)),
        )

    def field_of_prompt(self, index: int) -> str:
        """The name of the field that the words of prompt `index` came in."""
        return "text_prompt"


class BatchRequest(_Request):
    """Find every instance of several concepts in one image."""

    # The upper limit is told here and held by the prompt check, which answers with a code of its own.
    prompts: Annotated[list[BatchPrompt], Field(min_length=1, json_schema_extra={"maxItems": MAX_PROMPTS})]

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that do not fit together, and why."""
        yield from super().problems()
        for index, prompt in enumerate(self.prompts):
            if isinstance(prompt, PromptObject):
                yield from ((f"prompts.{index}.{field}", problem) for field, problem in prompt.problems())

    @property
    def all_prompts(self) -> tuple[Prompt, ...]:
        """The prompts in order."""
        return tuple(
            self._prompt(PromptObject(text_prompt=prompt) if isinstance(prompt, str) else prompt)
            for prompt in self.prompts
        )

    def field_of_prompt(self, index: int) -> str:
        """The name of the field that the words of prompt `index` came in."""
        field = f"prompts.{index}"
        return field if isinstance(self.prompts[index], str) else f"{field}.text_prompt"


def _problems_of_prompt(
    text: str | None, boxes: list[BoxExemplar] | None, points: list[Click] | None
) -> Iterator[tuple[str, str]]:
    if text is None and not boxes and not points:
        yield "text_prompt", "Field required"  # or boxes, or points
    if points and (boxes or text is not None):
        yield "points", "Points stand alone: leave text_prompt and boxes out"
    if boxes and text is None and all(box.label == "negative" for box in boxes):
        yield "boxes", "Expected a positive box, or a text_prompt: nothing says what to look for"
    for index, box in enumerate(boxes or ()):
        if (problem := box.problem()) is not None:
            yield f"boxes.{index}.xyxy", problem
    for index, point in enumerate(points or ()):
        if (problem := point.problem()) is not None:
            yield f"points.{index}.xy", problem


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
    mask_rle: Annotated[CocoMask | None, Field(description="Null if `outputs` is without `rle`.")]


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


class StoredOutput(_Response):
    """One of the things that are made of the instances."""

    url: Annotated[str, Field(description="Where it is stored.")]
    media_type: Annotated[str, Field(description="Such as `image/png`.")]
    inline: Annotated[
        dict[str, Any] | None, Field(description="The document itself, if it is JSON and not large.")
    ] = None


class PredictResponse(_Response):
    """The answer to one prompt."""

    task_id: str
    mask_url: Annotated[
        str | None,
        Field(
            description="Union of the instances: a PNG of 0 and 255 of the image's size. Null if `outputs` is without."
        ),
    ]
    labels: Annotated[
        list[str],
        Field(
            description="`[text_prompt]` if anything was found, else `[]`; `object` for what has no words."
        ),
    ]
    inference_time_ms: float
    confidence: Annotated[float, Field(ge=0, le=1, description="The best instance's score; 0 if none.")]
    text_prompt: Annotated[str | None, Field(description="Null for a prompt without words.")]
    instances: list[Instance]
    image_size: ImageSize
    score_threshold: float
    timings_ms: Timings
    model: ModelName
    outputs: Annotated[
        dict[OutputName, StoredOutput] | None, Field(description="Those that were asked for.")
    ] = None


class BatchResponse(_Response):
    """The answers to all prompts, in their order."""

    task_id: str
    results: list[PredictResponse]
    total_inference_time_ms: float
    mask_url: Annotated[
        str | None,
        Field(description="Union over all prompts; also what the row gets. Null if `outputs` is without."),
    ]
    outputs: Annotated[
        dict[OutputName, StoredOutput] | None,
        Field(description="Those that were asked for, over all prompts."),
    ] = None


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
        request = schema.model_validate(body)
        problems = list(request.problems())
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        problems = [(_field(problem["loc"]), problem["msg"]) for problem in found]
    if problems:
        count = "1 field is" if len(problems) == 1 else f"{len(problems)} fields are"
        details = tuple({"field": field, "message": message} for field, message in problems[:20])
        raise InvalidRequest(f"{count} invalid; see details.", details)
    return request


def _field(location: tuple[int | str, ...]) -> str:
    """A place in the body, without the kind of prompt that it was taken for."""
    return ".".join(str(part) for part in location if part not in (_WORDS, _OBJECT)) or "body"
