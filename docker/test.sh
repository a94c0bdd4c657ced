#!/usr/bin/env bash
# Runs an image as its users will: numeric user, read-only root, no network, all written under /data and /tmp.
#   test.sh NAME     ENGINE, RUN_FLAGS, GPU_FLAGS as in the Makefile
set -euo pipefail

name=${1:?the name of the image}
# shellcheck disable=SC2206 # flags are several words
run=("$ENGINE" run --rm --read-only --network none --user 10001:10001 --tmpfs "/tmp:rw,exec,mode=1777" --volume /data
     ${GPU_FLAGS:-} ${RUN_FLAGS:-})
say() { echo "image-test: $1"; }

say "contents"
"${run[@]}" "$name" docker/image-check.sh
say "doctor"
"${run[@]}" "$name" make doctor PROFILE=smoke
say "kernels of the GPU profile, for every GPU of the image"
"${run[@]}" "$name" make doctor ARGS=--require-baked
say "smoke"
"${run[@]}" "$name" make all PROFILE=smoke
say "tests"
"${run[@]}" "$name" make test ARGS="-p no:cacheprovider -q"
say "all passed"
