"""`make demo`: the whole round trip through the real HTTP API, on this machine alone.

    python examples/demo.py [--image photo.jpg] [--prompt "blue square"] [--out demo-out]

Starts the service on its embedded defaults (a local directory, SQLite, the demo checkpoint), uploads the
image, asks for one prompt and then for several, writes the mask and a coloured overlay, reads the task's row
back, and stops the service.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run by its path, a script finds only its own folder

from PIL import Image  # noqa: E402

from sam3_runner.drawing import draw_overlay, numbered  # noqa: E402
from sam3_runner.images import ImageLimits, open_image  # noqa: E402
from sam3_runner.rle import from_coco  # noqa: E402
from sam3_runner.types import Segmentation  # noqa: E402
from tasks.local import LocalTasks  # noqa: E402
from tasks.store import TaskRow  # noqa: E402

DEFAULT_IMAGE = ROOT / "examples" / "shapes.jpg"
DEFAULT_PROMPT = "red circle"
MORE_PROMPTS = ("blue square", "green star", "yellow ring", "purple cross")
# Loading PyTorch in several processes at once, from a cold disk, on two cores.
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 30.0
# What would lead the demo away from the embedded defaults. SAM3_* stays: one's own weights may well be shown.
NOT_FOR_THE_DEMO = ("R2_", "SUPABASE_", "S3_", "API_SECRET_KEY", "BENTOML_", "PORT")
SHOWN_RLE_CHARACTERS = 24
LINE_WIDTH = 110


class DemoError(Exception):
    """Something went wrong that the person at the keyboard can read and act on."""


@dataclass(frozen=True)
class Options:
    """What to segment, and where the results go."""

    image: Path
    prompt: str
    out: Path

    @property
    def data_dir(self) -> Path:
        """Where the service keeps uploads, masks and rows."""
        return self.out / "data"

    @property
    def log(self) -> Path:
        """What the service says."""
        return self.out / "service.log"


@dataclass(frozen=True)
class Service:
    """A running service."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path


def main() -> int:
    """Run the demo; the exit status is 0 only if every step worked."""
    options = read_options()
    for ending in (signal.SIGTERM, signal.SIGHUP):  # so that the service is stopped too
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    try:
        image_bytes = read_image(options.image)
        empty(options)
        with running_service(options) as service, open_client(service.url) as client:
            tour(client, options, image_bytes)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    return 0


def read_options() -> Options:
    """Read the command line; what it does not say comes from IMAGE and PROMPT, as make passes them."""
    parser = argparse.ArgumentParser(description="Segment an image by text through the real HTTP API.")
    parser.add_argument("--image", type=Path, default=os.environ.get("IMAGE") or DEFAULT_IMAGE)
    parser.add_argument("--prompt", default=os.environ.get("PROMPT") or DEFAULT_PROMPT)
    parser.add_argument("--out", type=Path, default=ROOT / "demo-out", help="made anew each time")
    found = parser.parse_args()
    return Options(image=found.image, prompt=found.prompt, out=found.out.resolve())


def read_image(path: Path) -> bytes:
    """Read the file, or say in one line why not."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DemoError(f"cannot read the image {path}: {error.strerror}") from error


def empty(options: Options) -> None:
    """Make the results' folder anew; one that an earlier demo did not make is left alone."""
    try:
        if options.out.exists() and any(options.out.iterdir()):
            if not options.log.exists():
                raise DemoError(
                    f"{shown(options.out)} holds other things: empty it, or name another with --out"
                )
            shutil.rmtree(options.out)
        options.data_dir.mkdir(parents=True)
    except OSError as error:
        raise DemoError(f"cannot empty {shown(options.out)}: {error.strerror}") from error


# --- the service --------------------------------------------------------------------------------------------


