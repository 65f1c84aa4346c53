"""What every `ObjectStore` does, held against each one; R2Store talks to a real S3 server."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from storage.errors import InvalidContentType, InvalidKey, ObjectNotFound, ObjectTooLarge, StorageUnavailable
from storage.local import LocalStore
from storage.r2 import R2Store
from storage.store import ObjectStore
from storage.urls import ImageUrls
from tasks.breaker import GuardedStore
from tests.servers.s3 import S3Server

MEGABYTE = 1_000_000


@pytest.fixture(params=["local", "guarded", "r2"])
def store_and_urls(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ObjectStore, ImageUrls]:
    if request.param in ("local", "guarded"):
        base_url = "http://127.0.0.1:8000"
        local = LocalStore(tmp_path / "objects", base_url)
        return GuardedStore(local) if request.param == "guarded" else local, ImageUrls.for_local(base_url)
    server: S3Server = request.getfixturevalue("shared_s3")
    server.clear()  # before the test, not after: what a failed test left cannot fail the next
    store: R2Store = request.getfixturevalue("shared_r2_store")
    return store, ImageUrls.for_r2(endpoint=server.endpoint, bucket=server.bucket)


@pytest.fixture
def store(store_and_urls: tuple[ObjectStore, ImageUrls]) -> ObjectStore:
    return store_and_urls[0]


@pytest.fixture
def urls(store_and_urls: tuple[ObjectStore, ImageUrls]) -> ImageUrls:
    return store_and_urls[1]


async def test_what_was_put_is_got_back_byte_for_byte(store: ObjectStore):
    data = bytes(range(256)) * 4000

    await store.put("masks/42.png", data, "image/png")

    assert await store.get("masks/42.png", max_bytes=len(data)) == data


async def test_an_empty_object_is_an_object(store: ObjectStore):
    await store.put("masks/empty.png", b"", "image/png")

    assert await store.get("masks/empty.png", max_bytes=0) == b""
    assert await store.exists("masks/empty.png")


async def test_a_put_replaces_what_was_there_whatever_its_length(store: ObjectStore):
    await store.put("masks/1.png", b"a long first version", "image/png")
    await store.put("masks/1.png", b"short", "image/webp")

    assert await store.get("masks/1.png", MEGABYTE) == b"short"


async def test_a_missing_object_is_not_found_and_does_not_exist(store: ObjectStore):
    with pytest.raises(ObjectNotFound, match=r"uploads/none\.jpg"):
        await store.get("uploads/none.jpg", MEGABYTE)
    assert not await store.exists("uploads/none.jpg")


async def test_a_prefix_of_keys_is_no_object(store: ObjectStore):
    await store.put("masks/42/0.png", b"mask", "image/png")

    with pytest.raises(ObjectNotFound):
        await store.get("masks/42", MEGABYTE)
    assert not await store.exists("masks/42")


async def test_a_key_below_an_object_is_not_found(store: ObjectStore):
    await store.put("masks/42.png", b"mask", "image/png")

    with pytest.raises(ObjectNotFound):
        await store.get("masks/42.png/0.png", MEGABYTE)


async def test_the_masks_of_a_batch_live_beside_their_union(store: ObjectStore):
    keys = ["masks/task.png", "masks/task/0.png", "masks/task/1.png"]

    await asyncio.gather(*(store.put(key, key.encode(), "image/png") for key in keys))

    assert [await store.get(key, MEGABYTE) for key in keys] == [key.encode() for key in keys]


@pytest.mark.parametrize("size", [1, 3000, MEGABYTE])
async def test_one_byte_more_than_allowed_is_too_large_and_exactly_as_many_is_not(
    store: ObjectStore, size: int
):
    await store.put("uploads/photo.jpg", b"x" * size, "image/jpeg")

    assert len(await store.get("uploads/photo.jpg", max_bytes=size)) == size
    with pytest.raises(ObjectTooLarge, match=f"{size - 1} bytes"):
        await store.get("uploads/photo.jpg", max_bytes=size - 1)


async def test_the_store_works_on_after_an_object_that_was_too_large(store: ObjectStore):
    await store.put("uploads/large.jpg", b"x" * MEGABYTE, "image/jpeg")
    await store.put("uploads/small.jpg", b"small", "image/jpeg")

    for _ in range(20):
        with pytest.raises(ObjectTooLarge):
            await store.get("uploads/large.jpg", max_bytes=10)

    assert await store.get("uploads/small.jpg", max_bytes=10) == b"small"


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("uploads/고양이 사진.jpg", id="Korean and a space"),
        pytest.param("uploads/Bildschirmfoto 9\u202fUhr.png", id="narrow no-break space"),
        pytest.param("uploads/😀/å.png", id="emoji and composed"),
        pytest.param("uploads/a\u030a.png", id="decomposed"),
        pytest.param("uploads/100%.png", id="percent"),
        pytest.param("uploads/a+b&c=d?e#f;g,h:i@j!k$l'm(n)*.png", id="all that URLs reserve"),
        pytest.param('uploads/~-_.[]{}|^`"<>.png', id="all else in ASCII"),
        pytest.param("uploads/.hidden", id="hidden"),
        pytest.param("uploads/" + "long/" * 40 + "k" * 200, id="long"),
    ],
)
async def test_keys_of_any_script_and_sign_work_and_their_urls_lead_back(
    store: ObjectStore, urls: ImageUrls, key: str
):
    await store.put(key, key.encode(), "image/png")

    assert await store.get(key, MEGABYTE) == key.encode()
    assert await store.exists(key)
    assert store.public_url(key).isascii()
    assert urls.key_of(store.public_url(key)) == key


async def test_keys_that_differ_only_in_case_or_composition_are_different_objects(store: ObjectStore):
    keys = ["uploads/a.png", "uploads/A.png", "uploads/\u00e5.png", "uploads/a\u030a.png"]
    for key in keys:
        await store.put(key, key.encode(), "image/png")

    assert [await store.get(key, MEGABYTE) for key in keys] == [key.encode() for key in keys]


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("", id="empty"),
        pytest.param("/etc/passwd", id="absolute"),
        pytest.param("masks/", id="slash at the end"),
        pytest.param("masks//1.png", id="empty segment"),
        pytest.param("..", id="parent"),
        pytest.param("masks/../../etc/passwd", id="up and out"),
        pytest.param("masks/./1.png", id="dot segment"),
        pytest.param("masks\\..\\1.png", id="backslashes"),
        pytest.param("masks/\x00.png", id="NUL"),
        pytest.param("masks/\n.png", id="newline"),
        pytest.param("masks/\x85.png", id="C1 control"),
        pytest.param("masks/\ud800.png", id="half a surrogate pair"),
        pytest.param("masks/%2e%2e/1.png", id="percent-encoded"),
        pytest.param("masks/.partial-1", id="name of a file being written"),
        pytest.param("k" * 1025, id="1025 bytes"),
        pytest.param("é" * 513, id="1026 bytes in 513 characters"),
    ],
)
async def test_what_is_no_key_is_refused_by_every_method(store: ObjectStore, key: str):
    with pytest.raises(InvalidKey):
        await store.get(key, MEGABYTE)
    with pytest.raises(InvalidKey):
        await store.put(key, b"", "image/png")
    with pytest.raises(InvalidKey):
        await store.exists(key)
    with pytest.raises(InvalidKey):
        store.public_url(key)


@pytest.mark.parametrize(
    "content_type", ["", "png", "image/", "image/png\r\nX-Evil: 1", "image/pñg", "a/" + "b" * 300]
)
async def test_what_is_no_media_type_is_refused_and_nothing_written(store: ObjectStore, content_type: str):
    with pytest.raises(InvalidContentType):
        await store.put("masks/1.png", b"", content_type)
    assert not await store.exists("masks/1.png")


async def test_many_puts_side_by_side_all_arrive(store: ObjectStore):
    async def put_and_get(n: int) -> bytes:
        await store.put(f"masks/{n}.png", b"%d" % n, "image/png")
        return await store.get(f"masks/{n}.png", MEGABYTE)

    assert await asyncio.gather(*map(put_and_get, range(64))) == [b"%d" % n for n in range(64)]


async def test_readers_during_puts_see_one_whole_version_never_a_mixture(store: ObjectStore):
    # Unlike S3, rclone may pair one version's length with another's bytes (so all are of one length), and for
    # a moment answer 404 or 500 (so these count as nothing seen). Half an object is never right.
    nothing_seen = (ObjectNotFound, StorageUnavailable) if isinstance(store, R2Store) else ()
    versions = [bytes([n]) * 100_000 for n in range(8)]
    await store.put("masks/1.png", versions[0], "image/png")

    async def write() -> None:
        for version in versions * 2:
            await store.put("masks/1.png", version, "image/png")

    async def read_until(writer: asyncio.Task[None]) -> list[bytes]:
        seen = []
        while not writer.done():
            with contextlib.suppress(*nothing_seen):
                seen.append(await store.get("masks/1.png", MEGABYTE))
        return seen

    writer = asyncio.create_task(write())
    seen = [
        data for readers in await asyncio.gather(*(read_until(writer) for _ in range(3))) for data in readers
    ]

    await writer
    assert seen
    assert set(seen) <= set(versions)


async def test_puts_to_one_key_side_by_side_leave_one_of_them_whole(store: ObjectStore):
    versions = [bytes([n]) * 50_000 for n in range(8)]

    await asyncio.gather(*(store.put("masks/1.png", version, "image/png") for version in versions))

    assert await store.get("masks/1.png", MEGABYTE) in versions
