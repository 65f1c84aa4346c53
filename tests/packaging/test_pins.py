"""One set of complete pins, the same for people, CI and the bento, with nobody's host in it."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FILES = ("requirements.txt", "requirements-dev.txt")
ALL_FILES = (*FILES, "requirements-parity.txt")  # the last is of an environment of its own


def entries(name: str) -> list[str]:
    """Each pin with its hashes on one line, comments left out."""
    lines = (line for line in (ROOT / name).read_text().splitlines() if not line.lstrip().startswith("#"))
    return [entry for entry in "\n".join(lines).replace("\\\n", " ").splitlines() if entry.strip()]


def requirement(entry: str) -> Requirement:
    return Requirement(entry.split("--hash")[0])


@pytest.mark.parametrize("name", ALL_FILES)
def test_every_package_is_pinned_to_one_version_with_hashes(name: str) -> None:
    for entry in entries(name):
        assert re.fullmatch(r"==[^,*]+", str(requirement(entry).specifier)), entry[:80]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry[:80]


@pytest.mark.parametrize("name", ALL_FILES)
def test_no_host_and_no_path_of_any_machine_is_in_the_pins(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"https?:|file:|://|--(extra-)?index-url|--find-links|\s/[a-z]", text)


def test_the_two_files_never_disagree_on_a_version() -> None:
    service, dev = ({r.name: str(r.specifier) for r in map(requirement, entries(name))} for name in FILES)
    assert {name: dev[name] for name in service.keys() & dev.keys()} == {
        name: service[name] for name in service.keys() & dev.keys()
    }


@pytest.mark.parametrize("name", ALL_FILES)
def test_everything_asked_for_is_pinned(name: str) -> None:
    asked = (ROOT / name).with_suffix(".in").read_text().splitlines()
    names = {
        canonicalize_name(Requirement(line.split("#")[0]).name) for line in asked if re.match(r"[a-z]", line)
    }
    assert names <= {canonicalize_name(requirement(entry).name) for entry in entries(name)}


def test_what_is_installed_here_is_what_is_pinned() -> None:
    wrong = []
    for pin in (requirement(entry) for name in FILES for entry in entries(name)):
        if pin.marker is None or Marker(str(pin.marker)).evaluate():
            found = importlib.metadata.version(pin.name)
            if not pin.specifier.contains(found, prereleases=True):
                wrong.append(f"{pin.name} {found} is installed, {pin.specifier} is pinned")
    assert wrong == []
