#!/usr/bin/env bash
# The environment in /opt/venv: everything that a run and its tests need, exact versions with hashes.
#   20-python.sh LOCK
set -euo pipefail

lock=${1:?a lock file}
python3 -m venv /opt/venv
/opt/venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off --no-deps --no-compile \
  --only-binary :all: --require-hashes -r "$lock"
# Compiled by content, not by time: the same bytes in every build, and nothing to write at run time; pip's own came
# compiled by time (-f). Packages bring templates and examples that are no Python of this version: those stay as they are.
/opt/venv/bin/python -W ignore -m compileall -q -f -j 0 --invalidation-mode unchecked-hash /opt/venv/lib >/dev/null || true
# What pip notes of its own doings differs from build to build.
find /opt/venv -name direct_url.json -delete
# Machine code of a Triton kernel names its sources with their times, Triton's own among them.
find /opt/venv -exec touch -h -d 1980-01-01T00:00Z {} +
