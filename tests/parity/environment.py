"""An environment of its own for Meta's package, made once from `requirements-parity.txt` and kept.

Its libraries are older than ours, so that the two cannot share one. uv takes what the two have in common, torch above
all, from its own cache, as links: a second environment costs little disk.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from uv import find_uv_bin

ROOT = Path(__file__).resolve().parents[2]
PINS = ROOT / "requirements-parity.txt"
INSTALL_TIMEOUT_S = 1800
SHOWN_OUTPUT = 2000  # characters, of a command that failed


def meta_python() -> Path:
    """The interpreter that can `import sam3`. Installs it if these pins never were: about 3 GB to download.

    Raises:
        RuntimeError: the packages could not be installed.
    """
    key = hashlib.sha256(PINS.read_bytes() + sys.version.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s3-backend-tests"
    target = cache / f"sam3-{key}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        _install(target)
    return target / "bin" / "python"


def bpe_file(python: Path) -> Path:
    """CLIP's vocabulary, which sam3's wheel leaves out: it comes with open_clip."""
    (packages,) = (python.parents[1] / "lib").glob("python*/site-packages")
    return packages / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"


def _install(target: Path) -> None:
    uv = find_uv_bin()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="installing-") as temporary:
        building = Path(temporary) / "environment"
        _run([uv, "venv", "--quiet", "--relocatable", "--python", sys.executable, str(building)])
        _run(
            [
                uv,
                "pip",
                "sync",
                "--quiet",
                "--python",
                str(building / "bin/python"),
                "--require-hashes",
                str(PINS),
            ]
        )
        try:
            building.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was quicker
                raise


def _run(command: list[str]) -> None:
    finished = subprocess.run(
        command,
        env={**os.environ, **_package_index()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
        check=False,
    )
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:3])} failed: {finished.stderr[-SHOWN_OUTPUT:]}")


def _package_index() -> dict[str, str]:
    """uv reads none of pip's settings: a mirror named to pip alone is handed on, as `scripts/setup.sh` does."""
    if "UV_DEFAULT_INDEX" in os.environ or "UV_INDEX_URL" in os.environ:
        return {}
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    index = os.environ.get("PIP_INDEX_URL") or asked.stdout.strip()
    return {"UV_DEFAULT_INDEX": index} if index else {}


if __name__ == "__main__":
    print(meta_python())
