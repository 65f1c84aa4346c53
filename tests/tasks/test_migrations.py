"""The SQL of `tasks/migrations` on a real Postgres, with Supabase's real roles deciding who may do what."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import psycopg
import pytest
from psycopg import sql

from tests.servers.postgres import MIGRATIONS_DIR, Postgres, apply_migrations
from tests.servers.postgrest import PostgrestStandIn, insert_task, insert_user

TABLES = ("users_profile", "projects", "segmentation_results", "usage_logs")
STATEMENTS = {
    "select": "select * from public.{}",
    "insert": "insert into public.{} default values",
    "update": "update public.{} set id = id",
    "delete": "delete from public.{}",
}


@dataclass(frozen=True)
class World:
    """Two users with a row in each table."""

    dsn: str
    owner: str
    stranger: str
    task_id: str

    @contextmanager
    def as_role(self, role: str, user_id: str | None = None) -> Iterator[psycopg.Connection[Any]]:
        """A transaction as PostgREST opens it for such a caller; rolled back at the end."""
        with psycopg.connect(self.dsn) as connection:
            claims = {"role": role} | ({"sub": user_id} if user_id else {})
            connection.execute("select set_config('request.jwt.claims', %s, true)", (json.dumps(claims),))
            connection.execute(sql.SQL("set local role {}").format(sql.Identifier(role)))
            yield connection
            connection.rollback()


@pytest.fixture(scope="module")
def world(postgres: Postgres) -> Iterator[World]:
    with postgres.new_database() as dsn:
        owner, stranger = insert_user(dsn), insert_user(dsn)
        with psycopg.connect(dsn, autocommit=True) as connection:
            for user in (owner, stranger):
                connection.execute("insert into users_profile (id) values (%s)", (user,))
                connection.execute("insert into projects (user_id, name) values (%s, 'p')", (user,))
                connection.execute("insert into usage_logs (user_id, action) values (%s, 'predict')", (user,))
        task_id = insert_task(dsn, user_id=owner)
        insert_task(dsn, user_id=stranger)
        yield World(dsn, owner, stranger, task_id)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("verb", STATEMENTS)
def test_anon_can_do_nothing_at_all(world: World, table: str, verb: str) -> None:
    with world.as_role("anon") as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(STATEMENTS[verb].format(table))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("verb", ["insert", "update", "delete"])
def test_users_write_nothing_not_even_their_own_rows(world: World, table: str, verb: str) -> None:
    with (
        world.as_role("authenticated", world.owner) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(STATEMENTS[verb].format(table))


@pytest.mark.parametrize("table", TABLES)
def test_users_read_their_own_rows_and_no_others(world: World, table: str) -> None:
    column = "id" if table == "users_profile" else "user_id"
    for user in (world.owner, world.stranger):
        with world.as_role("authenticated", user) as connection:
            rows = connection.execute(f"select {column}::text from public.{table}").fetchall()
        assert rows == [(user,)]


@pytest.mark.parametrize("table", TABLES)
def test_a_user_without_an_identity_reads_nothing(world: World, table: str) -> None:
    with world.as_role("authenticated") as connection:
        assert connection.execute(f"select * from public.{table}").fetchall() == []
    with world.as_role("authenticated", str(uuid.uuid4())) as connection:
        assert connection.execute(f"select * from public.{table}").fetchall() == []


@pytest.mark.parametrize("table", TABLES)
def test_service_role_reads_and_updates_every_row(world: World, table: str) -> None:
    with world.as_role("service_role") as connection:
        assert len(connection.execute(f"select * from public.{table}").fetchall()) == 2
        assert connection.execute(f"update public.{table} set id = id").rowcount == 2


def test_row_level_security_alone_holds_if_someone_gives_the_grants_back(postgres: Postgres) -> None:
    with postgres.new_database() as dsn:
        owner = insert_user(dsn)
        task_id = insert_task(dsn, user_id=owner)
        open_world = World(dsn, owner, insert_user(dsn), task_id)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("grant all on all tables in schema public to anon, authenticated")
        for role, user in [("anon", None), ("authenticated", open_world.stranger), ("authenticated", owner)]:
            with open_world.as_role(role, user) as connection:
                update = "update segmentation_results set status = 'done'"
                assert connection.execute(update).rowcount == 0
                assert connection.execute("delete from segmentation_results").rowcount == 0
                seen = connection.execute("select id::text from segmentation_results").fetchall()
                assert seen == ([(task_id,)] if user == owner else [])
                with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
                    connection.execute(
                        "insert into segmentation_results (user_id, source_image_url, text_prompt)"
                        " values (%s, 'a', 'b')",
                        (owner,),
                    )


def test_over_http_too_the_owner_reads_and_nobody_but_the_service_writes(
    stand_in: PostgrestStandIn, dsn: str
) -> None:
    owner, stranger = insert_user(dsn), insert_user(dsn)
    task_id = insert_task(dsn, user_id=owner)

    def call(method: str, key: str, bearer: str | None = None) -> httpx.Response:
        headers = {"apikey": key, "Prefer": "return=representation"}
        headers |= {"Authorization": f"Bearer {bearer}"} if bearer else {}
        url = f"{stand_in.url}/rest/v1/segmentation_results?id=eq.{task_id}&select=id,status"
        return httpx.request(
            method,
            url,
            headers=headers,
            json={"status": "done"} if method == "PATCH" else None,
            trust_env=False,
        )

    anon = stand_in.publishable_key
    row = [{"id": task_id, "status": "pending"}]
    assert call("GET", anon, stand_in.user_jwt(owner)).json() == row
    assert call("GET", anon, stand_in.user_jwt(stranger)).json() == []
    assert call("GET", anon).status_code == 401
    assert call("GET", stand_in.anon_jwt, stand_in.anon_jwt).status_code == 401
    assert (
        call("GET", stand_in.service_jwt).status_code == 401
    )  # the key alone, without Authorization, is anon
    assert call("GET", "sb_secret_wrong").status_code == 401
    assert call("PATCH", anon).json()["code"] == "42501"
    assert call("PATCH", anon, stand_in.user_jwt(stranger)).status_code == 403
    assert call("PATCH", anon, stand_in.user_jwt(owner)).status_code == 403
    assert call("GET", stand_in.secret_key).json() == row
    assert call("PATCH", stand_in.secret_key).json() == [{"id": task_id, "status": "done"}]


def test_it_can_be_applied_again_and_keeps_what_is_there(postgres: Postgres) -> None:
    with postgres.new_database() as dsn:
        task_id = insert_task(dsn)
        before = _schema(dsn)
        apply_migrations(dsn)
        apply_migrations(dsn)
        assert _schema(dsn) == before
        with psycopg.connect(dsn) as connection:
            assert connection.execute("select id::text from segmentation_results").fetchall() == [(task_id,)]


def test_it_joins_a_realtime_publication_that_is_there_already(postgres: Postgres) -> None:
    with postgres.new_database(migrated=False) as dsn:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("create table public.other (id int primary key)")
            connection.execute("create publication supabase_realtime for table public.other")
        apply_migrations(dsn)
        assert _published(dsn) == ["other", "segmentation_results"]


def test_a_publication_of_all_tables_is_enough_as_it_is(postgres: Postgres) -> None:
    with postgres.new_database(migrated=False) as dsn:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("create publication supabase_realtime for all tables")
        apply_migrations(dsn)
        assert "segmentation_results" in _published(dsn)


def test_realtime_publishes_results_and_nothing_else(world: World) -> None:
    assert _published(world.dsn) == ["segmentation_results"]


def test_an_owner_who_is_no_superuser_can_apply_it_as_on_supabase(postgres: Postgres) -> None:
    with postgres.new_database(migrated=False) as dsn:
        role = sql.Identifier(f"project_owner_{uuid.uuid4().hex[:8]}")
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("create role {} login").format(role))
            database = sql.Identifier(connection.info.dbname)
            for grant in (
                sql.SQL("grant create on database {} to {}").format(database, role),
                sql.SQL("grant create, usage on schema public to {} with grant option").format(role),
                sql.SQL("grant usage on schema auth to {}").format(role),
                sql.SQL("grant references, select on auth.users to {}").format(role),
            ):
                connection.execute(grant)
            connection.execute(sql.SQL("set role {}").format(role))
            for _ in range(2):
                for path in sorted(MIGRATIONS_DIR.glob("*.sql")):
                    connection.execute(path.read_bytes())
            connection.execute("reset role")
        assert _published(dsn) == ["segmentation_results"]
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("drop owned by {} cascade").format(role))
            connection.execute(sql.SQL("drop role {}").format(role))


@pytest.mark.parametrize("status", ["pending", "processing", "done", "error"])
def test_the_four_statuses_are_allowed(world: World, status: str) -> None:
    with world.as_role("service_role") as connection:
        connection.execute("update segmentation_results set status = %s", (status,))


@pytest.mark.parametrize("status", ["", "DONE", "failed", None])
def test_no_other_status_is_allowed(world: World, status: str | None) -> None:
    with world.as_role("service_role") as connection, pytest.raises(psycopg.errors.IntegrityError):
        connection.execute("update segmentation_results set status = %s", (status,))


@pytest.mark.parametrize(
    "statement",
    ["update users_profile set credits = -1", "update usage_logs set credits_used = -1"],
)
def test_credits_are_never_negative(world: World, statement: str) -> None:
    with world.as_role("service_role") as connection, pytest.raises(psycopg.errors.CheckViolation):
        connection.execute(statement)


def test_updated_at_moves_with_every_update_whatever_the_update_says(world: World) -> None:
    with psycopg.connect(world.dsn, autocommit=True) as connection:
        query = "select created_at, updated_at from segmentation_results where id = %s"
        change = "update segmentation_results set updated_at = '2000-01-01' where id = %s"
        connection.execute(change, (world.task_id,))
        first = connection.execute(query, (world.task_id,)).fetchone()
        connection.execute(change, (world.task_id,))
        second = connection.execute(query, (world.task_id,)).fetchone()
    assert first is not None
    assert second is not None
    assert first[0] == second[0] <= first[1] < second[1]


def test_everything_of_a_user_goes_with_the_user(postgres: Postgres) -> None:
    with postgres.new_database() as dsn:
        user = insert_user(dsn)
        insert_task(dsn, user_id=user)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("insert into users_profile (id) values (%s)", (user,))
            connection.execute("delete from auth.users where id = %s", (user,))
            assert connection.execute("select count(*) from segmentation_results").fetchone() == (0,)
            assert connection.execute("select count(*) from users_profile").fetchone() == (0,)


def _published(dsn: str) -> list[str]:
    with psycopg.connect(dsn) as connection:
        query = "select tablename from pg_publication_tables where pubname = 'supabase_realtime' order by 1"
        return [name for (name,) in connection.execute(query).fetchall()]


def _schema(dsn: str) -> list[tuple[Any, ...]]:
    """Columns, constraints, policies, indexes, triggers and grants of `public`."""
    queries = (
        "select table_name, column_name, data_type, column_default, is_nullable"
        " from information_schema.columns where table_schema = 'public' order by 1, 2",
        "select conrelid::regclass::text, conname, pg_get_constraintdef(oid) from pg_constraint"
        " where connamespace = 'public'::regnamespace order by 1, 2",
        "select tablename, policyname, roles::text, cmd, qual, with_check from pg_policies order by 1, 2",
        "select indexdef from pg_indexes where schemaname = 'public' order by 1",
        "select tgname, pg_get_triggerdef(oid) from pg_trigger where not tgisinternal order by 1",
        "select table_name, grantee, privilege_type from information_schema.role_table_grants"
        " where table_schema = 'public' order by 1, 2, 3",
        "select relname, relrowsecurity from pg_class where relnamespace = 'public'::regnamespace order by 1",
    )
    with psycopg.connect(dsn) as connection:
        return [row for query in queries for row in connection.execute(query.encode()).fetchall()]
