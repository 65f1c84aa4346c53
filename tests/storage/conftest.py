from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from storage.r2 import R2Store
from tests.servers.s3 import S3Server, s3_server


@pytest.fixture(scope="session")
def shared_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def shared_r2_store(shared_s3: S3Server) -> Iterator[R2Store]:
    store = R2Store(
        shared_s3.endpoint, shared_s3.bucket, shared_s3.access_key_id, shared_s3.secret_access_key
    )
    yield store
    asyncio.run(store.aclose())
