"""Every algorithm of quantise, quantise + lift and dequantise + bias gives the reference's bits."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slidesparse.dtypes import QUANTISED, DType
from slidesparse.kernels import reference
from slidesparse.kernels.backend import Algorithm
from slidesparse.kernels.cpu_activations import FUSED, TORCH, CpuActivations
from slidesparse.kernels.e4m3 import decode, encode_bits
from slidesparse.pattern import Sparsity

KERNELS = CpuActivations()
ALGORITHMS = pytest.mark.parametrize("algorithm", [FUSED, TORCH], ids=str)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype.itemsize == 1:
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def awkward(m: int, k: int, kind: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of very different size, zeros, a subnormal row, NaN, infinity."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-30, 30, m).unsqueeze(1)
    specials = [0.0, 1e-40, float("nan"), float("inf")]
    for row, value in zip(range(1, m, 2), specials, strict=False):
        x[row] = 0 if value == 0 else x[row]
        x[row, row % k] = value
        if value == 1e-40:
            x[row] = value
    return x.to(kind)


@ALGORITHMS
@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@given(
    m=st.integers(1, 9), k=st.integers(1, 40), seed=st.integers(0, 2**31), l=st.sampled_from([0, 4, 6, 10, 16, None])
)
@settings(max_examples=15)
def test_quantise_and_lift(
    algorithm: Algorithm,
    dtype: DType,
    kind: torch.dtype,
    m: int,
    k: int,
    seed: int,
    l: int | None,  # noqa: E741
) -> None:
    x = awkward(m, k, kind, seed)
    before = x.clone()
    sparsity = None if l == 0 else Sparsity(l)
    codes, scale = KERNELS.quantise(x, dtype, sparsity, algorithm)
    expected, scales = reference.quantise(x, dtype)
    assert same_bits(codes, expected if sparsity is None else reference.lift(expected, sparsity))
    assert same_bits(scale, scales)
    assert same_bits(x, before), "the input must not change"


@ALGORITHMS
@pytest.mark.parametrize("acc_dtype", [torch.int32, torch.float32])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_dequantise(algorithm: Algorithm, acc_dtype: torch.dtype, out_dtype: torch.dtype, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    acc = torch.randint(-(2**31), 2**31 - 1, (7, 33), generator=generator, dtype=torch.int64).to(acc_dtype)
    token, channel = torch.rand(7, 1, generator=generator), torch.rand(33, 1, generator=generator)
    token[2] = float("nan")
    bias = torch.randn(33, generator=generator) if with_bias else None
    before = acc.clone()
    y = KERNELS.dequantise_bias(acc, token, channel, bias, out_dtype, algorithm)
    assert y.dtype is out_dtype
    assert same_bits(y, reference.dequantise_bias(acc, token, channel, bias, out_dtype))
    assert torch.equal(acc, before)


def test_encoder_equals_the_torch_cast_at_every_boundary() -> None:
    """All e4m3 numbers, all midpoints between neighbours, and the float32 neighbours of both."""
    numbers = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
    steps = [points, torch.nextafter(points, torch.tensor(0.0)), torch.nextafter(points, torch.tensor(448.0))]
    values = torch.cat([*steps, torch.tensor([1e-45, 1e-38, 2.0**-11, 2.0**-10, 2.0**-12])])
    values = torch.cat([values, -values]).clamp(-448, 448)

    @numba.njit
    def encode(bits, out):  # type: ignore[no-untyped-def]
        for i in range(bits.size):
            out[i] = encode_bits(bits[i])

    out = np.empty(values.numel(), dtype=np.uint8)
    encode(values.numpy().view(np.uint32), out)
    assert np.array_equal(out, values.to(torch.float8_e4m3fn).view(torch.uint8).numpy())


def test_decoder_equals_the_torch_cast() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert same_bits(
        decode(codes.view(torch.float8_e4m3fn), DType.FP8, torch.float32), codes.view(torch.float8_e4m3fn).float()
    )
    assert torch.equal(decode(codes.view(torch.int8), DType.INT8, torch.float64), codes.view(torch.int8).double())
