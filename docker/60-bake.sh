#!/usr/bin/env bash
# Machine code of our Triton kernels into /opt/triton-cache, for each GPU architecture given (80, 90a, ...).
set -euo pipefail

mkdir -p /opt/triton-cache
cd /opt/slidesparse
architectures=$(tr ' ' '\n' <<<"$*" | tr -d '[:lower:]' | paste -sd, -)
TRITON_CACHE_DIR=/opt/triton-cache /opt/venv/bin/python -m slidesparse.bake --profile bitnet-2b \
  --architectures "$architectures" --cache /opt/triton-cache
chmod -R a+rX /opt/triton-cache
