"""What a request costs around the model: our way beside the plain one, in one run.

    python -m bench.images                    # all rows: ten minutes
    python -m bench.images --rows jpeg-12mp request --rounds 15

The plain way is what one would write first: Pillow decodes the whole picture and resizes it, masks are upsampled to
the image's size as pixels, and Pillow writes them. The model itself is left out. One thread. The two ways take turns,
and what is written down is each one's median CPU time and the median of the ratios of a turn; peak memory is that of
one call in a process of its own, above what it had before.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import pickle
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as pycocotools

from sam3_runner import rle
from sam3_runner.images import ImageLimits, open_for_model
from sam3_runner.masks import encode_png
from sam3_runner.types import RunLengthMask
from sam3_runner.upsample import masks_from_logits

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
INPUT_PX = 1008
LOGITS_PX = 288
PHOTO_HW = (3000, 4000)
LIMITS = ImageLimits()


@dataclass(frozen=True)
class Case:
    """One piece of work, done in two ways; `prepare` makes what both are given."""

    name: str
    prepare: Callable[[], Any]
    plain: Callable[[Any], Any]
    ours: Callable[[Any], Any]


@dataclass
class Row:
    """A case's figures: CPU seconds of each turn, and megabytes."""

    name: str
    plain_s: list[float]
    ours_s: list[float]
    plain_peak_mb: float
    ours_peak_mb: float

    def figures(self) -> dict[str, str]:
        """What is written down."""
        ratio = median(plain / ours for plain, ours in zip(self.plain_s, self.ours_s, strict=True))
        return {
            "case": self.name,
            "turns": str(len(self.ours_s)),
            "plain_cpu_ms": f"{median(self.plain_s) * 1e3:.1f}",
            "ours_cpu_ms": f"{median(self.ours_s) * 1e3:.2f}",
            "ours_cpu_ms_min": f"{min(self.ours_s) * 1e3:.2f}",
            "times_less": f"{ratio:.1f}",
            "plain_peak_mb": f"{self.plain_peak_mb:.0f}",
            "ours_peak_mb": f"{self.ours_peak_mb:.0f}",
        }


# --- what is given ------------------------------------------------------------------------------------------


