"""The Edge's Worker, the service, and all that both of them need; and at the end what was said."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.pictures import Picture, draw_pictures
from tests.conftest import Serve
from tests.edge.package import Package
from tests.edge.worker import Phone, Transcript, running_worker
from tests.edge.world import (
    API_KEY,
    CALL_TIMEOUT_S,
    GIVE_UP_AFTER_S,
    MAX_BACKLOG,
    PUBLIC_URL,
    USERS,
    World,
    insert_users,
)
from tests.servers.npm import NodeIsMissing
from tests.servers.postgres import running_postgres
from tests.servers.postgrest import running_postgrest
from tests.servers.proxy import running_proxy
from tests.servers.s3 import s3_server

TRANSCRIPT = pytest.StashKey[Transcript]()


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    try:
        return Package(tmp_path_factory.mktemp("clients"))
    except NodeIsMissing as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have it: {error}")
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def compiled(package: Package) -> Package:
    package.compile()
    return package


@pytest.fixture(scope="session")
def picture() -> Picture:
    """A red circle and a blue square."""
    return draw_pictures()[0]


@pytest.fixture(scope="session")
def shared_world(
    served: Serve, compiled: Package, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    transcript = request.config.stash[TRANSCRIPT] = Transcript()
    with (
        s3_server(tmp_path_factory.mktemp("s3")) as s3,
        running_postgres() as postgres,
        postgres.new_database() as dsn,
        running_postgrest(dsn) as supabase,
    ):
        insert_users(dsn)
        service = served(
            {
                "R2_ENDPOINT": s3.endpoint,
                "R2_ACCESS_KEY_ID": s3.access_key_id,
                "R2_SECRET_ACCESS_KEY": s3.secret_access_key,
                "R2_BUCKET": s3.bucket,
                "R2_PUBLIC_URL": PUBLIC_URL,
                "SUPABASE_URL": supabase.url,
                "SUPABASE_SERVICE_KEY": supabase.secret_key,
                "API_SECRET_KEY": API_KEY,
                "S3_MAX_BACKLOG": str(MAX_BACKLOG),
            }
        )
        variables = {
            "R2_PUBLIC_URL": PUBLIC_URL,
            "API_SECRET_KEY": API_KEY,
            "CALL_TIMEOUT_MS": f"{CALL_TIMEOUT_S * 1e3:.0f}",
            "GIVE_UP_AFTER_MS": f"{GIVE_UP_AFTER_S * 1e3:.0f}",
        }
        with (
            running_proxy(service.url) as way,
            running_worker(
                compiled, s3, supabase, transcript, {**variables, "SERVICE_URL": way.url}
            ) as worker,
        ):
            yield World(s3, supabase, service, way, worker, transcript)
        service.stop()


@pytest.fixture
def world(shared_world: World) -> World:
    """With nothing broken by an earlier test."""
    shared_world.way.heal()
    shared_world.supabase.reset()
    return shared_world


@pytest.fixture
def phone(world: World) -> Iterator[Phone]:
    with world.worker.phone(USERS[0]) as phone:
        yield phone


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The transcript; also in the file that `EDGE_TRANSCRIPT` names."""
    transcript = config.stash.get(TRANSCRIPT, None)
    if transcript is None:
        return
    terminalreporter.section("what phone and Worker said")
    text = "\n".join(transcript.lines).strip()
    terminalreporter.write_line(text)
    if path := os.environ.get("EDGE_TRANSCRIPT"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n")
