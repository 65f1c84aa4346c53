"""The Makefile's set-up, and the commands that the README promises."""

import os
import re
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("install", "demo", "serve", "test", "test-all", "check", "fix", "bench", "bento")
READMES = ("README.md", "README.ko.md")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the set-up needs of a checkout, without an environment."""
    folder = tmp_path / "check out"  # with a blank, as people have them
    (folder / "scripts").mkdir(parents=True)
    for name in ("Makefile", "scripts/setup.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # A make that runs these tests passes its own settings down.
    clean = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON"}}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=clean | variables, capture_output=True, text=True, timeout=60
    )


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_python_that_is_too_old_is_named_with_what_to_do(checkout: Path) -> None:
    old = program(checkout / "bin/python3.9", 'case "$1" in --version) echo Python 3.9.2;; *) exit 1;; esac')
    result = make(checkout, "install", f"PYTHON={old.relative_to(checkout)}")
    assert result.returncode != 0
    assert "needs Python 3.11 or newer" in result.stderr
    assert "Python 3.9.2" in result.stderr
    assert not (checkout / ".venv").exists()


def test_a_python_without_venv_is_named_with_what_to_install(checkout: Path) -> None:
    script = 'case "$*" in *version_info*) exit 0;; *) exit 1;; esac'
    bare = program(checkout / "bin/python3.12", script)
    result = make(checkout, "install", f"PYTHON={bare.relative_to(checkout)}")
    assert result.returncode != 0
    assert "apt install python3-venv" in result.stderr


def test_nothing_is_done_and_nothing_said_when_the_pins_are_installed(checkout: Path) -> None:
    program(checkout / ".venv/bin/python", "exit 0")
    pins = (checkout / "requirements.txt").read_bytes() + (checkout / "requirements-dev.txt").read_bytes()
    checksum = subprocess.run(["cksum"], input=pins, capture_output=True, check=True).stdout.decode().strip()
    (checkout / ".venv/.pins").write_text(f"{checksum} {checkout.resolve()}")
    began = time.monotonic()
    result = make(checkout, "install")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "target", ["install", "demo", "serve", "test", "test-all", "check", "fix", "bench", "bento"]
)
def test_every_target_is_there_and_listed_by_help(target: str) -> None:
    assert make(ROOT, "--dry-run", target).returncode == 0
    assert re.search(rf"^  make {target} +\S", make(ROOT, "help").stdout, re.MULTILINE)


@pytest.mark.parametrize("readme", READMES)
def test_every_make_command_of_a_readme_exists(readme: str) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL)
    targets = set(re.findall(r"^make ([a-z-]+)", "\n".join(blocks), re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert make(ROOT, "--dry-run", target).returncode == 0, target


@pytest.mark.parametrize("readme", [*READMES, *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_every_file_that_a_page_links_to_is_there(readme: str) -> None:
    page = ROOT / readme
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