@contextmanager
def running_service(options: Options) -> Iterator[Service]:
    """Start the service on a free port, wait until it is ready, and stop it in the end whatever happens."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "bentoml",
        "serve",
        "service:S3Backend",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    say(f"Starting the service on 127.0.0.1:{port} (its log: {shown(options.log)})")
    with options.log.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=service_environment(options.data_dir),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us first, and the service is stopped in order
        )
    service = Service(process, f"http://127.0.0.1:{port}", options.log)
    try:
        wait_until_ready(service)
        yield service
    except httpx.TransportError as error:
        raise DemoError(f"lost the service ({error}); the end of its log:\n{tail(options.log)}") from error
    finally:
        say("Stopping the service")
        stop(process)


def service_environment(data_dir: Path) -> dict[str, str]:
    """The environment of a service on its embedded defaults."""
    return embedded_defaults() | {"S3_DATA_DIR": str(data_dir), "BENTOML_DO_NOT_TRACK": "true"}


def embedded_defaults() -> dict[str, str]:
    """This process's environment without what would configure R2, Supabase or a key."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_FOR_THE_DEMO)}
    return kept | {"S3_ENV_FILE": ""}


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_ready(service: Service) -> None:
    """Poll `/readyz`, with a sign of life every few seconds."""
    began = time.monotonic()
    next_sign_s = 5.0
    while (waited_s := time.monotonic() - began) < START_TIMEOUT_S:
        if service.process.poll() is not None:
            raise DemoError(f"the service ended at start; the end of its log:\n{tail(service.log)}")
        if is_ready(service.url):
            say(f"Ready after {waited_s:.1f} s: the model is loaded and warmed up")
            return
        if waited_s >= next_sign_s:
            print(f"    loading the model … {waited_s:.0f} s", flush=True)
            next_sign_s += 5
        time.sleep(0.2)
    raise DemoError(
        f"the service was not ready after {START_TIMEOUT_S:.0f} s; the end of its log:\n{tail(service.log)}"
    )


def is_ready(url: str) -> bool:
    """Whether requests can be served now."""
    try:
        return httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the service to finish; end what is left of it, its workers included, if it does not."""
    workers = processes_under(process.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    # A service that was stopped while it started may leave workers behind that still load the model.
    left = [worker for worker in [*workers, *processes_under(process.pid)] if worker.is_running()]
    if process.poll() is None:
        process.kill()
        process.wait()
    for worker in left:
        with suppress(psutil.NoSuchProcess):
            worker.kill()
    psutil.wait_procs(left, timeout=STOP_TIMEOUT_S)


def processes_under(pid: int) -> list[psutil.Process]:
    """Everything that a process has started and that still runs."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


# --- the tour -----------------------------------------------------------------------------------------------


def tour(client: httpx.Client, options: Options, image_bytes: bytes) -> None:
    """Upload, one prompt, several prompts, and the row."""
    info = call(client, "GET", "/api/v1/model/info")
    name, version, device = info["model_name"], info["model_version"], info["device"]
    say(f"Model: {name} {version}, {info['parameters']:,} parameters on {device}")

    file = re.sub(r"[^A-Za-z0-9_.-]", "-", options.image.name).lstrip(".-") or "image"
    say(f"PUT /files/uploads/{file}  ({len(image_bytes):,} bytes of {shown(options.image)})")
    upload = call(client, "PUT", f"/files/uploads/{file}", content=image_bytes)

    task_id = str(uuid.uuid4())
    common = {"image_url": upload["url"], "user_id": "demo"}
    request = common | {"task_id": task_id, "text_prompt": options.prompt}
    say(f"POST /api/v1/predict  {json.dumps(request)}")
    answer = call(client, "POST", "/api/v1/predict", json=request)
    print(pretty(shortened(answer)))

    prompts = [options.prompt, *(prompt for prompt in MORE_PROMPTS if prompt != options.prompt)]
    many = common | {"task_id": str(uuid.uuid4()), "prompts": prompts}
    say(f"POST /api/v1/predict/batch  {json.dumps(many)}")
    batch = call(client, "POST", "/api/v1/predict/batch", json=many)
    print(pretty(shortened(batch)))

    for result in batch["results"]:
        found, best = len(result["instances"]), result["confidence"]
        print(f"    {result['text_prompt']!r}: {found} found" + (f", best score {best:.2f}" if found else ""))

    write_results(client, options, image_bytes, answer, batch)
    show_row(asyncio.run(read_row(options.data_dir, task_id)), task_id)


def open_client(url: str) -> httpx.Client:
    """A client that no proxy of the environment comes between."""
    return httpx.Client(base_url=url, timeout=120, trust_env=False)


