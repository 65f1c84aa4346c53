"""What was computed lately, within bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Anything that knows the memory it takes."""

    @property
    def nbytes(self) -> int:
        """In bytes."""
        ...


V = TypeVar("V", bound=Sized)


class LruCache(Generic[V]):
    """The most recently used values that fit into `max_bytes` together. One thread at a time."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, V] = OrderedDict()
        self.nbytes = 0

    def get(self, key: Hashable) -> V | None:
        """The value of `key`, or None if it is not there (any more)."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: Hashable, value: V) -> None:
        """Keep `value`, and drop what was used longest ago to make room; one too large for all is not kept."""
        self.discard(key)
        if value.nbytes > self._max_bytes:
            return
        self._entries[key] = value
        self.nbytes += value.nbytes
        while self.nbytes > self._max_bytes:
            self.discard(next(iter(self._entries)))

    def discard(self, key: Hashable) -> None:
        """Forget `key`, if it is known."""
        value = self._entries.pop(key, None)
        if value is not None:
            self.nbytes -= value.nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)
