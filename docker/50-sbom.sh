#!/usr/bin/env bash
# The software bill of materials, CycloneDX: Python packages from the environment's own metadata. System packages are
# listed beside it as dpkg knows them.
#   50-sbom.sh LOCK
set -euo pipefail

lock=${1:?the lock file of the tool}
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --disable-pip-version-check --no-input -q --no-deps --require-hashes -r "$lock"
mkdir -p /opt/sbom
"$room/venv/bin/cyclonedx-py" environment --output-reproducible --of JSON -o /opt/sbom/python.cdx.json /opt/venv
dpkg-query -W -f '${Package} ${Version} ${Architecture}\n' | sort >/opt/sbom/system.txt
