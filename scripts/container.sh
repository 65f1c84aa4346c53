#!/bin/sh
# Runs once, as root, while the image is built: the places that volumes are mounted at, owned by the service's user, so
# that a fresh named volume is writable for it.
set -eu
mkdir -p /app/weights /app/data
chown bentoml:bentoml /app/weights /app/data
