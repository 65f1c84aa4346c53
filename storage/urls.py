"""Which image URLs name objects of ours. Everything here is text: nothing is looked up and no one is called.

The service downloads what a URL names with its own credentials, so a URL is never fetched as it stands: it is
taken apart, held against the few places that are ours, and only the key goes on to the store.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from storage.errors import ForeignUrl, InvalidKey
from storage.keys import validate_key

FILES_PATH = "/files/"  # where the service itself serves objects of the local store
UPLOADS_PREFIX = "uploads/"  # what a bare key begins with

# A presigned URL of a key of 1,024 bytes, all of them percent-encoded, with a session token, is below this.
MAX_URL_CHARS = 8192
_MAX_HOST_CHARS = 253  # RFC 1035, §2.3.4, as text
_DEFAULT_PORTS = {"http": 80, "https": 443}
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
# The query of a presigned GET: Signature Version 4, and what the JavaScript SDK adds (since 3.729 also the
# checksum mode). Any other name asks for something that reading with our own credentials would not do.
_SIGNED_WITH = frozenset({"x-amz-algorithm", "x-amz-credential", "x-amz-signature"})
_SIGNATURE_NAMES = _SIGNED_WITH | {
    "x-amz-date",
    "x-amz-expires",
    "x-amz-signedheaders",
    "x-amz-security-token",
    "x-amz-content-sha256",
    "x-amz-checksum-mode",
    "x-id",
}


@dataclass(frozen=True, slots=True)
class BaseUrl:
    """A configured http or https URL in one spelling.

    Attributes:
        scheme: `http` or `https`.
        host: Lower case ASCII; an IPv6 literal in its brackets.
        port: Always there; 80 or 443 if the URL names none.
        path: Empty, or begins with a slash and does not end with one.
    """

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> BaseUrl:
        """Read a URL out of the configuration.

        Raises:
            ValueError: not `http(s)://host[:port][/path]`, with user-info, query or fragment, or beyond ASCII
                (such a host is written in its punycode form).
        """
        expected = "expected http(s)://HOST[:PORT][/PATH] in ASCII, without user-info, query and fragment"
        parts = urlsplit(url)
        authority = _split_authority(parts.scheme, parts.netloc)
        path = parts.path.rstrip("/")
        is_plain = url.isascii() and url.isprintable() and not set(url) & set("?#@\\ %")
        if authority is None or not is_plain or not set(path.split("/")[1:]).isdisjoint({"", ".", ".."}):
            raise ValueError(expected)
        return cls(parts.scheme, *authority, path)

    @property
    def is_ip_literal(self) -> bool:
        """Whether the host is an address rather than a name."""
        try:
            ipaddress.ip_address(self.host.strip("[]"))
        except ValueError:
            return False
        return True

    @property
    def text(self) -> str:
        """The URL, without a slash at its end and without the scheme's default port."""
        port = "" if self.port == _DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{self.host}{port}{self.path}"

    def on_host(self, host: str) -> BaseUrl:
        """The same URL on another host."""
        return BaseUrl(self.scheme, host, self.port, self.path)

    def below(self, path: str) -> BaseUrl:
        """The same URL with a path, such as `/bucket`, put behind its own."""
        return BaseUrl(self.scheme, self.host, self.port, self.path + path)


