"""Bounds on what is taken in: kind and bytes of a body, and requests at once."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from starlette.requests import ClientDisconnect, Request

from api.errors import BodyIncomplete, Overloaded, UnsupportedMediaType

MAX_JSON_BYTES = 1_000_000
BODY_TIMEOUT_S = 30.0

_JSON_TYPE = re.compile(r"application/([a-z0-9!#$&^_.+-]+\+)?json *(;.*)?", re.IGNORECASE)


def require_json(request: Request) -> None:
    """Refuse a body that says it is something else than JSON; one that says nothing may pass.

    Raises:
        UnsupportedMediaType: another type, or compressed.
    """
    kind, coding = request.headers.get("content-type"), request.headers.get("content-encoding", "identity")
    if kind is not None and not _JSON_TYPE.fullmatch(kind):
        raise UnsupportedMediaType("The body must be JSON: send it with Content-Type: application/json.")
    if coding.lower() != "identity":
        raise UnsupportedMediaType("The body must not be compressed: send it without Content-Encoding.")


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
    """Counts the requests being worked on, over all web workers, and refuses more than `limit`.

    A place is a lock on one byte of a file that the workers share: the kernel keeps the count and, when a worker
    dies, gives its places back.

    Args:
        limit: Requests at once.
        shared: The file; None where there is one process only.
    """

    def __init__(self, limit: int, shared: Path | None = None) -> None:
        self._limit = limit
        # Never closed: closing any handle of a file gives up all locks that the process has on it.
        self._file = (
            os.memfd_create("in-flight") if shared is None else os.open(shared, os.O_RDWR | os.O_CREAT, 0o600)
        )
        self._held: set[int] = set()  # by this process, which may take its own locks again

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one of the places.

        Raises:
            Overloaded: all are taken.
        """
        place = self._take()
        if place is None:
            raise Overloaded(
                f"{self._limit} requests are in flight here already. Wait as long as Retry-After says."
            )
        try:
            yield
        finally:
            self._held.discard(place)
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)

    def _take(self) -> int | None:
        for place in range(self._limit):
            if place not in self._held:
                with suppress(BlockingIOError):  # another worker has it
                    fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                    self._held.add(place)
                    return place
        return None
