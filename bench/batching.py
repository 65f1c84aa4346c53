"""Load test of the batching: our two services beside LitServe, plain BentoML and the ideal, in one run.

    python -m bench.batching                 # the fake model: 10 ms + 2 ms per item, at most 16 in a batch
    python -m bench.batching --model demo    # the real service on the demo checkpoint
    python -m bench.batching --systems tuned configured --sides-px 1 240 1008    # what an item's size costs

Clients are a closed loop in a process of their own. Rounds alternate between the systems, so that whatever
else the machine does falls on all of them. The exit status is 1 if our own services made an error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import psutil

from bench import results_file
from bench.fake_model import MAX_BATCH_SIZE, OFF_VARIABLE, SIDE_PX_VARIABLE, batch_s
from bench.load import Load
from bench.results_file import RESULTS, ROOT, Value
from examples.demo import embedded_defaults, stop

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "s3-backend-bench"
LITSERVE = "litserve==0.2.19"
READY_WITHIN_S = 240.0  # the real service, on a machine that does much else; ten is usual
AFTERWARDS = 100  # requests of the client that comes alone after the busiest level
WARM_UP = (16, 200)  # clients, requests: BentoML's batcher learns from its first calls
BODY = {
    "image_url": "uploads/bench.jpg",
    "text_prompt": "red circle",
    "user_id": "00000000-0000-4000-8000-000000000001",
    "task_id": "{task_id}",
}


@dataclass(frozen=True)
class System:
    """Something that answers the load.

    Attributes:
        name: As in the table.
        command: What serves it; `{port}` stands for the port.
        path: Where the load goes.
        variables: Of its environment, beside the ones of this process.
        is_ours: Errors of ours make the run fail.
        root: Where it is started.
    """

    name: str
    command: tuple[str, ...]
    path: str = "/predict"
    variables: dict[str, str] = field(default_factory=dict)
    is_ours: bool = True
    root: Path = ROOT


@dataclass(frozen=True)
class Level:
    """How hard to press: so many clients, so many requests in all."""

    name: str
    clients: int
    requests: int


@dataclass
class Row:
    """One system at one level: all rounds together.

    Attributes:
        level: Its name.
        cpu_s: Processor time of all of the server's processes.
        items: Answered, whose batches are known.
        batches: They were in.
    """

    system: str
    side_px: int
    level: str
    requests: int = 0
    cpu_s: float = 0.0
    items: float = 0.0
    batches: float = 0.0
    load: Load = field(default_factory=Load)

    def add(self, load: Load, requests: int, cpu_s: float) -> None:
        """Take in one more round."""
        self.requests += requests
        self.cpu_s += cpu_s
        self.load.seconds += load.seconds
        self.load.latencies_ms += load.latencies_ms
        self.items += len(load.batch_sizes)
        self.batches += sum(1 / size for size in load.batch_sizes)  # one of n is an n-th of its batch
        self.load.errors.update(load.errors)

    def percentile_ms(self, share: float) -> float:
        """The latency that this share of the answers was at or under."""
        ordered = sorted(self.load.latencies_ms)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")

    def mean_batch(self) -> float:
        """Items per batch."""
        return self.items / self.batches if self.batches else float("nan")

    def figures(self) -> dict[str, Value]:
        """What is printed and written down."""
        answered = self.requests - sum(self.load.errors.values())
        return {
            "system": self.system,
            "side_px": self.side_px,
            "concurrency": self.level,
            "requests": self.requests,
            "errors": sum(self.load.errors.values()),
            "per_s": f"{answered / self.load.seconds:.1f}",
            "p50_ms": f"{self.percentile_ms(0.50):.1f}",
            "p99_ms": f"{self.percentile_ms(0.99):.1f}",
            "mean_batch": f"{self.mean_batch():.2f}",
            "cpu_ms_per_request": f"{self.cpu_s / self.requests * 1e3:.2f}",
            "error_kinds": " ".join(f"{kind}:{n}" for kind, n in sorted(self.load.errors.items())),
        }


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


@contextlib.contextmanager
def served(system: System, log: Path) -> Iterator[tuple[int, psutil.Process]]:
    """Serve a system: its port and its first process. It ends with all of its processes, whatever happens."""
    port = free_port()
    command = [part.replace("{port}", str(port)) for part in system.command]
    variables = {**embedded_defaults(), "BENTOML_DO_NOT_TRACK": "true", **system.variables}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=system.root, env=variables, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield port, psutil.Process(process.pid)
        finally:
            stop(process)


def await_answers(system: System, port: int, process: psutil.Process, log: Path) -> None:
    """Return when the system answers its first request rightly.

    Raises:
        RuntimeError: it ended, or took longer than `READY_WITHIN_S`.
    """
    deadline = time.monotonic() + READY_WITHIN_S
    body, said = {**BODY, "task_id": "00000000-0000-4000-8000-000000000000"}, "nothing"
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=READY_WITHIN_S, trust_env=False) as client:
        while time.monotonic() < deadline and process.status() != psutil.STATUS_ZOMBIE:
            with contextlib.suppress(httpx.TransportError):
                if client.get("/readyz" if system.path != "/predict" else "/").status_code < 500:
                    prepare(system, client)
                    answer = client.post(system.path, json=body)
                    if answer.status_code == 200:
                        return
                    said = answer.text
            time.sleep(0.1)
    raise RuntimeError(f"{system.name} answers {said}; the end of its log:\n{log.read_text()[-2000:]}")


def prepare(system: System, client: httpx.Client) -> None:
    """Put the image where the real service looks for it."""
    if system.path != "/predict":
        image = (ROOT / "examples" / "shapes.jpg").read_bytes()
        client.put("/files/uploads/bench.jpg", content=image).raise_for_status()


def drive(
    port: int, path: str, concurrency: int, requests: int, body: Mapping[str, str] = BODY, *more: str
) -> Load:
    """One level of load, from a process of its own; `more` is what `bench.load` may be told beside the body."""
    arguments = [str(port), path, str(concurrency), str(requests), json.dumps(body), *more]
    done = subprocess.run(
        [sys.executable, "-m", "bench.load", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    return Load(**json.loads(done.stdout))


def cpu_seconds(process: psutil.Process) -> float:
    """Processor time so far, of a process and all of its children."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            total += times.user + times.system
    return total


