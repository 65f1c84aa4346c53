"""Pictures of the results: `python -m bench.plots` draws an SVG beside every CSV that it knows how to draw."""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.results_file import RESULTS

try:
    from matplotlib import rcParams
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError:
    sys.exit("plots need matplotlib, which is among the development requirements")

Rows = Sequence[dict[str, str]]
Point = tuple[float, float]
COLORS = {
    "ours": "#d1495b",
    "ours-float8": "#edae49",
    "ours-eager": "#e58f9a",
    "before": "#8d96a3",
    "hf": "#00798c",
    "hf-compiled": "#30638e",
    "meta": "#6a4c93",
    "floor": "#222222",
    "s3 and rows": "#d1495b",
    "embedded": "#edae49",
    "embedded, known image": "#00798c",
    "model alone": "#222222",
}
WIDTH_HEIGHT_IN = (9.0, 3.6)


def draw_model(rows: Rows) -> Figure:
    """Latency of one image and one prompt, and images per second by batch, both with the floor."""
    calls = [
        row for row in rows if row["kind"] == "call" and row["case"] == "whole" and row["prompts"] == "1"
    ]
    figure = Figure(WIDTH_HEIGHT_IN, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_latencies(left, calls)
    series: dict[str, list[Point]] = defaultdict(list)
    for row in calls:
        batch = float(row["batch"])
        series[row["system"]].append((batch, float(row["images_per_s"])))
        if row["system"] == "ours":
            series["floor"].append((batch, batch / float(row["floor_ms"]) * 1e3))
    _draw_lines(right, series, "images in a batch", "images/s")
    figure.suptitle(_machine(rows), fontsize=9)
    return figure


def _draw_latencies(axes: Axes, calls: Rows) -> None:
    alone = {row["system"]: row for row in calls if row["batch"] == "1"}
    names = list(reversed(alone))
    latencies = [float(alone[name]["p50_ms"]) for name in names]
    bars = axes.barh(names, latencies, color=[COLORS.get(name, "#999999") for name in names])
    axes.bar_label(bars, [f"{value:.1f}" for value in latencies], padding=2, fontsize=8)
    if alone:
        floor_ms = float(next(iter(alone.values()))["floor_ms"])
        axes.axvline(
            floor_ms, color=COLORS["floor"], linestyle="--", linewidth=1, label=f"floor {floor_ms:.1f}"
        )
        axes.legend(fontsize=8)
    axes.margins(x=0.15)
    axes.set_xlabel("ms, one image and one prompt (p50)")


def draw_service(rows: Rows) -> Figure:
    """Images per second, and the latency that 99 of 100 answers keep, at rising load."""
    figure = Figure(WIDTH_HEIGHT_IN, layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2), ("images_per_s", "p99_ms"), ("images/s", "p99, ms"), strict=True
    ):
        series: dict[str, list[Point]] = defaultdict(list)
        for row in rows:
            series[row["system"]].append((float(row["concurrency"]), float(row[column])))
        _draw_lines(axes, series, "requests under way", label)
    figure.suptitle(_machine(rows), fontsize=9)
    return figure


def _draw_lines(axes: Axes, series: dict[str, list[Point]], across: str, up: str) -> None:
    for name, points in series.items():
        ordered = sorted(dict(points).items())  # a cell that was measured again counts as it was last
        style = "--" if name == "floor" else "o-"
        axes.plot(*zip(*ordered, strict=True), style, color=COLORS.get(name), label=name, linewidth=1.3)
    axes.set_xscale("log", base=2)
    ticks = sorted({place for points in series.values() for place, _ in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if series:
        axes.legend(fontsize=8)


def _machine(rows: Rows) -> str:
    first = rows[0]
    device = first["device"] if first["device"] != "cpu" else f"{first['processor']}, {first['cores']} cores"
    size = f"SAM3 {first['size']}" if "size" in first else f"weights {first['weights']}"
    return f"{device}, {size}, PyTorch {first['torch']}, commit {first['commit']}"


DRAWN: dict[str, Callable[[Rows], Figure]] = {"model-*.csv": draw_model, "service*.csv": draw_service}


def draw_all(folder: Path) -> list[Path]:
    """Draw what there is results of; the same results give the same files."""
    rcParams["svg.fonttype"], rcParams["svg.hashsalt"] = "none", "s3-backend"
    drawn = []
    for pattern, draw in DRAWN.items():
        for source in sorted(folder.glob(pattern)):
            with source.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            if rows:
                target = source.with_suffix(".svg")
                draw(rows).savefig(target, metadata={"Date": None})
                drawn.append(target)
    return drawn


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    for target in draw_all(parser.parse_args().folder):
        print(target)


if __name__ == "__main__":
    main()
