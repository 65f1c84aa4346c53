"""The contract of an object store."""

from __future__ import annotations

from typing import Protocol


class ObjectStore(Protocol):
    """Whole objects by key, read and written at once. Safe to use from many tasks of one event loop.

    An object is seen whole or not at all: a reader during a put gets all of the old bytes or all of the new.
    The last of several puts to a key wins. Keys obey `storage.keys.validate_key` in every method.
    """

    async def get(self, key: str, max_bytes: int) -> bytes:
        """Read one whole object.

        Args:
            key: Its key.
            max_bytes: The most the caller takes. No more than this is read, whatever the store claims.

        Raises:
            InvalidKey: the key is none.
            ObjectNotFound: there is no such object.
            ObjectTooLarge: it is longer than `max_bytes`; the rest was never read.
            StorageUnavailable: no usable answer, retries included.
            StorageRefused: an answer that no retry mends.
            StorageTimeout: no answer in time.
        """
        ...

    async def put(self, key: str, data: bytes, content_type: str) -> None:
        """Write one whole object, in the place of any that is there.

        Args:
            key: Its key.
            data: All of its bytes; may be empty.
            content_type: Its media type, such as `image/png`; what a public URL of the object is served with.

        Raises:
            InvalidKey: the key is none, or others forbid it (a file system has no `a` beside `a/b`).
            InvalidContentType: not a media type.
            StorageUnavailable: no usable answer, retries included.
            StorageRefused: an answer that no retry mends.
            StorageTimeout: no answer in time; the object may still be written.
        """
        ...

    async def exists(self, key: str) -> bool:
        """Say whether there is such an object. Raises as `get` does, but for the first two sizes of "no"."""
        ...

    def public_url(self, key: str) -> str:
        """The URL at which others read the object, percent-encoded. Nothing is looked up."""
        ...

    async def aclose(self) -> None:
        """Let calls under way end, then free threads and connections. A second call does nothing."""
        ...
