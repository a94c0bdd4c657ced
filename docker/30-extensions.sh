#!/usr/bin/env bash
# csrc/ for every GPU architecture of this CPU's machines, into the package.
set -euo pipefail

cd /opt/slidesparse
/opt/venv/bin/python -m slidesparse.kernels.build
for library in gemm peak fused; do
  test -s "slidesparse/kernels/lib/libslidesparse_$library.so" ||
    { echo "30-extensions.sh: libslidesparse_$library.so was not built" >&2; exit 1; }
done
