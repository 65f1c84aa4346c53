"""Do ours and Meta's interactive predictor answer clicks alike? The full size, on a CPU, in float32.

As `bench.parity`, which asks in words and by boxes. The result goes to `bench/results/parity-clicks.md`; the exit
status is 1 if anything is further apart than it may be.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from sam3_runner.segmenter import Segmenter
from tests.parity.clicks import REDUCED_CLICKS, ClickDifference, ask_meta, click_cases, click_differences
from tests.parity.compare import FULL, MASK_LOGIT_TOLERANCE, SCORE_TOLERANCE

RESULT = Path(__file__).parent / "results" / "parity-clicks.md"
# Of the mask for several clicks: it is stable and taken, or is not.
GAINS = (30.0, 0.1)
HEAD = (
    "| gain | image | clicks | mask taken | the same | score | mask logit | pixels that differ | logit there |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, write; 1 if the answers are not the same."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    found = {gain: compare(gain, options) for gain in GAINS}
    report = f"# Clicks: parity with Meta's code\n\n{conditions(options)}\n\n{table(found)}"
    print(report)
    if not options.reduced:
        RESULT.write_text(report + "\n")
    return 0 if all(row.is_same for rows in found.values() for row in rows) else 1


def compare(gain: float, options: argparse.Namespace) -> list[ClickDifference]:
    """Both, asked the same, on weights of their own."""
    cases, size = click_cases(), REDUCED_CLICKS if options.reduced else FULL
    with tempfile.TemporaryDirectory(prefix="parity-") as temporary:
        folder = Path(temporary)
        ask_meta(folder, size, cases, single_gain=gain, threads=options.threads)
        return click_differences(folder, Segmenter.from_checkpoint(folder / "sam3.pt"), cases)


def table(found: dict[float, list[ClickDifference]]) -> str:
    """Differences, as Markdown."""
    lines = [
        f"| {gain:g} | {row.case} | {row.clicks} | {row.chosen} | {'yes' if row.is_same_choice else '**no**'} "
        f"| {row.score:.1e} | {row.mask_logit:.1e} | {row.pixels} of {row.of_pixels:,} | {row.logit_there:.1e} |"
        for gain, rows in found.items()
        for row in rows
    ]
    return "\n".join([HEAD, *lines])


def conditions(options: argparse.Namespace) -> str:
    """What was compared, and where."""
    return f"""\
Largest differences from `SAM3InteractiveImagePredictor` of Meta's package on the same random weights, images and
clicks, float32, a CPU, threads: {options.threads}. Mask 0 is the one for several clicks, 1 to 3 are those that one
click chooses from; the gain is a factor of the first one's logits, by which it is stable or not.

Allowed: score {SCORE_TOLERANCE:g}, mask logit {MASK_LOGIT_TOLERANCE:g}, the same mask taken, and no pixel that differs
where Meta's logit, with holes filled and upsampled in float64, is further from 0 than that.

Ours: torch {torch.__version__}, transformers {transformers.__version__}."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--reduced", action="store_true", help="the few layers of the test; writes no result")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
