"""Backend `cutlass`, with vLLM's operator stood in for: operands, layouts, whole layers, what it refuses."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from gemm_doubles import CutlassDouble, scaled_product
from small_runs import MACHINE

from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import UnsupportedHere
from slidesparse.kernels import cutlass, operands, reference, verify
from slidesparse.kernels.backend import Backend, backend
from slidesparse.kernels.linear import W8A8Linear
from slidesparse.machine import Gpu
from slidesparse.plan import Variant

N, K = 48, 64


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Backend:
    found = CutlassDouble()
    monkeypatch.setattr(cutlass, "_scaled_product", lambda: scaled_product)
    monkeypatch.setattr("slidesparse.kernels.linear.backend", {"cutlass": found}.__getitem__)
    return found


def layer(dtype: DType, bias: bool, n: int = N, k: int = K) -> tuple[W8A8Linear, torch.Tensor]:
    codes = operands.random_weight(n, k, dtype, None, 1)
    generator = torch.Generator().manual_seed(2)
    scale = torch.rand(n, 1, generator=generator) / 50 + 0.01
    added = torch.randn(n, generator=generator).bfloat16() if bias else None
    return W8A8Linear("layer", codes, scale, added, k=k, variant=Variant("cutlass"), dtype=dtype), codes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", QUANTISED)
def test_layers_are_right_and_have_one_way_to_run(side: Backend, dtype: DType, bias: bool) -> None:
    linear, codes = layer(dtype, bias)
    error, _ = side.accumulation_error(dtype, K)
    for m in (1, 33, 400):
        x = operands.activation(m, K, m)
        (choice,) = linear.choices(m)
        with verify.poisoned_memory():
            y = linear.run(x, choice)
        check = verify.check_linear(x, y, codes, linear.scale, linear.bias, dtype, error, exact=side.exact_epilogue)
        assert check.ok, check.text
        assert str(choice) == f"{choice.quantise.name} > cutlass_scaled_mm (scales and bias fused)"


def test_it_is_named_in_the_registry_and_says_which_vllm_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", {"vllm": "0.24.0"}.__getitem__)
    found = backend("cutlass")
    (algorithm,) = found.scaled_algorithms(DType.INT8, 64, N, K, False)
    assert found.path(DType.INT8, algorithm) == "cutlass cutlass_scaled_mm (vLLM 0.24.0), INT8 -> bfloat16"


@pytest.mark.parametrize(("n", "k"), [(40, 64), (48, 72)])
def test_sizes_that_vllm_would_give_to_another_kernel_are_refused(side: Backend, n: int, k: int) -> None:
    linear, _ = layer(DType.INT8, False, n, k)
    with pytest.raises(UnsupportedHere, match=f"cutlass has no algorithm for cutlass INT8 {n}x{k}"):
        linear.choices(16)


def test_there_is_no_gemm_alone(side: Backend) -> None:
    for call in (
        lambda: side.algorithms(DType.INT8, 16, N, K),
        lambda: side.gemm(torch.empty(0), None, None, torch.empty(0)),  # type: ignore[arg-type]
    ):
        with pytest.raises(UnsupportedHere, match="no GEMM without scales"):
            call()


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [((9, 0), DType.INT8, ""), ((10, 0), DType.INT8, "no INT8 kernel"), ((8, 0), DType.FP8, "needs compute"),
     ((12, 1), DType.FP8, "")],
)  # fmt: skip
def test_what_a_gpu_must_have(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: DType, reason: str
) -> None:
    monkeypatch.setattr(cutlass, "_scaled_product", lambda: scaled_product)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    machine = replace(MACHINE, gpu=Gpu("test", capability, 0, ""))
    if reason:
        with pytest.raises(UnsupportedHere, match=reason):
            backend("cutlass").require(machine, dtype)
    else:
        backend("cutlass").require(machine, dtype)


def test_without_vllm_it_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", None)
    cutlass._scaled_product.cache_clear()
    with pytest.raises(UnsupportedHere, match="needs vLLM with its compiled extension") as error:
        cutlass._scaled_product()
    assert "\n" not in str(error.value)
    cutlass._scaled_product.cache_clear()


def test_scales_in_another_order_pass_only_as_rounding_in_the_last_place() -> None:
    """The check of its INT8 layers: what the reference's order gives elsewhere is right, one step more is not."""
    m, n, k = 256, 128, 256
    codes = operands.random_weight(n, k, DType.INT8, None, 1)
    scale = torch.rand(n, 1, generator=torch.Generator().manual_seed(1)) / 50 + 0.01
    bias = torch.randn(n, generator=torch.Generator().manual_seed(2)).bfloat16()
    x = operands.activation(m, k, 3)
    a, token = reference.quantise(x, DType.INT8)
    y = torch.empty(m, n, dtype=torch.bfloat16)
    scaled_product(y, a, codes.T, token, scale, bias)
    expected = reference.linear(x, codes, scale, bias, DType.INT8)
    differ = int((y != expected).sum())
    assert 0 < differ < y.numel() / 500, "else this test shows nothing"
    strict = verify.check_linear(x, y, codes, scale, bias, DType.INT8, 0.0)
    assert strict.verified == "failed"
    loose = verify.check_linear(x, y, codes, scale, bias, DType.INT8, 0.0, exact=False)
    assert loose.verified == "within_bound", loose.text
    assert verify.check_linear(x, expected, codes, scale, bias, DType.INT8, 0.0, exact=False).verified == "exact"
    wrong = y.clone()
    wrong.view(torch.int16)[7, 9] += 1
    check = verify.check_linear(x, wrong, codes, scale, bias, DType.INT8, 0.0, exact=False)
    assert check.verified == "failed"
    assert "[7, 9]" in check.text
