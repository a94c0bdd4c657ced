"""Task 9: whole layers are checked, timed beside dense, recorded, resumed."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from small_runs import MODEL, QUICK, small_run, task

from slidesparse import records
from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import VerificationError
from slidesparse.kernels import cpu_activations, operands
from slidesparse.kernels.linear import W8A8Linear
from slidesparse.measure import kernel_bench, linear_bench
from slidesparse.measure.linear_block import Block
from slidesparse.pattern import Sparsity
from slidesparse.plan import Variant
from slidesparse.run import Run
from slidesparse.tuning import search

LINEAR = {"m": [4, 9], "stopping": QUICK}


def run_in(folder: Path, **changes: object) -> Run:
    return small_run(folder, linear=LINEAR, **changes)


def table(run: Run, dtype: DType = DType.INT8) -> pd.DataFrame:
    return records.read(run.tree.linear(MODEL, dtype))


def test_rows_of_every_pattern_and_size(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    outcome = linear_bench.run_task(run, task(run, "linear"))
    assert (outcome.ok, outcome.failed, outcome.skipped) == (8, 0, 0)
    for dtype in QUANTISED:
        frame = table(run, dtype)
        assert list(zip(frame["sparsity"], frame["M"], strict=True)) == [
            ("2:8", 4), ("2:8", 9), ("2:inf", 4), ("2:inf", 9)
        ]  # fmt: skip
        assert set(frame["verified"]) == {"exact" if dtype is DType.INT8 else "within_bound"}
        assert frame["emulation"].all()
        for column in ("lat_us", "dense_us", "quantise_us", "gemm_us", "dequantise_us"):
            assert (frame[column] > 0).all(), column
        assert (frame["speedup_low"] <= frame["speedup"]).all()
        assert (frame["speedup"] <= frame["speedup_high"]).all()
        assert (frame["reference_us"] == -1).all(), "the yardstick is a GPU's"
        assert frame["layers"].str.contains("qkv 160x96; o 96x96").all()


def test_tuned_algorithms_are_the_ones_that_run(tmp_path: Path) -> None:
    run = run_in(tmp_path, dtypes=["INT8"], tune={"coarse_m": [4], "fine_m": [4], "stopping": QUICK})
    search.run_task(run, task(run, "tune"))
    linear_bench.run_task(run, task(run, "linear"))
    tuned = records.read(run.tree.tune(MODEL, DType.INT8))
    won = tuned[tuned["winner"] & (tuned["operation"] == "sparse_gemm") & (tuned["N"] == 160)]
    assert f"qkv: fused > {won['algorithm'].iloc[0]}" in table(run)["path"].iloc[0] or (
        f"> {won['algorithm'].iloc[0]} >" in table(run)["path"].iloc[0]
    )


def test_a_second_run_does_nothing_and_a_new_winner_measures_again(tmp_path: Path) -> None:
    run = run_in(tmp_path, dtypes=["INT8"])
    linear_bench.run_task(run, task(run, "linear"))
    assert linear_bench.run_task(run, task(run, "linear")).done_before == 4
    search.run_task(run, task(run, "tune"))
    assert linear_bench.run_task(run, task(run, "linear")).done_before == 0


def test_another_reference_pipeline_measures_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is beside it."""
    run = run_in(tmp_path, dtypes=["INT8"])
    linear_bench.run_task(run, task(run, "linear"))
    monkeypatch.setattr(linear_bench, "source_hash", lambda module: f"other {module}")
    assert linear_bench.run_task(run, task(run, "linear")).done_before == 0


def test_a_wrong_layer_fails_its_cells_and_leaves_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = cpu_activations.CpuActivations.dequantise_bias

    def wrong(self, acc, *rest):  # type: ignore[no-untyped-def]
        return genuine(self, acc, *rest) * 1.02

    monkeypatch.setattr(cpu_activations.CpuActivations, "dequantise_bias", wrong)
    run = run_in(tmp_path)
    outcome = linear_bench.run_task(run, task(run, "linear"))
    assert (outcome.ok, outcome.failed) == (0, 8)
    frame = table(run)
    assert set(frame["verified"]) == {"failed"}
    assert frame["reason"].str.contains("qkv, cpu_sparse 2:8.*check failed|qkv, cpu_sparse 2:inf", regex=True).all()
    assert (frame["lat_us"] == -1).all()


