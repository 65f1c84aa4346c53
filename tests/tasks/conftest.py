"""Real servers for the tests of tasks: one Postgres, and what speaks PostgREST over it, for the whole run."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path

import pytest

from storage import ObjectStore
from storage.local import LocalStore
from storage.r2 import R2Store
from tasks.journal import Journal
from tasks.local import LocalTasks
from tasks.store import TaskStore
from tasks.supabase import SupabaseTasks
from tests.servers.npm import NodeIsMissing
from tests.servers.postgres import Postgres, running_postgres
from tests.servers.postgrest import PostgrestStandIn, insert_task, running_postgrest
from tests.servers.s3 import S3Server, s3_server
from tests.servers.supabase_lite import SupabaseLite, running_supabase_lite
from tests.tasks.colour_runner import ColourRunner
from tests.tasks.world import FAST, PUBLIC_URL, World, picture


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def dsn(postgres: Postgres) -> Iterator[str]:
    """A database with Supabase's prelude and our tables."""
    with postgres.new_database() as database:
        yield database


@pytest.fixture(scope="session")
def stand_in_server(dsn: str) -> Iterator[PostgrestStandIn]:
    with running_postgrest(dsn) as server:
        yield server


@pytest.fixture
def stand_in(stand_in_server: PostgrestStandIn) -> PostgrestStandIn:
    """The PostgREST stand-in, with no faults left over from other tests."""
    stand_in_server.reset()
    return stand_in_server


@pytest.fixture(scope="session")
def supabase_lite(postgres: Postgres) -> Iterator[SupabaseLite]:
    try:
        # A database of its own: it hands out grants of its own when it starts.
        with postgres.new_database() as database, running_supabase_lite(database) as server:
            yield server
    except NodeIsMissing as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have it: {error}")
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def codec_pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2, thread_name_prefix="codec") as pool:
        yield pool


@pytest.fixture(scope="session")
def r2_store(s3: S3Server) -> Iterator[R2Store]:
    store = R2Store(
        s3.endpoint,
        s3.bucket,
        s3.access_key_id,
        s3.secret_access_key,
        public_url=PUBLIC_URL,
        connect_timeout_s=15,
        deadline_s=40,
        max_attempts=2,
    )
    yield store
    asyncio.run(store.aclose())


@pytest.fixture
async def world(
    r2_store: R2Store, stand_in: PostgrestStandIn, dsn: str, codec_pool: ThreadPoolExecutor, tmp_path: Path
) -> AsyncIterator[World]:
    """As in production: R2 and Supabase."""
    async with aclosing(SupabaseTasks(stand_in.url, stand_in.secret_key, retry=FAST)) as tasks:
        made = await _world(r2_store, tasks, lambda: insert_task(dsn), codec_pool, tmp_path)
        async with aclosing(made):
            yield made


@pytest.fixture
async def embedded(tmp_path: Path, codec_pool: ThreadPoolExecutor) -> AsyncIterator[World]:
    """As on a developer's machine: a directory and SQLite."""
    async with (
        aclosing(LocalStore(tmp_path / "files", "http://127.0.0.1:8000")) as store,
        aclosing(LocalTasks(tmp_path / "tasks.sqlite3")) as tasks,
    ):
        made = await _world(store, tasks, lambda: str(uuid.uuid4()), codec_pool, tmp_path)
        async with aclosing(made):
            yield made


async def _world(
    store: ObjectStore,
    tasks: TaskStore,
    new_task_id: Callable[[], str],
    pool: ThreadPoolExecutor,
    home: Path,
) -> World:
    await store.put("uploads/picture.png", picture(), "image/png")
    return World(store, tasks, ColourRunner(), new_task_id, pool, Journal(home / "journal"))


@pytest.fixture(params=["world", "embedded"])
def any_world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(request.param)
    return found
