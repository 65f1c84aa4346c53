"""The bench of the journal's cost: its figures, and a short run."""

import csv
from pathlib import Path

import psutil
import pytest

from bench.load import Load
from bench.reliability import Side, figures, main
from bench.service import Place


def side(ms: float, seconds: float) -> Side:
    made = Side(Place({}, ""), 0, psutil.Process())
    made.loads[8] = [Load(seconds, [ms] * 10), Load(seconds, [ms] * 10)]
    made.cpu_s[8] = 0.2
    return made


def test_after_stands_beside_the_others_at_the_same_level() -> None:
    sides = {"before": side(10.0, 1.0), "in memory": side(11.0, 1.25), "after": side(11.5, 1.25)}
    before, memory, after = figures(sides, 8)
    assert (before["per_s"], after["per_s"], after["p50_ms"]) == ("10.0", "8.0", "11.50")
    assert before["after_adds_p50_ms"] == "+1.50"
    assert before["after_is"] == "0.800 (0.800–0.800) of the throughput"
    assert (memory["after_adds_p50_ms"], memory["after_is"]) == (
        "+0.50",
        "1.000 (1.000–1.000) of the throughput",
    )
    assert "after_is" not in after
    assert before["cpu_ms_per_request"] == "10.00"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_sides_answer_without_an_error(tmp_path: Path) -> None:
    arguments = ["--before", "HEAD", "--requests", "8", "--rounds", "1", "--concurrency", "1", "2"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    with (tmp_path / "reliability.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["concurrency"], row["service"]) for row in rows] == [
        (level, name) for level in ("1", "2") for name in ("before", "in memory", "after")
    ]
    assert all(row["errors"] == "0" for row in rows)
