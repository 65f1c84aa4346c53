"""Ids that try to be SQL, a filter, a key or a path: refused at the door, and harmless to whoever gets one anyway.

`api/schemas.py` lets none of them in. What is below it does not rely on that.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest

from api.errors import InvalidRequest
from api.schemas import PredictRequest, parse_request
from tasks.errors import InvalidTaskId, TaskNotFound
from tasks.keys import prompt_mask_key, union_mask_key
from tasks.local import LocalTasks
from tasks.store import TaskInputs, TaskResult
from tasks.supabase import SupabaseTasks
from tests.storage import failing_server as server_that
from tests.storage.failing_server import Request, failing_server

HOSTILE = [
    "",
    "*",
    "%",
    "_%",
    "'",
    '"',
    "' or '1'='1",
    "'; drop table segmentation_results; --",
    "x') or (1=1",
    "0)",
    "(0,1)",
    "0,1",
    "neq.0",
    "0&id=neq.0",
    "0&select=*,users(*)",
    "0&or=(id.neq.0)",
    "0#",
    "0?x=1",
    "0%26id=neq.0",
    "0;id=neq.0",
    "0+or+1",
    "../0",
    "..",
    ".",
    "a/b",
    "a\\b",
    "~",
    "$inputs",
    ":id",
    "{id}",
    "a.b",
    "a b",
    "a\tb",
    "a\r\nPrefer: tx=rollback",
    "\u202e0",
    "０",
    "é",
    "x" * 129,
]
OTHER = "0c9f7f1e-51d1-4a1b-9a55-c0a1f5f3b7aa"
TASK = TaskInputs(OTHER, "user-1", "uploads/a.png", ("red circle",), 0.5, request_id="request-1")
RESULT = TaskResult("https://images.example.com/masks/a.png", ("red circle",), {})

of_each = pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)


@of_each
def test_neither_id_gets_in(hostile: str) -> None:
    sound = {"image_url": "uploads/a.png", "text_prompt": "cat", "user_id": "u", "task_id": "t"}
    with pytest.raises(InvalidRequest):
        parse_request(PredictRequest, {**sound, "task_id": hostile})
    if not set(hostile) <= set("abneq0.:id") or not hostile:  # dots and colons are fit for a user's id
        with pytest.raises(InvalidRequest):
            parse_request(PredictRequest, {**sound, "user_id": hostile})


@of_each
def test_none_of_them_names_a_mask(hostile: str) -> None:
    with pytest.raises(InvalidTaskId):
        union_mask_key(hostile)
    with pytest.raises(InvalidTaskId):
        prompt_mask_key(hostile, 0)


async def test_in_sqlite_each_is_one_row_of_that_name_and_no_other(tmp_path: Path) -> None:
    local = LocalTasks(tmp_path / "tasks.sqlite3")
    await local.start(TASK)
    await local.finish(TASK, RESULT)
    before = await local.get(OTHER)
    for hostile in HOSTILE:
        assert await local.get(hostile) is None
        task = replace(TASK, task_id=hostile, user_id=hostile, prompts=(hostile, "other"))
        await local.start(task)
        await local.fail(task, hostile, hostile)
        row = await local.get(hostile)
        assert row is not None
        assert (row.id, row.user_id, row.status) == (hostile, hostile, "error")
    assert await local.get(OTHER) == before
    await local.aclose()


async def test_to_postgrest_each_is_the_value_of_one_filter() -> None:
    with failing_server(server_that.answer(200, b"[]")) as server:
        tasks = SupabaseTasks(server.endpoint, "sb_secret_0123456789")
        for hostile in HOSTILE:
            server.requests.clear()
            assert await tasks.get(hostile) is None
            task = replace(TASK, task_id=hostile, user_id=hostile)
            with pytest.raises(TaskNotFound):
                await tasks.start(task)
            await tasks.fail(task, "CODE", hostile)
            for request in server.requests:
                check_filters(request, hostile, task.fingerprint)
            assert {request.method for request in server.requests} == {"GET", "PATCH"}
        await tasks.aclose()


def check_filters(request: Request, hostile: str, fingerprint: str) -> None:
    """The filters of a request are those that were meant, the id among them as it is."""
    url = urlsplit(request.path)
    assert url.path == "/rest/v1/segmentation_results"
    sent = parse_qsl(url.query, keep_blank_values=True, strict_parsing=True)
    assert sent[0] == ("id", f"eq.{hostile}")
    if request.method == "GET":
        assert sent[1:] == [("select", "*")]
    else:
        guard = ("or", f"(metadata->>inputs.is.null,metadata->>inputs.eq.{fingerprint})")
        assert sent[1:] == [("status", "in.(pending,processing,error)"), guard, ("select", "id")]
        assert json.loads(request.body)["metadata"]["user_id"] == hostile
