"""Tuning of the fused BitNet kernels: which cells there are, that checks tell wrong results from right ones, that the
linears find what was tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from small_models import BITNET, LLAMA
from small_runs import MODEL, small_run, task

from slidesparse import records
from slidesparse.bench_file import load_bench
from slidesparse.config import Bench
from slidesparse.dtypes import QUANTISED, DType
from slidesparse.kernels import bitnet_reference, operands
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.kernels.cpu_activations import CpuActivations
from slidesparse.kernels.cpu_dense import CpuDense
from slidesparse.kernels.linear import Recipe
from slidesparse.kernels.verify_normed import STEPS, ExpectedNormed
from slidesparse.measure.clocks import clock_of
from slidesparse.pattern import Sparsity
from slidesparse.plan import FUSED_BEFORE, Plan, TuneCell, Variant
from slidesparse.run import Run
from slidesparse.tuning import search
from slidesparse.tuning import store as store_module
from slidesparse.tuning.candidates import FUSED, Workbench
from slidesparse.tuning.store import TuningStore

ROOT = Path(__file__).parents[1]
OPERATIONS: tuple[BitNetOperation, ...] = ("norm", "add", "gate")
DENSE, SPARSE = Variant("cpu_dense"), Variant("cpu_sparse", Sparsity(8))


def fused_cells(plan: Plan) -> list[TuneCell]:
    tune = next(task for task in plan.tasks if task.name == "tune")
    return [cell for cell in tune.cells if isinstance(cell, TuneCell) and cell.operation in FUSED]


# -- cells -------------------------------------------------------------------------------------------


def test_plan_and_look_up_name_the_same_operations() -> None:
    assert {name for dense, lifting, _ in FUSED_BEFORE for name in (dense, lifting)} == set(FUSED)
    assert [FUSED[dense] for dense, *_ in FUSED_BEFORE] == list(OPERATIONS)


def test_cells_of_the_reference_run() -> None:
    """Three operations, dense and four patterns, ten M, two types; K of what each stands before."""
    plan = Plan(load_bench(ROOT / "bench.yaml"), "bitnet-2b", Path())
    cells = fused_cells(plan)
    assert len(cells) == len(set(cells)) == 3 * 5 * 10 * 2
    assert len(plan.stage_tasks("tune")[0].cells) == 760 + 320 + 300
    assert {(FUSED[cell.operation], cell.k) for cell in cells} == {("norm", 2560), ("add", 2560), ("gate", 6912)}
    assert {cell.m for cell in cells} == set(plan.profile.tune.fine_m)
    for cell in cells:
        assert cell.operation.endswith("_lift") == (cell.variant.sparsity is not None)


def plan_of(run: Run, config: dict[str, Any]) -> Plan:
    """The plan of a run with another model of the same name."""
    model = {MODEL: {"quantization": "bitnet_ternary", "config": config}}
    profiles = {"test": run.plan.profile.model_dump()}
    return Plan(Bench.model_validate({"version": 1, "models": model, "profiles": profiles}), "test", Path())


def test_none_where_nothing_would_run_them(tmp_path: Path) -> None:
    in_vllm = small_run(tmp_path, engine="vllm")
    assert fused_cells(plan_of(in_vllm, BITNET))
    assert not fused_cells(plan_of(in_vllm, LLAMA))
    assert not fused_cells(small_run(tmp_path, engine="transformers").plan)


def test_heads_that_do_not_fill_the_hidden_size_and_ranks_that_split_k(tmp_path: Path) -> None:
    """The sub-norm is over heads * head_dim, the first norm of a model over the hidden size."""

    def sizes(**changes: Any) -> set[tuple[str, int]]:
        plan = plan_of(small_run(tmp_path, engine="vllm", **changes), BITNET | {"head_dim": 64})
        return {(FUSED[cell.operation], cell.k) for cell in fused_cells(plan)}

    assert sizes() == {("norm", 96), ("norm", 192), ("add", 96), ("gate", 176)}
    assert sizes(vllm={"tensor_parallel_size": 2}) == {("norm", 96), ("add", 96)}, "o and down are not fused there"


def test_backends_that_share_kernels_add_no_cells(tmp_path: Path) -> None:
    one = small_run(tmp_path, engine="vllm")
    two = small_run(
        tmp_path, engine="vllm", backends={"dense": ["cpu_dense", "cublaslt"], "sparse": ["cpu_sparse", "cusparselt"]}
    )
    assert fused_cells(one.plan) == fused_cells(two.plan)


# -- checks ------------------------------------------------------------------------------------------

M, K = 400, 1280


def operands_of(before: BitNetOperation) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    x = operands.activation(M, 2 * K if before == "gate" else K, 3)
    x[-1] = 0
    return x, operands.activation(M, K, 4) if before == "add" else None, 1 + operands.activation(1, K, 5)[0] / 4


def result(
    before: BitNetOperation, dtype: DType, sparsity: Sparsity | None, steps: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A kernel's, whose r is so many float32 steps beside the reference's."""
    x, residual, weight = operands_of(before)
    t = bitnet_reference.squared_relu_gate(x) if before == "gate" else x if residual is None else x + residual
    inverse = (bitnet_reference.inverse_rms(t, 1e-5).view(torch.int32) + steps).view(torch.float32)
    y = bitnet_reference.normalise(t, inverse, weight)
    codes, scale = bitnet_reference.quantise_lift(y, dtype, sparsity)
    return codes, scale, t if before == "add" else None


