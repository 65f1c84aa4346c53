#!/bin/sh
# Makes .venv with exactly the pinned packages. Does nothing when that is already so.
#
#   scripts/setup.sh              what every make target calls first
#   PYTHON=python3.12 …           which interpreter makes the environment (3.11 or newer)
set -eu
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/.pins
# Scripts in an environment name their interpreter by its absolute path: one that was moved is made anew.
home=$venv/.home
here=$(pwd -P)
wanted="$(cat requirements.txt requirements-dev.txt | cksum) $here"

if [ -x $venv/bin/python ] && [ -f $stamp ] && [ "$(cat $stamp)" = "$wanted" ]; then
    exit 0
fi

say() { printf '==> %s\n' "$*" >&2; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.13 python3.12 python3.11; fi
    for candidate; do
        if command -v "$candidate" >/dev/null 2>&1 && is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    found=$("${PYTHON:-python3}" --version 2>&1 || true)
    fail "needs Python 3.11 or newer; ${PYTHON:-python3} is: ${found:-not there}. Install one and name it: make PYTHON=python3.12 …"
}

rm -f $stamp # until the end, nothing is known to be whole
if ! { [ "$(cat $home 2>/dev/null)" = "$here" ] && is_new_enough $venv/bin/python && $venv/bin/python -m pip --version >/dev/null 2>&1; }; then
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv (as root), then again."
    say "Virtual environment: $venv ($("$python" --version))"
    "$python" -m venv --clear $venv
    printf '%s' "$here" >$home
fi

# pip knows how to check hashes only for a whole file: give it uv's entry alone.
awk '/^uv==/ {on = 1} on {print} on && !/\\$/ {exit}' requirements-dev.txt >$venv/uv.txt
say "Installer: $(sed -n 's/^\(uv==[^ ]*\).*/\1/p' $venv/uv.txt)"
$venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $venv/uv.txt ||
    fail "could not install uv: see pip's message above (is the package index reachable?)"

# uv reads none of pip's settings: hand the index on, so that a mirror is named in one place.
index=${PIP_INDEX_URL:-$($venv/bin/python -m pip config get global.index-url 2>/dev/null || true)}
if [ -n "$index" ] && [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
    export UV_DEFAULT_INDEX="$index"
fi

say "Packages: $(grep -h "^[a-z].*==" requirements.txt requirements-dev.txt | sort -u | wc -l) pins, about 3 GB to download the first time, 6 GB on disk"
UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300} $venv/bin/uv pip sync --python $venv/bin/python --require-hashes \
    requirements.txt requirements-dev.txt ||
    fail "could not install the pinned packages: see the message above; run it again to go on where it stopped"

printf '%s' "$wanted" >$stamp
say "Ready"
