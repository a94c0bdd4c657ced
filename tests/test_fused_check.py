"""What doctor says of our own GEMM on a GPU that nobody has tried it on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gemm_doubles import FusedDouble
from small_runs import MACHINE

from slidesparse import surroundings
from slidesparse.dtypes import QUANTISED, DType
from slidesparse.machine import Gpu
from slidesparse.measure import fused_check

MACHINE_HERE = replace(MACHINE, gpu=Gpu("NVIDIA L40", (8, 9), 0, ""))


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> FusedDouble:
    double = FusedDouble()
    monkeypatch.setattr(fused_check, "backend", lambda name: double)
    monkeypatch.setattr(surroundings, "require", lambda name, machine, dtype: None)
    return double


@pytest.mark.parametrize("dtype", QUANTISED)
def test_every_algorithm_is_run_at_every_size(fused: FusedDouble, dtype: DType) -> None:
    assert fused_check.problem_here(dtype) == ""
    each = len(fused.scaled_algorithms(dtype, 1, 8, 32, False))
    products = len(fused_check.SIZES) * each * (1 if dtype is DType.INT8 else 2)  # FP8 also on signs
    assert len(fused.rows) == products
    assert set(fused.rows) == {m for m, _, _ in fused_check.SIZES}


@pytest.mark.parametrize("dtype", QUANTISED)
def test_a_wrong_kernel_is_named(fused: FusedDouble, dtype: DType) -> None:
    wrong = fused.scaled_algorithms(dtype, 1, 8, 32, False)[-1].name
    fused.off[wrong] = 0.5
    said = surroundings._backend_problem("fused", MACHINE_HERE, dtype)
    assert said.startswith(f"wrong on this GPU: {wrong} at M=")
    assert "\n" not in said


def test_a_kernel_that_crashes_is_one_line(fused: FusedDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*given: object) -> None:
        raise RuntimeError("CUDA error: an illegal instruction was encountered\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(fused, "gemm_scaled", crash)
    said = surroundings._backend_problem("fused", MACHINE_HERE, DType.INT8)
    assert said == "cannot be run on this GPU: CUDA error: an illegal instruction was encountered"


def test_other_backends_are_not_run(fused: FusedDouble) -> None:
    assert surroundings._backend_problem("cusparselt", MACHINE_HERE, DType.INT8) == ""
    assert not fused.rows
