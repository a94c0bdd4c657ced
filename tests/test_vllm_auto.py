"""Backend `auto`: what is measured when weights are loaded, what counts, what is chosen and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from gemm_doubles import CutlassDouble, Double, FusedDouble, scaled_product
from small_runs import MACHINE

from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import SlideSparseError, UnsupportedHere
from slidesparse.kernels import bitnet_reference, cutlass, operands, verify
from slidesparse.kernels.cpu_activations import CpuActivations
from slidesparse.machine import Gpu
from slidesparse.measure.timer import Call
from slidesparse.pattern import Sparsity
from slidesparse.plan import Variant
from slidesparse.vllm_plugin import auto, linear_op
from slidesparse.vllm_plugin.auto import ROUNDS, Auto
from slidesparse.vllm_plugin.kinds import Plan
from slidesparse.vllm_plugin.linear_op import Prepared

N, K, EPS = 48, 64, 1e-5
CUBLASLT, CUTLASS, SPARSE = Variant("cublaslt"), Variant("cutlass"), Variant("cusparselt", Sparsity(8))
DENSE = CUBLASLT, CUTLASS
FUSED = Variant("fused", Sparsity(8))
Times = Callable[[str, int], float]
"""Microseconds of a backend at M."""


class Scripted:
    """A clock that shows what the test says."""

    batch = 1

    def __init__(self, us: Times) -> None:
        self.us = us
        self.rounds: list[list[tuple[str, int]]] = []

    def now(self) -> float:
        return 0.0

    def prepare(self, calls: Sequence[Call], brief: bool = False) -> Call:
        assert isinstance(calls[0], partial)
        plan = calls[0].func.__self__  # type: ignore[attr-defined]
        assert isinstance(plan, Plan)
        self.us(plan.way.recipe.backend.name, plan.size)  # may refuse
        return calls[0]

    def times(self, calls: Sequence[Call]) -> list[float]:
        plans = [call.func.__self__ for call in calls]  # type: ignore[attr-defined]
        self.rounds.append([(plan.way.recipe.backend.name, plan.size) for plan in plans])
        return [self.us(name, size) * 1e-6 for name, size in self.rounds[-1]]


@pytest.fixture(autouse=True)
def doubles(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {
        "cublaslt": Double("cublaslt", False),
        "cusparselt": Double("cusparselt", True),
        "fused": FusedDouble(),
        "cutlass": CutlassDouble(),
    }
    monkeypatch.setattr("slidesparse.kernels.linear.backend", found.__getitem__)
    monkeypatch.setattr(auto, "backend", found.__getitem__)
    monkeypatch.setattr(cutlass, "_scaled_product", lambda: scaled_product)
    monkeypatch.setattr(linear_op, "_KINDS", {})
    return found


def codes_of(dtype: DType, sparsity: Sparsity | None, seed: int = 5) -> torch.Tensor:
    return operands.random_weight(N, K, dtype, sparsity, seed)


def prepared(
    variants: tuple[Variant, ...],
    us: Times,
    sizes: tuple[int, ...] = (16, 64, 256),
    dtype: DType = DType.INT8,
    before: Any = None,
    layer: str = "model.layers.0.mlp.down_proj",
    settings: Auto | None = None,
) -> Prepared:
    sparsity = next((variant.sparsity for variant in variants if variant.sparsity), None)
    scale = torch.rand(N, 1, generator=torch.Generator().manual_seed(5)) / 50 + 0.01
    settings = settings or Auto(variants, sizes, Scripted(us))
    return linear_op.prepare(
        layer, codes_of(dtype, sparsity), scale, Variant("auto", sparsity), dtype, None, settings, before
    )


def run(x: torch.Tensor, ready: Prepared) -> torch.Tensor:
    y: torch.Tensor = torch.ops.slidesparse.linear(x, ready.weight, ready.scale, None, ready.kind)
    return y


def ran(ready: Prepared) -> dict[int, str]:
    """Bucket -> name of what ran."""
    paths = linear_op.paths()[ready.kind]
    return {int(path.split(":")[0][2:]): path.split(": ")[1] for path in paths}


def cublaslt_is_faster_below_64(name: str, m: int) -> float:
    return 10.0 if (name == "cublaslt") == (m < 64) else 20.0


# -- choice ------------------------------------------------------------------------------------------


def test_each_bucket_runs_the_fastest_and_the_path_names_it() -> None:
    ready = prepared(DENSE, cublaslt_is_faster_below_64)
    for m in (3, 60, 256):
        run(operands.activation(m, K, 1), ready)
    assert ready.kind == f"auto INT8 {N}x{K}"
    assert linear_op.paths()[ready.kind] == {
        "M=16: cublaslt: quantise fused > int_mm > fused": 1,
        "M=64: cutlass: quantise fused > cutlass_scaled_mm (scales and bias fused)": 1,
        "M=256: cutlass: quantise fused > cutlass_scaled_mm (scales and bias fused)": 1,
    }


@pytest.mark.parametrize(("m", "expected"), [(16, "cublaslt"), (23, "cublaslt"), (48, "cutlass"), (1000, "cutlass")])
def test_a_bucket_that_was_not_measured_goes_by_the_nearest_ratio(m: int, expected: str) -> None:
    """Of 16 and 100 (bucket 112), 48 is nearer to 112: 2.33 against 3."""
    ready = prepared(DENSE, cublaslt_is_faster_below_64, sizes=(16, 100))
    run(operands.activation(m, K, 1), ready)
    assert list(ran(ready).values()) == [expected]


def test_all_that_was_measured_can_be_asked_for_the_fastest_first() -> None:
    ready = prepared(DENSE, cublaslt_is_faster_below_64, sizes=(16, 64))
    found = linear_op.measured()[ready.kind]
    assert found == {
        "M=16": {"cublaslt": pytest.approx(10), "cutlass": pytest.approx(20)},
        "M=64": {"cutlass": pytest.approx(10), "cublaslt": pytest.approx(20)},
    }
    assert [next(iter(of)) for of in found.values()] == ["cublaslt", "cutlass"]


def test_models_are_built_under_another_default_type() -> None:
    """vLLM loads weights with bfloat16 as torch's default, in which row 511 is row 512."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        ready = prepared(DENSE, cublaslt_is_faster_below_64, sizes=(512,))
    finally:
        torch.set_default_dtype(before)
    assert linear_op.measured()[ready.kind] == {
        "M=512": {"cutlass": pytest.approx(10), "cublaslt": pytest.approx(20)},
    }


