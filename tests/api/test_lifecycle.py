"""What the processes of one service share lies in memory, is found by them, and goes with the supervisor."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

SUPERVISOR = """
import os, subprocess, sys
from api import lifecycle
lifecycle._MEMORY = sys.argv[1]
lifecycle._MEMORY_BYTES = int(sys.argv[2])
lifecycle.prepare_processes()
os.environ["PROMETHEUS_MULTIPROC_DIR"] = "/where/bentoml/says"
subprocess.run([sys.executable, "-c", '''if True:
    import os
    from pathlib import Path
    from api import lifecycle
    lifecycle.count_in_memory()
    from api.metrics import BatchMetrics
    BatchMetrics().observe(1)
    print(os.environ["PROMETHEUS_MULTIPROC_DIR"])
    print(*(path.stem.split("_")[0] for path in Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).iterdir()))
'''], check=True)
"""


@pytest.mark.parametrize(
    ("memory", "needed_bytes", "parent"),
    [
        pytest.param("/dev/shm", 1, "/dev/shm", id="memory"),
        pytest.param("/dev/shm", 1 << 60, tempfile.gettempdir(), id="too little of it"),
        pytest.param(str(ROOT), 1, tempfile.gettempdir(), id="a disk"),
        pytest.param("/nowhere", 1, tempfile.gettempdir(), id="none"),
    ],
)
def test_metrics_are_counted_in_memory_if_there_is_some_and_leave_nothing_behind(
    memory: str, needed_bytes: int, parent: str
) -> None:
    printed = subprocess.run(
        [sys.executable, "-c", SUPERVISOR, memory, str(needed_bytes)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    ).stdout.split()
    directory, *kinds = printed
    assert Path(directory).parent.parent == Path(parent)
    assert kinds == ["histogram"]
    assert not Path(directory).parent.exists()
