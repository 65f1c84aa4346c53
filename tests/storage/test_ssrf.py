"""No image URL makes the service call anybody but its own store, or read a file that is none of its objects.

The way of a URL through the service is `ImageUrls.key_of`, then the store's `get`: both are the real ones here, the
store being a real S3 server or a directory. A canary listens where the URLs point to.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import boto3
import httpx
import pytest

from storage.errors import StorageError, StorageRefused, StorageUnavailable
from storage.local import LocalStore
from storage.r2 import R2Store
from storage.store import ObjectStore
from storage.urls import ImageUrls
from tasks.errors import TaskStoreUnavailable
from tasks.supabase import SupabaseTasks
from tests.servers.canary import Canary, listening_canary
from tests.servers.s3 import S3Server
from tests.storage import failing_server as server_that
from tests.storage.failing_server import failing_server
from tests.storage.hostile_urls import hostile_urls

SECRET = b"what no caller may read"


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    with listening_canary() as listening:
        yield listening


@pytest.fixture(autouse=True)
def _nobody_calls_it(canary: Canary) -> Iterator[None]:
    canary.calls.clear()
    yield
    assert canary.calls == []


@pytest.fixture(params=["R2", "local"])
def way_in(
    request: pytest.FixtureRequest, shared_s3: S3Server, shared_r2_store: R2Store, tmp_path: Path
) -> tuple[ImageUrls, ObjectStore]:
    """Which URLs are ours, and the store that they are read from."""
    (tmp_path / "tasks.sqlite3").write_bytes(SECRET)
    if request.param == "local":
        # The service stands beside the canary, on another port.
        base_url = "http://127.0.0.1:2"
        return ImageUrls.for_local(base_url), LocalStore(tmp_path / "files", base_url)
    public_url = "https://images.example.com"
    urls = ImageUrls.for_r2(endpoint=shared_s3.endpoint, bucket=shared_s3.bucket, public_url=public_url)
    return urls, shared_r2_store


async def read(way_in: tuple[ImageUrls, ObjectStore], url: str) -> bytes:
    urls, store = way_in
    return await store.get(urls.key_of(url), 1000)


def test_there_are_enough_of_them() -> None:
    assert len(set(hostile_urls(1, bucket="s3-images", own_port=2).values())) >= 60


async def test_hostile_urls_read_nothing_and_call_nobody(
    way_in: tuple[ImageUrls, ObjectStore], canary: Canary
) -> None:
    for name, url in hostile_urls(canary.port, bucket="s3-images", own_port=2).items():
        with pytest.raises(StorageError):
            pytest.fail(f"{name}: it read {await read(way_in, url)!r}")
        assert canary.calls == [], name


def test_the_canary_would_have_noticed(canary: Canary) -> None:
    httpx.get(f"http://localhost:{canary.port}/a.png", trust_env=False)
    assert canary.calls.pop().startswith(b"GET /a.png")


async def test_a_url_of_ours_is_read_by_its_key_and_its_host_is_never_called(
    canary: Canary, shared_s3: S3Server, shared_r2_store: R2Store
) -> None:
    """So nothing that the public host answers, a redirect to the inside least of all, ever counts."""
    urls = ImageUrls.for_r2(
        endpoint=shared_s3.endpoint, bucket=shared_s3.bucket, public_url=f"http://127.0.0.1:{canary.port}"
    )
    await shared_r2_store.put("uploads/ours.png", b"ours", "image/png")
    way_in = (urls, shared_r2_store)
    assert await read(way_in, f"http://127.0.0.1:{canary.port}/uploads/ours.png") == b"ours"


async def test_an_object_that_is_a_redirect_is_read_as_the_object_that_it_is(
    canary: Canary, shared_s3: S3Server, shared_r2_store: R2Store
) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=shared_s3.endpoint,
        region_name="auto",
        aws_access_key_id=shared_s3.access_key_id,
        aws_secret_access_key=shared_s3.secret_access_key,
    )
    target = f"http://127.0.0.1:{canary.port}/a.png"
    page = f'<meta http-equiv="refresh" content="0; url={target}">'.encode()
    client.put_object(
        Bucket=shared_s3.bucket,
        Key="uploads/redirect.png",
        Body=page,
        ContentType="text/html",
        WebsiteRedirectLocation=target,
    )
    client.close()
    assert await shared_r2_store.get("uploads/redirect.png", 1000) == page


# Of a 303, urllib3 makes an error of its own before it would follow it, and leaves the connection to the collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (300, ""),
        (301, ""),
        (301, "PermanentRedirect"),
        (302, ""),
        (303, ""),
        (307, "TemporaryRedirect"),
        (308, ""),
        (400, "AuthorizationHeaderMalformed"),
    ],
)
async def test_a_store_that_redirects_is_not_followed(canary: Canary, status: int, code: str) -> None:
    elsewhere = f"127.0.0.1:{canary.port}"
    body = f"<Error><Code>{code}</Code><Endpoint>{elsewhere}</Endpoint><Region>evil</Region></Error>"
    headers = {"Location": f"http://{elsewhere}/a.png", "x-amz-bucket-region": "evil"}
    with failing_server(server_that.answer(status, body.encode() if code else b"", headers)) as server:
        store = R2Store(server.endpoint, "s3-images", "key", "secret")
        for call in (
            store.get("uploads/a.png", 1000),
            store.put("masks/a.png", b"", "image/png"),
            store.exists("uploads/a.png"),
        ):
            with pytest.raises(StorageUnavailable if status == 303 else StorageRefused):
                await call
        await store.aclose()
    gc.collect()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_table_that_redirects_is_not_followed_and_the_service_key_stays(
    canary: Canary, status: int
) -> None:
    headers = {"Location": f"http://127.0.0.1:{canary.port}/rest/v1/segmentation_results"}
    with failing_server(server_that.answer(status, b"", headers)) as server:
        tasks = SupabaseTasks(server.endpoint, "sb_secret_0123456789")
        with pytest.raises(TaskStoreUnavailable, match=str(status)):
            await tasks.get("0c9f7f1e-51d1-4a1b-9a55-c0a1f5f3b7aa")
        await tasks.aclose()
