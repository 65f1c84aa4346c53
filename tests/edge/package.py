"""The TypeScript of `clients/edge`, copied to where its tools may write, with their packages from the cache."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.servers import npm

SOURCE = Path(__file__).resolve().parents[2] / "clients" / "edge"
LOCKED = [SOURCE / name for name in ("package.json", "package-lock.json", ".npmrc")]
TOOL_DEADLINE_S = 150
MOST_CHARS = 8_000


class Package:
    """A copy of the package.

    Attributes:
        folder: Where it is.
        node: The path of Node.

    Raises:
        NodeIsMissing: no Node or npm, or too old.
    """

    def __init__(self, folder: Path) -> None:
        self.node = npm.node()
        modules = npm.installed("edge", LOCKED) / "node_modules"
        self.folder = folder / "edge"
        made = shutil.ignore_patterns("node_modules", "dist", ".wrangler", ".dev.vars*")
        shutil.copytree(SOURCE, self.folder, ignore=made)
        (self.folder / "node_modules").symlink_to(modules)

    def run(self, command: str, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """What a command prints, run in the folder; those of packages are found by their names.

        Raises:
            AssertionError: it failed; with the end of what it printed.
        """
        tool = self.folder / "node_modules" / ".bin" / command
        finished = subprocess.run(
            [str(tool if tool.exists() else command), *arguments],
            cwd=self.folder,
            env={**npm.environment(), "NO_COLOR": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TOOL_DEADLINE_S,
            check=False,
        )
        assert finished.returncode == 0, f"{command} {' '.join(arguments)}:\n{finished.stdout[-MOST_CHARS:]}"
        return finished.stdout

    def compile(self) -> None:
        """Checks the tests' types, and the client's as Node knows them, and makes JavaScript of both in `dist`."""
        self.run("tsc", "-p", "test")
