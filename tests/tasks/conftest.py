"""Real servers for the tests of tasks: one Postgres, and what speaks PostgREST over it, for the whole run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.servers.postgres import Postgres, running_postgres
from tests.servers.postgrest import PostgrestStandIn, running_postgrest
from tests.servers.supabase_lite import NodeIsMissing, SupabaseLite, running_supabase_lite


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