@cache
def photo() -> Image.Image:
    """12 MP with detail at every scale, as photographs have it."""
    random = torch.Generator().manual_seed(0)
    height, width = PHOTO_HW
    pixels = torch.full((3, height, width), 128.0)
    cells, contrast = 4, 45.0
    while cells <= width:
        noise = torch.randn(1, 3, max(2, cells * height // width), cells, generator=random)
        noise = 0.35 * noise + noise.mean(dim=1, keepdim=True)  # more light than colour
        pixels += contrast * F.interpolate(noise, PHOTO_HW, mode="bilinear")[0]
        cells, contrast = cells * 2, contrast * 0.78
    return Image.fromarray(pixels.clamp(0, 255).byte().permute(1, 2, 0).numpy())


def photo_file(file_format: str, size_wh: tuple[int, int], **options: Any) -> bytes:
    """The photo at some size. JPEG at quality 95 is 3.2 MB at 12 MP."""
    out = io.BytesIO()
    image = photo() if photo().size == size_wh else photo().resize(size_wh, Image.Resampling.BICUBIC)
    image.save(out, file_format, **options)
    return out.getvalue()


def jpeg(size_wh: tuple[int, int], **options: Any) -> Callable[[], bytes]:
    """A JPEG as phones write it: 4:2:0."""
    return lambda: photo_file("JPEG", size_wh, quality=95, subsampling="4:2:0", **options)


def logits(count: int, radii: tuple[float, float], seed: int = 0) -> torch.Tensor:
    """(N, 288, 288) of round objects with a ragged rim; radii in logits' pixels, in the range given."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:LOGITS_PX, :LOGITS_PX]
    made = []
    for _ in range(count):
        centre, radius = random.uniform(0, LOGITS_PX, 2), random.uniform(*radii, 2)
        depth = 1 - np.hypot((y - centre[0]) / radius[0], (x - centre[1]) / radius[1])
        made.append(8 * depth + 0.6 * random.standard_normal(depth.shape) * np.exp(-np.abs(4 * depth)))
    return torch.tensor(np.stack(made), dtype=torch.float32)


def pixels_and_runs(given: torch.Tensor) -> tuple[npt.NDArray[np.bool_], tuple[RunLengthMask, ...]]:
    """The union for the plain way, the instances' runs for ours."""
    masks = masks_from_logits(given, PHOTO_HW)
    return rle.union(masks, PHOTO_HW), masks


# --- the two ways -------------------------------------------------------------------------------------------


def decode_plain(data: bytes) -> npt.NDArray[np.uint8]:
    """Pillow, whole, and its resize."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((INPUT_PX, INPUT_PX), Image.Resampling.BILINEAR))


def decode_ours(data: bytes) -> npt.NDArray[np.uint8]:
    """As the pipeline does."""
    return open_for_model(data, INPUT_PX, LIMITS).pixels


def png_plain(mask: npt.NDArray[np.bool_]) -> bytes:
    """Pillow, with its defaults."""
    out = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(out, "PNG")
    return out.getvalue()


def masks_plain(given: torch.Tensor) -> tuple[bytes, list[Any]]:
    """Each mask at full size, one by one: all 200 together would need 9.6 GB. COCO's RLE, area, union, PNG."""
    union = np.zeros(PHOTO_HW, bool)
    found = []
    for one in given:
        whole = F.interpolate(one[None, None], PHOTO_HW, mode="bilinear")[0, 0].sigmoid() > 0.5
        mask = whole.numpy()
        union |= mask
        found.append((pycocotools.encode(np.asfortranarray(mask.astype(np.uint8))), int(mask.sum())))
    return png_plain(union), found


def masks_ours(given: torch.Tensor) -> tuple[bytes, list[Any]]:
    """Runs from the logits; all else from runs."""
    masks = masks_from_logits(given, PHOTO_HW)
    found = [(rle.to_coco(mask), rle.area_px(mask)) for mask in masks]
    return encode_png(rle.union_rle(masks, PHOTO_HW)), found


def png_case(name: str, given: Callable[[], torch.Tensor]) -> Case:
    """Union and PNG alone."""
    return Case(
        name,
        lambda: pixels_and_runs(given()),
        lambda both: png_plain(both[0]),
        lambda both: encode_png(rle.union_rle(both[1], PHOTO_HW)),
    )


def cases() -> list[Case]:
    """All of them."""
    files = {
        "jpeg-2mp": jpeg((1632, 1224)),
        "jpeg-12mp": jpeg((4000, 3000)),
        "jpeg-12mp-progressive": jpeg((4000, 3000), progressive=True),
        "jpeg-48mp": jpeg((8000, 6000)),
        "png-2mp": lambda: photo_file("PNG", (1632, 1224)),
        "png-12mp": lambda: photo_file("PNG", (4000, 3000), compress_level=1),
        "webp-12mp": lambda: photo_file("WEBP", (4000, 3000), quality=85, method=0),
    }
    return [
        *(Case(name, make, decode_plain, decode_ours) for name, make in files.items()),
        png_case("mask-png-small", lambda: logits(1, (10, 12))),
        png_case("mask-png-large", lambda: logits(1, (100, 120))),
        png_case("mask-png-200-objects", lambda: logits(200, (5, 14))),
        Case("masks-5", lambda: logits(5, (20, 60)), masks_plain, masks_ours),
        Case("masks-200", lambda: logits(200, (5, 14)), masks_plain, masks_ours),
        Case(
            "request",
            lambda: (jpeg((4000, 3000))(), logits(5, (20, 60))),
            lambda given: (decode_plain(given[0]), masks_plain(given[1])),
            lambda given: (decode_ours(given[0]), masks_ours(given[1])),
        ),
    ]


# --- measuring ----------------------------------------------------------------------------------------------


def cpu_s(work: Callable[[Any], Any], given: Any) -> float:
    """Processor time of one call."""
    began = time.process_time()
    work(given)
    return time.process_time() - began


def measure(case: Case, rounds: int) -> Row:
    """Both ways in turns, the first of which does not count; then their peaks."""
    given = case.prepare()
    plain_s, ours_s = [], []
    for turn in range(rounds + 1):
        first, second = (case.plain, case.ours) if turn % 2 else (case.ours, case.plain)
        seconds = {first: cpu_s(first, given), second: cpu_s(second, given)}
        if turn:
            plain_s.append(seconds[case.plain])
            ours_s.append(seconds[case.ours])
    return Row(case.name, plain_s, ours_s, *(peak_mb(case.name, way, given) for way in ("plain", "ours")))


def peak_mb(name: str, way: str, given: Any) -> float:
    """Peak memory of one call in a new process."""
    command = [sys.executable, "-m", "bench.images", "--peak", way, "--rows", name]
    return float(
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, input=pickle.dumps(given)).stdout
    )


def own_peak_mb(case: Case, way: str, given: Any) -> float:
    """How far a call raises this process's resident memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (Linux)
    before = memory_mb("VmRSS")
    (case.plain if way == "plain" else case.ours)(given)
    return memory_mb("VmHWM") - before


def memory_mb(field: str) -> float:
    """A line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


# --- writing down -------------------------------------------------------------------------------------------


def conditions(rounds: int) -> dict[str, str | int]:
    """Under which the figures were measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "pillow", "simplejpeg", "numpy")},
        "commit": git.stdout.strip(),
        "rounds": rounds,
    }


def write(rows: Sequence[Row], seen: dict[str, str | int], out: Path, name: str) -> None:
    """NAME.csv, every row with its conditions, and NAME.md, the table under them."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*seen, *rows[0].figures()])
        writer.writeheader()
        writer.writerows(seen | row.figures() for row in rows)
    told = ", ".join(f"{key} {value}" for key, value in seen.items())
    (out / f"{name}.md").write_text(f"{told}\n\n{table(rows)}\n")


def table(rows: Sequence[Row]) -> str:
    """The figures as Markdown."""
    lines = [
        "| case | plain CPU ms | ours CPU ms (least) | times less | plain peak MB | ours peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        seen = row.figures()
        lines.append(
            f"| {seen['case']} | {seen['plain_cpu_ms']} | {seen['ours_cpu_ms']} ({seen['ours_cpu_ms_min']}) "
            f"| {seen['times_less']} | {seen['plain_peak_mb']} | {seen['ours_peak_mb']} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    known = {case.name: case for case in cases()}
    parser = argparse.ArgumentParser(prog="python -m bench.images", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=[*known], default=[*known])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for NAME.csv and NAME.md")
    parser.add_argument("--name", default="images", help="of the files")
    parser.add_argument(
        "--peak",
        choices=["plain", "ours"],
        help="print one call's peak memory in MB; what it is given comes pickled on standard input",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.peak:
        given = pickle.load(sys.stdin.buffer)  # of the process that started this one
        print(own_peak_mb(known[options.rows[0]], options.peak, given))
        return 0
    rows = []
    for name in options.rows:
        rows.append(measure(known[name], options.rounds if name != "masks-200" else min(options.rounds, 3)))
        print(rows[-1].figures(), file=sys.stderr, flush=True)
        write(rows, conditions(options.rounds), options.out, options.name)
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
