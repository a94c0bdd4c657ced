"""GEMMs with their epilogue, on the CPU: checked with their scales, beside rivals that do the same work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gemm_doubles import CutlassDouble, FusedDouble, scaled_product
from small_runs import MODEL, small_run, task

from slidesparse import records
from slidesparse.dtypes import QUANTISED, DType
from slidesparse.kernels import backend as backends
from slidesparse.kernels import cutlass, operands
from slidesparse.kernels.backend import Backend
from slidesparse.kernels.cpu_sparse import CpuSparse
from slidesparse.kernels.reference import dequantise_bias
from slidesparse.measure import kernel_bench, linear_bench
from slidesparse.measure.gemm_point import LayerWeight, Product
from slidesparse.measure.scaled_point import ScaledPoint, TwoKernelPoint, point_of, whole_point
from slidesparse.pattern import Sparsity
from slidesparse.plan import Variant
from slidesparse.tuning import search

PATTERN = Sparsity(8)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> FusedDouble:
    """Stands for backend `fused`; `cutlass` is vLLM's operator in plain PyTorch, for which this machine is one."""
    double, genuine = FusedDouble(), backends.backend
    monkeypatch.setattr(cutlass, "_scaled_product", lambda: scaled_product)
    monkeypatch.setattr(CutlassDouble, "require", lambda self, machine, dtype: None)
    stand_ins: dict[str, Backend] = {"fused": double, "cutlass": CutlassDouble()}
    for module in (backends, kernel_bench, linear_bench, search):
        monkeypatch.setattr(module, "backend", lambda name: stand_ins.get(name) or genuine(name))
    monkeypatch.setattr("slidesparse.kernels.linear.backend", lambda name: stand_ins.get(name) or genuine(name))
    return double


def weight_of(side: Backend, dtype: DType, sparsity: Sparsity | None = PATTERN) -> LayerWeight:
    plain = operands.random_weight(48, 96, dtype, PATTERN, 3)
    return LayerWeight.pack(plain, "random", dtype, sparsity, side, "w")


@pytest.mark.parametrize("dtype", QUANTISED)
def test_a_fused_gemm_is_checked_with_its_scales(fused: FusedDouble, dtype: DType) -> None:
    weight = weight_of(fused, dtype)
    point = point_of(fused, weight, Product(weight.plain, dtype, 5, 1), PATTERN)
    assert isinstance(point, ScaledPoint)
    for algorithm in point.algorithms():
        check = point.check(algorithm)
        assert check.verified == ("exact" if dtype is DType.INT8 else "within_bound"), check.text
        assert point.path(algorithm).endswith("scales fused")
    wrong = point.algorithms()[1]
    fused.off[wrong.name] = 0.05
    assert not point.check(wrong).ok
    assert not point.check(wrong, figures=False).ok


@pytest.mark.parametrize("dtype", QUANTISED)
def test_two_kernels_give_the_same(fused: FusedDouble, dtype: DType) -> None:
    side = CpuSparse()
    weight = weight_of(side, dtype)
    product = Product(weight.plain, dtype, 5, 1)
    point = whole_point(side, weight, product, PATTERN)
    assert isinstance(point, TwoKernelPoint)
    algorithm = point.algorithms()[0]
    assert point.check(algorithm).ok
    got = point.calls(algorithm)[0]()
    exact = dequantise_bias(product.codes.double() @ weight.plain.double().T, *product.scales, None)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got, exact, rtol=0.01, atol=0)


def test_an_epilogue_of_another_order_is_right_within_one_rounding(fused: FusedDouble) -> None:
    side = CutlassDouble()
    weight = weight_of(side, DType.INT8, None)
    point = whole_point(side, weight, Product(weight.plain, DType.INT8, 5, 1), None)
    assert isinstance(point, ScaledPoint)
    assert point.check(point.algorithms()[0]).verified == "within_bound"


def test_the_kernel_bench_times_it_beside_whole_rivals(tmp_path: Path, fused: FusedDouble) -> None:
    run = small_run(tmp_path, backends={"dense": ["cpu_dense"], "sparse": ["fused", "cpu_sparse"]})
    outcome = kernel_bench.run_task(run, task(run, "kernel_high"))
    assert (outcome.ok, outcome.failed) == (16, 0)
    for dtype in QUANTISED:
        frame = records.read(run.tree.kernel(MODEL, dtype, Variant("fused", PATTERN)))
        assert frame["path"].str.endswith("scales fused").all()
        assert (frame["dense_us"] > 0).all()
        assert frame["dense_path"].str.contains("dequantise|scales fused").all(), "the epilogue is in both"
        assert frame["two_kernels_path"].str.match("cpu_sparse .* > dequantise").all()
        assert (frame["over_two_kernels_low"] <= frame["over_two_kernels"]).all()
        other = records.read(run.tree.kernel(MODEL, dtype, Variant("cpu_sparse", PATTERN)))
        assert (other["two_kernels_us"] == -1).all()


def test_tuning_and_whole_linears_take_it(tmp_path: Path, fused: FusedDouble) -> None:
    quick = {"warmup_s": 0, "min_samples": 2, "max_samples": 3, "ci_rel": 0.5, "cap_s": 0.05}
    both = {"dense": ["cpu_dense"], "sparse": ["cpu_sparse", "fused"]}
    run = small_run(tmp_path, dtypes=["INT8"], backends=both, linear={"m": [2, 3], "stopping": quick})
    tuned = search.run_task(run, task(run, "tune"))
    assert tuned.failed == tuned.skipped == 0
    frame = records.read(run.tree.tune(MODEL, DType.INT8))
    own = frame[frame["backend"] == "fused"]
    assert set(own["operation"]) == {"sparse_gemm"}, "the kernels around GEMMs are shared"
    assert own["winner"].sum() == 4
    outcome = linear_bench.run_task(run, task(run, "linear"))
    assert outcome.failed == 0, outcome
    rows = records.read(run.tree.linear(MODEL, DType.INT8))
    rows = rows[rows["backend"] == "fused"]
    assert set(rows["verified"]) == {"exact"}
    assert rows["path"].str.contains("scales and bias fused").all()
    assert (rows["gemm_us"] > 0).all()
    assert (rows["dequantise_us"] == -1).all(), "there is no such step"
