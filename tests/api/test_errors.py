"""The error table knows every error, and nothing that is inside gets out."""

import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import sam3_runner
import storage
import tasks
from api.errors import FAULTS, ApiError, Unauthorized, answer_of, code_of, error_of_status
from sam3_runner.errors import InferenceFailed, RunnerError, UndecodableImage
from storage.errors import StorageError, StorageUnavailable
from tasks.errors import TaskConflict, TaskError, TaskStoreUnavailable

BASES = (ApiError, RunnerError, StorageError, TaskError)
STATUSES = {400, 401, 404, 405, 409, 413, 415, 422, 429, 500, 502, 503, 504}


def tree_of(base: type[Exception]) -> Iterator[type[Exception]]:
    yield base
    for subclass in base.__subclasses__():
        yield from tree_of(subclass)


@pytest.fixture(scope="module", autouse=True)
def every_module_is_imported() -> None:
    """A subclass is only seen once its module is."""
    for package in (sam3_runner, storage, tasks):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.startswith("sam3_runner.training"):
                importlib.import_module(module.name)


@pytest.mark.parametrize("base", BASES)
def test_every_error_of_every_part_has_a_row_of_its_own(base: type[Exception]) -> None:
    assert [cls.__name__ for cls in tree_of(base) if cls not in FAULTS] == []


def test_the_table_answers_with_the_statuses_of_the_contract_only() -> None:
    assert {fault.status for fault in FAULTS.values()} <= STATUSES


def test_one_code_always_has_the_same_status() -> None:
    statuses: dict[str, set[int]] = {}
    for fault in FAULTS.values():
        statuses.setdefault(fault.code, set()).add(fault.status)
    assert [code for code, found in statuses.items() if len(found) > 1] == []


def test_every_5xx_has_words_of_its_own_so_that_no_exception_text_gets_out() -> None:
    assert [cls.__name__ for cls, fault in FAULTS.items() if fault.status >= 500 and not fault.message] == []


@pytest.mark.parametrize("status", [429, 503])
def test_who_is_turned_away_is_told_when_to_come_back(status: int) -> None:
    faults = [fault for fault in FAULTS.values() if fault.status == status]
    assert faults and all(fault.retry_after_s for fault in faults)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("password=hunter2"),
        StorageUnavailable("https://account.example: hunter2"),
        TaskStoreUnavailable("hunter2"),
        InferenceFailed("/srv/weights hunter2"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_inside_is_not_told(error: Exception) -> None:
    body = answer_of(error).body("id")
    assert "hunter2" not in str(body)
    assert "hunter2" not in str(code_of(error))


def test_an_error_that_the_caller_can_mend_speaks_for_itself() -> None:
    answer = answer_of(UndecodableImage("the JPEG ends after 12 bytes"))
    assert (answer.status, answer.code) == (422, "UNDECODABLE_IMAGE")
    assert answer.message == "the JPEG ends after 12 bytes"
    assert code_of(TaskConflict("in use")) == ("TASK_CONFLICT", "in use")


def test_a_subclass_that_nobody_foresaw_is_treated_as_its_parent() -> None:
    class Odd(UndecodableImage):
        pass

    try:
        assert answer_of(Odd("odd")).code == "UNDECODABLE_IMAGE"
    finally:
        del Odd  # the walk over the trees must not find it
        importlib.import_module("gc").collect()


def test_a_time_out_is_504_and_so_is_a_call_that_was_given_up() -> None:
    assert answer_of(TimeoutError()).status == 504
    assert answer_of(importlib.import_module("asyncio").CancelledError()).status == 504


def test_the_envelope_has_details_only_when_there_are_any() -> None:
    body = answer_of(Unauthorized("no key")).body("some-id")
    assert body["success"] is False and body["data"] is None
    assert body["error"] == {"code": "UNAUTHORIZED", "message": "no key"}
    assert body["meta"]["request_id"] == "some-id"


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (301, "NOT_FOUND"),
        (307, "NOT_FOUND"),
        (400, "REQUEST_REFUSED"),
        (404, "NOT_FOUND"),
        (405, "METHOD_NOT_ALLOWED"),
        (413, "BODY_TOO_LARGE"),
        (418, "REQUEST_REFUSED"),
        (429, "OVERLOADED"),
        (500, "INTERNAL_ERROR"),
        (503, "MODEL_NOT_READY"),
        (504, "TIMED_OUT"),
        (507, "INTERNAL_ERROR"),
    ],
)
def test_a_foreign_error_response_becomes_one_of_ours(status: int, code: str) -> None:
    answer = answer_of(error_of_status(status, "GET", "/x", {"vary": "Origin"}))
    assert (answer.code, answer.headers["vary"]) == (code, "Origin")
    assert answer.message != answer.code
    assert answer.status == status or code in ("NOT_FOUND", "REQUEST_REFUSED", "INTERNAL_ERROR")
