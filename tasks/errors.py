"""Errors of the task rows. They know nothing of HTTP.

TaskError
├── InvalidTaskId           cannot be part of an object key
├── TaskNotFound            no such row
├── TaskConflict            the id is in use with other inputs
├── TaskStoreUnavailable    the store failed after retries, refused us, or answered what we cannot read
└── TaskStoreTimeout        the store did not answer in time, retries included
"""


class TaskError(Exception):
    """Base of all errors about tasks and their rows."""


class InvalidTaskId(TaskError):
    """The task id cannot be part of an object key; nothing was read or written."""


class TaskNotFound(TaskError):
    """There is no row for this task."""


class TaskConflict(TaskError):
    """The task id is in use with other inputs; its row was left as it is."""


class TaskStoreUnavailable(TaskError):
    """The store of the rows failed after retries, refused us, or answered something that we cannot read.

    Attributes:
        retry_after_s: How long the store asked to be left alone, if it did.
    """

    retry_after_s: float | None = None


class TaskStoreTimeout(TaskError):
    """The store of the rows did not answer in time, retries included."""
