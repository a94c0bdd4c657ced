# Two commands on a bare machine with Python 3.11 or 3.12: `make all`, `make test`. `make help` lists the rest.

PROFILE ?= auto
SOURCE ?=
TYPES ?=
DATA ?= .
CONFIG ?= bench.yaml
FLAGS ?=
ARGS ?=
PYTHON ?=
TORCH ?= auto
TORCH_INDEX ?=
VENV ?= .venv
# An environment that is used as it is, nothing installed: set in the images.
BAKED ?= $(SLIDESPARSE_BAKED)
CONFIRM ?=
# Of `merge`: another result folder, reports/TAG.
FROM ?=
# Of `bake`: where compiled kernels go, and for which GPUs.
CACHE ?= triton-cache
ARCHITECTURES ?= all
ENGINE ?= docker
BASE_IMAGE ?=
PLATFORM ?= $(subst arm64,aarch64,$(shell uname -m))
BUILD_FLAGS ?=
RUN_FLAGS ?=
GPU_FLAGS ?=
IMAGE ?= slidesparse:$(PLATFORM)

ENVIRONMENT := $(if $(BAKED),$(BAKED),$(VENV))
RUN := $(ENVIRONMENT)/bin/python -m slidesparse --config "$(CONFIG)" --profile "$(PROFILE)" --data "$(DATA)" \
       $(if $(SOURCE),--source "$(SOURCE)") $(if $(TYPES),--types "$(TYPES)") $(FLAGS)
SETUP := VENV="$(VENV)" PYTHON="$(PYTHON)" TORCH="$(TORCH)" TORCH_INDEX="$(TORCH_INDEX)" requirements/setup.sh

COMMANDS := all prepare convert tune prefill decode throughput kernel linear calibrate report plan status doctor
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: $(COMMANDS) merge bake env env-dev test lint format lock clean help image image-test image-save image-sbom image-files

##@ The whole run
all:      ## all tasks, then the report; run again to resume
plan:     ## dry run: every cell, what is done, time and disk expected (ARGS=--cells lists them)
doctor:   ## what this machine can and cannot run, and why
status:   ## what became of each task

##@ Single stages
prepare:  ## task 1: get the model, quantise it to INT8 and FP8
convert:  ## task 2: prune to Z:L, prove that lifting loses nothing
tune:     ## task 3: measure every candidate algorithm, store the winners
prefill:  ## task 4: prefill throughput
decode:   ## task 5: decode throughput
throughput: ## tasks 4 and 5 together: each engine is started once
kernel:   ## tasks 6 to 8: GEMM latency, dense and sparse
linear:   ## task 9: whole linear layers, against dense and the reference pipeline
calibrate: ## task 10: what this GPU can do: copy bandwidth, tensor-core rates
report:   ## render reports/<tag>/report.md again, from records alone

$(COMMANDS): env
	@$(RUN) $@ $(ARGS)

merge: env ## take the records of FROM=DIR/reports/<tag>, a run of this machine's tag, into this result folder; report
	@$(RUN) merge $(if $(FROM),"$(FROM)") $(ARGS)

bake: env ## compile the profile's Triton kernels into CACHE for ARCHITECTURES, without a GPU (docs/bake.md)
	@$(RUN) bake --cache "$(CACHE)" --architectures "$(ARCHITECTURES)" $(ARGS)

##@ Development
test: env-dev ## the test-suite (ARGS="tests/test_config.py -k line", ARGS=--slow)
	@$(ENVIRONMENT)/bin/python -m pytest $(ARGS)

lint: env-dev ## ruff, mypy, hadolint, shellcheck; each runs, whatever the others say
	@failed=0; \
	for tool in "ruff check" "ruff format --check" mypy "hadolint Dockerfile.x86_64 Dockerfile.aarch64" \
	  "shellcheck docker/*.sh deploy/*.sh requirements/*.sh .ci/run"; do \
	  echo "$$tool"; $(ENVIRONMENT)/bin/$$tool || failed=1; \
	done; exit $$failed

format: env-dev ## let ruff lay out the code
	@$(ENVIRONMENT)/bin/ruff check --fix .
	@$(ENVIRONMENT)/bin/ruff format .

