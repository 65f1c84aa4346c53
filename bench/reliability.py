"""What the journal costs: the service before it, with it in memory, and as it is, in one run.

    python -m bench.reliability                    # before: the commit in front of the one that brought the journal
    python -m bench.reliability --before COMMIT --after COMMIT    # … or any two

`before` tells what the executor, the journal and all else that came since cost together; `in memory` is today's code
without a disk (`bench.journalless`), and tells what the journal itself costs. They run side by side on the demo
checkpoint and local storage, and are asked in turn, a burst each, so that whatever else the machine does falls on all.
They are asked about one image again and again: the model takes as little of the time as it can, and what is around it
shows. The exit status is 1 if one of them made an error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from bench import results_file
from bench.batching import System, cpu_seconds, served
from bench.load import Load
from bench.results_file import RESULTS, ROOT, Value
from bench.service import PATH, WARM_UP, Place, await_ready, embedded_place, jpegs, press
from bench.timing import percentile

JOURNAL = "tasks/journal.py"
SERVE = ("-m", "bentoml", "serve", "{module}:S3Backend", "--host", "127.0.0.1", "--port", "{port}")
SIDES = ("before", "in memory", "after")


@dataclass
class Side:
    """One of the services while it runs, and what was measured of it.

    Attributes:
        loads: By concurrency, one a round.
        cpu_s: Processor time of its processes, by concurrency.
    """

    place: Place
    port: int
    process: psutil.Process
    loads: dict[int, list[Load]] = field(default_factory=dict)
    cpu_s: dict[int, float] = field(default_factory=dict)

    def press(self, concurrency: int, requests: int) -> None:
        """One burst."""
        before_s = cpu_seconds(self.process)
        self.loads.setdefault(concurrency, []).append(press(self.place, self.port, concurrency, requests, 1))
        spent_s = cpu_seconds(self.process) - before_s
        self.cpu_s[concurrency] = self.cpu_s.get(concurrency, 0.0) + spent_s

    def latencies_ms(self, concurrency: int) -> list[float]:
        """Of all rounds."""
        return [ms for load in self.loads[concurrency] for ms in load.latencies_ms]

    def per_s(self, concurrency: int) -> list[float]:
        """Answers a second, one a round."""
        return [len(load.latencies_ms) / load.seconds for load in self.loads[concurrency]]

    def errors(self) -> int:
        """In all rounds at all levels."""
        return sum(sum(load.errors.values()) for loads in self.loads.values() for load in loads)


@contextlib.contextmanager
def files_of(commit: str) -> Iterator[Path]:
    """A folder with the repository's files as they were."""
    done = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(done.stdout)) as files:
        files.extractall(folder, filter="data")
        yield Path(folder)


def commit_before_journal() -> str:
    """The parent of the commit that added it.

    Raises:
        RuntimeError: there is no such commit: not a repository, or not its whole history.
    """
    command = ["git", "log", "--diff-filter=A", "--format=%H", "--", JOURNAL]
    added = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True).stdout.split()
    if not added:
        raise RuntimeError(f"no commit of this repository added {JOURNAL}: say --before COMMIT")
    return f"{added[-1]}~1"


@contextlib.contextmanager
def running(root: Path, module: str = "service") -> Iterator[Side]:
    """The service made of the files in a folder, on local storage with images in it."""
    serve = tuple(part.replace("{module}", module) for part in SERVE)
    with tempfile.TemporaryDirectory() as home, embedded_place(Path(home), jpegs()) as place:
        log = Path(home) / "log"
        variables = {**place.variables, "S3_ENV_FILE": "", "PYTHONPATH": ""}
        with served(System("", (sys.executable, *serve), PATH, variables, root=root), log) as (port, process):
            await_ready(port, process, log)
            press(place, port, *WARM_UP)
            yield Side(place, port, process)


def figures(sides: Mapping[str, Side], concurrency: int) -> list[dict[str, Value]]:
    """One level: each side, and beside the others how much more the last one takes."""
    rows: list[dict[str, Value]] = []
    *_, after = sides.values()
    for name, side in sides.items():
        latencies = side.latencies_ms(concurrency)
        rows.append(
            {
                "concurrency": concurrency,
                "service": name,
                "requests": len(latencies),
                "per_s": f"{median(side.per_s(concurrency)):.1f}",
                "p50_ms": f"{percentile(latencies, 0.50):.2f}",
                "p99_ms": f"{percentile(latencies, 0.99):.2f}",
                "cpu_ms_per_request": f"{side.cpu_s[concurrency] / len(latencies) * 1e3:.2f}",
                "errors": sum(sum(load.errors.values()) for load in side.loads[concurrency]),
            }
        )
        if side is not after:
            ratios = [b / a for a, b in zip(side.per_s(concurrency), after.per_s(concurrency), strict=True)]
            added_ms = percentile(after.latencies_ms(concurrency), 0.5) - percentile(latencies, 0.5)
            rows[-1] |= {
                "after_is": f"{median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f}) of the throughput",
                "after_adds_p50_ms": f"{added_ms:+.2f}",
            }
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description=__doc__.splitlines()[0])
    parser.add_argument("--before", help="commit; default: the one before the journal")
    parser.add_argument("--after", help="commit; default: the files as they are")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=200, help="in each burst")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for NAME.csv and NAME.md")
    parser.add_argument("--name", default="reliability", help="of the files")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    options = parse(arguments)
    commit = options.before or commit_before_journal()
    before = subprocess.run(
        ["git", "rev-parse", "--short=10", commit], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    seen = results_file.conditions("torch", "bentoml", before=before, rounds=options.rounds)
    if options.after:
        seen["after"] = options.after
    with (
        files_of(commit) as before_root,
        files_of(options.after) if options.after else contextlib.nullcontext(ROOT) as after_root,
        running(before_root) as old,
        running(after_root, "bench.journalless") as memory,
        running(after_root) as new,
    ):
        sides = dict(zip(SIDES, (old, memory, new), strict=True))
        for turn in range(options.rounds):
            for concurrency in options.concurrency:
                for name in SIDES if turn % 2 == 0 else reversed(SIDES):
                    sides[name].press(concurrency, options.requests)
            print(f"round {turn + 1} of {options.rounds}", file=sys.stderr, flush=True)
    rows = [row for concurrency in options.concurrency for row in figures(sides, concurrency)]
    results_file.write(options.out, options.name, seen, rows)
    print(results_file.markdown(rows))
    return int(any(side.errors() for side in sides.values()))


if __name__ == "__main__":
    raise SystemExit(main())
