#!/usr/bin/env bash
# Builds the image of one CPU architecture:  build.sh x86_64|aarch64 NAME
#   ENGINE docker or podman   BASE_IMAGE another base   BUILD_FLAGS more options
# PIP_CONFIG, if it names a file, is what pip is configured with during the build; it is kept nowhere.
set -euo pipefail
cd "$(dirname "$0")/.."

cpu=${1:?x86_64 or aarch64} name=${2:?the name of the image}
case $cpu in
  x86_64) platform=linux/amd64 ;;
  aarch64) platform=linux/arm64 ;;
  *) echo "error: PLATFORM=$cpu: allowed are x86_64, aarch64" >&2; exit 2 ;;
esac
command -v "$ENGINE" >/dev/null || { echo "error: ENGINE=$ENGINE is not installed" >&2; exit 2; }

# Times inside the image are the commit's, so that two builds of one commit agree.
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
export SOURCE_DATE_EPOCH=$epoch
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain --untracked-files=no 2>/dev/null)" ] || revision=$revision+changes
arguments=(
  --file "Dockerfile.$cpu" --platform "$platform" --tag "$name"
  --build-arg "SOURCE_DATE_EPOCH=$epoch" --build-arg "REVISION=$revision"
  --build-arg "VERSION=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' slidesparse/__init__.py)"
  --build-arg "CREATED=$(date -u -d "@$epoch" +%Y-%m-%dT%H:%M:%SZ)"
  --build-arg "SOURCE=$(git config --get remote.origin.url 2>/dev/null | sed 's#//[^/@]*@#//#' || true)"
)
[ -z "${BASE_IMAGE:-}" ] || arguments+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
[ -z "${PIP_CONFIG:-}" ] || arguments+=(--secret "id=pip,src=$PIP_CONFIG")
# shellcheck disable=SC2086 # BUILD_FLAGS are several words
exec "$ENGINE" build "${arguments[@]}" ${BUILD_FLAGS:-} .
