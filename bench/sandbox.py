"""What it costs to decode in a process of its own: beside the same call in a thread, in turns, in one run.

    python -m bench.sandbox

Then how long the children take to be there, and what memory they hold (proportional set size: shared pages counted by
their share), at rest and after the largest image of each kind. Linux; uvloop, as in the service.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import uvloop
from PIL import Image

from bench.images import INPUT_PX, conditions, memory_mb, photo_file
from bench.timing import percentile
from sam3_runner.images import ImageLimits, ModelImage, open_for_model, probe_image
from sam3_runner.sandbox import ImageSandbox
from tests.sam3_runner import made_images

LIMITS = ImageLimits()
Read = Callable[[bytes], Awaitable[object]]


def small_png() -> bytes:
    """128×96, flat."""
    return made_images.save(Image.new("RGB", (128, 96), "navy"), "PNG")


def files() -> dict[str, tuple[bytes, int]]:
    """Name: file, and side of the model's input."""
    photo = photo_file("JPEG", (4000, 3000), quality=95, subsampling="4:2:0")
    noise = np.random.default_rng(0).integers(0, 256, (2800, 2900, 3), np.uint8)
    return {
        "PNG 128×96 → 224²": (small_png(), 224),
        "PNG 128×96 → 1008²": (small_png(), INPUT_PX),
        f"JPEG 12 MP, {len(photo) / 1e6:.1f} MB → 1008²": (photo, INPUT_PX),
        "PNG 8 MP of noise, 24 MB → 1008²": (made_images.save(Image.fromarray(noise), "PNG"), INPUT_PX),
    }


async def compare(
    read_here: Read, read_there: Read, data: bytes, rounds: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of each way, in turns."""
    here: list[float] = []
    there: list[float] = []
    for turn in range(rounds + 3):
        for read, into in ((read_here, here), (read_there, there))[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            await read(data)
            if turn >= 3:
                into.append((time.perf_counter() - began) * 1e3)
    return here, there


async def latencies(sandbox: ImageSandbox, pool: ThreadPoolExecutor, rounds: int) -> None:
    """Both ways beside each other, for each file."""
    loop = asyncio.get_running_loop()
    print(
        "| work | thread p50, p99 ms | sandbox p50, p99 ms | difference of p50 | ratio |\n|---|---|---|---|---|"
    )
    for name, (data, side) in files().items():

        def here(data: bytes, side: int = side) -> Awaitable[ModelImage]:
            return loop.run_in_executor(pool, open_for_model, data, side, LIMITS)

        def there(data: bytes, side: int = side) -> Awaitable[ModelImage]:
            return sandbox.open_for_model(data, side)

        row(name, *await compare(here, there, data, max(10, rounds // (1 + len(data) // 500_000))))
    png = small_png()
    row(
        "type and size of a PNG",
        *await compare(
            lambda data: loop.run_in_executor(pool, probe_image, data, LIMITS), sandbox.probe, png, rounds
        ),
    )


def row(name: str, here: list[float], there: list[float]) -> None:
    """One line of the table."""
    more = median(there) - median(here)
    print(
        f"| {name} | {median(here):.2f}, {percentile(here, 0.99):.2f} "
        f"| {median(there):.2f}, {percentile(there, 0.99):.2f} "
        f"| {more:+.2f} ms | {median(there) / median(here):.2f} |",
        flush=True,
    )


def pss_mb(pid: int) -> tuple[float, float]:
    """Proportional and private memory of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kb = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines[1:])}
    return kb["Pss"] / 1024, (kb["Private_Clean"] + kb["Private_Dirty"]) / 1024


def print_memory(when: str) -> None:
    """Of the template and its children."""
    (template,) = psutil.Process().children()
    for name, process in [("template", template), *(("child", child) for child in template.children())]:
        pss, private = pss_mb(process.pid)
        rss = process.memory_info().rss / 2**20
        print(f"{when}: {name}: PSS {pss:.0f} MB, private {private:.0f} MB, RSS {rss:.0f} MB")


