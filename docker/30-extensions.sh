#!/usr/bin/env bash
# csrc/ for each GPU architecture given (80, 90a, ...), into the package.
set -euo pipefail

cd /opt/slidesparse
IFS=', ' read -ra architectures <<<"$*"
/opt/venv/bin/python -m slidesparse.kernels.build "${architectures[@]}"
for library in gemm peak fused; do
  test -s "slidesparse/kernels/lib/libslidesparse_$library.so" ||
    { echo "30-extensions.sh: libslidesparse_$library.so was not built" >&2; exit 1; }
done
# nvcc leaves names of temporary files, process numbers in them, among the local symbols.
strip --strip-unneeded slidesparse/kernels/lib/*.so
