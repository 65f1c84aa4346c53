"""The soak: what it calls flat and bounded, and a short run."""

import json
from pathlib import Path

import pytest

from bench.open_load import OpenLoad
from bench.soak import ProcessWatch, Watched, answer_rows, faults, main, process_rows

SECONDS = 100.0


def watched(pid: int, growth: float, files: int = 0, begins_s: float = 0.0) -> Watched:
    at = [float(second) for second in range(int(begins_s), 101, 5)]
    return Watched(
        "runner",
        pid,
        {second: 100.0 * (1 + growth * second / SECONDS) for second in at},
        {second: 10.0 + files * second / SECONDS for second in at},
    )


def test_what_grows_or_is_replaced_is_not_flat() -> None:
    watch = ProcessWatch.__new__(ProcessWatch)
    watch.seen = {
        one.pid: one
        for one in (watched(1, 0.05), watched(2, 0.2), watched(3, 0.0, 20), watched(4, 0.0, 0, 50.0))
    }
    flat = {row["pid"]: row["flat"] for row in process_rows(watch, SECONDS)}
    assert flat == {1: "yes", 2: "NO", 3: "NO", 4: "NO: it came or went"}


def load(refused_ms: float, accepted_ms: float, kind: str = "429") -> OpenLoad:
    answers = [(n / 10, "200", accepted_ms) for n in range(1000)]
    return OpenLoad(answers + [(n / 10, kind, refused_ms) for n in range(1000)], [("429", 5.0)])


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        pytest.param(load(5.0, 900.0), [], id="as it should be"),
        pytest.param(load(80.0, 900.0), ["p99 of 429 is 80 ms"], id="refused late"),
        pytest.param(load(5.0, 9000.0), ["p99 of the accepted is 9000 ms"], id="accepted and left to wait"),
        pytest.param(load(5.0, 900.0, "502"), ["other answers", "unsent"], id="failed"),
    ],
)
def test_what_does_not_hold_is_said(seen: OpenLoad, said: list[str]) -> None:
    told = faults(seen, [], capacity_per_s=32.0, in_flight=64)
    assert len(told) >= len(said) and all(part in " ".join(told) for part in said)
    assert bool(told) == bool(said)


def test_answers_are_told_by_tenths_and_together() -> None:
    rows = answer_rows(load(5.0, 900.0), SECONDS)
    assert [row["minutes"] for row in rows][::10] == ["0.0–0.2", "all"]
    assert (rows[-1]["accepted"], rows[-1]["refused_429"], rows[-1]["p99_ms"]) == (1000, 1000, "900")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_short_run_writes_what_it_saw(tmp_path: Path) -> None:
    main(["--minutes", "0.5", "--place", "embedded", "--out", str(tmp_path)])
    told = json.loads((tmp_path / "soak.json").read_text())
    assert {row["process"] for row in told["processes"]} >= {"supervisor", "web worker", "runner"}
    assert int(told["answers"][-1]["accepted"]) > 0 and told["answers"][-1]["other"] == 0
    assert "| minutes |" in (tmp_path / "soak.md").read_text()
