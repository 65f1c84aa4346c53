"""The `Prefer` header (RFC 7240), as far as it is honoured here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

RESPOND_ASYNC: Final = "respond-async"


def wants_async(headers: Iterable[str]) -> bool:
    """Whether the caller would rather not wait: `respond-async` is among its preferences, in any letters.

    Args:
        headers: The values of all `Prefer` headers; each holds preferences joined by commas, each of which may have
            a value and parameters.
    """
    preferences = (part for header in headers for part in header.split(","))
    return any(
        part.partition(";")[0].partition("=")[0].strip().lower() == RESPOND_ASYNC for part in preferences
    )
