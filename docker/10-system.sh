#!/usr/bin/env bash
# System packages: what runs (runtime), and on top what only builds (builder). Debian and Ubuntu.
#   10-system.sh runtime|builder
# A C++ compiler stays in the runtime: Triton and torch.compile build launchers with it when a cache misses.
set -euo pipefail

case ${1:?runtime or builder} in
  runtime) packages=(ca-certificates g++ make python3 python3-dev python3-venv) ;;
  builder) packages=(cmake) ;;
  *) echo "10-system.sh: $1: runtime or builder" >&2; exit 2 ;;
esac
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}"
# Logs and caches hold times and nothing that is needed: two builds would differ by them.
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/ldconfig/aux-cache /var/log/apt /var/log/dpkg.log \
  /var/log/alternatives.log
