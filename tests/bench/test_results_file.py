"""What every bench writes its figures with."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from bench.results_file import COMMIT_VARIABLE, ROOT, commit, conditions, write


def test_every_row_of_the_csv_stands_by_itself(tmp_path: Path) -> None:
    write(tmp_path / "new", "speed", {"cores": 2}, [{"batch": 1, "ms": "3.5"}, {"batch": 2, "error": "none"}])
    with (tmp_path / "new" / "speed.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"cores": "2", "batch": "1", "ms": "3.5", "error": ""},
        {"cores": "2", "batch": "2", "ms": "", "error": "none"},
    ]
    assert (tmp_path / "new" / "speed.md").read_text().splitlines() == [
        "cores 2",
        "",
        "| batch | ms | error |",
        "| --- | --- | --- |",
        "| 1 | 3.5 |  |",
        "| 2 |  | none |",
    ]


def test_writing_again_leaves_no_half_of_a_file(tmp_path: Path) -> None:
    for row in range(3):
        write(tmp_path, "speed", {}, [{"batch": row}], table=f"row {row}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.csv", "speed.md"]
    assert (tmp_path / "speed.md").read_text() == "\n\nrow 2\n"


def test_conditions_name_machine_versions_and_commit() -> None:
    seen = conditions("pytest", "no-such-package", batch=4)
    assert {"processor", "cores", "load_average", "python", "pytest", "commit", "batch"} == set(seen)
    assert seen["pytest"] == pytest.__version__


def test_the_commit_is_the_repositorys_or_the_one_given(monkeypatch: pytest.MonkeyPatch) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:  # a source archive has no repository
        assert head.stdout.startswith(commit().removesuffix("+changes"))
    monkeypatch.setenv(COMMIT_VARIABLE, "given")
    assert commit() == "given"


def test_it_needs_nothing_but_python() -> None:
    code = (
        "import bench.results_file, sys; print([name for name in sys.modules if name in ('numpy', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
