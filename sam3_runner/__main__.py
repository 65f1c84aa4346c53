"""`python -m sam3_runner`: fetch SAM3's weights, and say what a checkpoint is."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dotenv import dotenv_values

from sam3_runner.checkpoint import Checkpoint
from sam3_runner.errors import CheckpointError
from sam3_runner.fetch import REPOSITORY, FetchError, fetch_weights

DEFAULT_DIRECTORY = Path("weights") / "sam3"
STOPPED = 130  # what a shell says of a program that was interrupted


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks; errors are one line on standard error.

    Returns:
        The exit code: 0, or 1 after an error.
    """
    options = _parser().parse_args(arguments)
    try:
        return _fetch(options.directory) if options.command == "fetch" else _info(options.path)
    except (CheckpointError, FetchError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
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
    return parser


def _fetch(directory: Path) -> int:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings show signed addresses
    fetch_weights(directory, _token())
    Checkpoint.open(directory)
    print(f"Set SAM3_WEIGHTS_PATH={directory}")
    return 0


def _token() -> str | None:
    """`HF_TOKEN` of the environment, or of the file that the service reads its settings from."""
    file = os.environ.get("S3_ENV_FILE", ".env")
    token = os.environ.get("HF_TOKEN") or (dotenv_values(file).get("HF_TOKEN") if file else None)
    return (token or "").strip() or None


def _info(path: Path) -> int:
    from sam3_runner.info import describe  # torch takes seconds to import

    description = describe(Checkpoint.open(path))
    print(path)
    for label, text in description.lines:
        print(f"  {label:<10} {text}")
    for fault in description.faults:
        print(fault, file=sys.stderr)
    return 1 if description.faults else 0


if __name__ == "__main__":
    sys.exit(main())
