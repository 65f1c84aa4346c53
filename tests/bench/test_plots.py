"""Pictures of the results."""

from pathlib import Path

from bench.plots import draw_all
from bench.results_file import Value, write

MACHINE: dict[str, Value] = {"processor": "P", "cores": 2, "torch": "2", "commit": "c", "device": "cpu"}


def test_results_of_model_and_service_become_small_pictures(tmp_path: Path) -> None:
    call: dict[str, Value] = {"kind": "call", "case": "whole", "prompts": 1, "floor_ms": "5.0"}
    calls: list[dict[str, Value]] = [
        {**call, "system": system, "batch": batch, "p50_ms": "10.0", "images_per_s": "90.0"}
        for system in ("ours", "hf")
        for batch in (1, 2)
    ]
    write(tmp_path, "model-x", {**MACHINE, "size": "full"}, [{"kind": "rate", "case": "copy"}, *calls])
    levels: list[dict[str, Value]] = [
        {"system": "embedded", "concurrency": 8, "images_per_s": "9.0", "p99_ms": "20.0"}
    ]
    write(tmp_path, "service", {**MACHINE, "weights": "demo"}, levels)
    drawn = draw_all(tmp_path)
    assert [path.name for path in drawn] == ["model-x.svg", "service.svg"]
    for path in drawn:
        assert path.stat().st_size < 100_000
    assert "hf" in drawn[0].read_text() and "embedded" in drawn[1].read_text()


def test_the_same_results_give_the_same_picture(tmp_path: Path) -> None:
    levels: list[dict[str, Value]] = [
        {"system": "embedded", "concurrency": 8, "images_per_s": "9.0", "p99_ms": "20.0"}
    ]
    write(tmp_path, "service", {**MACHINE, "weights": "demo"}, levels)
    assert draw_all(tmp_path)[0].read_bytes() == draw_all(tmp_path)[0].read_bytes()
