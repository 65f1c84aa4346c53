"""`python -m sam3_runner`: segment one image, fetch SAM3's weights, and say what a checkpoint is."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dotenv import dotenv_values

from sam3_runner.checkpoint import DEMO_CHECKPOINT, Checkpoint
from sam3_runner.errors import RunnerError
from sam3_runner.fetch import REPOSITORY, FetchError, fetch_weights
from sam3_runner.types import DEFAULT_SCORE_THRESHOLD, Box, Prompt, Selection

DEFAULT_DIRECTORY = Path("weights") / "sam3"
STOPPED = 130  # what a shell says of a program that was interrupted


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks; errors are one line on standard error.

    Returns:
        The exit code: 0, or 1 after an error.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.command == "fetch":
            return _fetch(options.directory)
        return _info(options.path) if options.command == "info" else _view(options, parser)
    except (RunnerError, FetchError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename}: {error.strerror}" if error.filename else str(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run it again, and it goes on from there", file=sys.stderr)
        return STOPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sam3_runner", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser(
        "fetch", help=f"download weights and tokenizer of {REPOSITORY}, with HF_TOKEN"
    )
    fetch.add_argument(
        "directory", type=Path, nargs="?", default=DEFAULT_DIRECTORY, help="default: %(default)s"
    )
    info = commands.add_parser("info", help="say what a checkpoint is, without loading it")
    info.add_argument("path", type=Path, help="what SAM3_WEIGHTS_PATH would be")
    view = commands.add_parser("view", help="segment one image in this process, and draw what is found")
    view.add_argument("image", type=Path)
    view.add_argument("--prompt", action="append", default=[], help="what to find, in words; may be repeated")
    view.add_argument(
        "--box",
        action="append",
        default=[],
        type=_box,
        metavar="X0,Y0,X1,Y1",
        help="an example of it, in pixels; may be repeated",
    )
    view.add_argument(
        "--score-threshold", type=float, default=DEFAULT_SCORE_THRESHOLD, help="default: %(default)s"
    )
    view.add_argument(
        "--weights", type=Path, help="default: SAM3_WEIGHTS_PATH; without that, the demo checkpoint"
    )
    view.add_argument("--out", type=Path, help="the overlay; IMAGE.overlay.jpg, here, unless given")
    return parser


def _box(text: str) -> Box:
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected four numbers, as in 10,20,110,80; got {text!r}") from None
    if not (0 <= x0 < x1 < math.inf and 0 <= y0 < y1 < math.inf):
        raise argparse.ArgumentTypeError(
            f"expected left < right and top < bottom, none below 0; got {text!r}"
        )
    return Box((x0, y0, x1, y1))


def _fetch(directory: Path) -> int:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings show signed addresses
    fetch_weights(directory, _token())
    Checkpoint.open(directory)
    print(f"Set SAM3_WEIGHTS_PATH={directory}")
    return 0


def _token() -> str | None:
    return (_setting("HF_TOKEN") or "").strip() or None


def _setting(name: str) -> str | None:
    """A variable of the environment, or of the file that the service reads its settings from."""
    file = os.environ.get("S3_ENV_FILE", ".env")
    return os.environ.get(name) or (dotenv_values(file).get(name) if file else None)


def _info(path: Path) -> int:
    from sam3_runner.info import describe  # torch takes seconds to import

    description = describe(Checkpoint.open(path))
    print(path)
    for label, text in description.lines:
        print(f"  {label:<10} {text}")
    for fault in description.faults:
        print(fault, file=sys.stderr)
    return 1 if description.faults else 0


def _view(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if not options.prompt and not options.box:
        parser.error("view needs --prompt, --box, or both")
    if options.box and len(options.prompt) > 1:
        parser.error("--box shows what one --prompt means; with several it is not clear which")
    if not 0 <= options.score_threshold <= 1:
        parser.error(f"--score-threshold must be from 0 to 1, got {options.score_threshold:g}")
    from sam3_runner.view import view  # torch takes seconds to import

    selection = Selection(score_threshold=options.score_threshold)
    texts = dict.fromkeys(options.prompt) or [None]
    prompts = [Prompt(text, boxes=tuple(options.box), selection=selection) for text in texts]
    weights = options.weights or Path(_setting("SAM3_WEIGHTS_PATH") or DEMO_CHECKPOINT)
    out = options.out or Path(f"{options.image.stem}.overlay.jpg")
    for line in view(options.image, prompts, weights, out).lines:
        print(line)
    print(f"overlay: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
