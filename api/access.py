"""Who may call: the key check, how wrong keys are slowed, and the rule for a service that has no key."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from api.errors import Unauthorized

# Everything below these needs the key, known route or not.
GUARDED = ("/api/", "/files/")

FREE_FAILURES = 30  # of one address in one window, answered at once
WINDOW_S = 60.0
DELAY_S = 1.0  # of every further one
MAX_DELAYED = 64  # answers that wait at once; beyond them nobody is kept, and no memory with them
MAX_ADDRESSES = 4096  # that are remembered; the one that was quiet longest is forgotten first

# What proxies say: behind one, a connection from this machine is no sign of a caller from this machine.
_FORWARDED = ("forwarded", "x-forwarded-for")

logger = logging.getLogger("api")


def is_guarded(path: str) -> bool:
    """Whether a path needs the key."""
    return path.startswith(GUARDED)


class KeyCheck:
    """Asks for one of the keys in `X-API-Key`, and takes its time with those who have none.

    Every key is compared in constant time, all of them for every request: neither how much of one was right nor
    which one can be told from the time of the answer. A right key is never slowed, whatever else comes from the
    same address.

    Args:
        keys: Any of them opens. None at all lets through who calls from this machine, and nobody else.
        own_hosts: Without keys: hosts, beside loopback's, that requests may be addressed to.
        origins: Without keys: origins, beside loopback's, whose pages may call; `*` is everyone.
    """

    def __init__(
        self, keys: Sequence[str], own_hosts: Collection[str] = (), origins: Collection[str] = ()
    ) -> None:
        # Digests are of one length, so comparing them tells nothing of a key's.
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)
        self._own_hosts = frozenset(own_hosts)
        self._origins = frozenset(origins)
        self._failures = FailureBudget()

    async def require(self, scope: Scope) -> None:
        """Let the request pass or raise.

        Raises:
            Unauthorized: the same words however much of the key was right; later than it could be when the same
                address failed often.
        """
        client: tuple[str, int] | None = scope.get("client")
        address = client[0] if client else ""
        refusal = self._why_refused(Headers(scope=scope), address)
        if refusal is not None:
            await self._failures.spend(address)
            raise Unauthorized(refusal)

    def _why_refused(self, headers: Headers, address: str) -> str | None:
        if not self._digests:
            return self._why_not_from_here(headers, address)
        sent = headers.get("x-api-key")
        if sent is None:
            return "The X-API-Key header is missing: send the service's API_SECRET_KEY in it."
        digest = hashlib.sha256(sent.encode("latin-1")).digest()
        if sum(hmac.compare_digest(digest, known) for known in self._digests):
            return None
        return "The X-API-Key header is not the service's API_SECRET_KEY."

    def _why_not_from_here(self, headers: Headers, address: str) -> str | None:
        """Why a request without a key is none of this machine's own."""
        if not _is_loopback(address) or any(name in headers for name in _FORWARDED):
            return (
                "This service has no API_SECRET_KEY and answers its own machine only: "
                "set one to call it from elsewhere."
            )
        # A page in this machine's browser calls from here, too, whoever wrote it. It cannot choose these headers.
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and not self._is_own(f"//{host}"):
            return "This service has no API_SECRET_KEY and is called by the name localhost or 127.0.0.1 only."
        if origin is None or {origin, "*"} & self._origins or self._is_own(origin):
            return None
        return "This service has no API_SECRET_KEY, and S3_CORS_ORIGINS does not name this page's origin."

    def _is_own(self, url: str) -> bool:
        try:
            host = urlsplit(url).hostname or ""
        except ValueError:
            return False
        return host == "localhost" or _is_loopback(host) or host in self._own_hosts


@dataclass(slots=True)
class _Window:
    began_s: float
    failures: int = 0


class FailureBudget:
    """Counts the failures of each address, in this process, and delays the answers to those with too many.

    An address is an IPv4 address or a /64 of IPv6, which is what one subscriber has.

    Args:
        clock: In seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: OrderedDict[str, _Window] = OrderedDict()
        self._delayed = 0

    async def spend(self, address: str) -> None:
        """Count one failure, and wait if there were too many lately and not too many wait already."""
        if self._has_left(_subscriber_of(address)) or self._delayed >= MAX_DELAYED:
            return
        self._delayed += 1
        try:
            await asyncio.sleep(DELAY_S)
        finally:
            self._delayed -= 1

    def _has_left(self, subscriber: str) -> bool:
        now_s = self._clock()
        window = self._windows.pop(subscriber, None)
        if window is None or now_s - window.began_s > WINDOW_S:
            window = _Window(now_s)
        window.failures += 1
        self._windows[subscriber] = window  # at the end: the first is the one that was quiet longest
        if len(self._windows) > MAX_ADDRESSES:
            self._windows.popitem(last=False)
        if window.failures == FREE_FAILURES + 1:
            logger.warning("wrong keys: answers to this address are slowed", extra={"address": subscriber})
        return window.failures <= FREE_FAILURES


def _subscriber_of(address: str) -> str:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return ""
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(ip) >> 64 << 64, 64)))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
