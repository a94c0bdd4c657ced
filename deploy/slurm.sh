#!/usr/bin/env bash
# The same matrix on several GPU hosts of a Slurm cluster, a job each, then one report over all of them. On a login node:
#   DATA=/shared/folder deploy/slurm.sh NODE...      IMAGE, PROFILE, ENGINE (podman or docker) from the environment
# Each host writes reports/<tag> below DATA, a folder that all of them share: tags differ by GPU, driver stack and CPU.
# The report is made on the first node, when all have ended; a job that was cut short goes on when it is submitted again.
#SBATCH --job-name=slidesparse
#SBATCH --gpus=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=96G
#SBATCH --time=06:00:00
set -euo pipefail

: "${DATA:?a folder that all hosts share}" "${PROFILE:=bitnet-2b}" "${ENGINE:=podman}"
if [ -z "${SLURM_JOB_ID:-}" ]; then
  : "${1:?names of nodes}"
  ended=afterany
  for node in "$@"; do
    job=$(sbatch --parsable --nodelist="$node" "$0" run)
    ended+=:${job%%;*}
  done
  exec sbatch --dependency="$ended" --nodelist="$1" "$0" report
fi

: "${IMAGE:=slidesparse:$(uname -m)}"
run=("$ENGINE" run --rm --read-only --tmpfs "/tmp:rw,exec,mode=1777" --shm-size 8g --user "$(id -u):$(id -g)"
     --volume "$DATA:/data" --env "PROFILE=$PROFILE")
if [ "$ENGINE" = podman ]; then run+=(--userns keep-id --device nvidia.com/gpu=all); else run+=(--gpus all); fi
case ${1:?run or report} in
  run)
    "${run[@]}" "$IMAGE" make doctor
    "${run[@]}" "$IMAGE" make all FLAGS=--quiet
    ;;
  report) "${run[@]}" "$IMAGE" deploy/collect.sh ;;
  *) echo "slurm.sh: $1: run or report" >&2; exit 2 ;;
esac