def batches_counted(port: int) -> tuple[float, float]:
    """Items and batches that the real service has counted so far."""
    counted = {"s3_batch_size_sum": 0.0, "s3_batch_size_count": 0.0}
    for line in httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.partition("{")[0] in counted:
            counted[name.partition("{")[0]] += float(value)
    return counted["s3_batch_size_sum"], counted["s3_batch_size_count"]


def levels_of(options: argparse.Namespace) -> list[Level]:
    """Levels in the order of a round; at last one client alone, to see what a busy spell leaves behind."""
    each = -(-options.requests // options.rounds)
    levels = [Level(str(clients), clients, each) for clients in options.concurrency]
    if len(levels) > 1:
        levels.append(Level(f"1 after {levels[-1].name}", 1, min(each, AFTERWARDS)))
    return levels


def measure(system: System, options: argparse.Namespace, rows: dict[tuple[str, int, str], Row]) -> None:
    """One round of one system, all levels."""
    side_px = int(system.variables.get(SIDE_PX_VARIABLE, "0"))
    is_real = options.model == "demo"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        own = {"S3_DATA_DIR": f"{folder}/data", "S3_ENV_FILE": ""} if is_real else {}
        with served(replace(system, variables={**system.variables, **own}), log) as (port, process):
            await_answers(system, port, process, log)
            drive(port, system.path, *((2, 8) if is_real else WARM_UP))
            for level in levels_of(options):
                row = rows.setdefault(
                    (system.name, side_px, level.name), Row(system.name, side_px, level.name)
                )
                counted, cpu_s = batches_counted(port) if is_real else (0.0, 0.0), cpu_seconds(process)
                load = drive(port, system.path, level.clients, level.requests)
                row.add(load, level.requests, cpu_seconds(process) - cpu_s)
                if is_real:
                    items, batches = batches_counted(port)
                    row.items += items - counted[0]
                    row.batches += batches - counted[1]
                say(row)


def say(row: Row) -> None:
    """Progress, for whoever watches."""
    figures = row.figures()
    print(
        f"{figures['system']:<12} side {figures['side_px']:>4} px  concurrency {figures['concurrency']:>6}  "
        f"{figures['per_s']:>6}/s  p50 {figures['p50_ms']:>6}  p99 {figures['p99_ms']:>6} ms  "
        f"batch {figures['mean_batch']:>5}  {figures['cpu_ms_per_request']:>5} ms CPU  "
        f"errors {figures['errors']} {figures['error_kinds']}",
        file=sys.stderr,
        flush=True,
    )


def ideal_of(row: Row, options: argparse.Namespace) -> str:
    """Requests per second that the fake model allows when nothing else takes time."""
    if options.model != "fake":
        return ""
    together = min(next(one.clients for one in levels_of(options) if one.name == row.level), MAX_BATCH_SIZE)
    return f"{together / batch_s(together):.1f}"


def litserve_python(given: str | None) -> str | None:
    """A Python that has LitServe: the one given, or one made in the cache; None if it cannot be made."""
    if given:
        return given
    home = CACHE / LITSERVE.replace("==", "-")
    python = home / "bin" / "python"
    if (home / ".complete").exists():
        return str(python)
    print(f"making an environment for {LITSERVE} in {home}", file=sys.stderr)
    shutil.rmtree(home, ignore_errors=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", LITSERVE], check=True)
    except subprocess.CalledProcessError as error:
        print(f"LitServe is left out: {error}", file=sys.stderr)
        return None
    (home / ".complete").touch()
    return str(python)


def bento(target: str, name: str, **variables: str) -> System:
    """A BentoML service of ours."""
    serve = ("-m", "bentoml", "serve", target, "--host", "127.0.0.1", "--port", "{port}")
    return System(name, (sys.executable, *serve), variables=variables)


def systems_of(options: argparse.Namespace) -> list[System]:
    """Whatever is to be measured, in the order of a round."""
    if options.model == "demo":
        real = bento("service:S3Backend", "demo")
        return [System(real.name, real.command, "/api/v1/predict")]
    known = {
        "tuned": bento("bench.fake_service:TunedApi", "tuned"),
        "no-gate": bento("bench.fake_service:TunedApi", "no-gate", **{OFF_VARIABLE: "gate"}),
        "no-sharing": bento("bench.fake_service:TunedApi", "no-sharing", **{OFF_VARIABLE: "sharing"}),
        "link-only": bento("bench.fake_service:TunedApi", "link-only", **{OFF_VARIABLE: "gate,sharing"}),
        "configured": replace(bento("bench.fake_service:ConfiguredApi", "configured"), is_ours=False),
        "plain": replace(bento("bench.fake_service:PlainApi", "plain"), is_ours=False),
    }
    if "litserve" in options.systems and (python := litserve_python(options.litserve_python)):
        known["litserve"] = System("litserve", (python, "-m", "bench.fake_litserve", "{port}"), is_ours=False)
    chosen = [known[name] for name in options.systems if name in known]
    return [
        System(one.name, one.command, one.path, {**one.variables, SIDE_PX_VARIABLE: str(side)}, one.is_ours)
        for side in options.sides_px
        for one in chosen
    ]


def conditions(options: argparse.Namespace) -> dict[str, Value]:
    """Under which the figures were measured."""
    return {
        "model": options.model,
        **results_file.conditions("bentoml", "uvloop", "torch"),
        "litserve": LITSERVE.partition("==")[2],
        "max_batch": MAX_BATCH_SIZE,
        "rounds": options.rounds,
    }


def write(rows: list[Row], options: argparse.Namespace, seen: dict[str, Value]) -> None:
    """NAME.csv, every row with its conditions, and NAME.md, the table under them."""
    name = options.name or ("batching" if options.model == "fake" else f"batching-{options.model}")
    told = [{**row.figures(), "ideal_per_s": ideal_of(row, options)} for row in rows]
    results_file.write(options.out, name, seen, told, table(rows, options))


def table(rows: list[Row], options: argparse.Namespace) -> str:
    """The figures as Markdown."""
    lines = [
        "| system | item | concurrency | /s | ideal | p50 ms | p99 ms | mean batch | CPU ms | errors |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = [level.name for level in levels_of(options)]
    for row in sorted(rows, key=lambda one: (one.side_px, order.index(one.level))):
        seen, item = row.figures(), f"{row.side_px} px" if row.side_px else "photo"
        lines.append(
            f"| {seen['system']} | {item} | {seen['concurrency']} "
            f"| {seen['per_s']} | {ideal_of(row, options)} | {seen['p50_ms']} | {seen['p99_ms']} "
            f"| {seen['mean_batch']} | {seen['cpu_ms_per_request']} "
            f"| {seen['errors']} of {seen['requests']} |"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.batching", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["fake", "demo"], default="fake")
    parser.add_argument(
        "--systems",
        nargs="+",
        default=["litserve", "tuned", "configured", "plain"],
        help="of: tuned, no-gate, no-sharing, link-only, configured, plain, litserve",
    )
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--requests", type=int, default=1600, help="at each level, all rounds together")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sides-px", nargs="+", type=int, default=[1], help="of the image in every item")
    parser.add_argument(
        "--litserve-python", help="a Python that has LitServe (made in the cache if not given)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for NAME.csv and NAME.md")
    parser.add_argument("--name", help="of the files; default: batching, or batching-demo")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    options = parse(arguments)
    systems, seen = systems_of(options), conditions(options)
    rows: dict[tuple[str, int, str], Row] = {}
    for turn in range(options.rounds):
        for system in systems if turn % 2 == 0 else reversed(systems):
            try:
                measure(system, options, rows)
            except RuntimeError as error:
                if system.is_ours:
                    raise
                print(f"{system.name} is left out: {error}", file=sys.stderr)
        write([*rows.values()], options, seen | {"rounds": turn + 1})
    print(table([*rows.values()], options))
    ours = {system.name for system in systems if system.is_ours}
    return int(any(row.load.errors for row in rows.values() if row.system in ours))


if __name__ == "__main__":
    raise SystemExit(main())
