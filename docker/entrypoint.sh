#!/usr/bin/env bash
# Before the command: what a driver that is too old needs. Says what it does on stderr.
set -euo pipefail

# CUDA 13 on a driver of CUDA 12: NVIDIA's forward-compatibility libraries, on the data-centre GPUs that they are for.
needed=580 compat=/usr/local/cuda/compat
if command -v nvidia-smi >/dev/null && driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null); then
  driver=$(head -n 1 <<<"$driver")
  if [ "${driver%%.*}" -lt "$needed" ] 2>/dev/null; then
    if [ -e "$compat/libcuda.so.1" ]; then
      echo "driver $driver is older than $needed: using CUDA's forward-compatibility libraries (data-centre GPUs only)" >&2
      export LD_LIBRARY_PATH=$compat${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    else
      echo "driver $driver is older than $needed, which CUDA 13 needs: install driver $needed or newer" >&2
    fi
  fi
fi
exec "$@"
