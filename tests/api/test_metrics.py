"""Metrics as a scrape sees them, over several processes, some of them dead."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from api.metrics import RequestMetrics
from api.requests import RequestRecord
from tests.api.contract import DOCUMENT
from tests.conftest import ROOT

WORKER = """
import sys
from api.metrics import RequestMetrics
metrics = RequestMetrics()
{does}
print("ready", flush=True)
for _ in sys.stdin:
    sys.stdout.write(metrics.exposition({{"accepted": 2, "computed": 1, "done": 9}}).decode())
    print("end", flush=True)
"""


@contextmanager
def worker(directory: Path, does: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that counts into the directory, and answers each line with an exposition."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER.format(does=does)],
        cwd=ROOT,
        env={"PROMETHEUS_MULTIPROC_DIR": str(directory)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def scrape(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    samples = {}
    for line in iter(process.stdout.readline, "end\n"):
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            samples[name] = float(value)
    return samples


def up(samples: Mapping[str, float], name: str) -> float:
    return samples[f's3_dependency_up{{dependency="{name}"}}']


def test_a_dependency_is_up_if_no_living_worker_takes_it_to_be_down(tmp_path: Path) -> None:
    with worker(tmp_path) as one:
        assert (up(scrape(one), "storage"), up(scrape(one), "tasks")) == (1, 1)
        with worker(tmp_path, "metrics.tasks.storage_is_up(False)") as other:
            assert (up(scrape(one), "storage"), up(scrape(one), "tasks")) == (0, 1)
            other.send_signal(signal.SIGKILL)
            other.wait()
            assert up(scrape(one), "storage") == 1


def test_what_a_dead_worker_counted_still_counts(tmp_path: Path) -> None:
    does = 'metrics.tasks.retried("upload"); metrics.tasks.taken_over(); metrics.tasks.ended("done", {})'
    with worker(tmp_path, does) as one, worker(tmp_path, does) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        samples = scrape(one)
    assert samples['s3_task_retries_total{step="upload"}'] == 2
    assert samples["s3_task_takeovers_total"] == 2
    assert samples['s3_tasks_total{outcome="done"}'] == 2


def test_the_stages_of_tasks_that_ended_are_counted_as_far_as_they_came() -> None:
    metrics = RequestMetrics()
    metrics.tasks.ended("error", {"download": 5.0, "decode": 0.0, "nap": 1.0})
    text = metrics.exposition({}).decode()
    assert 's3_stage_seconds_count{stage="download"} 1.0' in text
    assert 's3_stage_seconds_sum{stage="download"} 0.005' in text
    assert 's3_stage_seconds_count{stage="decode"} 0.0' in text
    assert "nap" not in text


def test_tasks_that_wait_are_counted_once_for_the_whole_host(tmp_path: Path) -> None:
    with worker(tmp_path) as one, worker(tmp_path) as other:
        for process in (one, other):
            waiting = {
                name: value for name, value in scrape(process).items() if name.startswith("s3_tasks_waiting")
            }
            assert waiting == {
                's3_tasks_waiting{state="accepted"}': 2,
                's3_tasks_waiting{state="computed"}': 1,
                's3_tasks_waiting{state="failed"}': 0,
            }


def test_the_contract_names_exactly_the_metrics_of_the_web_workers() -> None:
    metrics = RequestMetrics()
    metrics.observe(RequestRecord("1", "POST", "/api/v1/predict", status=500, outcome="INTERNAL_ERROR"))
    metrics.tasks.retried("upload")
    text = metrics.exposition({}).decode()
    kinds = dict(re.findall(r"^# TYPE (s3_\w+) (\w+)$", text, re.MULTILINE))
    served = {name for name in kinds if not name.endswith("_created")}
    told = set(re.findall(r"`(s3_\w+)(?:\{\w+(?:,\w+)*\})?`", DOCUMENT.read_text(encoding="utf-8")))
    assert told == served | {"s3_batch_size"}  # the runner's