def test_a_layer_that_writes_nothing_finds_no_right_result_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch hands out what an equal layer before it has freed; a check has to see that nobody wrote."""
    genuine = W8A8Linear.run

    def run_nothing(self, tokens, choice):  # type: ignore[no-untyped-def]
        right = genuine(self, tokens, choice)
        left = torch.empty_like(right)
        return left if left.isnan().all() else right

    monkeypatch.setattr(W8A8Linear, "run", run_nothing)
    run = run_in(tmp_path, dtypes=["INT8"])
    assert linear_bench.run_task(run, task(run, "linear")).failed == 4
    assert not torch.empty(4).isnan().all(), "afterwards all is as before"


def test_missing_hardware_is_skipped_once_with_its_reason(tmp_path: Path) -> None:
    run = run_in(tmp_path, backends={"dense": ["cublaslt"], "sparse": ["cusparselt"]})
    for _ in range(2):
        outcome = linear_bench.run_task(run, task(run, "linear"))
        assert (outcome.skipped, outcome.status) == (8, "skipped")
    assert len(table(run)) == 4
    assert table(run)["reason"].str.contains("needs an NVIDIA GPU").all()


def test_a_yardstick_that_computes_something_else_is_caught() -> None:
    """It is the best of many algorithms by a quick look: a wrong one would be fast."""
    y = [torch.randn(8, 8, generator=torch.Generator().manual_seed(place)) for place in range(2)]
    linear_bench._compare([y[0] * 1.01, y[1]], y)
    with pytest.raises(VerificationError, match=r"reference pipeline, linear 1: relative L2 error 0\.2"):
        linear_bench._compare([y[0], y[1] * 1.2], y)
    with pytest.raises(VerificationError, match="linear 0"):
        linear_bench._compare([y[0] * float("nan"), y[1]], y)


def test_sets_of_buffers_hold_the_same_numbers_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes a GPU read each set from memory must not change what is computed."""
    monkeypatch.setattr("slidesparse.measure.linear_block.buffer_sets", lambda side, size: 3)
    layers = [
        W8A8Linear(
            "l", operands.random_weight(8, 32, DType.INT8, None, seed), torch.ones(8, 1), None,
            k=32, variant=Variant("cpu_dense"), dtype=DType.INT8,
        )
        for seed in (1, 2)
    ]  # fmt: skip
    tokens = [operands.activation(4, 32, seed) for seed in (3, 4)]
    block = Block(layers, tokens)
    choices = [layer.choices(4)[-1] for layer in layers]
    outputs = [call() for call in block.calls(choices)]
    assert len(outputs) == 3
    for one, two in zip(outputs[0], outputs[2], strict=True):  # type: ignore[call-overload]
        assert torch.equal(one, two)
    pointers = {part.linear.weight.data.data_ptr() for parts in block.sets for part in parts}
    assert len(pointers) == 6


def test_16_bit_and_square_points_are_kernel_points_alone(tmp_path: Path) -> None:
    """On the CPU they are skipped with the reason; square files have published names."""
    kernel = {"m": [4], "float_dtypes": ["BF16"], "square": [64], "stopping": QUICK}
    run = run_in(tmp_path, kernel=kernel)
    outcome = kernel_bench.run_task(run, task(run, "kernel_high"))
    assert (outcome.ok, outcome.skipped) == (8 + 2, 4 + 1)
    square = run.tree.kernel("SQUARE", DType.INT8, Variant("cpu_sparse", Sparsity(8)))
    assert square.name == "alg_search_SQUARE_2_8.csv"
    frame = records.read(square)
    assert frame[["M", "N", "K_model"]].iloc[0].tolist() == [64, 64, 64]
    assert (
        "has no BF16"
        in records.read(run.tree.kernel(MODEL, DType.BF16, Variant("cpu_sparse", Sparsity(8))))["reason"].iloc[0]
    )
