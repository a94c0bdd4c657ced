"""Runs of prepare and convert on tiny synthetic models, for tests of what is on disk afterwards."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import BITNET
from small_runs import MODEL, small_run, task

from slidesparse import records
from slidesparse.checkpoint import convert, prepare
from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.dtypes import DType
from slidesparse.plan import Plan
from slidesparse.rows import ConvertRow, PrepareRow
from slidesparse.run import Outcome, Run

SHARDS = ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors")


def model_run(folder: Path, config: dict[str, Any] = BITNET, local: Path | None = None, **changes: Any) -> Run:
    """A quiet run whose one model has the given config; `changes` replace keys of the profile."""
    run = small_run(folder, **changes)
    method = "bitnet_ternary" if config["model_type"] == "bitnet" else "absmax_per_channel"
    update = {"config": config, "quantization": method, "local": None if local is None else str(local)}
    models = {MODEL: run.plan.bench.models[MODEL].model_copy(update=update)}
    plan = Plan(run.plan.bench.model_copy(update={"models": models}), run.plan.profile_name, folder)
    return Run(plan, run.tree, run.machine, run.run_id, run.log, quiet=True)


def run_prepare(run: Run) -> Outcome:
    return prepare.run_task(run, task(run, "prepare"))


def run_convert(run: Run) -> Outcome:
    return convert.run_task(run, task(run, "convert"))


def prepare_rows(run: Run) -> dict[str, dict[str, Any]]:
    """Last row by dtype."""
    frame = records.latest(records.read(run.tree.prepare), PrepareRow.KEY)
    return {row["dtype"]: row for row in frame.to_dict("records")}


def convert_rows(run: Run) -> dict[tuple[str, str], dict[str, Any]]:
    """Last row by dtype and pattern."""
    frame = records.latest(records.read(run.tree.convert), ConvertRow.KEY)
    return {(row["dtype"], row["sparsity"]): row for row in frame.to_dict("records")}


def prepared(run: Run, dtype: DType) -> Checkpoint:
    return Checkpoint.open(run.plan.prepared_folder(MODEL, dtype))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def dequantised(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """float32 tensors of a W8A8 checkpoint in layout `plain`."""
    state = {name: checkpoint.load(name).float() for name in checkpoint.names() if not name.endswith("weight_scale")}
    for name in checkpoint.linears():
        state[f"{name}.weight"] *= checkpoint.load(f"{name}.weight_scale")
    return state


@contextmanager
def mounted_disk(folder: Path, size: str) -> Iterator[Path]:
    """A real file system of that size (`24m`) at a new folder; the test is skipped where mounting is not permitted."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
