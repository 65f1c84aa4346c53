"""Two services, each started once: on the embedded defaults, and on an S3 server and Supabase."""

from __future__ import annotations

import io
import json
import os
import signal
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import numpy as np
import numpy.typing as npt
import pytest
from jsonschema import Draft202012Validator
from PIL import Image, ImageDraw

from tests.conftest import ROOT, Serve, Served, wait_until
from tests.servers.postgres import Postgres, running_postgres
from tests.servers.postgrest import PostgrestStandIn, running_postgrest
from tests.servers.s3 import S3Server, s3_server

SECRETS = {"API_SECRET_KEY": "local-secret-key-0123456789"}
REMOTE_KEY = "remote-secret-key-0123456789"
NEXT_KEY = "the-next-remote-secret-key-0123456789"
MAX_IMAGE_BYTES = 300_000
MAX_IMAGE_PIXELS = 1_000_000
# Long enough for two busy cores; some tests wait this long, so no longer.
LOCAL_TIMEOUT_S = 15
REMOTE_TIMEOUT_S = 25

PREDICT, BATCH = "/api/v1/predict", "/api/v1/predict/batch"

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Picture:
    """A drawn image and what is true about it.

    Attributes:
        png: The file.
        masks: Prompt → where it is.
    """

    png: bytes
    masks: dict[str, Mask]


@pytest.fixture(scope="session")
def picture() -> Picture:
    """A red circle and a blue square on grey, 320×240."""
    size = (320, 240)
    image = Image.new("RGB", size, (205, 205, 200))
    masks = {}
    shapes: dict[str, tuple[str, tuple[int, int, int], tuple[int, int, int, int]]] = {
        "red circle": ("ellipse", (214, 36, 38), (40, 60, 130, 150)),
        "blue square": ("rectangle", (36, 70, 200), (200, 90, 280, 170)),
    }
    for prompt, (shape, colour, box) in shapes.items():
        getattr(ImageDraw.Draw(image), shape)(box, fill=colour)
        mask = Image.new("1", size)
        getattr(ImageDraw.Draw(mask), shape)(box, fill=1)
        masks[prompt] = np.asarray(mask)
    file = io.BytesIO()
    image.save(file, "PNG")
    return Picture(file.getvalue(), masks)


def read_mask(png: bytes) -> Mask:
    """A mask as others read it: exactly 0 and 255."""
    values = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    assert set(np.unique(values)) <= {0, 255}
    return values == 255


def iou(one: Mask, other: Mask) -> float:
    return float(np.logical_and(one, other).sum() / max(1, np.logical_or(one, other).sum()))


@pytest.fixture(scope="session")
def weights() -> Path:
    """The demo checkpoint, which every clone has."""
    path = ROOT / "weights" / "demo"
    if not (path / "config.json").exists():
        if os.environ.get("CI") == "true":
            pytest.fail("CI must have weights/demo")
        pytest.skip("weights/demo is not there")
    return path


@pytest.fixture(scope="session")
def local(served: Serve, weights: Path) -> Served:
    """On the embedded defaults, with a key and tight limits, in the environment of a container."""
    limits = {
        "S3_MAX_IN_FLIGHT": "2",
        "S3_REQUEST_TIMEOUT_S": str(LOCAL_TIMEOUT_S),
        "S3_MAX_IMAGE_BYTES": str(MAX_IMAGE_BYTES),
        "S3_MAX_IMAGE_PIXELS": str(MAX_IMAGE_PIXELS),
    }
    return served({**SECRETS, **limits, "BENTOML_CONTAINERIZED": "true"})


@pytest.fixture(scope="module")
def keyless(served: Serve, weights: Path) -> Iterator[Served]:
    """On the embedded defaults, with nothing configured at all."""
    service = served({})
    yield service
    service.stop()


@pytest.fixture(scope="session")
def local_image(local: Served, picture: Picture) -> str:
    """URL of the picture in local storage."""
    response = local.client.put("/files/uploads/shapes.png", content=picture.png)
    assert response.status_code == 200, response.text
    url: str = response.json()["url"]
    return url


def ask(image_url: str, **other: Any) -> dict[str, Any]:
    return {
        "image_url": image_url,
        "text_prompt": "red circle",
        "user_id": "user-1",
        "task_id": str(uuid.uuid4()),
        **other,
    }


def ask_many(image_url: str, *prompts: str, **other: Any) -> dict[str, Any]:
    body = ask(image_url, prompts=list(prompts), **other)
    del body["text_prompt"]
    return body


