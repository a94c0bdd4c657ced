#!/usr/bin/env bash
# clean.sh [checkpoints|results]: without an argument environment and caches go, models and results stay.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
data=${DATA:-.}

case ${1:-} in
  "")
    if [ -e "$venv/.made-by-slidesparse" ]; then rm -rf "$venv"; fi
    rm -rf build ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
    find slidesparse tests -name __pycache__ -type d -prune -exec rm -rf {} +
    for kept in "$data"/checkpoints "$data"/checkpoints_slidesparse "$data"/reports; do
      if [ -d "$kept" ]; then echo "kept: $kept ($(du -sh "$kept" | cut -f1))"; fi
    done
    echo "make clean CONFIRM=checkpoints removes the models made, CONFIRM=results the reports"
    ;;
  checkpoints) rm -rf "$data"/checkpoints "$data"/checkpoints_slidesparse ;;
  results) rm -rf "$data"/reports ;;
  *)
    echo "error: CONFIRM=$1: allowed are checkpoints, results" >&2
    exit 2
    ;;
esac
