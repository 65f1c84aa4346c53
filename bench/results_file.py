"""What every bench writes: NAME.csv, each row with the conditions it was measured under, and NAME.md, a table.

Needs nothing but Python: the bench of the model runs on machines that have little else.
"""

from __future__ import annotations

import csv
import io
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
COMMIT_VARIABLE = "BENCH_COMMIT"  # the commit, on a machine that has the files but not the repository

Value = str | int | float


def conditions(*packages: str, **more: Value) -> dict[str, Value]:
    """Under which something was measured: machine, load, versions and commit.

    Args:
        packages: Whose versions matter; those that are not installed are left out.
        more: Whatever else a bench has to say, in the same row.
    """
    versions: dict[str, Value] = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **versions,
        "commit": commit(),
        **more,
    }


def processor() -> str:
    """The processor's name, or what kind it is where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit that is measured, "+changes" behind it if the files differ; "unknown" without a repository."""
    if given := os.environ.get(COMMIT_VARIABLE):
        return given
    try:
        name = _git("rev-parse", "--short=10", "HEAD")
        return f"{name}+changes" if _git("status", "--porcelain", "--untracked-files=no") else name
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def write(
    folder: Path,
    name: str,
    seen: Mapping[str, Value],
    rows: Sequence[Mapping[str, Value]],
    table: str | None = None,
) -> None:
    """Write NAME.csv and NAME.md; each appears whole or not at all, so a bench may write after every row.

    Args:
        folder: Made if it is not there.
        name: Of the files, without a suffix.
        seen: The conditions, see `conditions`; in the CSV they stand in front of every row.
        rows: May differ in their keys: a cell that a row does not have stays empty.
        table: What NAME.md shows under the conditions; all rows and columns if not given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = [*dict.fromkeys([*seen, *(key for row in rows for key in row)])]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**seen, **row} for row in rows)
    _replace(folder / f"{name}.csv", text.getvalue())
    told = ", ".join(f"{key} {value}" for key, value in seen.items())
    _replace(folder / f"{name}.md", f"{told}\n\n{markdown(rows) if table is None else table}\n")


def markdown(rows: Sequence[Mapping[str, Value]]) -> str:
    """Rows as a Markdown table, one column for every key."""
    columns = [*dict.fromkeys(key for row in rows for key in row)]
    lines = [columns, ["---"] * len(columns), *([str(row.get(key, "")) for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
