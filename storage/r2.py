"""Objects in Cloudflare R2, or any other S3, through boto3.

boto3 blocks, so calls run in threads: as many as there are pooled connections, and never more.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import boto3.session
import botocore.exceptions
import botocore.handlers
import botocore.parsers
import botocore.session
import urllib3.exceptions
from botocore.config import Config

from storage.errors import (
    ObjectNotFound,
    ObjectTooLarge,
    StorageError,
    StorageRefused,
    StorageTimeout,
    StorageUnavailable,
)
from storage.keys import quote_key, validate_content_type, validate_key
from storage.urls import BaseUrl, parse_endpoint, validate_bucket

P = ParamSpec("P")
T = TypeVar("T")

_CHUNK_BYTES = 256 * 1024
_MAX_TOLD_PAUSE_S = 2.0  # a thread waits no longer because of a `Retry-After`
_FIRST_BODY_PAUSE_S = 0.05  # before a body that broke off is asked for again; doubles each time

# What each error of the libraries below means. The nearest base class in this table decides, so an error that
# nobody has thought about comes out as refused; a test fails when botocore grows one.
ERRORS: dict[type[Exception], type[StorageError]] = {
    botocore.exceptions.BotoCoreError: StorageRefused,
    botocore.exceptions.UndefinedModelAttributeError: StorageRefused,
    botocore.parsers.ResponseParserError: StorageUnavailable,
    botocore.exceptions.ConnectionError: StorageUnavailable,
    botocore.exceptions.SSLError: StorageUnavailable,
    botocore.exceptions.ProxyConnectionError: StorageUnavailable,
    botocore.exceptions.HTTPClientError: StorageUnavailable,
    botocore.exceptions.IncompleteReadError: StorageUnavailable,
    botocore.exceptions.ChecksumError: StorageUnavailable,
    botocore.exceptions.FlexibleChecksumError: StorageUnavailable,
    botocore.exceptions.AwsChunkedWrapperError: StorageUnavailable,
    botocore.exceptions.CapacityNotAvailableError: StorageUnavailable,
    botocore.exceptions.ConnectTimeoutError: StorageTimeout,
    botocore.exceptions.ReadTimeoutError: StorageTimeout,
    # Bodies are read from urllib3 itself: `StreamingBody.read` waits for a whole chunk, however it drips.
    urllib3.exceptions.HTTPError: StorageUnavailable,
    urllib3.exceptions.TimeoutError: StorageTimeout,
    OSError: StorageUnavailable,
    TimeoutError: StorageTimeout,
    ValueError: StorageUnavailable,  # botocore reads dates and lengths of an answer's headers unguarded
}


class R2Store:
    """An `ObjectStore` in one bucket of R2.

    Answers of 429 and 5xx and network errors are retried by botocore's standard mode: jittered backoff, and
    a quota that stops retries while most of them fail. A body that breaks off is asked for again. A short
    `Retry-After` is waited for; a long one ends the retries, and is on the error.

    Retries here are for what passes in a moment. Whoever can wait for longer tries the whole call again: no
    call takes longer than `deadline_s`, and its thread is free after `max_attempts` read timeouts.
    """

    def __init__(
        self,
        endpoint: str,
        bucket: str,
        access_key_id: str,
        secret_access_key: str,
        *,
        public_url: str | None = None,
        connect_timeout_s: float = 3.0,
        read_timeout_s: float = 5.0,
        deadline_s: float = 15.0,
        max_attempts: int = 3,
        pool_size: int = 16,
    ) -> None:
        """Prepare a client. No connection is made yet; profiles, keys and endpoints of AWS tools have no say.

        Args:
            endpoint: The S3 endpoint, such as `https://ACCOUNT.r2.cloudflarestorage.com`; no bucket in it.
            bucket: The bucket's name.
            access_key_id: Of an R2 API token that may read and write objects in the bucket.
            secret_access_key: The same token's secret.
            public_url: The custom domain at which others read the bucket. Without it, `public_url()` answers
                with the S3 endpoint, which serves signed requests only.
            connect_timeout_s: For each connection.
            read_timeout_s: For each wait for bytes.
            deadline_s: For a whole call, with its retries and its wait for a free connection.
            max_attempts: Requests per call, the first included.
            pool_size: Connections, threads, and so calls that run side by side.

        Raises:
            ValueError: endpoint, bucket or public URL are malformed.
        """
        endpoint_url = parse_endpoint(endpoint)
        validate_bucket(bucket)
        public = endpoint_url.below(f"/{bucket}") if public_url is None else BaseUrl.parse(public_url)
        self._public_url = public.text
        self._bucket = bucket
        self._deadline_s = deadline_s
        self._max_attempts = max_attempts
        self._executor = ThreadPoolExecutor(pool_size, thread_name_prefix="r2")
        self._is_closed = False
        config = _client_config(
            connect_timeout=connect_timeout_s,
            read_timeout=read_timeout_s,
            retries={"mode": "standard", "total_max_attempts": max_attempts},
            max_pool_connections=pool_size,
        )
        self._client = _make_client(endpoint_url.text, access_key_id, secret_access_key, config)
        self._client.meta.events.register_first("needs-retry.s3", self._wait_as_told)

    async def get(self, key: str, max_bytes: int) -> bytes:
        """See `ObjectStore.get`."""
        validate_key(key)
        return await self._in_thread(self._get, key, max_bytes)

    async def put(self, key: str, data: bytes, content_type: str) -> None:
        """See `ObjectStore.put`. R2 takes one write a second per key and answers 429 to more."""
        validate_key(key)
        validate_content_type(content_type)
        await self._in_thread(self._put, key, data, content_type)

    async def exists(self, key: str) -> bool:
        """See `ObjectStore.exists`. A bucket that is not there looks like an object that is not there."""
        validate_key(key)
        return await self._in_thread(self._exists, key)

    def public_url(self, key: str) -> str:
        """See `ObjectStore.public_url`."""
        validate_key(key)
        return f"{self._public_url}/{quote_key(key)}"

    async def aclose(self) -> None:
        """See `ObjectStore.aclose`. Calls that wait for a free connection still get theirs."""
        if self._is_closed:
            return
        self._is_closed = True
        await asyncio.to_thread(self._executor.shutdown)
        self._client.close()

    async def _in_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._is_closed:
            raise StorageUnavailable("the object store is closed")
        future = asyncio.wrap_future(self._executor.submit(call, *args, **kwargs))
        try:
            async with asyncio.timeout(self._deadline_s):
                return await future
        except TimeoutError as error:
            raise StorageTimeout(f"the object store gave no answer within {self._deadline_s:g} s") from error

    def _wait_as_told(self, response: Any, attempts: int, **_: Any) -> float | bool | None:
        """Read the `Retry-After` of an answer, which botocore does not.

        Returns:
            Seconds until the next try, False for none, or None to leave it to botocore.
        """
        if response is None or attempts >= self._max_attempts:
            return None
        told_s = _retry_after_s(response[1])
        if not told_s:
            return None
        return told_s * random.uniform(1.0, 1.25) if told_s <= _MAX_TOLD_PAUSE_S else False

    def _get(self, key: str, max_bytes: int) -> bytes:
        give_up_at = time.monotonic() + self._deadline_s
        for attempt in itertools.count(1):
            try:
                return self._get_once(key, max_bytes, give_up_at)
            except _BodyBrokeOff as error:
                if attempt >= self._max_attempts or time.monotonic() > give_up_at:
                    raise StorageUnavailable(f"the object store's answer broke off: {error}") from error
            time.sleep(random.uniform(0, _FIRST_BODY_PAUSE_S * 2 ** (attempt - 1)))
        raise AssertionError("unreachable: the loop has no end")

    def _get_once(self, key: str, max_bytes: int, give_up_at: float) -> bytes:
        with _storage_errors(key):
            response = self._client.get_object(Bucket=self._bucket, Key=key)
            expected_bytes = response.get("ContentLength")
            # Leaving the block hands the connection back if the body was read to its end, and else cuts it.
            with response["Body"] as body:
                if expected_bytes is not None and expected_bytes > max_bytes:
                    raise _too_large(key, max_bytes)
                data = _read_at_most(body, key, max_bytes, give_up_at)
        if expected_bytes is not None and len(data) != expected_bytes:
            raise _BodyBrokeOff(f"{len(data)} of {expected_bytes} bytes")
        return data

    def _put(self, key: str, data: bytes, content_type: str) -> None:
        with _storage_errors(key):
            self._client.put_object(Bucket=self._bucket, Key=key, Body=data, ContentType=content_type)

    def _exists(self, key: str) -> bool:
        try:
            with _storage_errors(key):
                self._client.head_object(Bucket=self._bucket, Key=key)
        except ObjectNotFound:
            return False
        return True


class _BodyBrokeOff(Exception):
    """The connection ended in the middle of a body; the same request may well succeed now."""


def _client_config(**options: Any) -> Config:
    return Config(
        region_name="auto",
        signature_version="s3v4",
        s3={"addressing_style": "path"},
        # The checksums that boto3 adds since 1.36 are not part of R2's S3; over https they break puts.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        tcp_keepalive=True,
        **options,
    )


def _make_client(endpoint: str, access_key_id: str, secret_access_key: str, config: Config) -> Any:
    # (name in files, name in the environment, default, conversion): neither ~/.aws nor AWS_PROFILE is read.
    nowhere = (None, None, os.devnull, None)
    session = botocore.session.Session(
        session_vars={
            "profile": (None, None, None, None),
            "config_file": nowhere,
            "credentials_file": nowhere,
        }
    )
    client = boto3.session.Session(botocore_session=session).client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=access_key_id,
        aws_secret_access_key=secret_access_key,
        config=config,
    )
    client.meta.events.register("before-call.s3", _stay_where_we_are)
    # `Expect: 100-continue` makes every put wait for the server's consent: a round trip more, for a few kB.
    client.meta.events.unregister("before-call.s3", botocore.handlers.add_expect_header)
    return client


def _stay_where_we_are(context: dict[str, Any], **_: Any) -> None:
    """Mark a request as redirected already, so that botocore does not look for the bucket in other regions.

    R2 has one region. Where an endpoint redirects every request (http instead of https will do), botocore's
    search asks it again for every answer until Python's stack is full.
    """
    context["s3_redirect"]["redirected"] = True


def _read_at_most(body: Any, key: str, max_bytes: int, give_up_at: float) -> bytes:
    """Read a body in whatever pieces arrive, so that limit and deadline hold even if it drips for ever."""
    chunks: list[bytes] = []
    n_bytes = 0
    while True:
        try:
            chunk = body.read1(_CHUNK_BYTES)
        except urllib3.exceptions.ProtocolError as error:
            raise _BodyBrokeOff(f"{n_bytes} bytes of its body") from error
        if not chunk:
            return b"".join(chunks)
        n_bytes += len(chunk)
        if n_bytes > max_bytes:
            raise _too_large(key, max_bytes)
        if time.monotonic() > give_up_at:
            raise StorageTimeout("the object store sent the object too slowly")
        chunks.append(chunk)


def _too_large(key: str, max_bytes: int) -> ObjectTooLarge:
    return ObjectTooLarge(f"the object {key!r} has more than the {max_bytes} bytes allowed")


@contextlib.contextmanager
def _storage_errors(key: str) -> Iterator[None]:
    """Turn every error of boto3 and of the network into ours, without the words of the server in it."""
    try:
        yield
    except StorageError:
        raise
    except botocore.exceptions.ClientError as error:
        raise _answered(error, key) from error
    except tuple(ERRORS) as error:
        raise kind_of(type(error))(f"the object store failed: {type(error).__name__}") from error


def kind_of(error: type[Exception]) -> type[StorageError]:
    """Find what an error of the libraries below means: the nearest base class in `ERRORS` decides."""
    return next(ERRORS[base] for base in error.__mro__ if base in ERRORS)


def _answered(error: botocore.exceptions.ClientError, key: str) -> StorageError:
    """Read an S3 error answer. Its message is left alone: S3 puts key ids and signed strings in there."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = re.sub("[^A-Za-z0-9.]", "", str(error.response.get("Error", {}).get("Code", "")))[:64]
    # The answer to HEAD has no body that could tell a missing object from a missing bucket.
    if code == "NoSuchKey" or (status == 404 and error.operation_name == "HeadObject"):
        return ObjectNotFound(f"there is no object {key!r}")
    status_and_code = f"{status} {code}" if code != str(status) else code
    said = f"the object store answered {status_and_code} to {error.operation_name}"
    if status == 408 or code == "RequestTimeout":
        return StorageTimeout(said)
    if status == 429 or status >= 500:
        unavailable = StorageUnavailable(said)
        unavailable.retry_after_s = _retry_after_s(error.response)
        return unavailable
    return StorageRefused(said)


def _retry_after_s(answer: Mapping[str, Any]) -> float | None:
    """Seconds from the `Retry-After` of a 429 or 5xx; None if there is none, or it is not a number."""
    metadata = answer.get("ResponseMetadata", {})
    told = str(metadata.get("HTTPHeaders", {}).get("retry-after", ""))
    is_to_wait = metadata.get("HTTPStatusCode", 0) in (429, 500, 502, 503, 504)
    return float(told) if is_to_wait and re.fullmatch("[0-9]{1,6}", told) else None
