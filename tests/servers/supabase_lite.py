"""`@supabase/lite`, Supabase's own small REST API, run by Node over the tests' Postgres.

npm installs it into the user's cache directory, once per version of the lock file, never into the checkout.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

SOURCE_DIR = Path(__file__).resolve().parent / "supabase_lite_node"
INSTALL_TIMEOUT_S = 150


class NodeIsMissing(Exception):
    """There is no Node (20 or later) with npm on this machine."""


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
    node = _node()
    installed = _installed()
    keys = SupabaseLite(
        "", dsn, f"sb_secret_{secrets.token_hex(16)}", f"sb_publishable_{secrets.token_hex(16)}"
    )
    environment = {
        **_environment(),
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


def _node() -> str:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise NodeIsMissing(
            "@supabase/lite needs Node 20 or later with npm, which this machine does not have"
        )
    version = subprocess.run(
        [node, "--version"], capture_output=True, text=True, timeout=30, check=True
    ).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < 20:
        raise NodeIsMissing(f"@supabase/lite needs Node 20 or later; this machine has {version}")
    return node


def _installed() -> Path:
    """The directory with server and packages; installs them if this lock file never was."""
    sources = [SOURCE_DIR / name for name in ("package.json", "package-lock.json", "server.mjs")]
    version = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s3-backend-tests"
    target = cache / f"supabase-lite-{version}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="installing-") as temporary:
        building = Path(temporary) / "package"
        building.mkdir()
        for path in sources:
            shutil.copy(path, building)
        npm = shutil.which("npm")
        assert npm is not None
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        finished = subprocess.run(
            command,
            cwd=building,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
            check=False,
        )
        if finished.returncode != 0:
            raise RuntimeError(f"npm could not install @supabase/lite: {finished.stderr[-2000:]}")
        with contextlib.suppress(OSError):  # another test run was faster: its copy is the same
            building.rename(target)
    return target


def _environment() -> dict[str, str]:
    return {**os.environ, "DO_NOT_TRACK": "1", "LITE_TELEMETRY": "0", "NO_UPDATE_NOTIFIER": "1"}
