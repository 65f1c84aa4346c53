"""The outermost layer: request id, key, one log line, metrics, and the one form of every error.

It stands around BentoML's own application, so that an unknown route, a failing readiness probe or a bug in
any layer below comes out in the same form as an error of ours.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from starlette.datastructures import State
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.access import is_guarded
from api.errors import Answer, answer_of, error_of_status
from api.logs import log_request
from api.requests import RECORD, REQUEST_ID_HEADER, RequestRecord, current_request, request_id_of

logger = logging.getLogger("api")

# Asked every few seconds by machines: counted, but logged only when something is broken.
QUIET_PATHS = frozenset({"/health", "/livez", "/healthz", "/readyz", "/metrics"})
UNMATCHED = "unmatched"  # the route of a path that is none: such paths must not label metrics

_ID_HEADER = REQUEST_ID_HEADER.lower().encode()
# What is kept of an error response that another layer wrote. Not `Location`: nothing here has moved.
_KEPT_HEADERS = (b"allow", b"retry-after", b"vary", b"access-control-")


class EnvelopeMiddleware:
    """See the module.

    Args:
        app: Everything below.
        state: Of the application that is mounted; `state.backend` is there before the first request.
        cors_origins: Origins whose pages may call; none turns CORS off. `*` is everyone.
    """

    def __init__(
        self,
        app: ASGIApp,
        state: State,
        cors_origins: Sequence[str] = (),
    ) -> None:
        self._app = app
        self._state = state
        self._inner: ASGIApp = self._answer
        if cors_origins:
            self._inner = CORSMiddleware(
                self._answer,
                allow_origins=cors_origins,
                allow_methods=("GET", "POST", "PUT"),
                allow_headers=("Content-Type", "X-API-Key", REQUEST_ID_HEADER),
                expose_headers=(REQUEST_ID_HEADER, "Retry-After"),
                max_age=600,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in QUIET_PATHS else UNMATCHED
        request = RequestRecord(request_id_of(_header(scope, _ID_HEADER)), scope["method"], route)
        scope[RECORD] = request
        token = current_request.set(request)
        try:
            await self._inner(scope, receive, _Reply(scope, request, send))
        finally:
            if not request.status:
                request.outcome = "CANCELLED"  # by the server, before anything was sent
            self._state.backend.metrics.observe(request)
            if request.route == UNMATCHED:
                request.fields["path"] = scope["path"]
            if scope["path"] not in QUIET_PATHS or request.status >= 500:
                log_request(logger, request)
            current_request.reset(token)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the layers below answer; what they raise becomes an answer too."""
        request: RequestRecord = scope[RECORD]
        try:
            if is_guarded(scope["path"]):
                await self._state.backend.key_check.require(scope)
            await self._app(scope, receive, send)
        except Exception as error:  # the outermost edge: nothing may leave in another form
            answer = answer_of(error)
            _log_cause(error, answer)
            if request.status:
                request.outcome = answer.code
                raise  # half of a response is out: all that is left is to cut the connection
            await send_error(answer, request, send)


class _Reply:
    """Sends one response: adds the id, and rewrites errors that are not in the contract's form, and redirects."""

    def __init__(self, scope: Scope, request: RequestRecord, send: Send) -> None:
        self._scope = scope
        self._request = request
        self._send = send
        self._is_rewritten = False

    async def __call__(self, message: Message) -> None:
        """Pass on what the layers below send."""
        if self._is_rewritten:
            return  # the rest of a body that was replaced
        if message["type"] == "http.response.start":
            if message["status"] >= 300 and not self._request.is_enveloped:
                await self._rewrite(message)
                return
            self._request.status = message["status"]
            id_header = (_ID_HEADER, self._request.request_id.encode())
            message = {**message, "headers": [*message.get("headers", ()), id_header]}
        await self._send(message)

    async def _rewrite(self, start: Message) -> None:
        kept = {
            name.decode().lower(): value.decode("latin-1")
            for name, value in start.get("headers", ())
            if name.lower().startswith(_KEPT_HEADERS)
        }
        error = error_of_status(start["status"], self._scope["method"], self._scope["path"], kept)
        await send_error(answer_of(error), self._request, self)
        self._is_rewritten = True


async def send_error(answer: Answer, request: RequestRecord, send: Send) -> None:
    """Send an error in the contract's form."""
    request.is_enveloped = True
    request.outcome = answer.code
    body = json.dumps(answer.body(request.request_id)).encode()
    headers = {
        **{name.lower(): value for name, value in answer.headers.items()},
        "content-type": "application/json",
        "content-length": str(len(body)),
    }
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


def _log_cause(error: Exception, answer: Answer) -> None:
    """What the caller is not told."""
    if answer.status == 500:
        logger.error("unexpected error", exc_info=error)
    elif answer.status > 500:
        cause = "" if error.__cause__ is None else f" ({error.__cause__!r})"
        logger.warning("%s: %s%s", type(error).__name__, error, cause)
