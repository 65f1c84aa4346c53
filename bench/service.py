"""Load test of the whole service, from HTTP request to mask and row, beside the model alone: what the rest costs.

    python -m bench.service                       # on the demo checkpoint, five minutes on two CPU cores
    SAM3_WEIGHTS_PATH=… python -m bench.service   # on SAM3 itself, on a GPU host

Systems, in turn, twice: the service on an S3 server and on Postgres behind a stand-in for PostgREST, all of them on
this machine; the service on its embedded defaults, asked about images that are new to it and about one that is not;
and the same checkpoint called as a Python object, on images that are decoded already. The stand-in and the clients
take their share of the same cores. The exit status is 1 if the service made an error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import httpx
import numpy as np
import psutil
import psycopg
import torch
from PIL import Image

from bench import results_file
from bench.batching import READY_WITHIN_S, System, cpu_seconds, drive, served
from bench.load import Load
from bench.results_file import RESULTS, ROOT, Value
from bench.timing import device_name, percentile
from sam3_runner.checkpoint import DEMO_CHECKPOINT
from sam3_runner.images import resize_for_model
from sam3_runner.segmenter import Segmenter
from sam3_runner.types import Prompt, SegmentItem
from tests.servers.postgres import running_postgres
from tests.servers.postgrest import running_postgrest
from tests.servers.s3 import s3_server

PATH = "/api/v1/predict"
API_KEY = "bench-secret-key-0123456789"
PUBLIC_URL = "https://images.example.com"
USER = "00000000-0000-4000-8000-000000000001"
PROMPT = "red circle"
IMAGES = 200  # each a little different, and more than the service remembers
MAX_BATCH = 16
SERVICES = ("s3 and rows", "embedded")
KNOWN, ALONE = "embedded, known image", "model alone"
SYSTEMS = (*SERVICES, KNOWN, ALONE)
WARM_UP = (4, 24)  # clients, requests


@dataclass
class Row:
    """One system at one level, all rounds together.

    Attributes:
        system: One of `SYSTEMS`.
        concurrency: Clients that always have one request under way; images in a batch, for the model alone.
        cpu_s: Processor time of the service's processes.
        gpu_shares: Of the time that the GPU was busy, one a round.
    """

    system: str
    concurrency: int
    requests: int = 0
    cpu_s: float = 0.0
    load: Load = field(default_factory=Load)
    gpu_shares: list[float] = field(default_factory=list)

    def add(self, load: Load, requests: int, cpu_s: float, gpu_share: float | None) -> None:
        """Take in one more round."""
        self.requests += requests
        self.cpu_s += cpu_s
        self.load.seconds += load.seconds
        self.load.latencies_ms += load.latencies_ms
        self.load.errors.update(load.errors)
        if gpu_share is not None:
            self.gpu_shares.append(gpu_share)

    @property
    def images_per_s(self) -> float:
        """Answered with 200."""
        return len(self.load.latencies_ms) / self.load.seconds

    def figures(self, alone: Row | None) -> dict[str, Value]:
        """What is written down; `alone` is the model's row at the same level."""
        latencies, cores = self.load.latencies_ms, len(os.sched_getaffinity(0))
        return {
            "system": self.system,
            "concurrency": self.concurrency,
            "requests": self.requests,
            "errors": sum(self.load.errors.values()),
            "images_per_s": f"{self.images_per_s:.2f}",
            "of_the_model": f"{self.images_per_s / alone.images_per_s:.2f}" if alone else "",
            "p50_ms": f"{percentile(latencies, 0.50):.1f}",
            "p95_ms": f"{percentile(latencies, 0.95):.1f}",
            "p99_ms": f"{percentile(latencies, 0.99):.1f}",
            "cpu_ms_per_image": f"{self.cpu_s / max(1, len(latencies)) * 1e3:.1f}",
            "cpu_busy": f"{self.cpu_s / self.load.seconds / cores:.2f}",
            "gpu_busy": f"{np.mean(self.gpu_shares):.2f}" if self.gpu_shares else "",
            "error_kinds": " ".join(f"{kind}:{count}" for kind, count in sorted(self.load.errors.items())),
        }


def jpegs() -> list[bytes]:
    """`IMAGES` photos of one scene, each moved a little to the right of the one before."""
    with Image.open(ROOT / "examples" / "shapes.jpg") as file:
        scene = np.asarray(file.convert("RGB"))
    made = []
    for number in range(IMAGES):
        buffer = io.BytesIO()
        Image.fromarray(np.roll(scene, number, axis=1)).save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return made


