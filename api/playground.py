"""The playground: a page to try the API by hand. It loads nothing from elsewhere, and is told to browsers so."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from starlette.responses import Response

from api.errors import RouteNotFound

_ROOT = Path(__file__).resolve().parent.parent
_FOLDER = _ROOT / "playground"
PAGE = "index.html"
# The picture for those who have none at hand; it is kept with the demo.
_ELSEWHERE = {"sample.jpg": _ROOT / "examples" / "shapes.jpg"}
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
}
_HEADERS = {
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


@dataclass(frozen=True, slots=True)
class _File:
    data: bytes
    media_type: str


def page(picture_url: str | None) -> Response:
    """The page itself.

    Args:
        picture_url: Where pictures and masks are read from, if not here: the one other place that the page may ask.
    """
    return _response(_files()[PAGE], picture_url)


def file(name: str, picture_url: str | None) -> Response:
    """What the page is made of.

    Raises:
        RouteNotFound: there is no such file, or it is the page, which has a path of its own.
    """
    found = _files().get(name)
    if found is None or name == PAGE:
        raise RouteNotFound(f"There is no file {name!r} of the playground.")
    return _response(found, picture_url)


@cache
def _files() -> dict[str, _File]:
    """All files by name, read once: a path of the disk is never made from what a request says."""
    paths = {path.name: path for path in _FOLDER.iterdir() if path.suffix in MEDIA_TYPES} | _ELSEWHERE
    return {name: _File(path.read_bytes(), MEDIA_TYPES[path.suffix]) for name, path in paths.items()}


def _response(found: _File, picture_url: str | None) -> Response:
    headers = {"content-security-policy": _policy(picture_url), "content-type": found.media_type, **_HEADERS}
    return Response(found.data, headers=headers)


def _policy(picture_url: str | None) -> str:
    """Own scripts and styles only, none of them inline; pictures only as blobs that the page has fetched itself."""
    elsewhere = "" if picture_url is None else " {0.scheme}://{0.netloc}".format(urlsplit(picture_url))
    return "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' blob:",
            f"connect-src 'self'{elsewhere}",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
