"""Task rows in Supabase, through its REST API (PostgREST) and one pooled httpx client.

Only ever UPDATEs and reads `segmentation_results`. Every update names the row by primary key, sets absolute
values and is guarded on status and inputs: a retry whose first try did arrive changes nothing. It asks for
the ids that it changed, because an update that matches no row is answered as if all were well.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import email.utils
import json
import logging
import random
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import httpx

from tasks.errors import TaskConflict, TaskError, TaskRowRefused, TaskStoreTimeout, TaskStoreUnavailable
from tasks.store import (
    DONE,
    ERROR,
    PENDING,
    PROCESSING,
    TaskInputs,
    TaskResult,
    TaskRow,
    done_metadata,
    error_metadata,
    is_taken,
    processing_metadata,
    task_conflict,
    task_not_found,
)

TABLE: Final = "segmentation_results"
# 520–524 are Cloudflare's, in front of Supabase: the origin hung up, refused or timed out.
RETRIED_STATUSES: Final = frozenset({408, 429, 502, 503, 504, 520, 521, 522, 523, 524})
# Postgres or a gateway has read the request and does not like what it says; the next time neither.
REFUSED_STATUSES: Final = frozenset({400, 409, 413, 414, 415, 422})
# Unless it is the database that is not as it should be: a table, column or right is missing (PostgREST's own class,
# and Postgres'). Whoever applies the migrations mends that for all tasks.
NOT_SET_UP: Final = ("PGRST2", "42")
RETRIED_ERRORS: Final = (
    httpx.TimeoutException,
    httpx.NetworkError,
    httpx.RemoteProtocolError,
    httpx.ProxyError,
)
MAX_START_TRIES: Final = 3  # each of them an atomic update; more than one only if the row changes in between
INVALID_TEXT_REPRESENTATION: Final = "22P02"  # Postgres: an id that is no uuid, so no row can have it

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long and how often a call is tried. All times in seconds.

    Attributes:
        attempts: Tries in all.
        deadline_s: For all tries and the pauses between them together.
        backoff_base_s: The pause before try n+1 is drawn from [half, whole] of base · 2^(n-1).
        backoff_cap_s: No drawn pause is longer. A `Retry-After` may be, as far as the deadline allows.
    """

    attempts: int = 4
    deadline_s: float = 15.0
    connect_timeout_s: float = 3.0
    read_timeout_s: float = 6.0
    backoff_base_s: float = 0.2
    backoff_cap_s: float = 3.0

    def pause_s(self, attempt: int, retry_after_s: float | None) -> float:
        """The pause after failed try `attempt` (the first is 1): never shorter than what was asked for."""
        doubled_s: float = self.backoff_base_s * 2 ** (attempt - 1)
        drawn = min(self.backoff_cap_s, doubled_s) * random.uniform(0.5, 1.0)
        return max(drawn, retry_after_s or 0.0)


