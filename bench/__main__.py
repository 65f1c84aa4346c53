"""`make bench`: every bench that this machine can run, one after the other, and pictures of what came out.

python -m bench                  # all; half an hour on two CPU cores
python -m bench model service    # those
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from bench.results_file import ROOT

# In this order: the floor first, then what is built on it. Each is a module, which can be run by itself with options
# of its own.
BENCHES = {
    "model": "the model against its floor, Hugging Face's and Meta's",
    "images": "from a photo to the model's input, and from masks to files",
    "outputs": "what each output adds on 12 MP with 1, 20 and 200 instances",
    "service": "the whole service beside the model alone",
    "batching": "the two services beside LitServe, around a fake model",
    "journal": "what it costs to put tasks on record",
    "reliability": "what the journal costs: the service before and after it",
    "plots": "pictures of all that",
}


def main(arguments: list[str] | None = None) -> int:
    """Run them; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("benches", nargs="*", metavar="BENCH", help=f"of: {', '.join(BENCHES)}; default: all")
    chosen = parser.parse_args(arguments).benches or [*BENCHES]
    if unknown := [name for name in chosen if name not in BENCHES]:
        parser.error(f"there is no bench {unknown[0]!r}: {', '.join(BENCHES)}")
    failed = []
    for name in chosen:
        print(f"=== {name}: {BENCHES[name]}", flush=True)
        if subprocess.run([sys.executable, "-m", f"bench.{name}"], cwd=ROOT, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
