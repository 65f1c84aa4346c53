"""Objects as files under one directory: the embedded default, for development and small set-ups."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from storage.errors import InvalidKey, ObjectNotFound, ObjectTooLarge, StorageUnavailable
from storage.keys import PARTIAL_PREFIX, quote_key, validate_content_type, validate_key
from storage.urls import FILES_PATH, BaseUrl

_UNWRITABLE_KEY = frozenset({errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})
_MISSING = _UNWRITABLE_KEY | {errno.ENOENT, errno.ENXIO}
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO that somebody left there must not wait for its writer.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OPEN_PARTIAL = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class LocalStore:
    """An `ObjectStore` in a directory. A key is the path of its file; content types are not kept.

    A put writes a file beside its target, flushes it to the disk and renames it over: a crash leaves the old
    object or the new one. Below `root` no symbolic link is followed, so none can lead out of it.
    """

    def __init__(self, root: Path, public_base_url: str) -> None:
        """Use a directory, making it first if need be.

        Args:
            root: Where the objects are.
            public_base_url: The service's own base URL, such as `http://127.0.0.1:8000`; objects are served
                below `/files/` of it.

        Raises:
            ValueError: `public_base_url` is not a plain http or https URL.
            StorageUnavailable: the directory cannot be made.
        """
        self._files_url = BaseUrl.parse(public_base_url).text + FILES_PATH
        self._root = root
        with _disk_errors():
            root.mkdir(parents=True, exist_ok=True)

    async def get(self, key: str, max_bytes: int) -> bytes:
        """See `ObjectStore.get`."""
        validate_key(key)
        return await asyncio.to_thread(self._get, key, max_bytes)

    async def put(self, key: str, data: bytes, content_type: str) -> None:
        """See `ObjectStore.put`. The content type is checked and forgotten."""
        validate_key(key)
        validate_content_type(content_type)
        await asyncio.to_thread(self._put, key, data)

    async def exists(self, key: str) -> bool:
        """See `ObjectStore.exists`."""
        validate_key(key)
        return await asyncio.to_thread(self._exists, key)

    def public_url(self, key: str) -> str:
        """See `ObjectStore.public_url`."""
        validate_key(key)
        return self._files_url + quote_key(key)

    async def aclose(self) -> None:
        """Nothing is held open."""

    def _get(self, key: str, max_bytes: int) -> bytes:
        with _missing_is_not_found(key), self._folder_of(key) as (folder_fd, name):
            file_fd = os.open(name, _OPEN_FILE, dir_fd=folder_fd)
            with open(file_fd, "rb") as file:
                status = os.fstat(file_fd)
                if not stat.S_ISREG(status.st_mode):
                    raise ObjectNotFound(f"there is no object {key!r}")
                # The byte more tells a file that somebody else is making longer from one that fits.
                data = file.read(min(status.st_size, max_bytes) + 1)
        if len(data) > max_bytes:
            raise ObjectTooLarge(f"the object {key!r} has more than the {max_bytes} bytes allowed")
        return data

    def _exists(self, key: str) -> bool:
        try:
            with _missing_is_not_found(key), self._folder_of(key) as (folder_fd, name):
                mode = os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_mode
        except ObjectNotFound:
            return False
        return stat.S_ISREG(mode)

    def _put(self, key: str, data: bytes) -> None:
        with _disk_errors(_UNWRITABLE_KEY), self._folder_of(key, make=True) as (folder_fd, name):
            partial = PARTIAL_PREFIX + secrets.token_hex(16)
            try:
                with open(os.open(partial, _OPEN_PARTIAL, 0o644, dir_fd=folder_fd), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
                os.fsync(folder_fd)  # the name, too
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(partial, dir_fd=folder_fd)
                raise

    @contextlib.contextmanager
    def _folder_of(self, key: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """Open the folder of a key one segment at a time, so that no link is followed, not even in a race."""
        *folders, name = key.split("/")
        # The root itself may be a link: it is the operator's word, not a caller's.
        folder_fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for folder in folders:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(folder, dir_fd=folder_fd)
                inner_fd = os.open(folder, _OPEN_DIRECTORY, dir_fd=folder_fd)
                os.close(folder_fd)
                folder_fd = inner_fd
            yield folder_fd, name
        finally:
            os.close(folder_fd)


@contextlib.contextmanager
def _disk_errors(unwritable_key: frozenset[int] = frozenset()) -> Iterator[None]:
    """Turn the disk's errors into ours, without the path that an OSError carries."""
    try:
        yield
    except OSError as error:
        if error.errno in unwritable_key:
            raise InvalidKey(f"the local store cannot hold this key: {error.strerror}") from error
        raise StorageUnavailable(f"the local store's disk failed: {error.strerror}") from error


@contextlib.contextmanager
def _missing_is_not_found(key: str) -> Iterator[None]:
    with _disk_errors():
        try:
            yield
        except OSError as error:
            if error.errno in _MISSING:
                raise ObjectNotFound(f"there is no object {key!r}") from error
            raise
