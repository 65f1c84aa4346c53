"""What goes wrong in a web worker's process ends the service instead of starting it for ever."""

from __future__ import annotations

import psutil
import pytest

from tests.conftest import READY_DEADLINE_S, STOP_DEADLINE_S, Serve, wait_until

# The runner takes the signal to stop once it has loaded, so the end may be as far away as readiness.
END_DEADLINE_S = READY_DEADLINE_S + 3 * STOP_DEADLINE_S


@pytest.mark.timeout(READY_DEADLINE_S + END_DEADLINE_S)
@pytest.mark.slow
def test_a_data_dir_that_breaks_after_the_check_ends_the_service_in_one_line(served: Serve) -> None:
    service = served({}, ready=False)
    supervisor = psutil.Process(service.process.pid)
    wait_until(lambda: len(supervisor.children()) == 2, READY_DEADLINE_S, "both are started", service.log)
    (service.data_dir / "tasks.sqlite3").write_bytes(b"not a database, and longer than the header of one" * 9)
    wait_until(lambda: service.process.poll() is not None, END_DEADLINE_S, "it ends", service.log)
    assert service.process.returncode == 1
    assert service.log().strip().splitlines()[-1].startswith("Error: S3_DATA_DIR is ")
