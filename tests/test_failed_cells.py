"""Cells that fail on a GPU: what they held is free before the next one starts; what is not supported is a skip."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from small_runs import MODEL, QUICK, small_run, task

from slidesparse import records
from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere
from slidesparse.kernels.cpu_dense import CpuDense
from slidesparse.measure import kernel_bench, linear_bench
from slidesparse.plan import Variant
from slidesparse.run import Outcome
from slidesparse.tuning import search


class Buffer:
    """Gigabytes."""


@pytest.mark.parametrize(
    ("module", "name", "measures"),
    [
        (search, "tune", "measure_together"),
        (kernel_bench, "kernel_dense", "rank"),
        (linear_bench, "linear", "measure_together"),
    ],
)
def test_memory_is_freed_when_nothing_holds_it_any_more(
    module: ModuleType, name: str, measures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside the handler the traceback would still hold every buffer of the failed cell."""
    buffers: list[weakref.ref[Buffer]] = []
    alive: list[int] = []

    def fails(*arguments: object, **options: object) -> None:
        held = Buffer()
        buffers.append(weakref.ref(held))
        raise RuntimeError("CUDA out of memory")

    def free_memory(side: object) -> None:
        gc.collect()
        alive.append(sum(buffer() is not None for buffer in buffers))

    monkeypatch.setattr(module, measures, fails)
    monkeypatch.setattr(module, "free_memory", free_memory)
    run = small_run(tmp_path, dtypes=["INT8"], linear={"m": [4], "stopping": QUICK})
    monkeypatch.setattr(run.log, "exception", lambda *arguments: None)  # pytest keeps records, with their tracebacks
    outcome: Outcome = module.run_task(run, task(run, name))
    assert outcome.failed == len(buffers) > 0
    assert len(alive) >= len(buffers)
    assert set(alive) == {0}


def unsupported(*arguments: object) -> None:
    raise UnsupportedHere("cuSPARSELt Init: architecture mismatch")


@pytest.mark.parametrize(
    ("run_task", "name"), [(search.run_task, "tune"), (kernel_bench.run_task, "kernel_dense")], ids=["tune", "kernel"]
)
def test_what_a_library_does_not_support_is_skipped(
    run_task: Callable[..., Outcome], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library may say so only when it is asked for its algorithms."""
    monkeypatch.setattr(CpuDense, "algorithms", unsupported)
    run = small_run(tmp_path, dtypes=["INT8"])
    for _ in range(2):
        outcome = run_task(run, task(run, name))
        assert (outcome.skipped, outcome.failed) == (4, 0)
    path = run.tree.tune(MODEL, DType.INT8)
    if name == "kernel_dense":
        path = run.tree.kernel(MODEL, DType.INT8, Variant("cpu_dense"))
    frame = records.read(path)
    assert frame[frame["status"] == "skipped"]["reason"].str.contains("architecture mismatch").tolist() == [True] * 4
