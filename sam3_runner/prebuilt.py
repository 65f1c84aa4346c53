"""Triton's C module, compiled while the container's image was built: the image itself has no compiler.

Triton makes GPU code without one: its compiler and NVIDIA's `ptxas` are in its wheel, and torch launches what
Inductor makes. But a process that asks Triton about the GPU loads `cuda_utils`, one C file of Triton's, which is
compiled when it is first needed (triton 3.8, `backends/nvidia/driver.py`). It depends on Triton and on the interpreter,
not on the GPU; `scripts/container.sh` compiles it and leaves it beside its source.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path


def use_prebuilt_module(directory: Path | None = None) -> bool:
    """Have Triton take its C module from a directory, if it lies there, whenever it would compile it.

    Args:
        directory: Where the module is; None is beside its source.
    Returns:
        Whether it is there. If not, nothing is changed, and Triton looks for a C compiler.
    """
    from triton import knobs
    from triton.backends.nvidia import driver

    module = (directory or Path(driver.dirname)) / f"cuda_utils{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.is_file():
        return False

    def take_prebuilt(name: str, *_: object) -> str:
        if name != "cuda_utils":
            raise RuntimeError(f"Triton's module {name} was not compiled in advance, and no compiler is here")
        return str(module)

    knobs.build.impl = take_prebuilt
    return True
