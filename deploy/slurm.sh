#!/usr/bin/env bash
# The same matrix on several GPU hosts of a Slurm cluster, one job a host, then one report over all of them:
#   sbatch --array=0-2 --export=ALL,HOSTS="node-h200 node-a100 node-gb200" deploy/slurm.sh
# Each host writes reports/<tag> below DATA, a folder that all of them share: tags differ by GPU, driver stack and CPU.
#SBATCH --job-name=slidesparse
#SBATCH --gpus=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=02:00:00
set -euo pipefail

: "${DATA:?a folder that all hosts share}" "${IMAGE:=slidesparse:$(uname -m)}" "${PROFILE:=bitnet-2b}" "${ENGINE:=podman}"
read -ra hosts <<<"${HOSTS:-}"
if [ "${#hosts[@]}" -gt 0 ] && [ -z "${ON_HOST:-}" ]; then
  exec srun --nodelist="${hosts[${SLURM_ARRAY_TASK_ID:-0}]}" --export=ALL,ON_HOST=1 "$0"
fi
run=("$ENGINE" run --rm --read-only --tmpfs "/tmp:rw,exec,mode=1777" --shm-size 8g --user "$(id -u):$(id -g)"
     --volume "$DATA:/data")
if [ "$ENGINE" = podman ]; then run+=(--userns keep-id --device nvidia.com/gpu=all); else run+=(--gpus all); fi
"${run[@]}" "$IMAGE" make doctor PROFILE="$PROFILE"
"${run[@]}" "$IMAGE" make all PROFILE="$PROFILE" FLAGS=--quiet
