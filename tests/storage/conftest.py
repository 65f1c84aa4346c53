from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator

import botocore.retries.standard
import botocore.session
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


@pytest.fixture(scope="session", autouse=True)
def quick_botocore() -> Iterator[None]:
    """Tests make a hundred clients and break a hundred calls.

    So all clients share one reader of botocore's data files, and its pauses between tries are short.
    """
    patch = pytest.MonkeyPatch()
    patch.setattr(botocore.session, "create_loader", functools.cache(botocore.session.create_loader))
    backoff = botocore.retries.standard.ExponentialBackoff
    patch.setattr(backoff, "delay_amount", lambda self, context: 0.01)
    yield
    patch.undo()