class GpuWatch:
    """How busy the first GPU is, as its driver says; None where there is none."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> GpuWatch:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"]
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen([*command, "--loop-ms=200"], stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.share: float | None = None
        if self._process is None:
            return
        self._process.terminate()
        told = self._process.communicate()[0]
        shares = [float(line) / 100 for line in told.splitlines() if line.strip().isdigit()]
        self.share = sum(shares) / len(shares) if shares else None


# --- the service ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a service keeps images and rows, and how it is asked.

    Attributes:
        variables: Of its environment.
        image_url: With `{image}` in it.
        headers: Of every request.
        dsn: Of the database in which every task needs a row; None if the service makes them itself.
    """

    variables: Mapping[str, str]
    image_url: str
    headers: str = ""
    dsn: str | None = None

    @property
    def body(self) -> dict[str, str]:
        """Of a request."""
        return {
            "image_url": self.image_url,
            "text_prompt": PROMPT,
            "user_id": USER,
            "task_id": "{task_id}",
        }

    def insert_tasks(self, first: int, count: int) -> None:
        """Insert the rows that the Edge would have inserted, numbered as `bench.load.Bodies` numbers them."""
        if self.dsn is None:
            return
        rows = [
            (str(uuid.UUID(int=first + n)), USER, self.image_url.replace("{image}", str(n % IMAGES)), PROMPT)
            for n in range(count)
        ]
        with psycopg.connect(self.dsn) as connection, connection.cursor() as cursor:
            cursor.execute("insert into auth.users (id) values (%s) on conflict (id) do nothing", (USER,))
            cursor.executemany(
                "insert into public.segmentation_results (id, user_id, source_image_url, text_prompt)"
                " values (%s, %s, %s, %s)",
                rows,
            )


@contextlib.contextmanager
def remote_place(folder: Path, images: Sequence[bytes]) -> Iterator[Place]:
    """An S3 server with the images in it, and a database."""
    (folder / "s3").mkdir()
    with (
        s3_server(folder / "s3") as s3,
        running_postgres() as postgres,
        postgres.new_database() as dsn,
        running_postgrest(dsn) as supabase,
    ):
        client = boto3.client(
            "s3",
            endpoint_url=s3.endpoint,
            region_name="auto",
            aws_access_key_id=s3.access_key_id,
            aws_secret_access_key=s3.secret_access_key,
        )
        for number, image in enumerate(images):
            client.put_object(Bucket=s3.bucket, Key=f"uploads/bench-{number}.jpg", Body=image)
        variables = {
            "R2_ENDPOINT": s3.endpoint,
            "R2_ACCESS_KEY_ID": s3.access_key_id,
            "R2_SECRET_ACCESS_KEY": s3.secret_access_key,
            "R2_BUCKET": s3.bucket,
            "R2_PUBLIC_URL": PUBLIC_URL,
            "SUPABASE_URL": supabase.url,
            "SUPABASE_SERVICE_KEY": supabase.secret_key,
            "API_SECRET_KEY": API_KEY,
        }
        url = f"{PUBLIC_URL}/uploads/bench-{{image}}.jpg"
        yield Place(variables, url, f"X-API-Key: {API_KEY}\r\n", dsn)


@contextlib.contextmanager
def embedded_place(folder: Path, images: Sequence[bytes]) -> Iterator[Place]:
    """The embedded defaults, with the images where the service looks for them."""
    uploads = folder / "data" / "files" / "uploads"
    uploads.mkdir(parents=True)
    for number, image in enumerate(images):
        (uploads / f"bench-{number}.jpg").write_bytes(image)
    yield Place({"S3_DATA_DIR": str(folder / "data")}, "uploads/bench-{image}.jpg")


def await_ready(port: int, process: psutil.Process, log: Path) -> None:
    """Return when the service has loaded its model.

    Raises:
        RuntimeError: it ended, or took longer than `READY_WITHIN_S`.
    """
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline and process.status() != psutil.STATUS_ZOMBIE:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the service did not become ready; the end of its log:\n{log.read_text()[-2000:]}")


PLACES = {"s3 and rows": remote_place, "embedded": embedded_place}


