"""Does ours compute what Meta's code computes? `make parity`: the full size, on a CPU, in float32.

Meta's own package, in an environment of its own, builds its model with seeded random weights, saves it as `sam3.pt`,
and answers images and prompts, in words, by boxes, or both; ours loads that file and answers the same. Needs 5 GB of
disk and 9 GB of memory. The result goes to `bench/results/parity.md`; the exit status is 1 if anything is further apart
than it may be.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch import nn
from transformers import Sam3Model

from sam3_runner.checkpoint import Checkpoint
from sam3_runner.engine import Engine
from sam3_runner.segmenter import Segmenter
from tests.parity.compare import (
    BOX_TOLERANCE_PX,
    FULL,
    MASK_LOGIT_TOLERANCE,
    REDUCED,
    SCORE_TOLERANCE,
    Difference,
    MaskDifference,
    Reference,
    ask_ours,
    ask_transformers,
    final_differences,
    is_same,
    made_cases,
    raw_differences,
)

T = TypeVar("T")

CPU = torch.device("cpu")
RESULT = Path(__file__).parent / "results" / "parity.md"
IMAGES = 3  # of the made cases: one has four prompts, the others two
LIBRARY_EPS = 1e-6  # of the vision encoder's normalisations, in transformers' configuration

RAW_HEAD = (
    "| what | image | prompt | kept | same kept | score | box, px | mask logit |\n"
    "|---|---|---|---|---|---|---|---|"
)
FINAL_HEAD = (
    "| image | prompt | instances | score | box, px | pixels that differ | largest logit there |\n"
    "|---|---|---|---|---|---|---|"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, write; 1 if the answers are not the same."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    cases = made_cases()[:IMAGES]
    with tempfile.TemporaryDirectory(prefix="parity-") as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "done.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            size = REDUCED if options.reduced else FULL
            Reference.ask(folder, size, cases, threads=options.threads)
        reference = Reference(folder, cases)
        segmenter = timed("load", lambda: Segmenter.from_checkpoint(folder / "sam3.pt"))
        together = timed("all images in one batch", lambda: ask_ours(segmenter, cases))
        alone = timed("the first image alone", lambda: ask_ours(segmenter, cases[:1]))
        model = Checkpoint.open(folder / "sam3.pt").load_model(CPU)
        library = timed("Sam3Model.forward", lambda: ask_transformers(model, segmenter, cases))
        use_epsilon(model, LIBRARY_EPS)
        changed = Segmenter(Engine(model, CPU, torch.float32), segmenter.info, segmenter._prompts)
        epsilon = timed("with the library's epsilon", lambda: ask_ours(changed, cases[:1]))
        ours = {
            "one batch": raw_differences(reference, together.raw),
            "alone": raw_differences(reference, alone.raw),
        }
        others = {
            "`Sam3Model.forward`": raw_differences(reference, library),
            "ours with its epsilon, 1e-6": raw_differences(reference, epsilon.raw),
        }
        final = final_differences(reference, together.found)
    report = "\n\n".join(
        [
            f"# Parity with Meta's code\n\n{conditions(reference, options, segmenter)}",
            "## All 200 queries, before any is dropped\n\n" + raw_table(ours),
            "## What callers get, all images in one batch\n\n" + final_table(final),
            "## What transformers differs by, on the same weights\n\n" + raw_table(others),
        ]
    )
    print(report)
    if not options.reduced:
        RESULT.write_text(report + "\n")
    rows: list[Difference | MaskDifference] = [*ours["one batch"], *ours["alone"], *final]
    return 0 if all(map(is_same, rows)) else 1


def timed(what: str, ask: Callable[[], T]) -> T:
    """Do it, and say how long it took."""
    started = time.perf_counter()
    answer = ask()
    print(f"{what}: {time.perf_counter() - started:.0f} s", flush=True)
    return answer


def use_epsilon(model: Sam3Model, eps: float) -> None:
    """Let the vision encoder normalise with another one."""
    for part in model.vision_encoder.backbone.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = eps


def raw_table(rows: dict[str, list[Difference]]) -> str:
    """Differences of all queries, as Markdown."""
    lines = [
        f"| {what} | {row.case} | `{row.prompt}` | {row.kept} of 200 | {'yes' if row.same_kept else '**no**'} "
        f"| {row.score:.1e} | {row.box_px:.1e} | {row.mask_logit:.1e} |"
        for what, differences in rows.items()
        for row in differences
    ]
    return "\n".join([RAW_HEAD, *lines])


def final_table(rows: Sequence[MaskDifference]) -> str:
    """Differences of the answers, as Markdown."""
    lines = [
        f"| {row.case} | `{row.prompt}` | {row.instances}{'' if row.same_count else ' (**not ours**)'} "
        f"| {row.score:.1e} | {row.box_px:.1e} | {row.pixels} of {row.of_pixels:,} | {row.logit_there:.1e} |"
        for row in rows
    ]
    return "\n".join([FINAL_HEAD, *lines])


def conditions(reference: Reference, options: argparse.Namespace, segmenter: Segmenter) -> str:
    """What was compared, and where."""
    info = segmenter.info
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    processor = models[0].partition(":")[2].strip() if models else platform.machine()
    sizes = ", ".join("×".join(map(str, case.image.shape[1::-1])) for case in reference.cases)
    theirs = ", ".join(f"{name} {version}" for name, version in reference.versions.items())
    return f"""\
Largest differences from Meta's package on the same weights, images and prompts. {info.parameters:,} parameters,
{info.input_size_px} px, float32; random weights (seed {reference.seed}) that Meta's code wrote as `sam3.pt`. Images of
{sizes} px, the last one grey. `[+2 -1]` stands for two boxes like which it should be and one like which not.

Allowed: score {SCORE_TOLERANCE:g}, box {BOX_TOLERANCE_PX:g} px, mask logit {MASK_LOGIT_TOLERANCE:g}, the same queries
kept, and no pixel that differs where Meta's logit, upsampled in float64, is further from 0 than that.

{processor}, {options.threads} threads, Python {platform.python_version()}. Meta: {theirs}; it took
{sum(reference.seconds):.0f} s. Ours: torch {torch.__version__}, transformers {transformers.__version__}."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--folder", type=Path, help="where weights and answers of Meta's code are kept for another run"
    )
    parser.add_argument("--reduced", action="store_true", help="the few layers of the test; writes no result")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
