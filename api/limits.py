"""Bounds on what one worker takes in: bytes of a body, and requests at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect, Request

from api.errors import BodyIncomplete, Overloaded

MAX_JSON_BYTES = 1_000_000
BODY_TIMEOUT_S = 30.0


async def read_body(
    request: Request, max_bytes: int, too_large: Exception, timeout_s: float = BODY_TIMEOUT_S
) -> bytes:
    """Read the body, whether or not it said how long it is, and never keep more than `max_bytes` of it.

    Args:
        request: Not yet read.
        max_bytes: The most that is taken.
        too_large: Raised when there is more.
        timeout_s: For the whole body.

    Raises:
        BodyIncomplete: it stopped arriving, or took longer than `timeout_s`.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                if len(body) + len(chunk) > max_bytes:
                    raise too_large
                body += chunk
    except (TimeoutError, ClientDisconnect) as error:
        raise BodyIncomplete(
            f"The body stopped after {len(body)} bytes or took longer than {timeout_s:g} s: send it whole."
        ) from error
    return bytes(body)


class InFlight:
    """Counts the requests being worked on, and refuses more than `limit`.

    One worker's asyncio loop is the only user, so a plain integer is enough.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one of the slots.

        Raises:
            Overloaded: all are taken.
        """
        if self._count >= self._limit:
            raise Overloaded(
                f"{self._limit} requests are in flight here already. Wait as long as Retry-After says."
            )
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1
