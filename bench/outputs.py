"""What each output adds to a request: time, bytes and memory on a 12 MP photo with 1, 20 and 200 instances.

    python -m bench.outputs                   # five minutes
    python -m bench.outputs --counts 20 --names overlay polygons --rounds 15

The masks are upsampled from logits as the model's are, with ragged rims. One thread, in this process: the time is CPU
time, the median of the rounds, and does not hold the photo's own decoding, which is a row of its own (`photo`: once,
if overlay or cutout are asked for). Peak memory is that of one call in a process of its own, above what it had
before with the photo's 36 MB already there. `all, sandbox` is what a request waits for everything at once, from the
JPEG on, in an image decoder's process (wall time); `photo, sandbox` is what handing the whole pixels out would take.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench.images import PHOTO_HW, logits, memory_mb, photo_file
from bench.results_file import RESULTS, ROOT, Value, conditions, markdown, write
from sam3_runner import rle
from sam3_runner.drawing import Found
from sam3_runner.images import ImageLimits, decode_whole
from sam3_runner.outputs import KINDS, Order, make_outputs
from sam3_runner.sandbox import ImageSandbox
from sam3_runner.types import Segmentation
from sam3_runner.upsample import masks_from_logits

COUNTS = (1, 20, 200)
RADII = {
    1: (80.0, 100.0),
    20: (20.0, 40.0),
    200: (5.0, 14.0),
}  # in the logits' pixels, of which there are 288²
LABELS = ("car", "traffic light")
PHOTO, ALL_SANDBOX, PHOTO_SANDBOX = "photo", "all, sandbox", "photo, sandbox"

Row = dict[str, Value]


@cache
def found(count: int) -> Found:
    """So many instances, in two prompts if there are two."""
    masks = masks_from_logits(logits(count, RADII.get(count, (5.0, 14.0))), PHOTO_HW)
    boxes = []
    for mask in masks:
        inside, (left, top) = rle.decode_tight(mask)
        boxes.append((left, top, left + inside.shape[1], top + inside.shape[0]))
    scores = np.linspace(0.98, 0.51, count, dtype=np.float32)
    boxes_xyxy_px = np.array(boxes, np.float32)
    return [
        (label, Segmentation(scores[at::2], boxes_xyxy_px[at::2], masks[at::2]))
        for at, label in enumerate(LABELS)
    ]


@cache
def photo_jpeg() -> bytes:
    """3.2 MB."""
    return photo_file("JPEG", (PHOTO_HW[1], PHOTO_HW[0]), quality=95, subsampling="4:2:0")


def measure(name: str, count: int, rounds: int) -> Row:
    """One output, or the photo."""
    if name == PHOTO:
        data = photo_jpeg()
        seconds = [cpu_s(lambda: decode_whole(data)) for _ in range(rounds + 1)][1:]
        return row(PHOTO, 0, seconds, len(data), peak_mb(PHOTO, 0))
    given, pixels = found(count), decode_whole(photo_jpeg())
    order = Order((name,))
    size = len(make_outputs(order, given, PHOTO_HW, pixels)[name])  # the first call imports
    seconds = [cpu_s(lambda: make_outputs(order, given, PHOTO_HW, pixels)) for _ in range(rounds)]
    return row(name, count, seconds, size, peak_mb(name, count))


def row(name: str, count: int, seconds: Sequence[float], size: int, peak: float | str) -> Row:
    """What is written down."""
    return {
        "output": name,
        "instances": count,
        "ms": round(median(seconds) * 1e3, 1),
        "ms_min": round(min(seconds) * 1e3, 1),
        "kb": round(size / 1000, 1),
        "peak_mb": peak if isinstance(peak, str) else round(peak),
    }


def cpu_s(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def peak_mb(name: str, count: int) -> float:
    """Peak memory of one call in a new process."""
    command = [sys.executable, "-m", "bench.outputs", "--peak", name, "--counts", str(count)]
    return float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)


def own_peak_mb(name: str, count: int) -> float:
    """How far a call raises this process's resident memory."""
    data = photo_jpeg()
    if name == PHOTO:
        return raised_mb(lambda: decode_whole(data))
    given, pixels = found(count), decode_whole(data)
    import_module("shapely")
    return raised_mb(lambda: make_outputs(Order((name,)), given, PHOTO_HW, pixels))


def raised_mb(work: Callable[[], object]) -> float:
    """How far resident memory rises."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (Linux)
    before = memory_mb("VmRSS")
    work()
    return memory_mb("VmHWM") - before


async def in_sandbox(counts: Sequence[int], rounds: int) -> list[Row]:
    """Everything at once, and the photo alone, each in a decoder's process."""
    sandbox = ImageSandbox(ImageLimits(), processes=1)
    data = photo_jpeg()
    try:
        seconds = await wall_s(lambda: sandbox.open_whole(data), rounds)
        rows = [row(PHOTO_SANDBOX, 0, seconds, 3 * PHOTO_HW[0] * PHOTO_HW[1], "")]
        for count in counts:
            make = partial(sandbox.make_outputs, Order(tuple(KINDS)), found(count), PHOTO_HW, data)
            made = await make()
            seconds = await wall_s(make, rounds)
            rows.append(row(ALL_SANDBOX, count, seconds, sum(map(len, made.values())), ""))
    finally:
        await sandbox.aclose()
    return rows


async def wall_s(work: Callable[[], Awaitable[object]], rounds: int) -> list[float]:
    """Seconds on the clock of each call but the first."""
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        await work()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def table(rows: Sequence[Row]) -> str:
    """One line for each output, the counts beside each other."""
    counts = [*dict.fromkeys(row["instances"] for row in rows if row["instances"])]
    lines: list[Row] = []
    for name in dict.fromkeys(row["output"] for row in rows):
        line: Row = {"output": name}
        for row_ in (row for row in rows if row["output"] == name):
            for count in [row_["instances"]] if row_["instances"] else counts[:1]:
                line |= {
                    f"{count}: ms": row_["ms"],
                    f"{count}: kB": row_["kb"],
                    f"{count}: peak MB": row_["peak_mb"],
                }
        lines.append(line)
    return markdown(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.outputs", description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+", choices=[PHOTO, *KINDS], default=[PHOTO, *KINDS])
    parser.add_argument("--counts", nargs="+", type=int, default=[*COUNTS])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-sandbox", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for NAME.csv and NAME.md")
    parser.add_argument("--name", default="outputs", help="of the files")
    parser.add_argument("--peak", choices=[PHOTO, *KINDS], help="print one call's peak memory in MB")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.peak:
        print(own_peak_mb(options.peak, options.counts[0]))
        return 0
    seen = conditions("shapely", "manimgx-fonts-cjk", "pillow", "simplejpeg", "numpy", rounds=options.rounds)
    rows: list[Row] = []
    for name in options.names:
        for count in [0] if name == PHOTO else options.counts:
            rows.append(measure(name, count, options.rounds))
            print(rows[-1], file=sys.stderr, flush=True)
    if not options.no_sandbox:
        rows += asyncio.run(in_sandbox(options.counts, options.rounds))
    write(options.out, options.name, seen, rows, table(rows))
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
