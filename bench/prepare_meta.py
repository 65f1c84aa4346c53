"""A folder with Meta's own SAM3 and its light dependencies, for `bench/model.py --meta` and `bench/gpu.sh`.

    python -m bench.prepare_meta FOLDER                          # for this Python
    python -m bench.prepare_meta FOLDER --python-version 3.12    # to be carried to a machine with another

About 45 MB. PyTorch, torchvision, transformers' dependencies and NumPy are not in it: it is meant to lie behind an
environment that has them. What `bench.exactness` wants of our own requirements beyond those is in it too. Meta's
package pins older libraries, so nobody asks what it requires.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = (
    "sam3==0.1.4",
    "timm==1.0.22",
    "iopath==0.1.10",
    "portalocker==3.2.0",
    "ftfy==6.3.1",
    "wcwidth==0.2.14",
    "einops==0.8.1",
    "pycocotools==2.0.11",
    "simplejpeg==1.9.0",
    "pillow-heif==1.8.1",
)
# Meta's wheel lacks the vocabulary that its tokenizer reads; OpenCLIP's wheel has the same file.
VOCABULARY_WHEEL = "open_clip_torch==3.3.0"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
PLATFORM = "x86_64-manylinux_2_28"


def prepare(folder: Path, python_version: str) -> None:
    """Make the folder anew."""
    shutil.rmtree(folder, ignore_errors=True)
    uv = Path(sys.executable).with_name("uv")
    aim = ("--python", sys.executable, "--python-version", python_version, "--python-platform", PLATFORM)
    wheels = ("--no-deps", "--only-binary", ":all:", "--no-binary", "iopath")  # which is published as source
    subprocess.run(
        [uv, "pip", "install", "--quiet", *wheels, *aim, "--target", folder, *PACKAGES], check=True
    )
    with tempfile.TemporaryDirectory() as download:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "-d",
                download,
                VOCABULARY_WHEEL,
            ],
            check=True,
        )
        (wheel,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (folder / VOCABULARY).write_bytes(archive.read(f"open_clip/{VOCABULARY}"))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.0f} MB")


def main() -> None:
    """Read the command line, make the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python-version", default=platform.python_version())
    options = parser.parse_args()
    prepare(options.folder, options.python_version)


if __name__ == "__main__":
    main()
