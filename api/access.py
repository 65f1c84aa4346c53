"""Who may call: the key check, and the rule for a service that has no key."""

from __future__ import annotations

import hmac
import ipaddress

from api.errors import Unauthorized

# Everything below these needs the key, known route or not.
GUARDED = ("/api/", "/files/")


def is_guarded(path: str) -> bool:
    """Whether a path needs the key."""
    return path.startswith(GUARDED)


class KeyCheck:
    """Compares `X-API-Key` in constant time.

    Args:
        key: None lets loopback through without a key, and nobody else.
    """

    def __init__(self, key: str | None) -> None:
        self._key = None if key is None else key.encode()

    def require(self, sent: bytes | None, client_host: str | None) -> None:
        """Let the request pass or raise.

        Args:
            sent: The header's raw bytes, None without one.
            client_host: The peer's address.

        Raises:
            Unauthorized: the same words however much of the key was right.
        """
        if self._key is None:
            if _is_loopback(client_host):
                return
            raise Unauthorized(
                "This service has no API_SECRET_KEY and answers its own machine only: "
                "set one to call it from elsewhere."
            )
        if sent is None:
            raise Unauthorized("The X-API-Key header is missing: send the service's API_SECRET_KEY in it.")
        if not hmac.compare_digest(sent, self._key):
            raise Unauthorized("The X-API-Key header is not the service's API_SECRET_KEY.")


def _is_loopback(host: str | None) -> bool:
    try:
        return host is not None and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
