#!/usr/bin/env bash
# The project into the environment: as a link to /opt/slidesparse, which also holds Makefile, bench.yaml and tests.
set -euo pipefail

cd /opt/slidesparse
# A checkout has the modes that its user's umask gave it.
chmod -R u=rwX,go=rX .
# And times, which machine code of a Triton kernel repeats.
find . -exec touch -h -d 1980-01-01T00:00Z {} +
/opt/venv/bin/python -m pip install --disable-pip-version-check --no-input -q --no-deps --no-build-isolation --no-compile \
  --no-index --editable .
rm -rf build ./*.egg-info
find /opt/venv -name direct_url.json -delete
/opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash slidesparse tests >/dev/null
# The link's own module; Python wrote it on the way, by time.
/opt/venv/bin/python -m compileall -q -f --invalidation-mode unchecked-hash /opt/venv/lib/python3*/site-packages/__editable__*.py
/opt/venv/bin/python -c "import slidesparse, slidesparse.kernels.fused_library as f; f.load()"
