"""Log lines as JSON, each with the id of the request it belongs to, none with a secret in it."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from api.requests import RequestRecord, current_request

# Ours and those of the parts below; BentoML's and uvicorn's keep their own handlers.
LOGGERS = ("api", "service", "tasks", "storage", "sam3_runner")
_MASK = "***"
_SHORTEST_SECRET = 6  # anything shorter would blank out ordinary words
_PATH_CHARS = 200  # of a path that is no route: callers may invent any
# What `logging` itself puts on a record; everything else on it was passed as `extra`.
_OWN_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({})))


class JsonFormatter(logging.Formatter):
    """One record, one line of JSON.

    Args:
        secrets: Values that are blanked out wherever they turn up.
    """

    def __init__(self, secrets: tuple[str, ...] = ()) -> None:
        super().__init__()
        # Longest first: one may contain another.
        long_enough = {secret for secret in secrets if len(secret) >= _SHORTEST_SECRET}
        self._plain = tuple(sorted(long_enough, key=len, reverse=True))
        self._in_json = tuple(json.dumps(secret)[1:-1] for secret in self._plain)

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request = current_request.get()
        if request is not None:
            line["request_id"] = request.request_id
            if request.task_id is not None:
                line["task_id"] = request.task_id
        line |= {name: value for name, value in vars(record).items() if name not in _OWN_ATTRIBUTES}
        if "path" in line:  # blanked out before it is cut: half a secret is one, too
            line["path"] = _blank_out(str(line["path"]), self._plain)[:_PATH_CHARS]
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _blank_out(json.dumps(line, default=str, ensure_ascii=True), self._in_json)


def _blank_out(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, _MASK)
    return text


def configure_logs(level: str, secrets: tuple[str, ...], stream: TextIO | None = None) -> None:
    """Send our loggers' lines to `stream`, standard output if None, as JSON."""
    handler = logging.StreamHandler(sys.stdout if stream is None else stream)
    handler.setFormatter(JsonFormatter(secrets))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False


def log_request(logger: logging.Logger, request: RequestRecord) -> None:
    """The one line per request."""
    fields: dict[str, Any] = {
        "method": request.method,
        "route": request.route,
        "status": request.status,
        "outcome": request.outcome,
        "duration_ms": round(request.elapsed_s * 1000, 1),
    }
    if request.stage_ms:
        fields["stage_ms"] = {stage: round(ms, 1) for stage, ms in request.stage_ms.items()}
    level = logging.INFO
    if request.status >= 429:
        level = logging.ERROR if request.status == 500 else logging.WARNING
    logger.log(level, "request", extra=fields | request.fields)
