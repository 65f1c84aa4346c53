"""How an image gets to where the service reads it: through the service in local mode, else straight into R2."""

from __future__ import annotations

import mimetypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from clients.client import S3Client, S3ClientError

if TYPE_CHECKING:
    from storage.r2 import R2Store

_R2_SETTINGS = ("R2_ENDPOINT", "R2_ACCESS_KEY_ID", "R2_SECRET_ACCESS_KEY")
_DEFAULT_BUCKET = "s3-images"  # the service's own default


class UploadSettingsError(Exception):
    """The service reads from R2, and what is needed to write there is not in the environment."""


class Uploads(Protocol):
    """Puts images where the service finds them by their key."""

    async def put(self, key: str, data: bytes) -> None:
        """Store an image under `uploads/…`, in place of what was there."""

    async def aclose(self) -> None:
        """Close its connections."""


async def choose_uploads(s3: S3Client, environ: Mapping[str, str]) -> Uploads:
    """Find out what the service reads from.

    Raises:
        UploadSettingsError: it reads from R2, and settings are missing or malformed.
        S3ClientError: it did not say.
    """
    if await s3.takes_uploads():
        return _ThroughService(s3)
    missing = [name for name in _R2_SETTINGS if not environ.get(name)]
    if missing:
        raise UploadSettingsError(
            f"the service reads images from R2, and {', '.join(missing)} is not set: set "
            f"{', '.join(_R2_SETTINGS)} (and R2_BUCKET, if it is not {_DEFAULT_BUCKET}) as the service has them"
        )
    from storage.r2 import R2Store  # boto3 takes its time

    endpoint, key_id, secret = (environ[name].strip() for name in _R2_SETTINGS)
    try:
        return _IntoR2(R2Store(endpoint, environ.get("R2_BUCKET") or _DEFAULT_BUCKET, key_id, secret))
    except ValueError as error:
        raise UploadSettingsError(f"R2_ENDPOINT or R2_BUCKET is wrong: {error}") from error


class _ThroughService:
    def __init__(self, s3: S3Client) -> None:
        self._s3 = s3

    async def put(self, key: str, data: bytes) -> None:
        await self._s3.upload(data, key)

    async def aclose(self) -> None:
        pass  # the client is its owner's


class _IntoR2:
    def __init__(self, store: R2Store) -> None:
        self._store = store

    async def put(self, key: str, data: bytes) -> None:
        from storage.errors import StorageError, StorageTimeout, StorageUnavailable

        try:
            await self._store.put(key, data, mimetypes.guess_type(key)[0] or "application/octet-stream")
        except StorageError as error:
            may_pass = isinstance(error, StorageUnavailable | StorageTimeout)
            raise S3ClientError("UPLOAD_FAILED", str(error), may_pass=may_pass) from error

    async def aclose(self) -> None:
        await self._store.aclose()