def call(client: httpx.Client, method: str, path: str, **request: Any) -> dict[str, Any]:
    """Send one request; an error answer becomes one readable line."""
    response = client.request(method, path, **request)
    if response.is_success:
        answer: dict[str, Any] = response.json()
        return answer
    try:
        error = response.json()["error"]
        reason = f"{error['code']}: {error['message']}"
    except (ValueError, KeyError, TypeError):
        reason = response.text[:500]
    raise DemoError(f"{method} {path} answered {response.status_code} {reason}")


def shortened(value: Any) -> Any:
    """The same JSON with long run-length strings cut, for reading."""
    if isinstance(value, Mapping):
        return {
            key: f"{item[:SHOWN_RLE_CHARACTERS]}… ({len(item)} characters)"
            if key == "counts" and isinstance(item, str) and len(item) > SHOWN_RLE_CHARACTERS
            else shortened(item)
            for key, item in value.items()
        }
    return [shortened(item) for item in value] if isinstance(value, list) else value


def pretty(value: Any, indent: str = "") -> str:
    """JSON for reading: what fits on a line stays on one."""
    flat = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(flat) <= LINE_WIDTH or not isinstance(value, dict | list) or not value:
        return flat
    inner = indent + "  "
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + pretty(item, inner) for item in value) + f"\n{indent}]"
    fields = (f"{inner}{json.dumps(key)}: {pretty(item, inner)}" for key, item in value.items())
    return "{\n" + ",\n".join(fields) + f"\n{indent}}}"


def write_results(
    client: httpx.Client, options: Options, image_bytes: bytes, answer: dict[str, Any], batch: dict[str, Any]
) -> None:
    """Write the served mask, the overlay of every prompt's instances, and both answers in full."""
    mask = client.get(answer["mask_url"])
    if not mask.is_success:
        raise DemoError(f"GET {answer['mask_url']} answered {mask.status_code}")
    (options.out / "mask.png").write_bytes(mask.content)
    (options.out / "predict.json").write_text(json.dumps(answer, indent=2))
    (options.out / "batch.json").write_text(json.dumps(batch, indent=2))
    save_overlay(options.out / "overlay.png", image_bytes, [answer])
    save_overlay(options.out / "overlay-batch.png", image_bytes, batch["results"])
    for name in ("mask.png", "overlay.png", "overlay-batch.png", "predict.json", "batch.json"):
        say(f"Wrote {shown(options.out / name)}")


def save_overlay(path: Path, image_bytes: bytes, results: list[dict[str, Any]]) -> None:
    """Paint every instance of every result over the upright image, each with its prompt and score."""
    found = [(result["text_prompt"], segmentation_of(result["instances"])) for result in results]
    limits = ImageLimits(max_pixels=1_000_000_000)  # the service has judged it already
    pixels = open_image(image_bytes, limits)
    Image.fromarray(draw_overlay(pixels, numbered(found, (pixels.shape[0], pixels.shape[1])))).save(path)


def segmentation_of(instances: list[dict[str, Any]]) -> Segmentation:
    """What an answer says of one prompt's instances."""
    return Segmentation(
        np.array([instance["score"] for instance in instances], np.float32),
        np.array([instance["box_xyxy_px"] for instance in instances], np.float32).reshape(-1, 4),
        tuple(from_coco(instance["mask_rle"]) for instance in instances),
    )


async def read_row(data_dir: Path, task_id: str) -> TaskRow | None:
    """Read the task's row from the service's own database."""
    rows = LocalTasks(data_dir / "tasks.sqlite3")
    try:
        return await rows.get(task_id)
    finally:
        await rows.aclose()


def show_row(row: TaskRow | None, task_id: str) -> None:
    """Print what the row says; a row that is not done is an error."""
    if row is None or row.status != "done":
        raise DemoError(f"the row of task {task_id} is {row.status if row else 'not there'}, expected done")
    say(f"Row of task {task_id}")
    columns = {"status": row.status, "labels": list(row.labels), "mask_image_url": row.mask_image_url}
    print(pretty(columns | {"metadata": dict(row.metadata)}))


def say(line: str) -> None:
    """One step of the demo."""
    print(f"==> {line}", flush=True)


def shown(path: Path) -> str:
    """A path as a person would type it from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