def expected(before: BitNetOperation, dtype: DType, sparsity: Sparsity | None) -> ExpectedNormed:
    x, residual, weight = operands_of(before)
    return ExpectedNormed(before, x, residual, weight, 1e-5, dtype, sparsity)


@pytest.mark.parametrize("sparsity", [None, Sparsity(8)], ids=str)
@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("before", OPERATIONS)
def test_a_right_result_passes_and_another_root_within_reach(
    before: BitNetOperation, dtype: DType, sparsity: Sparsity | None
) -> None:
    oracle = expected(before, dtype, sparsity)
    assert oracle.check(*result(before, dtype, sparsity)).verified == "exact"
    near = oracle.check(*result(before, dtype, sparsity, STEPS))
    assert near.verified == "within_bound"
    assert "rows with 1/rms up to" in near.text
    assert oracle.check(*result(before, dtype, sparsity, 1 << 11)).verified == "failed"


Fault = Literal["one code", "one byte of padding", "scale", "scale of zeros", "NaN scale"]


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("fault", ["one code", "one byte of padding", "scale", "scale of zeros", "NaN scale"])
def test_one_wrong_value_is_seen(fault: Fault, dtype: DType) -> None:
    """By as little as possible: what bounds on each code by itself would let pass."""
    codes, scale, _ = result("norm", dtype, Sparsity(10))
    if fault == "one code":
        codes.view(torch.int8)[3, 5] += 1
    elif fault == "one byte of padding":
        assert Sparsity(6).lifted_k(K) * 6 > 8 * K, "lifted rows end in padding"
        codes, scale, _ = result("norm", dtype, Sparsity(6))
        codes.view(torch.int8)[3, -1] = 1
    elif fault == "NaN scale":
        scale[3] = float("nan")
    else:
        row = -1 if fault == "scale of zeros" else 3
        scale[row] = torch.nextafter(scale[row], torch.tensor(1.0))
    seen = expected("norm", dtype, Sparsity(6) if fault == "one byte of padding" else Sparsity(10)).check(
        codes, scale, None
    )
    assert seen.verified == "failed"
    assert f"1 of {M} rows" in seen.text


def test_a_wrong_sum_is_seen_and_minus_zero_is_zero() -> None:
    codes, scale, total = result("add", DType.FP8, None)
    assert total is not None
    zeros = codes.view(torch.uint8)
    zeros[zeros == 0] = 0x80
    assert expected("add", DType.FP8, None).check(codes, scale, total).verified == "exact"
    total[2, 7] += 1
    assert "x + residual: 1 of" in expected("add", DType.FP8, None).check(codes, scale, total).text


# -- search ------------------------------------------------------------------------------------------


def test_linears_find_what_was_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(tmp_path, engine="vllm")
    outcome = search.run_task(run, task(run, "tune"))
    assert (outcome.ok, outcome.failed, outcome.skipped) == (len(task(run, "tune").cells), 0, 0)
    for dtype in QUANTISED:
        frame = records.read(run.tree.tune(MODEL, dtype))
        fused = frame[frame["operation"].isin(FUSED)]
        assert len(fused) == 3 * 2
        assert fused["winner"].all()
        assert set(fused["verified"]) == {"exact"}
        at = fused.set_index("operation")
        for operation, before in FUSED.items():
            k = 176 if before == "gate" else 96
            sparsity = Sparsity(8) if operation.endswith("_lift") else None
            moved = bitnet_reference.floor_bytes(before, 2, k, sparsity)
            assert (at.loc[operation, "bytes_moved"], at.loc[operation, "K"]) == (moved, k)
            assert at.loc[operation, "path"] == "cpu_bitnet torch"

    def counted(variant: Variant, before: BitNetOperation, m: int) -> dict[str, int]:
        """Look-ups for a linear whose N was not tuned: that of the fused kernel is the only one that can hit."""
        store = TuningStore.open(run.tree.tuning_store)
        k = 176 if before == "gate" else 96
        operand_k = k if variant.sparsity is None else variant.sparsity.lifted_k(k)
        Recipe(variant, DType.INT8, 64, k, operand_k, store).choices(m, False, before)
        return dict(store.counts)

    for variant in (DENSE, SPARSE):
        for before in OPERATIONS:
            assert counted(variant, before, 2) == {"hits": 1, "nearest": 2}
            assert counted(variant, before, 16) == {"nearest": 3}
    assert counted(Variant("cpu_sparse", Sparsity(6)), "add", 2) == {"missed": 2, "nearest": 1}
    genuine = store_module.own_revision
    monkeypatch.setattr(
        store_module, "own_revision", lambda family: "edited" if "bitnet" in family else genuine(family)
    )
    assert counted(SPARSE, "add", 2) == {"stale": 1, "nearest": 2}
    again = search.run_task(run, task(run, "tune"))
    assert again.ok - again.done_before == 3 * 2 * 2, "the fused kernels, and nothing else"


