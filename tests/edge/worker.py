"""The Worker in the real Workers runtime, and what a phone says to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.edge.package import Package
from tests.servers import npm
from tests.servers.postgrest import PostgrestStandIn
from tests.servers.s3 import S3Server

TIMEOUT_S = 30.0
STOP_DEADLINE_S = 20.0
MOST_CHARS = 120  # of a line about a request


class Transcript:
    """What was said, for people."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def scene(self, title: str) -> None:
        """What comes next."""
        self.lines += ["", f"# {title}"]

    def asked(self, response: httpx.Response, what: str) -> None:
        """A request and its answer."""
        request = response.request
        said = f"> {request.method} {request.url.raw_path.decode()}  {what}"
        self.lines.append(said if len(said) < MOST_CHARS else f"{said[:MOST_CHARS]}…")
        location = response.headers.get("Location")
        self.lines.append(f"< {response.status_code}" + (f"  Location: {location}" if location else ""))
        self.lines.append(f"  {response.text}")

    def note(self, line: str) -> None:
        """What happened meanwhile."""
        self.lines.append(f"  … {line}")


@dataclass(frozen=True)
class Phone:
    """A user's app.

    Attributes:
        user_id: Whom the token names.
        client: Sends the token to the Worker.
    """

    user_id: str
    client: httpx.Client
    transcript: Transcript

    def send(self, image: bytes, prompt: str, task_id: str | None = None, **headers: str) -> httpx.Response:
        """An image and what to look for, as a form."""
        fields = {"text_prompt": prompt} | ({} if task_id is None else {"task_id": task_id})
        files = {"image": ("photo", image, "application/octet-stream")}
        response = self.client.post("/segment", data=fields, files=files, headers=headers)
        self.transcript.asked(response, f"(form: image of {len(image)} bytes, text_prompt={prompt!r})")
        return response

    def send_bare(self, image: bytes, prompt: str) -> httpx.Response:
        """The same, with the image as the body."""
        response = self.client.post("/segment", params={"text_prompt": prompt}, content=image)
        self.transcript.asked(response, f"(body: image of {len(image)} bytes)")
        return response

    def look(self, task_id: str) -> dict[str, Any]:
        """The task, as the Worker tells it."""
        response = self.client.get(f"/tasks/{task_id}")
        assert response.status_code == 200, response.text
        told: dict[str, Any] = response.json()
        return told


class RunningWorker:
    """A Worker that serves.

    Attributes:
        url: `http://127.0.0.1:PORT`.
    """

    def __init__(self, url: str, log: Path, supabase: PostgrestStandIn, transcript: Transcript) -> None:
        self.url = url
        self._log = log
        self._supabase = supabase
        self._transcript = transcript

    @contextlib.contextmanager
    def phone(self, user_id: str, token: str | None = None) -> Iterator[Phone]:
        """A phone with a session of this user, or with this token."""
        headers = {"Authorization": f"Bearer {token or self._supabase.user_jwt(user_id)}"}
        with httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_S, trust_env=False) as client:
            yield Phone(user_id, client, self._transcript)

    def sweep(self) -> None:
        """What the cron trigger does every minute."""
        answer = httpx.get(f"{self.url}/cdn-cgi/handler/scheduled", timeout=TIMEOUT_S, trust_env=False)
        assert answer.status_code == 200, answer.text

    def log(self) -> str:
        """What Worker and runtime have written so far."""
        return self._log.read_text(errors="replace")


@contextlib.contextmanager
def running_worker(
    package: Package,
    s3: S3Server,
    supabase: PostgrestStandIn,
    transcript: Transcript,
    variables: Mapping[str, str],
) -> Iterator[RunningWorker]:
    """Build the Worker as it would be deployed, and run that.

    Args:
        package: Compiled.
        s3: Behind the Worker's R2 binding.
        supabase: For the Worker's rows and its users' tokens.
        transcript: Of what phones say to it.
        variables: Bindings beside those that follow from the other arguments.
    """
    package.run("wrangler", "deploy", "--dry-run", "--outdir", "dist/worker")
    bindings = {
        "SUPABASE_URL": supabase.url,
        "SUPABASE_SERVICE_KEY": supabase.secret_key,
        "SUPABASE_PUBLISHABLE_KEY": supabase.publishable_key,
        "SUPABASE_JWT_SECRET": supabase.jwt_secret,
        **variables,
    }
    bucket = {
        "ENDPOINT": s3.endpoint,
        "NAME": s3.bucket,
        "ACCESS_KEY_ID": s3.access_key_id,
        "SECRET_ACCESS_KEY": s3.secret_access_key,
    }
    log = package.folder / "worker.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [package.node, "dist/test/edge.js"],
            cwd=package.folder,
            env={**npm.environment(), "EDGE": json.dumps({"bindings": bindings, "s3": bucket})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # the runtime is a process of its own
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()  # ends at once if the process does
        assert line, f"the Worker did not start:\n{log.read_text(errors='replace')}"
        yield RunningWorker(json.loads(line)["url"], log, supabase, transcript)
    finally:
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_DEADLINE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def new_id() -> str:
    """Of a task."""
    return str(uuid.uuid4())