lock: env-dev ## pin again: requirements/*.in -> *.lock
	@UV="$(abspath $(ENVIRONMENT))/bin/uv" requirements/lock.sh

clean: ## remove the environment and caches; CONFIRM=checkpoints or CONFIRM=results removes those instead
	@VENV="$(VENV)" DATA="$(DATA)" requirements/clean.sh "$(CONFIRM)"

##@ Images (docs/containers.md)
image: ## build the image for PLATFORM (x86_64, aarch64)
	@ENGINE="$(ENGINE)" BASE_IMAGE="$(BASE_IMAGE)" BUILD_FLAGS="$(BUILD_FLAGS)" docker/build.sh "$(PLATFORM)" "$(IMAGE)"

image-test: ## what the image must hold and must not, then smoke and the tests in it: not root, read-only, no network
	@ENGINE="$(ENGINE)" RUN_FLAGS="$(RUN_FLAGS)" GPU_FLAGS="$(GPU_FLAGS)" docker/test.sh "$(IMAGE)"

image-save: ## the image as a file, for hosts without a registry (OUT=FILE)
	@ENGINE="$(ENGINE)" docker/save.sh "$(IMAGE)" "$(OUT)"

image-sbom: ## its bill of materials (CycloneDX) on standard output
	@"$(ENGINE)" run --rm --network none --entrypoint cat "$(IMAGE)" /opt/sbom/python.cdx.json

image-files: ## every file of it with mode, owner and hash, on standard output: to compare two builds
	@ENGINE="$(ENGINE)" docker/manifest.sh "$(IMAGE)"

##@ Environment
env: ## make the environment (every target does that by itself)
ifeq ($(BAKED),)
	@$(SETUP) base
else
	@test -x "$(BAKED)/bin/python" || { echo "error: BAKED=$(BAKED) holds no bin/python; unset BAKED and SLIDESPARSE_BAKED to build one" >&2; exit 1; }
endif

env-dev: ## as env, with what test and lint need
ifeq ($(BAKED),)
	@$(SETUP) dev
else
	@"$(BAKED)/bin/python" -c "import pytest, hypothesis" || { echo "error: BAKED=$(BAKED) was made without test packages; use a checkout outside the image, or BAKED= VENV=DIR" >&2; exit 1; }
endif

help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
	      /^[a-z-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@printf '\n%s\n' 'Variables (make TARGET NAME=value)'
	@printf '  %-12s %s\n' \
	  PROFILE 'auto (smoke without a GPU, bitnet-2b with one), smoke, bitnet-2b, paper, or another of bench.yaml' \
	  SOURCE 'hub, local or synthetic: overrides where the profile takes its models from' \
	  TYPES 'some of its types, e.g. INT8 or FP8E4M3,BF16: the others are not run' \
	  DATA 'folder of checkpoints and reports (default: here)' \
	  CONFIG 'bench file (default: bench.yaml)' \
	  FLAGS 'options before the command: --json, --quiet' \
	  ARGS 'options after the command' \
	  PYTHON 'interpreter to build the environment with (3.11 or 3.12)' \
	  TORCH 'auto, cpu or cuda: which pinned torch' \
	  TORCH_INDEX 'one more package index for torch, e.g. that of its CPU builds' \
	  VENV 'folder of the environment (default: .venv)' \
	  BAKED 'an environment to use as it is (set in the images)' \
	  FROM 'of merge: the result folder to take in, e.g. b/reports/<tag>' \
	  CACHE 'folder that make bake fills (default: triton-cache)' \
	  ARCHITECTURES 'GPUs that it is filled for: all, or a list such as 80,90,120' \
	  ENGINE 'docker or podman' \
	  PLATFORM 'x86_64 or aarch64: of the image (default: this machine)' \
	  IMAGE 'its name (default: slidesparse:PLATFORM)' \
	  BASE_IMAGE 'another base for it: Debian or Ubuntu' \
	  BUILD_FLAGS 'more options of ENGINE build, e.g. --network host' \
	  RUN_FLAGS 'more options of ENGINE run in image-test' \
	  GPU_FLAGS 'how a container gets the GPUs, e.g. --gpus all'
