#!/usr/bin/env bash
# One report over every machine whose results lie below DATA: this machine's own, the others set beside it. Runs in the
# image (docker run … IMAGE deploy/collect.sh) or in a checkout, on a machine that has results there.
#   PROFILE as in the Makefile
set -euo pipefail
cd "$(dirname "$0")/.."

own=$(make -s report FLAGS=--json | sed -n 's/.*"report": "\(.*\)\/[^/]*".*/\1/p')
others=()
for folder in "${DATA:-.}"/reports/*/; do
  folder=${folder%/}
  if [ -e "$folder/status.json" ] && ! [ "$folder" -ef "$own" ]; then others+=("--other $folder"); fi
done
make -s report ARGS="${others[*]}"
