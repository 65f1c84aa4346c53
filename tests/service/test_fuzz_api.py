"""Every route, driven by its own OpenAPI document: with what the document allows, and with what it does not.

schemathesis makes the requests and holds each answer against the document: status, headers and body. What comes with a
prompt and an image that is there goes all the way through the model.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Served
from tests.service.conftest import Picture

# Not positive_data_acceptance: a URL or a prompt may have the right form and still be none of ours.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
)


def pids_of(service: Served) -> tuple[int, int]:
    return service.process.pid, service.runner_pid()


def answered_with_500(service: Served) -> list[str]:
    lines = service.client.get("/metrics").text.splitlines()
    return [line for line in lines if line.startswith("s3_requests_total{") and 'status="500"' in line]


def fuzz(service: Served, folder: Path, *options: str) -> None:
    """Run it; fails with its report when an answer was not as the document says, or a process died."""
    before, errors = pids_of(service), answered_with_500(service)
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/docs.json"),
            *("--header", f"X-API-Key: {service.key}"),
            *("--checks", ",".join(CHECKS)),
            *(
                "--suppress-health-check",
                "all",
                "--warnings",
                "off",
                "--request-timeout",
                "30",
                "--no-shrink",
            ),
            *("--continue-on-failure", *options),
        ],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]
    assert "X-API-Key" not in finished.stdout
    assert service.is_ready()
    assert pids_of(service) == before
    assert answered_with_500(service) == errors


@pytest.fixture(autouse=True)
def _image_of_the_examples(local: Served, picture: Picture) -> None:
    local.wait_ready()
    local.client.put("/files/uploads/desk.jpg", content=picture.png).raise_for_status()


def test_no_request_breaks_it_or_gets_an_answer_that_is_not_in_the_document(
    local: Served, tmp_path: Path
) -> None:
    fuzz(local, tmp_path, "--seed", "1", "--phases", "examples,coverage")


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_thousands_of_requests_do_not_either(local: Served, tmp_path: Path) -> None:
    fuzz(local, tmp_path, "--max-examples", "300", "--phases", "examples,coverage,fuzzing")
