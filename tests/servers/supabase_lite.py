"""`@supabase/lite`, Supabase's own small REST API, run by Node over the tests' Postgres.

npm installs it into the user's cache directory, once per version of the lock file, never into the checkout.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.servers import npm

SOURCE_DIR = Path(__file__).resolve().parent / "supabase_lite_node"
SOURCES = [SOURCE_DIR / name for name in ("package.json", "package-lock.json", "server.mjs")]


@dataclass(frozen=True)
class SupabaseLite:
    """A running server.

    Attributes:
        url: What `SUPABASE_URL` would be.
        dsn: Of the database behind it, as superuser.
        secret_key: Of the new kind; role service_role. It knows no legacy service keys.
        publishable_key: Of the new kind; role anon.
    """

    url: str
    dsn: str
    secret_key: str
    publishable_key: str


@contextlib.contextmanager
def running_supabase_lite(dsn: str) -> Iterator[SupabaseLite]:
    """Yields a server over one database.

    Raises:
        NodeIsMissing: no Node or npm, or too old.
        RuntimeError: npm or the server failed; with their output.
    """
    node = npm.node()
    installed = npm.installed("supabase-lite", SOURCES)
    keys = SupabaseLite(
        "", dsn, f"sb_secret_{secrets.token_hex(16)}", f"sb_publishable_{secrets.token_hex(16)}"
    )
    environment = {
        **npm.environment(),
        "DATABASE_URL": dsn,
        "JWT_SECRET": secrets.token_hex(32),
        "SECRET_KEY": keys.secret_key,
        "PUBLISHABLE_KEY": keys.publishable_key,
    }
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [node, "server.mjs"],
            cwd=installed,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = process.stdout.readline()  # ends at once if the process does
            if not line:
                process.wait(10)
                errors.seek(0)
                raise RuntimeError(
                    f"@supabase/lite did not start: {errors.read().decode(errors='replace')[-2000:]}"
                )
            port = json.loads(line)["port"]
            yield replace(keys, url=f"http://127.0.0.1:{port}")
        finally:
            process.kill()  # it would take 5 s over its goodbye to Postgres
            process.wait()
            process.stdin.close()
            process.stdout.close()
