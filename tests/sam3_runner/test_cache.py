from __future__ import annotations

from dataclasses import dataclass

from sam3_runner.cache import LruCache


@dataclass(frozen=True)
class Block:
    nbytes: int


def test_what_was_used_longest_ago_makes_room() -> None:
    cache: LruCache[Block] = LruCache(10)
    cache.put("a", Block(4))
    cache.put("b", Block(4))
    assert cache.get("a") == Block(4)
    cache.put("c", Block(4))
    assert cache.get("b") is None
    assert cache.get("a") == cache.get("c") == Block(4)
    assert (len(cache), cache.nbytes) == (2, 8)


def test_what_is_larger_than_all_the_room_is_not_kept_and_drives_nothing_out() -> None:
    cache: LruCache[Block] = LruCache(10)
    cache.put("small", Block(10))
    cache.put("large", Block(11))
    assert cache.get("large") is None
    assert cache.get("small") == Block(10)


def test_a_value_put_again_counts_once() -> None:
    cache: LruCache[Block] = LruCache(10)
    for size in (3, 9, 5):
        cache.put("a", Block(size))
    assert (len(cache), cache.nbytes) == (1, 5)
    cache.clear()
    assert (len(cache), cache.nbytes, cache.get("a")) == (0, 0, None)
