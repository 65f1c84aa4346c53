"""What is particular to LocalStore: the disk, and links in it."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage.errors import InvalidKey, ObjectNotFound, StorageUnavailable
from storage.local import LocalStore


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "objects"


@pytest.fixture
def store(root: Path) -> LocalStore:
    return LocalStore(root, "http://127.0.0.1:8000/")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret.png").write_bytes(b"secret")
    return folder


async def test_a_key_is_the_path_of_its_file(store: LocalStore, root: Path):
    await store.put("masks/42/0.png", b"mask", "image/png")

    assert (root / "masks/42/0.png").read_bytes() == b"mask"
    assert store.public_url("masks/42/0.png") == "http://127.0.0.1:8000/files/masks/42/0.png"


async def test_a_link_to_a_file_outside_is_no_object(store: LocalStore, root: Path, outside: Path):
    (root / "uploads").mkdir()
    (root / "uploads/link.png").symlink_to(outside / "secret.png")

    assert not await store.exists("uploads/link.png")
    with pytest.raises(ObjectNotFound):
        await store.get("uploads/link.png", 100)


async def test_a_put_over_a_link_replaces_the_link_and_not_what_it_points_to(
    store: LocalStore, root: Path, outside: Path
):
    (root / "link.png").symlink_to(outside / "secret.png")

    await store.put("link.png", b"new", "image/png")

    assert await store.get("link.png", 100) == b"new"
    assert (outside / "secret.png").read_bytes() == b"secret"


async def test_a_link_to_a_directory_outside_is_not_followed(store: LocalStore, root: Path, outside: Path):
    (root / "uploads").symlink_to(outside)

    assert not await store.exists("uploads/secret.png")
    with pytest.raises(ObjectNotFound):
        await store.get("uploads/secret.png", 100)
    with pytest.raises(InvalidKey):
        await store.put("uploads/new.png", b"new", "image/png")
    assert [path.name for path in outside.iterdir()] == ["secret.png"]


async def test_the_directory_itself_may_be_a_link(tmp_path: Path, outside: Path):
    (tmp_path / "data").symlink_to(outside)

    assert await LocalStore(tmp_path / "data", "http://localhost").get("secret.png", 100) == b"secret"


@pytest.mark.timeout(60)
async def test_a_fifo_is_no_object_and_nobody_waits_for_its_writer(store: LocalStore, root: Path):
    os.mkfifo(root / "fifo")

    assert not await store.exists("fifo")
    with pytest.raises(ObjectNotFound):
        await store.get("fifo", 100)


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("masks", id="where there is a directory"),
        pytest.param("masks/1.png/2.png", id="below a file"),
        pytest.param("k" * 256, id="segment too long for the file system"),
    ],
)
async def test_a_key_that_a_file_system_cannot_hold_is_invalid(store: LocalStore, root: Path, key: str):
    await store.put("masks/1.png", b"mask", "image/png")

    with pytest.raises(InvalidKey):
        await store.put(key, b"new", "image/png")
    assert not await store.exists(key)
    assert _files_below(root) == ["masks/1.png"]


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 1,000 bytes: a write fails in its middle, as on a disk that is full.

    Not a fixture: pytest writes its own reports before a fixture ends.
    """
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    old_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old_limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limits)
        signal.signal(signal.SIGXFSZ, old_handler)


async def test_a_put_that_fails_half_way_leaves_the_old_object_and_no_rubbish(store: LocalStore, root: Path):
    await store.put("masks/1.png", b"old", "image/png")

    with pytest.raises(StorageUnavailable) as caught, full_disk():
        await store.put("masks/1.png", b"n" * 5000, "image/png")

    assert str(root) not in str(caught.value)
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert await store.get("masks/1.png", 100) == b"old"
    assert _files_below(root) == ["masks/1.png"]


async def test_a_root_that_cannot_be_made_is_reported_without_its_path(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(StorageUnavailable) as caught:
        LocalStore(tmp_path / "file" / "objects", "http://localhost")
    assert str(tmp_path) not in str(caught.value)


def test_a_process_killed_between_puts_leaves_whole_objects_only(root: Path):
    writer = """
import asyncio, sys
from pathlib import Path
from storage.local import LocalStore
async def main():
    store = LocalStore(Path(sys.argv[1]), "http://localhost")
    n = 0
    while True:
        n += 1
        await store.put("masks/1.png", bytes([n % 256]) * 300_000, "image/png")
asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", writer, str(root)])
    try:
        deadline = time.monotonic() + 120
        while not (root / "masks/1.png").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()

    data = (root / "masks/1.png").read_bytes()
    assert len(data) == 300_000
    assert len(set(data)) == 1


def _files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())
