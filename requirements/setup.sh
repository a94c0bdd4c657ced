#!/usr/bin/env bash
# Makes the environment that the Makefile uses:  setup.sh base|dev
#
#   VENV         folder of the environment                                     (default .venv)
#   PYTHON       interpreter to build it with                                  (default: the first 3.11 or 3.12 found)
#   TORCH        cpu, cuda or auto: which pin of torch     (default auto: as built before, else cuda if there is a GPU)
#   TORCH_INDEX  one more package index for torch, e.g. of its CPU builds      (default: none)
#
# Cheap when nothing changed: each part has a stamp, a hash over everything that decides its content, written
# when the part is complete. An interrupted part has no stamp and is made again. Everything is said on stderr.
set -euo pipefail
cd "$(dirname "$0")/.."

part=${1:?base or dev}
venv=${VENV:-.venv}
torch=${TORCH:-auto}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
python=$venv/bin/python
marker=$venv/.made-by-slidesparse

say() { echo "setup: $*" >&2; }
fail() { echo "setup: error: $*" >&2; exit 1; }

usable() { # a pyenv shim exists and fails, so run it
  "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1
}

find_python() {
  local candidate without_venv="" candidates=(python3 python3.12 python3.11 python /usr/bin/python3 /usr/local/bin/python3)
  if [ -n "${PYTHON:-}" ]; then
    candidates=("$PYTHON")
    usable "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python 3.11 or 3.12"
  fi
  for candidate in "${candidates[@]}"; do
    usable "$candidate" || continue
    if "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
    without_venv=$candidate
  done
  if [ -n "$without_venv" ]; then
    fail "$without_venv lacks the modules venv and ensurepip; on Debian and Ubuntu: apt-get install python3-venv"
  fi
  fail "no Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python3.12 ..."
}

current_choice() { cat "$venv/.stamp-torch" 2>/dev/null; }

choose_torch() {
  case $torch in
    cpu | cuda) echo "$torch" ;;
    auto) if current_choice; then :; elif [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; then echo cuda; else echo cpu; fi ;;
    *) fail "TORCH=$torch: allowed are auto, cpu, cuda" ;;
  esac
}

digest() { cat "$@" | sha256sum | cut -c1-64; }
stamp() { echo "$venv/.stamp-$1"; }
current() { [ "$(cat "$(stamp "$1")" 2>/dev/null)" = "$2" ]; }
done_with() { echo "$2" >"$(stamp "$1")"; }
pip() { "$python" -m pip --disable-pip-version-check -qq --no-input "$@" >&2; }

make_base() {
  local interpreter
  interpreter=$(find_python)
  if [ -e "$venv" ] && [ ! -e "$marker" ] && [ -n "$(ls -A "$venv")" ]; then
    fail "$venv exists and was not made by this script; move it aside or choose another with VENV="
  fi
  say "environment in $venv with $("$interpreter" --version), torch for ${choice}"
  mkdir -p "$venv"
  find "$venv" -mindepth 1 -delete
  touch "$marker"
  "$interpreter" -m venv "$venv" >&2
  say "1/2 pinned packages (base.lock)"
  # --no-deps: the lock is complete but for torch, which pip would otherwise ask a hash of.
  pip install --no-deps --require-hashes -r requirements/base.lock
  say "2/2 $pin; a CUDA build is several GB, docs/install.md tells how to avoid it"
  pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r "requirements/torch-$choice.txt"
  say "torch $("$python" -c 'import importlib.metadata as m; print(m.version("torch"))')"
}

choice=$(choose_torch)
pin=$(<"requirements/torch-$choice.txt")
# The folder counts because an environment cannot be moved. PYTHON and TORCH_INDEX do not: a later call without
# them is to use what they built.
base=$({ echo "$venv $choice"; digest requirements/base.lock "requirements/torch-$choice.txt"; } | sha256sum)
dev=$(digest requirements/dev.lock requirements/triton.txt)
project=$(digest pyproject.toml)
vllm=$(digest requirements/vllm.lock)
gpu=$(digest requirements/gpu.txt csrc/CMakeLists.txt csrc/*/*)

if ! current base "$base" || ! "$python" -c pass 2>/dev/null; then
  make_base
  done_with torch "$choice"
  done_with base "$base"
fi
if ! current project "$project"; then
  pip install --no-deps --no-build-isolation --editable .
  done_with project "$project"
fi
if [ "$choice" = cuda ] && ! current vllm "$vllm"; then
  say "vLLM and what it needs (vllm.lock); about 2 GB"
  pip install --no-deps --require-hashes -r requirements/vllm.lock
  done_with vllm "$vllm"
fi
if [ "$choice" = cuda ] && ! current gpu "$gpu"; then
  say "GPU libraries (gpu.txt), then csrc/ with them"
  pip install --no-deps -r requirements/gpu.txt
  # What cannot be built is not needed by everything: `make doctor` says what is then skipped, and the next call tries again.
  if PATH="$venv/bin:$PATH" "$python" -m slidesparse.kernels.build >&2; then done_with gpu "$gpu"
  else say "warning: csrc/ was not built, see above; GPU cells that need it will be skipped"; fi
fi
if [ "$part" = dev ] && ! current dev "$dev"; then
  say "test and lint packages (dev.lock)"
  pip install --no-deps --require-hashes -r requirements/dev.lock
  # A CUDA build of torch brings its own Triton; with a CPU build the kernels' tests need one, for its interpreter.
  "$python" -c 'import triton' 2>/dev/null || pip install --no-deps -r requirements/triton.txt
  done_with dev "$dev"
fi
