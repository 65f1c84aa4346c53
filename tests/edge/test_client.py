"""The TypeScript client without a service: its types, its form, and what it does when servers misbehave."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.edge.package import LOCKED, SOURCE, Package
from tests.edge.schema import TYPES, generate

pytestmark = pytest.mark.timeout(400)  # the first one may have to install the packages


def test_the_types_are_those_of_the_api(package: Package) -> None:
    again = "the API has changed: write the types anew with `python -m tests.edge.schema`"
    assert (package.folder / TYPES).read_text() == generate(package), again


def test_the_types_hold_in_workers_in_node_and_in_browsers(compiled: Package) -> None:
    compiled.run("tsc")
    compiled.run("tsc", "-p", "test/browser")


def test_nothing_is_any(package: Package) -> None:
    for path in (*(SOURCE / "src").glob("*.ts"), *(SOURCE / "test").glob("*.ts")):
        assert not re.search(r"(:|<|as|,|\|) *any\b|@ts-|\bas unknown as\b", path.read_text()), path


def test_it_is_written_as_biome_has_it(package: Package) -> None:
    package.run("biome", "ci", "--error-on-warnings")


def test_the_client_does_what_it_says(compiled: Package) -> None:
    said = compiled.run(compiled.node, "--test", "--test-timeout=60000", "dist/test/client.test.js")
    passed = re.search(r"^# pass (\d+)$", said, re.MULTILINE)
    assert passed is not None and int(passed[1]) > 40, said


def test_every_version_is_exact_and_no_registry_is_named() -> None:
    package, lock = (
        json.loads((SOURCE / name).read_text()) for name in ("package.json", "package-lock.json")
    )
    wanted = {**package["dependencies"], **package["devDependencies"]}
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values()), wanted
    assert {name: lock["packages"][f"node_modules/{name}"]["version"] for name in wanted} == wanted
    assert all("integrity" in entry for name, entry in lock["packages"].items() if name)
    assert not any("://" in _without_fundings(path) for path in LOCKED)


def _without_fundings(path: Path) -> str:
    """The file without the addresses where authors ask for money."""
    text = path.read_text()
    if path.suffix != ".json":
        return text
    told = json.loads(text)
    for entry in told.get("packages", {}).values():
        entry.pop("funding", None)
    return json.dumps(told)
