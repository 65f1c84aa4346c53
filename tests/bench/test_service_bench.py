"""The bench of the service: what it counts, and a short run of all three systems."""

import csv
from pathlib import Path

import pytest

from bench.load import Load
from bench.service import IMAGES, SYSTEMS, Row, figures, jpegs, main


def test_no_two_images_are_alike() -> None:
    assert len(set(jpegs())) == IMAGES


def test_a_service_stands_beside_the_model_at_the_same_level() -> None:
    rows = {("model alone", 8): Row("model alone", 8), ("embedded", 8): Row("embedded", 8)}
    rows["model alone", 8].add(Load(1.0, [5.0] * 10), 10, 0.5, None)
    rows["embedded", 8].add(Load(2.0, [5.0] * 9 + [50.0]), 12, 1.0, 0.25)
    rows["embedded", 8].load.errors["500"] += 2
    service, model = figures(rows)
    assert (service["system"], service["images_per_s"], service["of_the_model"]) == (
        "embedded",
        "5.00",
        "0.50",
    )
    assert (service["p50_ms"], service["p99_ms"], service["errors"]) == ("5.0", "50.0", 2)
    assert (service["cpu_ms_per_image"], service["gpu_busy"]) == ("100.0", "0.25")
    assert (model["of_the_model"], model["gpu_busy"]) == ("", "")


@pytest.mark.slow
def test_all_systems_answer_without_an_error(tmp_path: Path) -> None:
    arguments = ["--requests", "12", "--rounds", "1", "--concurrency", "1", "4", "--out", str(tmp_path)]
    assert main(arguments) == 0
    with (tmp_path / "service.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["system"], row["concurrency"]) for row in rows] == [
        (system, level) for level in ("1", "4") for system in SYSTEMS
    ]
    assert all(row["errors"] == "0" and float(row["images_per_s"]) > 0 for row in rows)
