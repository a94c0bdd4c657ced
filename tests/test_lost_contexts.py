"""A kernel that takes the GPU's context with it costs one algorithm, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import MODEL, small_run, task

from slidesparse import files, records, runner
from slidesparse.dtypes import DType
from slidesparse.errors import ContextLost, RecordError, SlideSparseError
from slidesparse.kernels import cpu_dense, lost_contexts, operands
from slidesparse.kernels.backend import Backend
from slidesparse.kernels.lost_contexts import LostContexts
from slidesparse.measure import gemm_point, kernel_bench
from slidesparse.plan import Variant

VERSIONS = {"torch": "2.11.0"}


class Gpu(cpu_dense.CpuDense):
    name = "fake_gpu"
    device = "cuda"


class FakeGpu:
    """A CPU backend's name, on a GPU."""

    device = "cuda"

    def __init__(self, side: Backend) -> None:
        self.name = side.name


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_contexts, "_context_is_lost", lambda: True)


def crash(path: Path, error: Exception) -> None:
    with LostContexts.open(path, VERSIONS).guard(Gpu(), DType.FP16, "36.s1"):
        raise error


@pytest.mark.usefixtures("lost")
def test_the_algorithm_is_barred_from_then_on_under_these_versions_only(tmp_path: Path) -> None:
    path = tmp_path / "lost.json"
    with pytest.raises(
        ContextLost, match=r"fake_gpu FP16 algorithm 36.s1 crashed the GPU context: illegal instruction"
    ):
        crash(path, RuntimeError("illegal\ninstruction"))
    again = LostContexts.open(path, VERSIONS)
    assert again.barred(Gpu(), DType.FP16) == {"36.s1"}
    assert again.barred(Gpu(), DType.BF16) == frozenset()
    assert LostContexts.open(path, {"torch": "2.12.0"}).barred(Gpu(), DType.FP16) == frozenset()


def test_an_ordinary_error_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_contexts, "_context_is_lost", lambda: False)
    with pytest.raises(ValueError, match="plain"):
        crash(tmp_path / "lost.json", ValueError("plain"))
    assert not (tmp_path / "lost.json").exists()


def test_a_kernel_that_never_ends_counts_as_lost_and_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_contexts, "_context_is_lost", lambda: pytest.fail("synchronising would wait for ever"))
    with pytest.raises(ContextLost, match="no end"):
        crash(tmp_path / "lost.json", TimeoutError("no end after 20 s"))


def test_an_algorithm_answers_for_its_own_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the reference's, in float64: a GPU with few such units takes longer for it than the limit."""
    order: list[str] = []

    def note(module: object, name: str) -> None:
        genuine = getattr(module, name)

        def noted(*arguments: object, **options: object) -> object:
            order.append(name)
            return genuine(*arguments, **options)

        monkeypatch.setattr(module, name, noted)

    side = cpu_dense.CpuDense()
    plain = operands.random_weight(8, 32, DType.INT8, None, 1)
    weight = gemm_point.LayerWeight.pack(plain, "random", DType.INT8, None, side, "layer")
    point = gemm_point.GemmPoint(side, weight, gemm_point.Product(plain, DType.INT8, 4, 2), None)
    note(gemm_point.Product, "expected")
    note(cpu_dense.CpuDense, "gemm")
    note(lost_contexts, "settle")
    note(lost_contexts, "wait")
    assert point.check(point.algorithms()[0]).ok
    assert order == ["expected", "settle", "gemm", "wait"]


def test_what_crashes_outside_a_check_bars_the_cell_and_no_algorithm(tmp_path: Path, lost: None) -> None:
    """Timing, or a kernel around the GEMM: an algorithm that was checked last is innocent, and the cell would loop."""
    path = tmp_path / "lost.json"
    with pytest.raises(ContextLost), LostContexts.open(path, VERSIONS).cell(Gpu(), DType.INT8, "qkv M=64"):
        raise RuntimeError("illegal address")
    again = LostContexts.open(path, VERSIONS)
    assert again.barred(Gpu(), DType.INT8) == {"qkv M=64"}
    refused = pytest.raises(SlideSparseError, match="crashed the GPU context in an earlier run")
    with refused, again.cell(Gpu(), DType.INT8, "qkv M=64"):
        pytest.fail("ran again")


def test_an_algorithm_that_crashes_bars_itself_not_its_cell(tmp_path: Path, lost: None) -> None:
    losses = LostContexts.open(tmp_path / "lost.json", VERSIONS)
    cell, algorithm = (
        way(Gpu(), DType.INT8, name) for way, name in ((losses.cell, "qkv M=64"), (losses.guard, "36.s1"))
    )
    with pytest.raises(ContextLost), cell, algorithm:
        raise RuntimeError("illegal instruction")
    assert losses.barred(Gpu(), DType.INT8) == {"36.s1"}


def test_a_broken_list_is_named(tmp_path: Path) -> None:
    files.write_json(tmp_path / "lost.json", {"a": 1})
    with pytest.raises(RecordError, match=r"lost.json: not a list"):
        LostContexts.open(tmp_path / "lost.json", VERSIONS)


@pytest.mark.usefixtures("lost")
def test_the_bench_ends_there_and_goes_on_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU backend plays a GPU whose algorithm crashes at the second shape."""
    run = small_run(tmp_path, dtypes=["INT8"])
    genuine, point = cpu_dense.CpuDense.gemm, gemm_point.LostContexts.guard

    def gemm(self, x, weight, algorithm, out):  # type: ignore[no-untyped-def]
        if algorithm.name == "float64" and weight.n == 96:
            raise RuntimeError("CUDA error: an illegal instruction was encountered")
        return genuine(self, x, weight, algorithm, out)

    monkeypatch.setattr(cpu_dense.CpuDense, "gemm", gemm)
    monkeypatch.setattr(gemm_point.LostContexts, "guard", lambda self, side, *rest: point(self, FakeGpu(side), *rest))
    with pytest.raises(ContextLost):
        kernel_bench.run_task(run, task(run, "kernel_dense"))
    done = records.read(run.tree.kernel(MODEL, DType.INT8, Variant("cpu_dense")))
    assert done["layer"].tolist() == ["qkv"], "what was measured is kept"
    outcome = kernel_bench.run_task(run, task(run, "kernel_dense"))
    assert (outcome.ok, outcome.done_before) == (4, 1)
    done = records.read(run.tree.kernel(MODEL, DType.INT8, Variant("cpu_dense")))
    assert done["alg_count"].tolist() == [3, 2, 2, 2]


def test_the_runner_leaves_an_interrupted_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(tmp_path)

    def stage(name: str) -> runner.RunTask:
        def lose(run: object, task: object) -> None:
            raise ContextLost("cusparselt FP16 algorithm 36.s1 crashed the GPU context: illegal instruction")

        return lose  # type: ignore[return-value]

    monkeypatch.setattr(runner, "_stage", stage)
    with pytest.raises(ContextLost):
        runner.run_tasks(run, [task(run, "kernel_dense")])
    entry = next(t for t in files.read_json(run.tree.status)["tasks"] if t["name"] == "kernel_dense")
    assert entry["status"] == "interrupted"
    assert "36.s1" in entry["note"]
