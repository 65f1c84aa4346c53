"""The Makefile's set-up, and the commands that the README promises."""

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = (
    "install",
    "demo",
    "serve",
    "weights",
    "test",
    "test-all",
    "chaos",
    "soak",
    "check",
    "fix",
    "bench",
    "parity",
    "bento",
    "audit",
)
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


def test_an_environment_that_was_moved_with_its_checkout_is_made_anew(checkout: Path) -> None:
    # Enough of an interpreter to show which step is reached.
    script = 'case "$*" in *"-m venv"*) echo making anew >&2; exit 1;; *) exit 0;; esac'
    python = program(checkout / "bin/python3.12", script)
    program(checkout / ".venv/bin/python", "exit 0")
    for home, is_made in ((checkout.resolve(), False), (checkout.resolve().parent, True)):
        (checkout / ".venv/.home").write_text(str(home))
        (checkout / ".venv/.pins").write_text("of other packages")
        result = make(checkout, "install", f"PYTHON={python}")
        assert ("making anew" in result.stderr) == is_made, result.stderr
        assert not (checkout / ".venv/.pins").exists()  # interrupted: nothing is known to be whole


def test_image_and_prompt_reach_the_demo_as_typed(checkout: Path) -> None:
    program(checkout / ".venv/bin/python", 'printf "%s|%s" "$IMAGE" "$PROMPT"')
    (checkout / ".venv/.pins").write_text(wanted_stamp(checkout))
    image, prompt = "my $5 photo (a) #1.jpg", 'it\'s "quoted" $HOME'
    result = make(checkout, "demo", f"IMAGE={image}", f"PROMPT={prompt}")
    assert result.stdout == f"{image}|{prompt}"


def test_the_address_comes_from_the_command_line_alone(checkout: Path) -> None:
    serve = make(ROOT, "--dry-run", "serve", HOST="0.0.0.0", PORT="80").stdout
    assert "--host 127.0.0.1 --port 8000" in serve
    assert "--host 0.0.0.0 --port 80" in make(ROOT, "--dry-run", "serve", "HOST=0.0.0.0", "PORT=80").stdout


def test_a_port_that_is_taken_is_one_readable_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        script = [sys.executable, "scripts/check_port.py", "127.0.0.1", str(port)]
        result = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use)" in result.stderr
    assert f"make serve PORT={port + 1}" in result.stderr
    assert subprocess.run(script, cwd=ROOT).returncode == 0


def wanted_stamp(checkout: Path) -> str:
    """What the set-up writes when all is installed."""
    pins = (checkout / "requirements.txt").read_bytes() + (checkout / "requirements-dev.txt").read_bytes()
    checksum = subprocess.run(["cksum"], input=pins, capture_output=True, check=True).stdout.decode().strip()
    return f"{checksum} {checkout.resolve()}"


def test_nothing_is_done_and_nothing_said_when_the_pins_are_installed(checkout: Path) -> None:
    program(checkout / ".venv/bin/python", "exit 0")
    (checkout / ".venv/.pins").write_text(wanted_stamp(checkout))
    began = time.monotonic()
    result = make(checkout, "install")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("target", TARGETS)
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
