"""The built bento, served once for all tests of this folder."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from examples.demo import stop

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120


def environment(bentoml_home: Path) -> dict[str, str]:
    """This process's environment, with a store of its own and nothing that configures the service."""
    configured = ("R2_", "SUPABASE_", "S3_", "SAM3_", "API_SECRET_KEY", "BENTOML_", "PYTHONPATH")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(configured)}
    return clean | {"BENTOML_HOME": str(bentoml_home), "BENTOML_DO_NOT_TRACK": "true", "S3_ENV_FILE": ""}


@pytest.fixture(scope="session")
def bentoml_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bentoml")


@pytest.fixture(scope="session")
def bento(bentoml_home: Path) -> Path:
    """The folder of a bento built from this checkout."""
    subprocess.run(
        [sys.executable, "-m", "bentoml", "build"],
        cwd=ROOT,
        env=environment(bentoml_home),
        check=True,
        capture_output=True,
        timeout=120,
    )
    (folder,) = (path for path in (bentoml_home / "bentos/s3-backend").iterdir() if path.is_dir())
    return folder


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder far from the checkout."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="session")
def bento_client(bento: Path, bentoml_home: Path, elsewhere: Path) -> Iterator[httpx.Client]:
    """A client of the built bento, which runs far from the checkout."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = environment(bentoml_home) | {"S3_DATA_DIR": str(elsewhere / "data"), "S3_API_WORKERS": "1"}
    log = elsewhere / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "bentoml", "serve", f"s3-backend:{bento.name}", "--port", str(port)],
            cwd=elsewhere,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            wait_until_ready(client, process, log)
            yield client
    finally:
        stop(process)


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(f"not ready after {START_TIMEOUT_S} s:\n{log.read_text()[-3000:]}")
