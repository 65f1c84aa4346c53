"""What is known about the request being handled, from the first byte in to the log line at the end."""

from __future__ import annotations

import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")

REQUEST_ID_HEADER = "X-Request-ID"
# Where the record lives in an ASGI scope; every layer below the middleware finds it there.
RECORD = "s3.record"


@dataclass(slots=True)
class RequestRecord:
    """One request, as its log line will tell it.

    Attributes:
        request_id: The caller's, or a new UUID.
        method: Of HTTP.
        route: The path template, never the raw path: it labels metrics.
        started_s: On the performance counter.
        task_id: Once it is known.
        status: What was answered; 0 until then.
        outcome: `ok`, or the code of the error.
        is_enveloped: Whether the error response being sent already has the contract's form.
        stage_ms: Stages of a segmentation.
        fields: What handlers add to the log line.
    """

    request_id: str
    method: str
    route: str = "unmatched"
    started_s: float = field(default_factory=time.perf_counter)
    task_id: str | None = None
    status: int = 0
    outcome: str = "ok"
    is_enveloped: bool = False
    stage_ms: dict[str, float] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the request came in."""
        return time.perf_counter() - self.started_s


# For log lines written deep below, where nobody hands the record down.
current_request: ContextVar[RequestRecord | None] = ContextVar("current_request", default=None)


def request_id_of(sent: bytes | None) -> str:
    """The id the caller sent if it is fit for headers and logs, else a new one."""
    if sent is not None and _REQUEST_ID.match(text := sent.decode("latin-1")):
        return text
    return str(uuid.uuid4())
