"""Half an hour at twice what the service can do: does anything grow, and what do callers see?

    python -m bench.soak                # or `make soak`
    python -m bench.soak --minutes 3

A short closed loop finds the capacity; then an open loop sends at twice that rate, on an S3 server and Postgres behind
the tests' stand-in for PostgREST. Every five seconds memory (PSS: shared pages count in part) and open files of every
process of the service are taken down. The exit status is 1 if one of these does not hold:

- memory and open files of every process stay within 5 % after the warm-up, and no process is another one by then
  (image decoders, which are replaced now and then, are counted together);
- half of the requests, or so, are refused, each with 429 and within 50 ms at p99, also while a large body is still on
  its way; nothing else is refused and nothing fails;
- the p99 of the accepted is bounded: at most twice the time that the requests in flight need at capacity.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from api.config import Settings
from bench import results_file
from bench.batching import System, served
from bench.open_load import OpenLoad
from bench.results_file import RESULTS, ROOT, Value
from bench.service import IMAGES, PATH, PLACES, WARM_UP, Place, await_ready, jpegs, press
from bench.timing import percentile

SERVE = ("-m", "bentoml", "serve", "service:S3Backend", "--host", "127.0.0.1", "--port", "{port}")
CALIBRATION = (32, 600)  # clients, requests
SAMPLE_S = 5.0
WARM_UP_SHARE, WINDOW_SHARE = 0.2, 0.2
MAX_GROWTH, SLACK_FILES = 0.05, 3
MAX_REFUSAL_MS = 50.0
ACCEPTED, REFUSED = "200", "429"
# Image decoders are replaced after so many images: what must not grow is all of them together.
DECODERS, TOGETHER = "image decoders", 0


@dataclass
class Watched:
    """One process over the time.

    Attributes:
        pss_mb: Seconds since the start → memory.
        files: Seconds since the start → open file descriptors.
    """

    role: str
    pid: int
    pss_mb: dict[float, float] = field(default_factory=dict)
    files: dict[float, float] = field(default_factory=dict)


class ProcessWatch:
    """Samples every process under one, in a thread, while the block runs."""

    def __init__(self, process: psutil.Process) -> None:
        self._root = process
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="process-watch", daemon=True)
        self.seen: dict[int, Watched] = {}
        self.samples = 0

    def __enter__(self) -> ProcessWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ends.is_set():
            at_s = self.samples * SAMPLE_S
            for process in (self._root, *self._root.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    role = _role(process)
                    pid = TOGETHER if role == DECODERS else process.pid
                    pss_mb, files = process.memory_full_info().pss / 1e6, float(process.num_fds())
                    watched = self.seen.setdefault(pid, Watched(role, pid))
                    watched.pss_mb[at_s] = watched.pss_mb.get(at_s, 0.0) + pss_mb
                    watched.files[at_s] = watched.files.get(at_s, 0.0) + files
            self.samples += 1
            self._ends.wait(SAMPLE_S)


def _role(process: psutil.Process) -> str:
    words = process.cmdline()
    for service, role in (("S3Backend", "web worker"), ("Sam3Runner", "runner")):
        if "--service-name" in words and service in words:
            return role
    if "sam3_runner.decoder" in words:
        return DECODERS
    return "supervisor" if "serve" in words else " ".join(words[-1:])[:40] or process.name()


def press_open(place: Place, port: int, rate_per_s: float, seconds: float) -> OpenLoad:
    """The open loop, each request about a task of its own."""
    first = uuid.uuid4().int & ~0xFFFFFFFF
    place.insert_tasks(first, round(rate_per_s * seconds) + round(seconds))
    said = [json.dumps(place.body), place.headers, str(IMAGES), str(first)]
    command = [sys.executable, "-m", "bench.open_load", str(port), PATH, f"{rate_per_s:.3f}", f"{seconds:g}"]
    done = subprocess.run([*command, *said], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return OpenLoad(**json.loads(done.stdout))


def process_rows(watch: ProcessWatch, seconds: float) -> list[dict[str, Value]]:
    """Every process that was there for at least one of the two windows, and how much it grew from one to the other."""
    first = (WARM_UP_SHARE * seconds, (WARM_UP_SHARE + WINDOW_SHARE) * seconds)
    last = ((1 - WINDOW_SHARE) * seconds, seconds)
    rows: list[dict[str, Value]] = []
    for one in watch.seen.values():
        memory = [_between(one.pss_mb, *window) for window in (first, last)]
        files = [_between(one.files, *window) for window in (first, last)]
        if not any(memory):
            continue
        row: dict[str, Value] = {"process": one.role, "pid": one.pid}
        if all(memory):
            early, late = median(memory[0]), median(memory[1])
            row |= {
                "pss_mb": f"{early:.1f}",
                "pss_mb_end": f"{late:.1f}",
                "growth": f"{late / early - 1:+.1%}",
                "pss_mb_max": f"{max(one.pss_mb.values()):.1f}",
                "files": f"{median(files[0]):.0f}",
                "files_end": f"{median(files[1]):.0f}",
            }
            is_flat = late <= early * (1 + MAX_GROWTH)
            is_flat &= median(files[1]) <= median(files[0]) * (1 + MAX_GROWTH) + SLACK_FILES
            row["flat"] = "yes" if is_flat else "NO"
        else:
            row["flat"] = "NO: it came or went"
        rows.append(row)
    return rows


def _between(samples: dict[float, float], begin_s: float, end_s: float) -> list[float]:
    return [value for at_s, value in samples.items() if begin_s <= at_s <= end_s]


def answer_rows(load: OpenLoad, seconds: float) -> list[dict[str, Value]]:
    """What callers saw, in tenths of the run and in all of it."""
    tenths: dict[int, list[tuple[str, float]]] = defaultdict(list)
    for due_s, kind, ms in load.answers:
        tenths[min(9, int(due_s / seconds * 10))].append((kind, ms))
    rows = [
        _answer_row(f"{tenth * seconds / 600:.1f}–{(tenth + 1) * seconds / 600:.1f}", answers)
        for tenth, answers in sorted(tenths.items())
    ]
    return [*rows, _answer_row("all", [(kind, ms) for _, kind, ms in load.answers])]


def _answer_row(name: str, answers: Sequence[tuple[str, float]]) -> dict[str, Value]:
    accepted = [ms for kind, ms in answers if kind == ACCEPTED]
    refused = [ms for kind, ms in answers if kind == REFUSED]
    return {
        "minutes": name,
        "accepted": len(accepted),
        "p50_ms": f"{percentile(accepted, 0.5):.0f}",
        "p99_ms": f"{percentile(accepted, 0.99):.0f}",
        "refused_429": len(refused),
        "429_p50_ms": f"{percentile(refused, 0.5):.1f}",
        "429_p99_ms": f"{percentile(refused, 0.99):.1f}",
        "other": len(answers) - len(accepted) - len(refused),
    }


def faults(
    load: OpenLoad, processes: Sequence[dict[str, Value]], capacity_per_s: float, in_flight: int
) -> list[str]:
    """What does not hold, one line each."""
    kinds = load.kinds()
    accepted = [ms for _, kind, ms in load.answers if kind == ACCEPTED]
    refused = [ms for _, kind, ms in load.answers if kind == REFUSED]
    slow = [ms for kind, ms in load.slow if kind == REFUSED]
    bound_ms = 2e3 * in_flight / capacity_per_s
    said = [f"{row['process']} ({row['pid']}) is not flat" for row in processes if row["flat"] != "yes"]
    if others := {kind: n for kind, n in kinds.items() if kind not in (ACCEPTED, REFUSED)}:
        said.append(f"other answers than {ACCEPTED} and {REFUSED}: {others}")
    if load.unsent or not accepted or not refused or not slow:
        said.append(
            f"{load.unsent} unsent; {len(accepted)}, {len(refused)} and {len(slow)} slow ones answered"
        )
    for name, values in (("429", refused), ("429 to a slow body", slow)):
        if (p99 := percentile(values, 0.99)) > MAX_REFUSAL_MS:
            said.append(f"p99 of {name} is {p99:.0f} ms, more than {MAX_REFUSAL_MS:g}")
    if (p99 := percentile(accepted, 0.99)) > bound_ms:
        said.append(f"p99 of the accepted is {p99:.0f} ms, more than {bound_ms:.0f}")
    return said


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--times", type=float, default=2.0, help="the capacity")
    parser.add_argument("--place", choices=PLACES, default="s3 and rows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for NAME.json and NAME.md")
    parser.add_argument("--name", default="soak", help="of the files")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Calibrate, press, print, write."""
    options = parse(arguments)
    seconds, in_flight = options.minutes * 60, Settings.model_fields["max_in_flight"].default
    seen = results_file.conditions("torch", "bentoml", "uvloop", place=options.place, minutes=options.minutes)
    with tempfile.TemporaryDirectory() as home, PLACES[options.place](Path(home), jpegs()) as place:
        log = Path(home) / "log"
        variables = {"S3_DATA_DIR": f"{home}/data", **place.variables, "S3_ENV_FILE": ""}
        with served(System("", (sys.executable, *SERVE), PATH, variables), log) as (port, process):
            await_ready(port, process, log)
            press(place, port, *WARM_UP)
            measured = press(place, port, *CALIBRATION)
            capacity_per_s = len(measured.latencies_ms) / measured.seconds
            rate_per_s = options.times * capacity_per_s
            print(f"capacity {capacity_per_s:.1f}/s, now {rate_per_s:.1f}/s", file=sys.stderr, flush=True)
            with ProcessWatch(process) as watch:
                load = press_open(place, port, rate_per_s, seconds)
    processes, answers = process_rows(watch, seconds), answer_rows(load, seconds)
    slow = [ms for kind, ms in load.slow if kind == REFUSED]
    seen |= {
        "capacity_per_s": f"{capacity_per_s:.1f}",
        "rate_per_s": f"{rate_per_s:.1f}",
        "429_to_slow_bodies": len(slow),
        "429_to_slow_bodies_p99_ms": f"{percentile(slow, 0.99):.1f}",
    }
    said = faults(load, processes, capacity_per_s, in_flight)
    write(options.out, options.name, seen, processes, answers, said)
    return int(bool(said))


def write(
    folder: Path,
    name: str,
    seen: dict[str, Value],
    processes: list[dict[str, Value]],
    answers: list[dict[str, Value]],
    said: list[str],
) -> None:
    """NAME.json and NAME.md, and the latter on the screen."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {"conditions": seen, "processes": processes, "answers": answers, "faults": said}
    (folder / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    tables = [results_file.markdown(rows) for rows in (answers, processes)]
    verdict = "\n".join(f"- {line}" for line in said) or "All of it holds."
    text = "\n\n".join([", ".join(f"{key} {value}" for key, value in seen.items()), *tables, verdict])
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    raise SystemExit(main())
