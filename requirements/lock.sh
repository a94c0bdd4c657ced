#!/usr/bin/env bash
# Regenerates base.lock, dev.lock and vllm.lock (hash-pinned, Python 3.11 and 3.12, x86_64 and aarch64).
# torch and the CUDA packages that it brings are left out: which build fits depends on the machine,
# so torch-cpu.txt and torch-cuda.txt pin them apart. dev.lock has those that dev.in names itself, nvcc's own.
set -euo pipefail
cd "$(dirname "$0")"
uv=${UV:-uv}
skip=(torch triton cuda-bindings cuda-pathfinder cuda-toolkit)
for package in cublas cuda-cccl cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver \
               cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx; do
  skip+=("nvidia-$package")
done
arguments=(--quiet --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock")
base=() dev=()
for package in "${skip[@]}"; do
  base+=(--no-emit-package "$package")
  grep -q "^$package==" dev.in || dev+=(--no-emit-package "$package")
done
"$uv" pip compile "${arguments[@]}" "${base[@]}" -c torch-cpu.txt base.in -o base.lock
"$uv" pip compile "${arguments[@]}" "${dev[@]}" -c torch-cpu.txt -c base.lock dev.in -o dev.lock
# vLLM and all it needs beside base.lock, for machines with a GPU; nvcc's own packages are gpu.txt's.
vllm=()
for package in "${skip[@]}" nvidia-cuda-crt nvidia-cuda-nvcc nvidia-nvvm; do vllm+=(--no-emit-package "$package"); done
"$uv" pip compile "${arguments[@]}" "${vllm[@]}" -c torch-cuda.txt vllm.in -o vllm.lock
