#!/usr/bin/env bash
# What an image must not hold and must hold; runs inside it:  docker run --rm IMAGE docker/image-check.sh
set -uo pipefail
failed=0
complain() { echo "image-check: $1" >&2; failed=1; }

[ "$(id -u)" -ne 0 ] || complain "runs as root"

# Files that anyone may change, but for the sticky temporary folders.
found=$(find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /data -o -path /tmp \) -prune -o \
  \( -type f -o -type d \) -perm -0002 ! -perm -1000 -print 2>/dev/null | head -n 5)
[ -z "$found" ] || complain "world-writable: $found"

# Credentials, and what a build left behind of its host: keys, tokens, package-index addresses with a login.
found=$(find / -xdev \( -path /proc -o -path /sys \) -prune -o \
  \( -name '.netrc' -o -name 'pip.conf' -o -name '.pypirc' -o -name 'id_rsa*' -o -name 'id_ed25519*' -o -name '.git-credentials' \
  -o -path '*/.docker/config.json' -o -path '*/.cache/huggingface/token' \) -print 2>/dev/null | head -n 5)
[ -z "$found" ] || complain "credentials: $found"
found=$(grep -rIlE -- '-----BEGIN [A-Z ]*PRIVATE KEY-----|hf_[A-Za-z0-9]{30,}|ghp_[A-Za-z0-9]{36}|AKIA[0-9A-Z]{16}|https?://[^/ :]+:[^/ @]+@[a-z]' \
  /opt/slidesparse /etc /opt/sbom 2>/dev/null | grep -v 'docker/image-check.sh$' | head -n 5)
[ -z "$found" ] || complain "secrets in: $found"
found=$(env | grep -iE '^[^=]*(TOKEN|PASSWORD|SECRET|INDEX_URL)[^=]*=.' | cut -d= -f1 | tr '\n' ' ')
[ -z "$found" ] || complain "in the environment: $found"

# Compiled for every architecture that the image is for.
IFS=', ' read -ra architectures <<<"${SLIDESPARSE_ARCHITECTURES:?}"
for name in peak fused; do
  library=/opt/slidesparse/slidesparse/kernels/lib/libslidesparse_$name.so
  cuobjdump=$(find /opt/venv -name cuobjdump -type f | head -n 1)
  listed=$("$cuobjdump" --list-elf "$library" 2>/dev/null) || { complain "$library: cannot be read"; continue; }
  for architecture in "${architectures[@]}"; do
    grep -q "sm_${architecture%a}\." <<<"$listed" || complain "$library: no code for sm_$architecture"
  done
done
for file in /opt/sbom/python.cdx.json slidesparse/report/templates/report.md.j2 slidesparse/report/published; do
  [ -e "$file" ] || complain "$file is missing"
done
[ "$failed" -eq 0 ] && echo "image-check: nothing found"
exit "$failed"
