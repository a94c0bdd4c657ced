#!/usr/bin/env bash
# Every file, link and folder of an image with mode, owner and SHA-256: two builds of one commit give the same list.
#   manifest.sh NAME >LIST       ENGINE as in the Makefile       then: diff LIST OTHER_LIST
set -euo pipefail

name=${1:?the name of the image}
# The engine makes /etc/hostname and its like anew for each container.
# shellcheck disable=SC2016 # for the shell in the container
"$ENGINE" run --rm --network none --user 0 --entrypoint bash "$name" -c '
  set -euo pipefail
  own=(-xdev \( -path /proc -o -path /sys -o -path /dev -o -path /data -o -path /.dockerenv -o -path /run/.containerenv
       -o -path /etc/hostname -o -path /etc/hosts -o -path /etc/resolv.conf -o -path /etc/mtab \) -prune -o)
  {
    find / "${own[@]}" -type f -print0 | xargs -0 -r sha256sum | sed -E "s/^\\\\?([0-9a-f]{64})  (.*)$/\2 \1/"
    find / "${own[@]}" -type l -printf "%p -> %l\n"
    find / "${own[@]}" ! -type l -printf "%p %M %U:%G\n"
  } | LC_ALL=C sort --buffer-size 512M'
