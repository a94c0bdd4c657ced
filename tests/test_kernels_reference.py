"""The oracle itself, against formulas written out in NumPy and against torch's own FP8 cast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slidesparse.checkpoint.lift import lift_activation
from slidesparse.dtypes import QUANTISED, DType
from slidesparse.kernels import reference
from slidesparse.pattern import Sparsity


def numpy_quantise_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes, scales = [], []
    for row in x.astype(np.float32):
        scale = np.maximum(np.float32(np.abs(row).max()) / np.float32(127), np.float32(2.0**-126))
        codes.append(np.rint(row / scale))  # NumPy rounds halves to even
        scales.append(scale)
    return np.array(codes, dtype=np.int8), np.array(scales, dtype=np.float32)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([1e-30, 1e-3, 1.0, 1e20]))
def test_int8_codes_and_scales_are_those_of_the_formula(m: int, k: int, seed: int, size: float) -> None:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * size
    codes, scale = reference.quantise(x, DType.INT8)
    expected, scales = numpy_quantise_int8(x.numpy())
    assert np.array_equal(codes.numpy(), expected)
    assert np.array_equal(scale[:, 0].numpy(), scales)
    assert codes.abs().max() <= 127


def test_halves_round_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    codes, scale = reference.quantise(x, DType.INT8)
    assert scale.item() == 1.0
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("largest", [2.0**-133, 2.0**-126, 1e-37, 1 / 600, 1.0, 3e38])
def test_codes_times_the_stored_scale_give_the_row_back(dtype: DType, largest: float) -> None:
    """Published kernels floored the scale but divided by the unfloored one: small rows came out wrong."""
    x = torch.tensor([[1.0, -0.5, 0.25, 0.0]]) * largest
    codes, scale = reference.quantise(x, dtype)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    error = (codes.double() * scale.double() - x.double()).abs().max().item()
    step = scale.item() if dtype is DType.INT8 else max(scale.item() * 2.0**-9, largest * 2.0**-4)
    assert error <= step


@pytest.mark.parametrize("dtype", QUANTISED)
def test_rows_of_zeros_and_rows_that_are_not_finite(dtype: DType) -> None:
    x = torch.ones(4, 6)
    x[1] = 0
    x[2, 3] = float("nan")
    x[3, 0] = float("-inf")
    codes, scale = reference.quantise(x, dtype)
    assert codes[1:].float().abs().sum() == 0
    assert scale[1].isfinite()
    assert scale[2:].isnan().all()
    y = reference.linear(x, codes[:1].repeat(3, 1), torch.ones(3, 1), None, dtype)
    assert y[:2].isfinite().all()
    assert (y[1] == 0).all()
    assert y[2:].isnan().all(), "a broken row must not look like a result"


@pytest.mark.parametrize("length", [4, 6, 10, 16, None])
@pytest.mark.parametrize("k", [1, 7, 16, 33])
def test_lift_is_the_column_map(length: int | None, k: int) -> None:
    codes = torch.arange(1, 3 * k + 1).reshape(3, k).to(torch.int8)
    sparsity = Sparsity(length)
    assert np.array_equal(reference.lift(codes, sparsity).numpy(), lift_activation(codes.numpy(), sparsity))


def test_fp8_product_in_float64_is_exact() -> None:
    """Against rational arithmetic: integers, after scaling both operands by 2**9."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (2, 9, 50), dtype=torch.uint8, generator=generator)
    bits[bits & 0x7F == 0x7F] = 0  # NaN
    a, w = bits.view(torch.float8_e4m3fn)
    integers = [(side.double() * 2**9).to(torch.int64).tolist() for side in (a, w)]
    exact = [[sum(p * q for p, q in zip(row, column, strict=True)) for column in integers[1]] for row in integers[0]]
    got = reference.gemm(a, w) * 2.0**18
    assert [[int(value) for value in row] for row in got.tolist()] == exact


def test_epilogue_rounds_once() -> None:
    """Rounding the sum before adding the bias would give another bfloat16."""
    acc = torch.tensor([[257]], dtype=torch.int32)
    y = reference.dequantise_bias(acc, torch.ones(1, 1), torch.ones(1, 1), torch.tensor([0.5]))
    assert y.dtype is torch.bfloat16
    assert y.item() == 258  # 257.5 -> 258; bf16(257) + 0.5 = 256.5 -> 256


def test_linear_against_float64() -> None:
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal((5, 40))).to(torch.bfloat16)
    codes = torch.from_numpy(rng.integers(-127, 128, (6, 40)).astype(np.int8))
    scale, bias = torch.from_numpy(rng.random((6, 1)).astype(np.float32)), torch.arange(6.0)
    expected_codes, scales = numpy_quantise_int8(x.float().numpy())
    product = expected_codes.astype(np.int64) @ codes.numpy().astype(np.int64).T
    exact = product * scales[:, None].astype(np.float64) * scale.numpy().T + bias.numpy()
    y = reference.linear(x, codes, scale, bias, DType.INT8).double().numpy()
    assert np.allclose(y, exact, rtol=2.0**-8, atol=0)
