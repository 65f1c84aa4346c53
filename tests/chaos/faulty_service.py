"""The service with a fault: a web worker that begins a named step of a named task kills itself.

    bentoml serve tests.chaos.faulty_service:S3Backend      with S3_CHAOS_FAULTS, a directory

A file `TASK_ID@STEP` in that directory is a fault: it holds how many more times it strikes. Only tests serve this
module; the service itself has no such switch.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import service
from tasks.executor import TaskExecutor

FAULTS_VARIABLE = "S3_CHAOS_FAULTS"

S3Backend = service.S3Backend
_reached = TaskExecutor._reached


async def _reached_or_killed(self: TaskExecutor, run: Any, stage: str) -> None:
    fault = Path(os.environ[FAULTS_VARIABLE]) / f"{run.job.task_id}@{stage}"
    if fault.exists() and (times := int(fault.read_text())) > 0:
        fault.write_text(str(times - 1))
        os.kill(os.getpid(), signal.SIGKILL)
    await _reached(self, run, stage)


TaskExecutor._reached = _reached_or_killed  # type: ignore[method-assign]
