"""What a store of task rows must do, and what goes into and comes out of one.

A row's life:

    pending ──start──▶ processing ──finish──▶ done
       │                  │  ▲                  ▲
       └──────fail──────▶ error ──start─┘──finish──┘

A row that is done stays done: `start` with the same inputs leaves it as it is, `fail` does not touch it, and
`finish` writes the same values again. So every call can be repeated, by us or by the Edge, without harm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from tasks.errors import TaskConflict, TaskNotFound

PENDING, PROCESSING, DONE, ERROR = "pending", "processing", "done", "error"


@dataclass(frozen=True, slots=True)
class TaskInputs:
    """What one task was asked to do.

    Attributes:
        task_id: Key of the row.
        user_id: Who owns the row.
        image_url: As the caller sent it.
        image_key: Key of the same image in the object store; empty when it is not known. A URL that is signed
            anew for a retry then still counts as the same input.
        prompts: At least one, in the caller's order.
        score_threshold: In [0, 1]; that of the first prompt.
        question: Whatever else shapes the answer, in a form of its own; empty if nothing does.
        request_id: Of the request that works on it; not part of the fingerprint.
    """

    task_id: str
    user_id: str
    image_url: str
    prompts: tuple[str, ...]
    score_threshold: float
    request_id: str = ""
    question: str = ""
    image_key: str = ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) over image, prompts and what else was asked: equal inputs, equal fingerprint."""
        inputs = [self.image_key or self.image_url, list(self.prompts), float(self.score_threshold)]
        if self.question:
            inputs.append(self.question)
        return hashlib.sha256(json.dumps(inputs, ensure_ascii=True).encode()).hexdigest()

    def row_metadata(self) -> dict[str, Any]:
        """What every state of the row says about its inputs."""
        return {"inputs": self.fingerprint, "user_id": self.user_id, "request_id": self.request_id}


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a finished row says.

    Attributes:
        mask_image_url: Where the union mask can be read; None if there is none.
        labels: Prompts that were found, in the caller's order.
        metadata: JSON values only. Replaces the row's metadata; `TaskInputs.row_metadata()` is added to it.
    """

    mask_image_url: str | None
    labels: tuple[str, ...]
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One row of `segmentation_results`, as it was when it was read."""

    id: str
    status: str
    user_id: str
    source_image_url: str
    text_prompt: str
    mask_image_url: str | None = None
    project_id: str | None = None
    labels: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    created_at: datetime | None = None
    updated_at: datetime | None = None


class TaskStore(Protocol):
    """Rows of tasks. All calls may come from many coroutines and many processes at once.

    Every method raises `TaskStoreUnavailable` or `TaskStoreTimeout` when the store cannot be used.
    """

    async def start(self, task: TaskInputs) -> None:
        """Makes the row `processing` and records the fingerprint of its inputs, in one atomic step.

        Of several callers that start one row with different inputs at once, exactly one wins. A row that is
        done with the same inputs stays done, and this returns.

        Raises:
            TaskNotFound: there is no row (a store that makes rows on demand makes it instead).
            TaskConflict: the row was started, or is done, with other inputs; it was left as it is.
        """
        ...

    async def finish(self, task: TaskInputs, result: TaskResult) -> None:
        """Makes the row `done` with the result, all of it at once.

        Raises:
            TaskNotFound: the row is gone.
            TaskConflict: the row has been taken over for other inputs; it was left as it is.
        """
        ...

    async def fail(self, task: TaskInputs, code: str, message: str) -> None:
        """Makes the row `error`, with `metadata.error = {"code", "message"}`.

        A row that is done, gone, or taken over for other inputs is left as it is, and this returns.
        """
        ...

    async def get(self, task_id: str) -> TaskRow | None:
        """The row as it is now, or None."""
        ...

    async def aclose(self) -> None:
        """Lets go of connections and files. Harmless when called again."""
        ...


def processing_metadata(task: TaskInputs) -> dict[str, Any]:
    """`metadata` of a row that is being worked on."""
    return task.row_metadata()


def done_metadata(task: TaskInputs, result: TaskResult) -> dict[str, Any]:
    """`metadata` of a row that is done."""
    return {**result.metadata, **task.row_metadata()}


def error_metadata(task: TaskInputs, code: str, message: str) -> dict[str, Any]:
    """`metadata` of a row that failed."""
    return {**task.row_metadata(), "error": {"code": code, "message": message}}


def is_taken(row: TaskRow, task: TaskInputs) -> bool:
    """True if the row may not be started for these inputs: others have it, or it is done from unknown."""
    recorded = row.metadata.get("inputs")
    return recorded != task.fingerprint and (recorded is not None or row.status == DONE)


def task_not_found(task: TaskInputs) -> TaskNotFound:
    """The error for a row that is not there."""
    return TaskNotFound(f"there is no task {task.task_id}: insert its row before asking for a prediction")


def task_conflict(row: TaskRow, task: TaskInputs) -> TaskConflict:
    """The error for a row that is not, or no longer, ours."""
    if row.metadata.get("inputs") == task.fingerprint:
        return TaskConflict(
            f"task {task.task_id} was reset to {row.status} while it was being worked on; ask again"
        )
    return TaskConflict(
        f"task {task.task_id} is {row.status} with another image, prompt or threshold; use a new task_id"
    )
