"""Runs of a tiny profile in a temporary folder, for tests of the measuring stages."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from small_models import BITNET

from slidesparse.config import Bench
from slidesparse.machine import Machine
from slidesparse.plan import Plan, Task
from slidesparse.result_tree import ResultTree
from slidesparse.run import Run

QUICK = {"warmup_s": 0, "min_samples": 2, "max_samples": 3, "ci_rel": 0.5, "cap_s": 0.05}
MODEL = "Tiny"
MACHINE = Machine(
    gpu=None, gpu_count=0, cpu="test", cores=2, memory_bytes=1 << 30, arch="x86_64", python="3.11.0", torch="2", cuda=""
)


def small_run(folder: Path, run_id: str = "run1", **changes: Any) -> Run:
    """A run of a profile with one model, both types and 2:4, 2:8; `changes` replace keys of the profile."""
    profile = {
        "description": "test", "models": [MODEL], "source": "synthetic", "dtypes": ["INT8", "FP8E4M3"],
        "sparsity": {"end_to_end": ["2:8"], "kernel_high": ["2:8"], "kernel_low": ["2:inf"]},
        "backends": {"dense": ["cpu_dense"], "sparse": ["cpu_sparse"]}, "engine": "transformers",
        "tune": {"coarse_m": [4], "fine_m": [2], "stopping": QUICK},
        "prefill": {"m": [4, 16], "prompt_cap": 8, "steps": 2, "stopping": QUICK},
        "decode": {"m": [3], "prompt_len": 4, "output_len": 3, "stopping": QUICK},
        "kernel": {"m": [4], "stopping": QUICK},
    } | changes  # fmt: skip
    model = {"quantization": "bitnet_ternary", "config": BITNET}
    bench = Bench.model_validate({"version": 1, "models": {MODEL: model}, "profiles": {"test": profile}})
    plan = Plan(bench, "test", folder)
    tree = ResultTree(plan.reports_folder / MACHINE.tag, MACHINE.tag)
    return Run(plan, tree, MACHINE, run_id, logging.getLogger("slidesparse.test"), quiet=True)


def task(run: Run, name: str) -> Task:
    return next(task for task in run.plan.tasks if task.name == name)