def test_sizes_of_one_bucket_are_measured_once_and_layers_of_one_kind_too() -> None:
    settings = Auto(DENSE, (1, 2, 4, 8, 16, 17), clock := Scripted(cublaslt_is_faster_below_64))
    one = prepared(DENSE, clock.us, settings=settings)
    rounds = len(clock.rounds)
    assert rounds == 2 * (1 + ROUNDS), "two buckets, each with a round to warm up"
    two = prepared(DENSE, clock.us, settings=settings, layer="model.layers.1.mlp.down_proj")
    assert (one.kind, len(clock.rounds)) == (two.kind, rounds)
    prepared(DENSE, clock.us, settings=Auto(DENSE, (16,), clock))
    assert len(clock.rounds) > rounds, "other settings: another model has taken the process over"


def test_candidates_are_timed_in_turns_and_an_outlier_changes_nothing() -> None:
    calls: list[str] = []

    def us(name: str, m: int) -> float:
        calls.append(name)
        return 1e6 if calls.count(name) % 4 == 1 else (10.0 if name == "cutlass" else 20.0)  # 2 or 3 of 8 are huge

    clock = Scripted(us)
    ready = prepared(DENSE, us, settings=Auto(DENSE, (16,), clock))
    assert all(sorted(name for name, _ in turn) == ["cublaslt", "cutlass"] for turn in clock.rounds)
    assert len({turn[0] for turn in clock.rounds}) == 2, "either comes first in some rounds"
    assert next(iter(linear_op.measured()[ready.kind]["M=16"])) == "cutlass"


# -- what counts -------------------------------------------------------------------------------------


def test_what_is_wrong_does_not_count_however_fast(doubles: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: Any) -> None:
        scaled_product(*given)
        given[0][:, 1] *= 1.02

    monkeypatch.setattr(cutlass, "_scaled_product", lambda: wrong)
    ready = prepared(DENSE, lambda name, m: 1.0 if name == "cutlass" else 9.0, sizes=(16,))
    found = linear_op.measured()[ready.kind]["M=16"]
    assert found["cublaslt"] == pytest.approx(9)
    assert "check failed" in str(found["cutlass"])
    run(operands.activation(5, K, 1), ready)
    assert ran(ready) == {16: "cublaslt"}


