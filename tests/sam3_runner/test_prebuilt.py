"""What Triton needs of a C compiler is made while the image is built; the process that uses it has no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="a C compiler is what builds it")

PROGRAM = """
import os
import sys
from pathlib import Path

sys.setdlopenflags(os.RTLD_LAZY)  # the driver's functions are not there without a GPU; they are looked up when called

import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaUtils

from sam3_runner.prebuilt import use_prebuilt_module


@triton.jit
def double(pointer, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(pointer + at, 2 * tl.load(pointer + at, at < size), at < size)


is_there = use_prebuilt_module(Path(sys.argv[1]))
source = triton.compiler.ASTSource(double, {"pointer": "*fp32", "size": "i32", "BLOCK": "constexpr"}, {(2,): 128})
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32))  # an H200's
print(is_there, len(kernel.asm["cubin"]), callable(CudaUtils().launch))
"""


@dataclass(frozen=True)
class Built:
    """What the image's build leaves.

    Attributes:
        module: Directory of the module.
        driver: Directory with a library that has the name of NVIDIA's driver, and nothing in it.
    """

    module: Path
    driver: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("triton")
    built = Built(folder / "module", folder / "driver")
    built.module.mkdir()
    built.driver.mkdir()
    subprocess.run(
        ["sh", str(ROOT / "scripts/container.sh"), "triton", str(built.module)],
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable},
        check=True,
        timeout=120,
    )
    subprocess.run(
        ["gcc", "-shared", "-x", "c", "/dev/null", "-o", str(built.driver / "libcuda.so.1")],
        check=True,
        timeout=60,
    )
    return built


def run(built: Built, folder: Path, module: Path) -> subprocess.CompletedProcess[str]:
    """The program, where no compiler can be found."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    return subprocess.run(
        [sys.executable, str(program), str(module)],
        env={
            "PATH": str(folder),
            "PYTHONPATH": str(ROOT),
            "TRITON_CACHE_DIR": str(folder / "cache"),
            "TRITON_LIBCUDA_PATH": str(built.driver),
            "LD_LIBRARY_PATH": str(built.driver),
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_module_that_the_image_was_built_with_is_taken_and_kernels_need_no_compiler(
    built: Built, tmp_path: Path
) -> None:
    finished = run(built, tmp_path, built.module)
    assert finished.returncode == 0, finished.stderr
    is_there, cubin_bytes, is_callable = finished.stdout.split()
    assert (is_there, is_callable) == ("True", "True")
    assert int(cubin_bytes) > 1000


def test_without_it_triton_asks_for_a_compiler(built: Built, tmp_path: Path) -> None:
    finished = run(built, tmp_path, tmp_path)
    assert finished.returncode != 0
    assert "Failed to find C compiler" in finished.stderr
