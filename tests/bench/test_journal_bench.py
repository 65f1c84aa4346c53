"""The bench of the journal works on a real one, in one process and in two, and writes down what it measured."""

import csv
from pathlib import Path

from bench import journal


def test_every_row_is_measured_beside_what_the_disk_takes(tmp_path: Path) -> None:
    given = ["--seconds", "0.2", "--concurrency", "4", "--result-kb", "0", "1", "--out", str(tmp_path)]
    assert journal.main([*given, "--directory", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "journal.csv").read_text().splitlines()))
    assert [row["what"] for row in rows[:2]] == ["the disk: 4 KB", "SQLite alone: one row"]
    assert [(row["what"], row["processes"]) for row in rows[2:]] == [
        ("accept", "1"),
        ("accept, compute, finish", "1"),
        ("accept", "2"),
        ("accept, compute, finish", "2"),
    ]
    assert all(float(row["tasks_per_s"]) > 0 and float(row["accept_p99_ms"]) > 0 for row in rows)
    assert list(tmp_path.glob("journal-bench-*")) == []
