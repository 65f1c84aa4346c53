#!/bin/sh
# Runs once, as root, while the image is built, after the packages are installed.
#
#   scripts/container.sh              all of it
#   scripts/container.sh triton DIR   only Triton's module, into DIR; tests do this, and the next, with PYTHON=…
#   scripts/container.sh store        only BentoML's folders in BENTOML_HOME
set -eu
python=${PYTHON:-/app/.venv/bin/python}

# Triton, which torch.compile makes GPU code with, compiles one C file of its own when it first launches a kernel: the
# same for every GPU. It is linked with the driver's library, which no machine without a GPU has: by its name alone, so
# an empty one will do here. sam3_runner/prebuilt.py finds the module beside its source.
compile_triton_module() {
    stub=$(mktemp -d)
    : | gcc -shared -x c - -Wl,-soname,libcuda.so.1 -Wl,--no-as-needed -o "$stub/libcuda.so.1"
    TRITON_LIBCUDA_PATH=$stub TRITON_CACHE_DIR=$stub/cache "$python" - "$@" <<'PYTHON'
import os
import shutil
import sys

from triton.backends.nvidia import driver
from triton.runtime.build import compile_so_from_file

source = os.path.join(driver.dirname, "driver.c")
built = compile_so_from_file(source, "cuda_utils", driver.library_dirs(), driver.include_dirs, driver.libraries)
print(shutil.copy(built, sys.argv[1] if len(sys.argv) > 1 else driver.dirname))
PYTHON
    rm -rf "$stub"
}

# BentoML makes the folders of its store when it starts, though it serves from none of them: in a file system that is
# read-only then, they must be there.
make_store() {
    "$python" -c 'from bentoml._internal.configuration.containers import BentoMLContainer as c; c.bentoml_home.get()'
}

case ${1:-} in
triton)
    compile_triton_module "$2"
    exit
    ;;
store)
    make_store
    exit
    ;;
esac

# What follows removes compilers: not from a developer's machine.
if [ "$(id -u)" != 0 ] || ! id bentoml >/dev/null 2>&1 || [ ! -d /app ]; then
    echo "container.sh: this is no image of the service" >&2
    exit 1
fi

# The places that volumes are mounted at, owned by the service's user, so that a fresh named volume is writable for it.
mkdir -p /app/weights /app/data
chown bentoml:bentoml /app/weights /app/data

compile_triton_module
make_store

# Compilers, make and git, which BentoML's base brings along, are of no use from here on but to an intruder.
apt-get purge -y --auto-remove build-essential gcc g++ cpp make dpkg-dev libc6-dev git gnupg2
rm -rf /var/lib/apt/lists/*
for tool in gcc cc g++ cpp make ld as git; do
    if command -v $tool; then
        echo "container.sh: $tool is still here" >&2
        exit 1
    fi
done
# What was purged took nothing along that the service needs.
"$python" -c 'import bentoml, numpy, pillow_heif, simplejpeg, torch, triton'
