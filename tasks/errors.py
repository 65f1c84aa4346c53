"""Errors of tasks, their rows and their journal. They know nothing of HTTP.

TaskError
├── InvalidTaskId           cannot be part of an object key
├── TaskNotFound            no such row
├── TaskConflict            the id is in use with other inputs
├── TaskStoreUnavailable    the store failed after retries, refused us, or answered what we cannot read
├── TaskStoreTimeout        the store did not answer in time, retries included
├── TaskRowRefused          the store refuses what the row would say; asking again is of no use
├── JournalUnavailable      the journal cannot be written or read: disk full, damaged, locked
│   └── JournalTooNew       a newer version of this service wrote it
├── BacklogFull             too many accepted tasks wait already
├── TaskFailed              it failed before, or elsewhere; with the code and message of then
├── TaskGaveUp              whoever worked on it died, too often
├── WorkerStops             this process accepts nothing more
├── NotOurTask              another process carries it by now
└── RecordUnreadable        the journal holds something that is not of this version
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


class TaskRowRefused(TaskError):
    """The store is there and refuses what the row would say, for its content: a constraint, a trigger, its size.

    Asked again it would say the same.
    """


class JournalUnavailable(TaskError):
    """The journal cannot be written or read: its disk is full, it is damaged, or another process keeps it locked."""


class JournalTooNew(JournalUnavailable):
    """The journal was written by a newer version of this service."""


class BacklogFull(TaskError):
    """Too many tasks are accepted and not finished; this one was not accepted."""


class TaskFailed(TaskError):
    """The task failed before, or in another process.

    Attributes:
        code: Of the error of then, for programs.
        message: Of the error of then, for people.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class TaskGaveUp(TaskError):
    """The process that worked on the task ended, each time that it was tried."""


class WorkerStops(TaskError):
    """This process is about to end and accepts nothing more; what it was given is in the journal."""


class NotOurTask(TaskError):
    """Another process carries the task by now, or it was asked for anew."""


class RecordUnreadable(TaskError):
    """The journal holds a job or a result that is not of this version, or is damaged."""
