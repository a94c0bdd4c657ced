#!/usr/bin/env bash
# An image as one compressed file:  save.sh NAME [FILE]     load it with: ENGINE load -i FILE
set -euo pipefail

name=${1:?the name of the image}
file=${2:-$(tr ':/' '--' <<<"$name").tar.gz}
trap 'rm -f "$file.partial"' EXIT
"$ENGINE" save "$name" | gzip -n -1 >"$file.partial"
mv "$file.partial" "$file"
echo "$file: $(du -h "$file" | cut -f1)"