class SupabaseTasks:
    """A `TaskStore` over one Supabase project.

    Args:
        url: `https://PROJECT.supabase.co`, or the URL of a gateway that serves `/rest/v1` below it.
        service_key: `sb_secret_…` or the legacy service role JWT (`eyJ…`). Errors, logs and `repr` hide it.
        retry: Timeouts and retries.
        max_connections: Size of the connection pool.

    Raises:
        ValueError: the URL is no http(s) URL, or the key is not a service key; never shows the key.
    """

    def __init__(
        self,
        url: str,
        service_key: str,
        *,
        retry: RetryPolicy | None = None,
        max_connections: int = 32,
    ) -> None:
        base_url = _rest_url(url)
        self._service_key = service_key
        self._retry = retry or RetryPolicy()
        self._client = httpx.AsyncClient(
            base_url=base_url,
            headers={**auth_headers(service_key), "Accept": "application/json"},
            timeout=httpx.Timeout(self._retry.read_timeout_s, connect=self._retry.connect_timeout_s),
            limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
            trust_env=base_url.host
            not in {"127.0.0.1", "localhost", "::1"},  # no proxy stands before loopback
            follow_redirects=False,
        )

    def __repr__(self) -> str:
        return f"SupabaseTasks({str(self._client.base_url)!r})"

    async def start(self, task: TaskInputs) -> None:
        """See `TaskStore.start`: one round trip, a second one only to tell why no row matched."""
        values = {"status": PROCESSING, "metadata": processing_metadata(task)}
        guard = {
            "status": f"in.({PENDING},{PROCESSING},{ERROR})",
            "or": f"(metadata->>inputs.is.null,metadata->>inputs.eq.{task.fingerprint})",
        }
        for _ in range(MAX_START_TRIES):
            if await self._update(task.task_id, guard, values):
                return
            row = await self.get(task.task_id)
            if row is None:
                raise task_not_found(task)
            if is_taken(row, task):
                raise task_conflict(row, task)
            if row.status == DONE:
                return
            # The row changed between the two calls, and may be started now.
        raise TaskConflict(f"the row of task {task.task_id} keeps changing under us; ask again")

    async def finish(self, task: TaskInputs, result: TaskResult) -> None:
        """See `TaskStore.finish`."""
        values = {
            "status": DONE,
            "mask_image_url": result.mask_image_url,
            "labels": list(result.labels),
            "metadata": done_metadata(task, result),
        }
        guard = {
            "status": f"in.({PROCESSING},{DONE},{ERROR})",
            "metadata->>inputs": f"eq.{task.fingerprint}",
        }
        if not await self._update(task.task_id, guard, values):
            row = await self.get(task.task_id)
            raise task_not_found(task) if row is None else task_conflict(row, task)

    async def fail(self, task: TaskInputs, code: str, message: str) -> None:
        """See `TaskStore.fail`."""
        values = {"status": ERROR, "metadata": error_metadata(task, code, message)}
        guard = {
            "status": f"in.({PENDING},{PROCESSING},{ERROR})",
            "or": f"(metadata->>inputs.is.null,metadata->>inputs.eq.{task.fingerprint})",
        }
        await self._update(task.task_id, guard, values)

    async def get(self, task_id: str) -> TaskRow | None:
        """See `TaskStore.get`."""
        rows = await self._call("GET", {"id": f"eq.{task_id}", "select": "*"})
        return parse_row(rows[0]) if rows else None

    async def aclose(self) -> None:
        """Closes the pooled connections."""
        await self._client.aclose()

    async def _update(self, task_id: str, guard: Mapping[str, str], values: Mapping[str, Any]) -> bool:
        """True if the row was there and the guard let it through."""
        filters = {"id": f"eq.{task_id}", **guard, "select": "id"}
        return bool(await self._call("PATCH", filters, values))

    async def _call(
        self, method: str, filters: Mapping[str, str], values: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """One request, with retries: the rows that it read or changed."""
        if self._client.is_closed:
            raise TaskStoreUnavailable("the client of Supabase is closed")
        deadline_s = self._retry.deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                reply = await self._send_with_retries(method, filters, values)
        except TimeoutError as error:
            raise TaskStoreTimeout(f"Supabase did not answer within {deadline_s:g} s") from error
        if reply.status_code in (200, 201):
            return _rows_of(reply)
        code = _error_code(reply)
        if reply.status_code == 400 and code == INVALID_TEXT_REPRESENTATION:
            return []
        if reply.status_code in REFUSED_STATUSES and not code.startswith(NOT_SET_UP):
            raise TaskRowRefused(f"{_told(reply, code)}: it refuses what the task's row would say")
        raise self._refusal(reply, code)

    async def _send_with_retries(
        self, method: str, filters: Mapping[str, str], values: Mapping[str, Any] | None
    ) -> httpx.Response:
        headers = {} if values is None else {"Prefer": "return=representation"}
        ends_at = asyncio.get_running_loop().time() + self._retry.deadline_s
        attempt = 0
        while True:
            attempt += 1
            failure: TaskError
            cause: Exception | None = None
            retry_after_s: float | None = None
            try:
                reply = await self._client.request(
                    method, TABLE, params=filters, json=values, headers=headers
                )
            except httpx.HTTPError as error:
                failure, cause = map_httpx_error(error), error
                if not isinstance(error, RETRIED_ERRORS):
                    raise failure from cause
            except AttributeError as error:  # anyio 4, of a connection that was reset before its first use
                failure = TaskStoreUnavailable("Supabase could not be reached (reset at once)")
                cause = error
            else:
                if reply.status_code not in RETRIED_STATUSES:
                    return reply
                retry_after_s = retry_after_seconds(reply.headers.get("Retry-After"))
                failure = self._refusal(reply, _error_code(reply))
                failure.retry_after_s = retry_after_s
            pause_s = self._retry.pause_s(attempt, retry_after_s)
            time_left_s = ends_at - asyncio.get_running_loop().time()
            if attempt >= self._retry.attempts or pause_s >= time_left_s:
                raise failure from cause
            _log.warning(
                "Supabase call failed, trying again", extra={"attempt": attempt, "reason": str(failure)}
            )
            await asyncio.sleep(pause_s)

    def _refusal(self, reply: httpx.Response, code: str) -> TaskStoreUnavailable:
        """What an unexpected status means. The reply's own text stays out: it may repeat what was sent."""
        status = _told(reply, code)
        if reply.status_code in (401, 403):
            return TaskStoreUnavailable(f"{status}: it refuses the service key; check SUPABASE_SERVICE_KEY")
        if reply.status_code == 404:
            return TaskStoreUnavailable(
                f"{status}: check SUPABASE_URL, and that tasks/migrations were applied"
            )
        return TaskStoreUnavailable(f"{status} to the call about the task's row")


def _told(reply: httpx.Response, code: str) -> str:
    return f"Supabase answered {reply.status_code}" + (f" ({code})" if code else "")


def auth_headers(service_key: str) -> dict[str, str]:
    """The headers that carry a key: `apikey`, and for a legacy JWT `Authorization` as well.

    Raises:
        ValueError: not a key that may update rows; the message never shows it.
    """
    if not re.fullmatch(r"[\x21-\x7e]+", service_key):
        raise ValueError("SUPABASE_SERVICE_KEY is empty, or has spaces or other characters that no key has")
    if service_key.startswith("sb_publishable_"):
        raise ValueError("SUPABASE_SERVICE_KEY is a publishable key; the secret key (sb_secret_…) is needed")
    if not service_key.startswith("eyJ"):
        return {"apikey": service_key}
    if _role_of(service_key) in {"anon", "authenticated"}:
        raise ValueError("SUPABASE_SERVICE_KEY is the anon key; the service_role key is needed")
    return {"apikey": service_key, "Authorization": f"Bearer {service_key}"}


def map_httpx_error(error: httpx.HTTPError) -> TaskError:
    """Our error for each error that httpx raises while a request is under way."""
    name = type(error).__name__
    if isinstance(error, httpx.TimeoutException):
        return TaskStoreTimeout(f"Supabase did not answer in time ({name})")
    if isinstance(error, httpx.TransportError):
        return TaskStoreUnavailable(f"Supabase could not be reached ({name})")
    return TaskStoreUnavailable(f"the reply of Supabase could not be read ({name})")


def retry_after_seconds(value: str | None) -> float | None:
    """Seconds from a `Retry-After` header (number or HTTP date), never negative; None if it is neither."""
    if value is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}(\.\d{1,6})?\s*", value):
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def parse_row(row: Mapping[str, Any]) -> TaskRow:
    """A row of `segmentation_results` from its JSON.

    Raises:
        TaskStoreUnavailable: a column is missing or of another type.
    """
    try:
        return TaskRow(
            id=str(row["id"]),
            status=str(row["status"]),
            user_id=str(row["user_id"]),
            source_image_url=str(row["source_image_url"]),
            text_prompt=str(row["text_prompt"]),
            mask_image_url=_text_or_none(row["mask_image_url"]),
            project_id=_text_or_none(row["project_id"]),
            labels=tuple(str(label) for label in row["labels"] or ()),
            metadata=dict(row["metadata"] or {}),
            created_at=datetime.fromisoformat(row["created_at"]),
            updated_at=datetime.fromisoformat(row["updated_at"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TaskStoreUnavailable(f"a row of {TABLE} does not have the columns expected") from error


def _text_or_none(value: object) -> str | None:
    return None if value is None else str(value)


def _rows_of(reply: httpx.Response) -> list[dict[str, Any]]:
    try:
        rows = reply.json()
    except ValueError as error:  # not JSON, or not in the encoding that it claims
        raise TaskStoreUnavailable("Supabase answered something that is not JSON") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TaskStoreUnavailable("Supabase answered JSON that is not a list of rows")
    return rows


def _error_code(reply: httpx.Response) -> str:
    """PostgREST's or Postgres' own code, such as PGRST204 or 42501; empty if there is none."""
    try:
        code = reply.json()["code"]
    except (ValueError, KeyError, TypeError):
        return ""
    return code if isinstance(code, str) and re.fullmatch(r"[A-Za-z0-9_]{1,20}", code) else ""


def _rest_url(url: str) -> httpx.URL:
    try:
        urllib.parse.urlsplit(url)  # refuses brackets that are none of an address, which httpx takes
        parsed = httpx.URL(url.rstrip("/"))
    except (httpx.InvalidURL, ValueError) as error:
        raise ValueError("SUPABASE_URL is not a URL") from error
    if parsed.scheme not in {"http", "https"} or not parsed.host or parsed.userinfo:
        raise ValueError("SUPABASE_URL must look like https://PROJECT.supabase.co")
    return parsed.copy_with(path=parsed.path.rstrip("/").removesuffix("/rest/v1") + "/rest/v1/", query=None)


def _role_of(jwt: str) -> str | None:
    """The role that a JWT claims, unverified: only for telling a wrong key early."""
    try:
        payload = jwt.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        role = claims["role"]
    except (IndexError, KeyError, TypeError, ValueError, binascii.Error):
        return None
    return role if isinstance(role, str) else None