def test_kernels_that_write_nothing_or_another_sum_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that were written before hold the right result: those of a check do not."""
    genuine = CpuActivations.encoder

    def encoder(self: CpuActivations, before: BitNetOperation | None, *rest: Any) -> Any:
        kernel = genuine(self, before, *rest)

        def run(x: Any, residual: Any, weight: Any, eps: float, codes: torch.Tensor, scale: torch.Tensor) -> Any:
            if before == "norm":
                return None
            if before == "gate":
                kept = codes.clone()
                kernel(x, residual, weight, eps, codes, scale)
                codes[:, -1] = kept[:, -1]
                return None
            return 2 * kernel(x, residual, weight, eps, codes, scale)

        return run

    monkeypatch.setattr(CpuActivations, "encoder", encoder)
    run = small_run(tmp_path, engine="vllm", dtypes=["INT8"])
    assert search.run_task(run, task(run, "tune")).failed == 6
    frame = records.read(run.tree.tune(MODEL, DType.INT8))
    fused = frame[frame["operation"].isin(FUSED)]
    assert set(fused["status"]) == set(fused["verified"]) == {"failed"}
    assert not fused["winner"].any()
    assert fused[fused["operation"].str.startswith("add")]["reason"].str.contains("x \\+ residual").all()


# -- the kernels -------------------------------------------------------------------------------------


class Triton(CpuDense):
    """The Triton kernels where this machine runs them: in the interpreter, or on a GPU."""

    def __init__(self) -> None:
        from slidesparse.kernels.gpu_activations import TritonActivations

        self.device = "cuda" if torch.cuda.is_available() else "cpu"  # type: ignore[misc, assignment]
        self.activations = TritonActivations()


def triton_cell(operation: Any, dtype: DType, m: int = 5, k: int = 164) -> TuneCell:
    variant = Variant("cusparselt", Sparsity(8)) if operation.endswith("_lift") else Variant("cublaslt")
    return TuneCell("Tiny", dtype, "fine", operation, variant, m, 0, k)


@pytest.mark.parametrize("operation", list(FUSED))
@pytest.mark.parametrize("dtype", QUANTISED)
def test_every_launch_passes_its_check(operation: str, dtype: DType) -> None:
    triton_bitnet = pytest.importorskip("slidesparse.kernels.triton_bitnet")
    if dtype is DType.FP8 and not torch.cuda.is_available():
        pytest.skip("float32 to e4m3 is off in Triton's interpreter")
    found = Workbench(Triton(), dtype, 1).candidates(triton_cell(operation, dtype))
    assert len(found) == len(triton_bitnet.launches(164)) >= 8
    for candidate in found:
        check = candidate.check()
        assert check.ok, (candidate.path, check.text)


@pytest.mark.gpu
@pytest.mark.parametrize("operation", list(FUSED))
def test_launches_and_the_copy_beside_them_are_timed(operation: str) -> None:
    side, cell = Triton(), triton_cell(operation, DType.INT8, 64, 2560)
    bench, clock = Workbench(side, DType.INT8, 1), clock_of(side)
    calls = [clock.prepare(candidate.calls, brief=True) for candidate in bench.candidates(cell)]
    calls.append(clock.prepare(bench.copy_calls(cell, clock)))
    assert all(seconds > 0 for seconds in clock.times(calls))


def test_candidates_compile_in_reasonable_time_and_long_rows_have_some() -> None:
    """Unrolled accesses are what compiling takes long for."""
    triton_bitnet = pytest.importorskip("slidesparse.kernels.triton_bitnet")
    for k in (4, 2560, 6912, 28672, 65536):
        known = triton_bitnet.launches(k)
        assert known
        assert all(-(-k // (4 * launch.words)) <= triton_bitnet.MOST_TILES for launch in known)
