"""The bento as a hardened container runs it: no capabilities, and nothing to write to but two directories."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from examples.demo import stop
from tests.packaging.conftest import ROOT, environment, wait_until_ready

# What `docker run --cap-drop ALL --security-opt no-new-privileges` does. Root could write anywhere, whatever modes say.
WITHOUT_CAPABILITIES = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]


def unprivileged(*command: str) -> list[str]:
    """The command, as somebody whom the modes of files hold back."""
    return [*command] if os.geteuid() else [*WITHOUT_CAPABILITIES, *command]


@pytest.fixture
def host(bento: Path) -> Iterator[Path]:
    """The bento in a home that cannot be written, and two places that can."""
    with tempfile.TemporaryDirectory(prefix="read-only-") as name:  # a short path: sockets lie below it
        folder = Path(name)
        shutil.copytree(bento, folder / "home" / "bento")
        for writable in ("tmp", "data"):
            (folder / writable).mkdir()
        (folder / "log").touch()
        subprocess.run(
            ["sh", str(ROOT / "scripts/container.sh"), "store"],
            env=environment(folder / "home") | {"PYTHON": sys.executable},
            check=True,
            timeout=120,
        )
        set_modes(folder / "home", writable=False)
        yield folder
        set_modes(folder / "home", writable=True)


def set_modes(folder: Path, *, writable: bool) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o755 if path.is_dir() else 0o644) if writable else (0o555 if path.is_dir() else 0o444))


@contextmanager
def served(host: Path) -> Iterator[httpx.Client]:
    """The bento by its path, as the image's entrypoint serves it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bento = host / "home" / "bento"
    variables = environment(host / "home") | {
        "HOME": str(host / "home"),
        "TMPDIR": str(host / "tmp"),
        "S3_DATA_DIR": str(host / "data"),
        "S3_API_WORKERS": "1",
        "BENTOML_CONTAINERIZED": "true",
        "PYTHONDONTWRITEBYTECODE": "1",  # the image's packages are compiled while it is built
    }
    variables.pop("PROMETHEUS_MULTIPROC_DIR", None)
    with (host / "log").open("wb") as log:
        process = subprocess.Popen(
            unprivileged(sys.executable, "-m", "bentoml", "serve", "--port", str(port), str(bento)),
            cwd=bento,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            wait_until_ready(client, process, host / "log")
            yield client
    finally:
        stop(process)


@pytest.mark.slow
def test_it_serves_where_nothing_but_temporary_files_and_data_can_be_written(host: Path) -> None:
    denied = subprocess.run(unprivileged("touch", str(host / "home" / "x")), capture_output=True)
    assert denied.returncode != 0, "the directory is writable: this test would show nothing"
    picture = (ROOT / "examples" / "shapes.jpg").read_bytes()
    with served(host) as client:
        assert client.put("/files/uploads/shapes.jpg", content=picture).status_code == 200
        body = {
            "image_url": "uploads/shapes.jpg",
            "text_prompt": "red circle",
            "user_id": "u",
            "task_id": "t",
        }
        answer = client.post("/api/v1/predict", json=body)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["instances"]) == 3
        assert client.get("/metrics").status_code == 200
    log = (host / "log").read_text()
    assert not re.search(r"Read-only file system|Permission denied|Traceback", log), log


def test_the_image_s_build_ends_without_a_compiler() -> None:
    """What can be held without building it: nothing asks for one, and the script that runs last takes them out."""
    assert re.findall(r"system_packages:\n *- (\S+)", (ROOT / "bentofile.yaml").read_text()) == [
        "fonts-noto-cjk"
    ]
    script = (ROOT / "scripts" / "container.sh").read_text()
    assert script.index("\ncompile_triton_module\nmake_store\n") < script.index("apt-get purge")
    purged = re.findall(r"apt-get purge -y --auto-remove (.*)", script)[0].split()
    # What BentoML's base installs beside them is a shell and certificates.
    assert {"build-essential", "gcc", "g++", "make", "git", "gnupg2"} <= set(purged)


def test_the_script_runs_after_the_packages_are_installed(bento: Path) -> None:
    dockerfile = (bento / "env/docker/Dockerfile").read_text()
    assert dockerfile.index("uv --directory") < dockerfile.index("env/docker/script__")
    installed = re.findall(r"apt-get install .*", dockerfile)
    line, own = installed
    assert own.split()[-1] == "fonts-noto-cjk"
    assert line.split("--allow-remove-essential ")[1].split() == [
        "ca-certificates",
        "gnupg2",
        "bash",
        "build-essential",
        "git",
    ]
