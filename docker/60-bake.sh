#!/usr/bin/env bash
# Machine code of our Triton kernels into /opt/triton-cache, for each GPU architecture given (80, 90a, ...).
# What a folder triton-cache of the checkout holds already is taken from there (docs/containers.md, emulation).
set -euo pipefail

cache=/opt/triton-cache
cd /opt/slidesparse
mkdir -p "$cache"
if [ -d triton-cache ]; then cp -R triton-cache/. "$cache" && rm -rf triton-cache; fi
/opt/venv/bin/python -m slidesparse.bake --profile bitnet-2b --quiet --architectures "$(paste -sd, <(printf '%s\n' "$@"))" \
  --cache "$cache"
rm -f "$cache/.lock"
chmod -R a+rX "$cache"