def test_rows_that_a_kernel_leaves_out_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def lazy(out: torch.Tensor, *given: Any) -> None:
        whole = torch.empty_like(out)
        scaled_product(whole, *given)
        out[: out.shape[0] // 2] = whole[: out.shape[0] // 2]

    monkeypatch.setattr(cutlass, "_scaled_product", lambda: lazy)
    ready = prepared(DENSE, lambda name, m: 1.0 if name == "cutlass" else 9.0, sizes=(64,))
    assert "check failed" in str(linear_op.measured()[ready.kind]["M=64"]["cutlass"])


def test_a_fused_kernel_that_disagrees_does_not_count(doubles: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """GEMM and epilogue are right; what stands before them is not."""

    class Wrong(CpuActivations):
        def encoder(self, before: Any, *rest: Any) -> Any:
            genuine = super().encoder(before, *rest)

            def run(x: torch.Tensor, residual: Any, weight: Any, *other: Any) -> Any:
                return genuine(x, residual, None if weight is None else weight * 1.03, *other)

            return run

    monkeypatch.setattr(doubles["cutlass"], "activations", Wrong())
    us: Times = lambda name, m: 1.0 if name == "cutlass" else 9.0  # noqa: E731
    ready = prepared(DENSE, us, sizes=(16,), before="norm")
    found = linear_op.measured()[ready.kind]["M=16"]
    assert "relative L2 difference" in str(found["cutlass"])
    assert next(iter(found)) == "cublaslt"


def test_nothing_right_is_an_error_with_the_layer_and_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutlass, "_scaled_product", lambda: lambda out, *given: out.zero_())
    with pytest.raises(SlideSparseError) as error:
        prepared((CUTLASS,), lambda name, m: 1.0)
    text = str(error.value)
    assert text.startswith("model.layers.0.mlp.down_proj: backend auto found nothing that is right: cutlass: check")
    assert "\n" not in text
    assert linear_op.layers() == {}


def test_a_size_without_memory_is_left_to_its_neighbours() -> None:
    def us(name: str, m: int) -> float:
        if m == 256:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB\nmore of it")
        return cublaslt_is_faster_below_64(name, m)

    ready = prepared(DENSE, us)
    found = linear_op.measured()[ready.kind]["M=256"]
    assert found == dict.fromkeys(("cublaslt", "cutlass"), "CUDA out of memory. Tried to allocate 8 GiB")
    run(operands.activation(256, K, 1), ready)
    assert ran(ready) == {256: "cutlass"}, "as at 64"


def test_a_backend_that_has_no_such_shape_does_not_count() -> None:
    scale = torch.ones(40, 1)
    settings = Auto(DENSE, (16,), Scripted(lambda name, m: 1.0))
    codes = operands.random_weight(40, K, DType.INT8, None, 1)
    ready = linear_op.prepare("layer", codes, scale, Variant("auto"), DType.INT8, None, settings)
    assert "no algorithm" in str(linear_op.measured()[ready.kind]["M=16"]["cutlass"])


# -- weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("winner", ["cusparselt", "cublaslt", "cutlass"])
@pytest.mark.parametrize("before", [None, "add", "gate"])
def test_every_choice_of_a_sparse_layer_gives_its_values(
    winner: str, dtype: DType, before: Any, doubles: dict[str, Any]
) -> None:
    ready = prepared((SPARSE, *DENSE), lambda name, m: 1.0 if name == winner else 2.0, dtype=dtype, before=before)
    side = doubles[winner]
    error, _ = side.accumulation_error(dtype, Sparsity(8).lifted_k(K))
    codes = codes_of(dtype, Sparsity(8))
    norm = torch.ones(K, dtype=torch.bfloat16)
    for m in (5, 64):
        x = operands.activation(m, 2 * K if before == "gate" else K, 1)
        rest = norm, EPS, ready.weight, ready.scale, None, ready.kind
        if before is None:
            y, t = run(x, ready), x
        elif before == "add":
            y, t = torch.ops.slidesparse.add_norm_linear(x, x, *rest)
            t = bitnet_reference.normalise(t, bitnet_reference.inverse_rms(t, EPS), norm)
        else:
            y, t = torch.ops.slidesparse.gate_norm_linear(x, *rest), bitnet_reference.squared_relu_gate(x)
            t = bitnet_reference.normalise(t, bitnet_reference.inverse_rms(t, EPS), norm)
        check = verify.check_linear(t, y, codes, ready.scale, None, dtype, error, exact=side.exact_epilogue)
        assert check.ok, check.text
    assert {name.split(" ")[0] for name in ran(ready).values()} == {winner}
    assert ready.kind == f"auto 2:8 {dtype.value} {N}x{K}"


def test_the_operand_is_the_same_whatever_wins() -> None:
    """vLLM keeps compiled graphs from start to start, and they know its size."""
    first = prepared((SPARSE, *DENSE), lambda name, m: 1.0 if name == "cusparselt" else 2.0)
    second = prepared((SPARSE, *DENSE), lambda name, m: 2.0 if name == "cusparselt" else 1.0)
    assert torch.equal(first.weight, second.weight)
    lifted, dense = N * Sparsity(8).lifted_k(K), N * K
    assert first.weight.numel() == -(-lifted // 256) * 256 + -(-dense // 256) * 256, "dense backends share their codes"


def test_dense_backends_share_one_weight_as_it_is() -> None:
    ready = prepared(DENSE, cublaslt_is_faster_below_64)
    assert torch.equal(ready.weight, codes_of(DType.INT8, None))


def test_the_operator_keeps_to_torchs_rules() -> None:
    ready = prepared((SPARSE, *DENSE), lambda name, m: 1.0 if name == "cusparselt" else 2.0)
    x = operands.activation(9, K, 1)
    torch.library.opcheck(torch.ops.slidesparse.linear.default, (x, ready.weight, ready.scale, None, ready.kind))


def test_the_recipe_of_a_size_can_be_asked_for() -> None:
    ready = prepared((SPARSE, *DENSE), lambda name, m: m if name == "cusparselt" else 60.0)
    assert linear_op.recipe_at(ready.kind, 5).variant == SPARSE
    assert linear_op.recipe_at(ready.kind, 256).variant in DENSE
    assert linear_op.paths()[ready.kind] == {}


# -- what is at hand ---------------------------------------------------------------------------------


def test_what_is_chosen_from(doubles: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sparsity = Sparsity(8)
    assert auto.at_hand(None, True, DType.INT8, MACHINE) == (list(DENSE), [])
    assert auto.at_hand(sparsity, True, DType.INT8, MACHINE) == ([FUSED, SPARSE, *DENSE], [])
    assert auto.at_hand(sparsity, False, DType.INT8, MACHINE) == ([FUSED, SPARSE], [])

    def missing(name: str) -> Any:
        def refuse(*given: Any) -> None:
            raise UnsupportedHere(f"{name} is not here")

        return refuse

    ada = replace(MACHINE, gpu=Gpu("NVIDIA L40", (8, 9), 0, ""))
    refused = ["backend fused is not verified on this GPU: tune with it first, and give the winners"]
    assert auto.at_hand(sparsity, False, DType.INT8, ada) == ([SPARSE], refused)
    assert auto.at_hand(sparsity, False, DType.INT8, ada, {"fused"}) == ([FUSED, SPARSE], [])
    monkeypatch.setattr(doubles["fused"], "require", missing("fused"))
    assert auto.at_hand(sparsity, False, DType.INT8, MACHINE) == ([SPARSE], ["fused is not here"])
    monkeypatch.setattr(doubles["cutlass"], "require", missing("cutlass"))
    assert auto.at_hand(None, True, DType.INT8, MACHINE) == ([CUBLASLT], ["cutlass is not here"])
    monkeypatch.setattr(doubles["cublaslt"], "require", missing("cublaslt"))
    with pytest.raises(UnsupportedHere, match="nothing to choose from: cublaslt is not here; cutlass is not here"):
        auto.at_hand(None, True, DType.INT8, MACHINE)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_our_own_sparse_gemm_is_one_of_the_candidates(doubles: dict[str, Any], dtype: DType) -> None:
    """It has no form without scales; where it is wrong the library's takes its place."""
    variants = FUSED, SPARSE, CUBLASLT

    def us(name: str, m: int) -> float:
        return {"fused": 1.0, "cusparselt": 2.0, "cublaslt": 3.0}[name]

    ready = prepared(variants, us, sizes=(16,), dtype=dtype)
    x = operands.activation(16, K, 1)
    codes = codes_of(dtype, FUSED.sparsity)
    assert verify.check_linear(x, run(x, ready), codes, ready.scale, None, dtype, 1e-3).ok
    assert ran(ready) == {16: "fused 2:8"}
    doubles["fused"].off = {name.name: 0.5 for name in doubles["fused"].scaled_algorithms(dtype, 16, N, K, False)}
    linear_op._KINDS.clear()
    ready = prepared(variants, us, sizes=(16,), dtype=dtype)
    run(x, ready)
    assert ran(ready) == {16: "cusparselt 2:8"}


def test_sizes_without_settings() -> None:
    assert auto.default_sizes((1, 2, 4, 8, 512), 4096) == (1, 2, 4, 8, 512, 1024, 2048, 4096)
    assert auto.default_sizes((), 100) == (16, 32, 64, 100)
    assert auto.default_sizes((1, 64), 64) == (1, 64)
    assert auto.default_sizes((512, 16384), 20000) == (512, 16384, 20000)