def row_of(service: Served, task_id: str) -> dict[str, Any] | None:
    """The task's row, read past the service."""
    database = sqlite3.connect(f"file:{service.data_dir / 'tasks.sqlite3'}?mode=ro", uri=True)
    try:
        database.row_factory = sqlite3.Row
        row = database.execute("select * from segmentation_results where id = ?", (task_id,)).fetchone()
    finally:
        database.close()
    if row is None:
        return None
    return {**dict(row), "metadata": json.loads(row["metadata"]), "labels": json.loads(row["labels"])}


def is_processing(service: Served, task_id: str) -> bool:
    row = row_of(service, task_id)
    return row is not None and row["status"] == "processing"


@dataclass(frozen=True)
class Remote:
    """A service on R2 and Supabase, and what stands for them."""

    service: Served
    s3: S3Server
    postgres: Postgres
    supabase: PostgrestStandIn

    @property
    def objects(self) -> Any:
        """A client of the S3 server."""
        return boto3.client(
            "s3",
            endpoint_url=self.s3.endpoint,
            region_name="auto",
            aws_access_key_id=self.s3.access_key_id,
            aws_secret_access_key=self.s3.secret_access_key,
        )

    def dependency(self, name: str) -> dict[str, Any]:
        """What `/health` says about one dependency."""
        said: dict[str, Any] = self.service.client.get("/health").json()["dependencies"][name]
        return said

    def wait_recovered(self) -> None:
        """Wait until the service has noticed that nothing is down any more."""

        def nothing_is_down() -> bool:
            return all(self.dependency(name)["status"] == "ok" for name in ("storage", "tasks"))

        wait_until(nothing_is_down, 60, "storage and rows are back", self.service.log)

    def put(self, key: str, data: bytes) -> None:
        self.objects.put_object(Bucket=self.s3.bucket, Key=key, Body=data)

    def get(self, key: str) -> bytes:
        data: bytes = self.objects.get_object(Bucket=self.s3.bucket, Key=key)["Body"].read()
        return data


@pytest.fixture(scope="session")
def remote_parts(served: Serve, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    with (
        s3_server(tmp_path_factory.mktemp("s3")) as s3,
        running_postgres() as postgres,
        postgres.new_database() as dsn,
        running_postgrest(dsn) as supabase,
    ):
        env = {
            "R2_ENDPOINT": s3.endpoint,
            "R2_ACCESS_KEY_ID": s3.access_key_id,
            "R2_SECRET_ACCESS_KEY": s3.secret_access_key,
            "R2_BUCKET": s3.bucket,
            "R2_PUBLIC_URL": "https://images.example.com",
            "SUPABASE_URL": supabase.url,
            "SUPABASE_SERVICE_KEY": supabase.secret_key,
            "API_SECRET_KEY": f"{REMOTE_KEY},{NEXT_KEY}",
            "S3_REQUEST_TIMEOUT_S": str(REMOTE_TIMEOUT_S),
        }
        remote = Remote(served(env), s3, postgres, supabase)
        yield remote
        remote.service.stop()


@pytest.fixture
def remote(remote_parts: Remote) -> Remote:
    """With nothing broken by an earlier test."""
    remote_parts.supabase.reset()
    remote_parts.service.wait_ready()
    remote_parts.wait_recovered()
    return remote_parts


Check = Callable[[Served, httpx.Response, str], Any]


@pytest.fixture(scope="session")
def checked() -> Check:
    """Holds a response against the OpenAPI document of the very service that sent it; returns its JSON."""
    documents: dict[str, dict[str, Any]] = {}

    def check(service: Served, response: httpx.Response, path: str) -> Any:
        if service.url not in documents:
            documents[service.url] = service.client.get("/docs.json").json()
        document = documents[service.url]
        operation = document["paths"][path][response.request.method.lower()]
        told = operation["responses"][str(response.status_code)]["content"]
        media_type = response.headers["content-type"].split(";")[0]
        schema = {**told[media_type]["schema"], "components": document["components"]}
        body = response.json()
        Draft202012Validator(schema).validate(body)
        assert response.headers["X-Request-ID"]
        if response.status_code >= 400:
            assert body["error"]["code"] in told[media_type]["examples"]
            assert body["meta"]["request_id"] == response.headers["X-Request-ID"]
        return body

    return check


@contextmanager
def held(pid: int) -> Iterator[None]:
    """The process stands still inside the block, as if it were at work for long."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # the block killed it
            os.kill(pid, signal.SIGCONT)


@contextmanager
def posting(service: Served, path: str, *bodies: dict[str, Any]) -> Iterator[list[Future[httpx.Response]]]:
    """Requests under way side by side."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        yield [pool.submit(service.client.post, path, json=body) for body in bodies]
