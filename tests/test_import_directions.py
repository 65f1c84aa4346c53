"""Imports point one way: service → api → tasks → {sam3_runner, storage}."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = frozenset(
    {"service", "api", "tasks", "sam3_runner", "storage", "tests", "bench", "examples", "clients"}
)
# What each part may import, of our own parts and of what is kept out of the lower ones.
ALLOWED = {
    "service": {"api", "tasks", "sam3_runner", "storage", "bentoml"},
    "api": {"tasks", "sam3_runner", "storage", "bentoml"},
    "tasks": {"sam3_runner", "storage"},
    "sam3_runner": set[str](),
    "storage": set[str](),
    "clients": {"sam3_runner", "storage"},  # of which they take what needs no PyTorch
}
WATCHED = OURS | {"bentoml"}


def imported_packages(path: Path) -> Iterator[str]:
    """Top-level names of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def files_of(part: str) -> list[Path]:
    if part == "service":
        return [ROOT / "service.py"]
    return sorted(path for path in (ROOT / part).rglob("*.py") if "node_modules" not in path.parts)


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_the_parts_below_it(part: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files_of(part)
        for name in imported_packages(path)
        if name in WATCHED - ALLOWED[part] - {part}
    ]
    assert wrong == []


@pytest.mark.parametrize("part", ALLOWED)
def test_every_part_has_files_to_look_at(part: str) -> None:
    assert all(path.is_file() for path in files_of(part))
    assert files_of(part)


def test_every_python_file_of_the_project_belongs_to_a_known_part() -> None:
    tops = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    assert tops | {path.stem for path in ROOT.glob("*.py")} <= OURS | {"scripts"}