async def largest(sandbox: ImageSandbox) -> None:
    """Time and peak memory of 50 MP in every kind and mode that could be the worst."""
    print("| 50 MP | file | seconds | peak MB above rest |\n|---|---|---|---|")
    for name, data in large_files():
        (template,) = psutil.Process().children()
        (child,) = template.children()
        before = data_mb(child.pid)
        watching = asyncio.create_task(peak_of(child.pid))
        began = time.perf_counter()
        try:
            await sandbox.open_for_model(data, INPUT_PX)
            seconds = f"{time.perf_counter() - began:.2f}"
        except Exception as error:
            seconds = f"{type(error).__name__}: {error}"
        watching.cancel()
        (peak,) = await asyncio.gather(watching)
        print(f"| {name} | {len(data) / 1e6:.1f} MB | {seconds} | {peak - before:.0f} |", flush=True)


async def peak_of(pid: int) -> float:
    """The most that a process maps to write to, until cancelled."""
    peak = 0.0
    try:
        while True:
            peak = max(peak, data_mb(pid))
            await asyncio.sleep(0.003)
    except (asyncio.CancelledError, OSError, StopIteration):
        return peak


def data_mb(pid: int) -> float:
    """What RLIMIT_DATA is held against."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmData"))


def large_files() -> list[tuple[str, bytes]]:
    """Of a picture that compresses to little."""
    width, height = 8192, 6100
    flat = Image.linear_gradient("L").resize((width, height))
    color = Image.merge("RGB", (flat, flat.rotate(180), flat))
    rgba = color.copy()
    rgba.putalpha(flat)
    save = made_images.save
    deep = np.asarray(flat).astype(np.uint16) * 257
    return [
        ("JPEG", save(color, "JPEG", quality=85)),
        ("JPEG, odd sides", save(color.crop((0, 0, width - 1, height - 1)), "JPEG", quality=85)),
        ("JPEG, progressive, 4:4:4", save(color, "JPEG", quality=85, progressive=True, subsampling="4:4:4")),
        ("JPEG, CMYK", save(color.convert("CMYK"), "JPEG", quality=85)),
        ("PNG, RGBA", save(rgba, "PNG", compress_level=1)),
        ("PNG, LA", save(Image.merge("LA", (flat, flat)), "PNG", compress_level=1)),
        ("PNG, palette", save(flat.convert("P"), "PNG", compress_level=1, transparency=3)),
        ("PNG, 16 bit grey", save(Image.fromarray(deep), "PNG", compress_level=1)),
        ("PNG, interlaced", made_images.png(np.asarray(color), interlaced=True)),
        ("WebP", save(color, "WEBP", quality=70, method=0)),
        ("WebP, alpha", save(rgba, "WEBP", quality=70, method=0)),
        ("HEIC", save(color, "HEIF", quality=50)),
        ("HEIC, alpha", save(rgba, "HEIF", quality=50)),
        ("AVIF", save(color, "AVIF", quality=50, speed=10)),
        ("AVIF, alpha", save(rgba, "AVIF", quality=50, speed=10)),
        ("TIFF, RGBA, LZW", save(rgba, "TIFF", compression="tiff_lzw")),
        ("TIFF, JPEG", save(color, "TIFF", compression="jpeg")),
        (
            "TIFF, LAB, deflate",
            save(Image.merge("LAB", (flat, flat, flat)), "TIFF", compression="tiff_adobe_deflate"),
        ),
        ("TIFF, 16 bit grey, LZW", save(Image.fromarray(deep), "TIFF", compression="tiff_lzw")),
        ("GIF", save(flat.convert("P"), "GIF")),
    ]


async def run(rounds: int, is_large: bool) -> None:
    """Everything."""
    before = memory_mb("VmRSS")
    sandbox = ImageSandbox(LIMITS, processes=1 if is_large else 2)
    began = time.perf_counter()
    sandbox.start()
    await sandbox.probe(small_png())
    print(f"first answer {time.perf_counter() - began:.2f} s after start; asker had {before:.0f} MB of RSS\n")
    try:
        if is_large:
            await largest(sandbox)
        else:
            print_memory("at rest")
            with ThreadPoolExecutor(2) as pool:
                await latencies(sandbox, pool, rounds)
        print_memory("in the end")
    finally:
        await sandbox.aclose()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.sandbox", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--large", action="store_true", help="time and peak memory of 50 megapixels instead")
    options = parser.parse_args()
    print(f"{conditions(options.rounds)}\n")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    uvloop.run(run(options.rounds, options.large))


if __name__ == "__main__":
    main()