def measure_service(name: str, options: argparse.Namespace, rows: dict[tuple[str, int], Row]) -> None:
    """One round of a service, all levels."""
    serve = ("-m", "bentoml", "serve", "service:S3Backend", "--host", "127.0.0.1", "--port", "{port}")
    with tempfile.TemporaryDirectory() as home, PLACES[name](Path(home), jpegs()) as place:
        log = Path(home) / "log"
        system = System(name, (sys.executable, *serve), PATH, {**place.variables, "S3_ENV_FILE": ""})
        with served(system, log) as (port, process):
            await_ready(port, process, log)
            press(place, port, *WARM_UP)
            for concurrency in options.concurrency:
                for shown, images in {name: IMAGES, **({KNOWN: 1} if name == "embedded" else {})}.items():
                    row = rows.setdefault((shown, concurrency), Row(shown, concurrency))
                    cpu_s = cpu_seconds(process)
                    with GpuWatch() as watch:
                        load = press(place, port, concurrency, options.each, images)
                    row.add(load, options.each, cpu_seconds(process) - cpu_s, watch.share)
                    say(row)


def press(place: Place, port: int, concurrency: int, requests: int, images: int = IMAGES) -> Load:
    """So many requests, each about a task of its own and the next of so many images."""
    first = uuid.uuid4().int & ~0xFFFFFFFF  # room for the numbers of the requests
    place.insert_tasks(first, requests)
    return drive(port, PATH, concurrency, requests, place.body, place.headers, str(images), str(first))


def measure_model(options: argparse.Namespace, rows: dict[tuple[str, int], Row]) -> None:
    """One round of the model alone: batches as large as the service could make at each level."""
    segmenter = Segmenter.from_checkpoint(
        os.environ.get("SAM3_WEIGHTS_PATH", DEMO_CHECKPOINT), "cuda" if torch.cuda.is_available() else "cpu"
    )
    segmenter.warm_up()
    items = [item_of(jpeg, segmenter.info.input_size_px) for jpeg in jpegs()]
    for concurrency in options.concurrency:
        row = rows.setdefault((ALONE, concurrency), Row(ALONE, concurrency))
        batch = min(concurrency, MAX_BATCH)
        segmenter.segment_batch(items[:batch])
        load, cpu_s, began = Load(), time.process_time(), time.perf_counter()
        with GpuWatch() as watch:
            for start in range(0, options.each, batch):
                asked = [items[(start + n) % IMAGES] for n in range(min(batch, options.each - start))]
                sent = time.perf_counter()
                results = segmenter.segment_batch(asked)
                load.latencies_ms += [(time.perf_counter() - sent) * 1e3] * len(asked)
                load.errors.update(result.error.code for result in results if result.error is not None)
        load.seconds = time.perf_counter() - began
        row.add(load, options.each, time.process_time() - cpu_s, watch.share)
        say(row)


def item_of(jpeg: bytes, size_px: int) -> SegmentItem:
    """An image as the model takes it."""
    with Image.open(io.BytesIO(jpeg)) as file:
        pixels = np.asarray(file.convert("RGB"))
    return SegmentItem(resize_for_model(pixels, size_px), pixels.shape[:2], (Prompt(PROMPT),))


def say(row: Row) -> None:
    """Progress, for whoever watches."""
    told = {key: value for key, value in row.figures(None).items() if value != ""}
    print(" ".join(f"{key}={value}" for key, value in told.items()), file=sys.stderr, flush=True)


def figures(rows: Mapping[tuple[str, int], Row]) -> list[dict[str, Value]]:
    """All rows, each beside the model alone at its level."""
    return [
        row.figures(rows.get((ALONE, level)) if name in SERVICES else None)
        for (name, level), row in sorted(rows.items(), key=lambda one: (one[0][1], SYSTEMS.index(one[0][0])))
    ]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.service", description=__doc__.splitlines()[0])
    parser.add_argument("--systems", nargs="+", choices=(*SERVICES, ALONE), default=[*SERVICES, ALONE])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--requests", type=int, default=400, help="at each level, all rounds together")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for NAME.csv and NAME.md")
    parser.add_argument("--name", default="service", help="of the files")
    options = parser.parse_args(arguments)
    options.each = -(-options.requests // options.rounds)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = Path(os.environ.get("SAM3_WEIGHTS_PATH", DEMO_CHECKPOINT)).name
    seen = results_file.conditions("torch", "bentoml", "uvloop", device=device_name(device), weights=weights)
    seen |= {"rounds": options.rounds}
    rows: dict[tuple[str, int], Row] = {}
    for turn in range(options.rounds):
        for name in options.systems if turn % 2 == 0 else reversed(options.systems):
            if name in PLACES:
                measure_service(name, options, rows)
            else:
                measure_model(options, rows)
            results_file.write(options.out, options.name, seen | {"rounds": turn + 1}, figures(rows))
    print(results_file.markdown(figures(rows)))
    return int(any(row.load.errors for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
