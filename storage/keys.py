"""Which strings are object keys: one rule for every store, narrow enough that a key has a single reading.

S3 itself takes almost anything. Here a key is also a relative path on disk and the tail of a URL, so whatever
those two could read differently (`..`, `//`, a backslash, a control character, `%2F`) is no key at all.
"""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import quote

from storage.errors import InvalidContentType, InvalidKey

MAX_KEY_BYTES = 1024  # of UTF-8; the limit of S3 and of R2
PARTIAL_PREFIX = ".partial-"  # how LocalStore names a file that is still being written

_PERCENT_ENCODED = re.compile("%[0-9A-Fa-f]{2}")
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+(;[\x20-\x7e]*)?", re.ASCII)
_MAX_MEDIA_TYPE_CHARS = 255


def validate_key(key: str) -> None:
    """Check that a string is an object key.

    Args:
        key: Segments parted by single slashes, as `masks/42.png`; decoded, not percent-encoded.

    Raises:
        InvalidKey: empty, longer than 1,024 bytes of UTF-8, with an empty, `.` or `..` segment, a slash at
            either end, a backslash, a control character, a lone surrogate or a percent-encoded byte.
    """
    reason = _why_no_key(key)
    if reason is not None:
        raise InvalidKey(f"not an object key: {reason}")


def quote_key(key: str) -> str:
    """Percent-encode a key for the path of a URL; slashes stay. `ImageUrls.key_of` undoes it."""
    return quote(key, safe="/")


def validate_content_type(content_type: str) -> None:
    """Check that a string is a media type, such as `image/png`.

    Raises:
        InvalidContentType: it is not `type/subtype`, with parameters or without, in printable ASCII.
    """
    if len(content_type) > _MAX_MEDIA_TYPE_CHARS or not _MEDIA_TYPE.fullmatch(content_type):
        raise InvalidContentType("the content type must be a media type such as image/png")


def _why_no_key(key: str) -> str | None:
    if not key:
        return "it is empty"
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in key):
        return "it has a control character or half a surrogate pair in it"
    if len(key.encode()) > MAX_KEY_BYTES:
        return f"it is longer than {MAX_KEY_BYTES} bytes"
    if "\\" in key:
        return "it has a backslash in it"
    if _PERCENT_ENCODED.search(key):
        return "it is percent-encoded once too often"
    segments = key.split("/")
    if "" in segments:
        return "it has an empty segment (a slash at an end, or two together)"
    if "." in segments or ".." in segments:
        return "it has a . or .. segment"
    if any(segment.startswith(PARTIAL_PREFIX) for segment in segments):
        return f"names that begin with {PARTIAL_PREFIX} are kept for files being written"
    return None
