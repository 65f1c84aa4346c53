"""Errors of the task rows and of the journal. They know nothing of HTTP.

TaskError
├── InvalidTaskId           cannot be part of an object key
├── TaskNotFound            no such row
├── TaskConflict            the id is in use with other inputs
├── TaskStoreUnavailable    the store failed after retries, refused us, or answered what we cannot read
├── TaskStoreTimeout        the store did not answer in time, retries included
├── JournalUnavailable      the journal cannot be written or read: disk full, damaged, locked
└── BacklogFull             too many accepted tasks wait already
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
    """The store of the rows failed after retries, refused us, or answered something that we cannot read."""


class TaskStoreTimeout(TaskError):
    """The store of the rows did not answer in time, retries included."""


class JournalUnavailable(TaskError):
    """The journal cannot be written or read: its disk is full, it is damaged, or another process keeps it locked."""


class BacklogFull(TaskError):
    """Too many tasks are accepted and not finished; this one was not accepted."""