class ImageUrls:
    """Tells which image URLs name objects of our store, and which objects.

    Made by `for_r2` or `for_local`. Holds no connection and makes none.
    """

    def __init__(self, places: Sequence[BaseUrl], buckets: Sequence[str], accepted: str) -> None:
        """Accept objects below some URLs.

        Args:
            places: URLs whose next path segments are a key.
            buckets: Buckets for which `s3://bucket/key` is accepted.
            accepted: Forms that may be told to anyone, in words, for the message of `ForeignUrl`.
        """
        # Where one place lies inside another, the inner one has the shorter, true key.
        self._places = sorted(places, key=lambda place: len(place.path), reverse=True)
        self._buckets = frozenset(buckets)
        self._accepted = accepted

    @classmethod
    def for_r2(cls, *, endpoint: str, bucket: str, public_url: str | None = None) -> ImageUrls:
        """Accept URLs of one bucket: below `public_url`, by endpoint in both S3 styles, `s3://`, bare keys.

        Args:
            endpoint: The S3 endpoint, such as `https://ACCOUNT.r2.cloudflarestorage.com`.
            bucket: The bucket's name.
            public_url: The custom domain at which the bucket is read, if it has one.

        Raises:
            ValueError: one of them is malformed.
        """
        endpoint_url = parse_endpoint(endpoint)
        validate_bucket(bucket)
        places = [endpoint_url.below(f"/{bucket}")]
        if not endpoint_url.is_ip_literal:  # bucket.127.0.0.1 is nobody's address
            places.append(endpoint_url.on_host(f"{bucket}.{endpoint_url.host}"))
        if public_url is not None:
            places.insert(0, BaseUrl.parse(public_url))
        # Endpoint and bucket are not named: the message ends up in a row that its owner reads.
        forms = [f"{places[0].text}/KEY"] if public_url is not None else []
        return cls(places, [bucket], ", ".join([*forms, f"{UPLOADS_PREFIX}…"]))

    @classmethod
    def for_local(cls, public_base_url: str) -> ImageUrls:
        """Accept the service's own `/files/` URLs, at its public host or a loopback one, and bare keys.

        Args:
            public_base_url: The service's own base URL, as given to `LocalStore`.

        Raises:
            ValueError: it is malformed.
        """
        files_url = BaseUrl.parse(public_base_url).below(FILES_PATH.rstrip("/"))
        hosts = dict.fromkeys((files_url.host, *_LOOPBACK_HOSTS))
        places = [files_url.on_host(host) for host in hosts]
        return cls(places, [], f"{files_url.text}/KEY, {UPLOADS_PREFIX}…")

    def key_of(self, image_url: str) -> str:
        """Find the key of the object that a URL names.

        A presignature (a query of Signature Version 4) is accepted, not verified, and dropped: the store is read
        with our own credentials. Percent-encoding is undone once, and nothing that is still encoded then is a key.

        Args:
            image_url: As a caller sent it: anything at all.

        Returns:
            The key, which `validate_key` accepts. Whether there is such an object is not known.

        Raises:
            ForeignUrl: the URL names nothing of ours. The message says why and how an image is best named; it
                shows neither query nor user-info, and neither endpoint nor bucket.
        """
        try:
            return self._key_of(image_url)
        except _NotOurs as reason:
            raise ForeignUrl(f"image_url is not ours: {reason}; accepted: {self._accepted}") from None

    def _key_of(self, image_url: str) -> str:
        _check_characters(image_url)
        if image_url.startswith(UPLOADS_PREFIX):
            bare_key, _, query = image_url.partition("?")
            _check_query(query)
            return _decode_key(bare_key)
        if any(char.isspace() for char in image_url):
            raise _NotOurs("it has a blank in it; in a URL that is written %20")
        try:
            parts = urlsplit(image_url)
        except ValueError as error:
            raise _NotOurs("its host is malformed") from error
        _check_query(parts.query)
        if parts.scheme == "s3":
            return self._key_in_bucket(parts.netloc, parts.path)
        if parts.scheme not in _DEFAULT_PORTS:
            raise _NotOurs("it is neither a URL of http, https or s3 nor the key of an upload")
        return self._key_below_places(parts.scheme, parts.netloc, parts.path)

    def _key_in_bucket(self, bucket: str, path: str) -> str:
        if bucket not in self._buckets:
            raise _NotOurs("its bucket is another one")
        return _decode_key(path.removeprefix("/"))

    def _key_below_places(self, scheme: str, netloc: str, path: str) -> str:
        authority = _split_authority(scheme, netloc)
        if authority is None:
            raise _NotOurs("its host is malformed")
        here = [place for place in self._places if (place.host, place.port) == authority]
        if not here:
            raise _NotOurs(f"its host is {authority[0][:_MAX_HOST_CHARS]}, port {authority[1]}")
        for place in here:
            if place.scheme == scheme and path.startswith(place.path + "/"):
                return _decode_key(path[len(place.path) + 1 :])
        raise _NotOurs("its scheme, bucket or path is another one")


def parse_endpoint(endpoint: str) -> BaseUrl:
    """Read the URL of an S3 endpoint out of the configuration.

    Raises:
        ValueError: malformed, or with a path: the bucket's name does not belong into it.
    """
    url = BaseUrl.parse(endpoint)
    if url.path:
        raise ValueError("expected http(s)://HOST[:PORT] without a path; the bucket has a setting of its own")
    return url


def validate_bucket(bucket: str) -> None:
    """Check the name of a bucket.

    Raises:
        ValueError: not 3 to 63 characters of a–z, 0–9, dot and hyphen.
    """
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise ValueError("a bucket's name is 3 to 63 characters of a-z, 0-9, dot and hyphen")


class _NotOurs(Exception):
    """Why a URL names nothing of ours; says nothing that the caller might want kept quiet."""


def _split_authority(scheme: str, netloc: str) -> tuple[str, int] | None:
    """Host in lower case and port of `host[:port]`, or None. User-info, blanks and non-ASCII never match."""
    match = _AUTHORITY.fullmatch(netloc.lower()) if netloc.isascii() else None
    if match is None or scheme not in _DEFAULT_PORTS:
        return None
    host, digits = match.groups()
    port = int(digits) if digits else _DEFAULT_PORTS[scheme]
    return (host, port) if 0 < port < 1 << 16 else None


def _check_characters(image_url: str) -> None:
    """Turn away what URL parsers drop or read in different ways, before any of them sees it."""
    if len(image_url) > MAX_URL_CHARS:
        raise _NotOurs(f"it is longer than {MAX_URL_CHARS} characters")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in image_url):
        raise _NotOurs("it has a control character or half a surrogate pair in it")
    if image_url != image_url.strip():
        raise _NotOurs("it begins or ends with a blank")
    if "\\" in image_url:
        raise _NotOurs("it has a backslash in it")
    if "#" in image_url:
        raise _NotOurs("it has a fragment; a # in a key is written %23")


def _check_query(query: str) -> None:
    """Accept no query, or a presignature, whole and with nothing beside it."""
    if not query:
        return
    names = {name.lower() for name, _ in parse_qsl(query, keep_blank_values=True)}
    if not _SIGNED_WITH <= names <= _SIGNATURE_NAMES:
        raise _NotOurs("its query is not a presignature; a ? in a key is written %3F")


def _decode_key(quoted_key: str) -> str:
    """Undo percent-encoding once, segment by segment, so that an encoded slash cannot pass for a real one."""
    try:
        segments = [unquote(segment, errors="strict") for segment in quoted_key.split("/")]
    except UnicodeDecodeError as error:
        raise _NotOurs("its percent-encoded bytes are not UTF-8") from error
    if any("/" in segment for segment in segments):
        raise _NotOurs("it has an encoded slash in it")
    key = "/".join(segments)
    try:
        validate_key(key)
    except InvalidKey as error:
        raise _NotOurs(str(error)) from error
    return key
