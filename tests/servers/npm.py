"""Packages of npm for the tests, in the user's cache directory: never in the checkout."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

INSTALL_TIMEOUT_S = 150


class NodeIsMissing(Exception):
    """There is no Node (20 or later) with npm on this machine."""


def node() -> str:
    """The path of Node.

    Raises:
        NodeIsMissing: it or npm is not there, or too old.
    """
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise NodeIsMissing("this needs Node 20 or later with npm, which this machine does not have")
    version = subprocess.run(
        [node, "--version"], capture_output=True, text=True, timeout=30, check=True
    ).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < 20:
        raise NodeIsMissing(f"this needs Node 20 or later; this machine has {version}")
    return node


def installed(name: str, sources: Sequence[Path]) -> Path:
    """A directory with `sources` and, in `node_modules`, what their lock file names; once for each state of them.

    Args:
        name: Of the directory, before a hash of the files.
        sources: `package.json`, `package-lock.json` and whatever else shall lie beside them.

    Raises:
        RuntimeError: npm failed; with its output.
    """
    version = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s3-backend-tests"
    target = cache / f"{name}-{version}"
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
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
            check=False,
        )
        if finished.returncode != 0:
            raise RuntimeError(f"npm could not install {name}: {finished.stderr[-2000:]}")
        with contextlib.suppress(OSError):  # another test run was faster: its copy is the same
            building.rename(target)
    return target


def environment() -> dict[str, str]:
    """Ours, and that nobody shall be told about it."""
    return {
        **os.environ,
        "DO_NOT_TRACK": "1",
        "LITE_TELEMETRY": "0",
        "NO_UPDATE_NOTIFIER": "1",
        "WRANGLER_SEND_METRICS": "false",
        "WRANGLER_HIDE_BANNER": "true",  # and do not ask whether there is a newer one
    }
